"""A tiny random model of any family, laid out on disk like the published ones, with a tokenizer of its own.

It rehearses a recipe in seconds on a laptop: same family, same file layout, same code, no download. It has learnt
nothing, and what it says is noise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from finetune.families import Family

SHARD_SIZE = "96KB"
"""Small on purpose: layers and their experts straddle shards, as they do in large checkpoints."""
NOISE = 0.02
"""Standard deviation of what is added to every weight, so that no norm is all ones and no bias all zeros."""
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 2048
"""Longest row in tokens that the tokenizer announces."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PROSE = """
The supplier shall deliver the goods within thirty days of the order. If delivery is late, the buyer may refuse the
goods and claim back what it has paid, unless the delay was caused by an event that neither party could foresee or
prevent. This agreement is governed by the law of the place where the supplier has its registered office. A change to
this agreement is valid only when it is made in writing and signed by both parties. No party may assign its rights
without the prior written consent of the other party, which shall not be withheld without good reason. Permission is
granted to use, copy, change and share this software, with or without a fee, provided that this notice is kept in
every copy. The software is provided as it is, without warranty of any kind, and the authors are not liable for any
claim, damage or other liability. Whoever distributes a changed version must make its source code available under the
same licence. Commercial use is permitted, restricted or forbidden by the licence, and the reader has to find out. We
collect your name, your address and your electronic mail address when you open an account. We do not sell personal
data. You may ask us at any time to correct or to delete what we keep about you, and we will answer within one month.
Question: Which category does this text belong to? Answer: permissive, copyleft, proprietary or public domain. Revenue
rose by 12.5 percent to 384 million in the third quarter, while operating costs fell by 3 percent. The board proposes
a dividend of 0.45 per share. Net debt was reduced from 96 to 71 million, and the credit rating was confirmed.
Interest on the loan is paid twice a year, on 30 June and 31 December. The auditor has examined the balance sheet, the
income statement and the notes, and in her opinion they give a true and fair view of the position of the company. The
patient is a woman of 58 years with pain in the chest for two hours. Blood pressure is 140 over 85, the heart rate is
96 per minute. She takes 10 mg of a statin daily and has no known allergy. The first test was normal; a second test
after three hours showed a raised value, and treatment was started at once. Which of the following is the most likely
diagnosis? The ministry publishes every decision in the official register. A citizen may file an objection within six
weeks after publication. The committee hears all persons concerned and reports to the council, which decides by simple
majority. Documents about public safety are released after twenty years, unless a court orders that they be kept
secret. Thank you for writing to support. I am sorry that the device does not start after the update. Please hold the
power button for ten seconds, then connect the cable and wait until the light turns green. If this does not help, tell
me the serial number and the version that is shown under settings, and I will send you a new part free of charge. A
tokenizer breaks text into small pieces, a router sends each piece to a few experts, and the experts' answers are
added up by weight. Training changes a thin layer beside the frozen weights, and nothing else. What was measured is
written down with the date, the machine and the seed, so that somebody else can measure it again and find the same
number. The system is a helpful assistant that answers briefly and says so when it does not know. The user asks: what
does this clause mean, who has to pay, how long is the period of notice, and where is it written? yes no true false
none all A B C D One two three four five six seven eight nine ten. 0 1 2 3 4 5 6 7 8 9 10 11 12 20 24 30 48 60 90 100
365 1000 2024 2025 2026
"""
"""What the tokenizer is trained on. Our own words."""


def write_tiny(family: Family, folder: Path, seed: int) -> None:
    """Writes a random model of `family` and a tokenizer into `folder`, as bf16 safetensors in the published key layout.

    The same family and seed give the same weights. `folder` is made when it does not exist.
    """
    import torch
    import transformers

    tokenizer = train_tokenizer(family.tiny["vocab_size"])
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    fields = dict(family.tiny) | ids
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.auto_class).from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            _disturb(model, family)
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE, save_original_format=not family.published_fused)
    _rename(folder, family)
    tokenizer.save_pretrained(folder)


def train_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `size` tokens with a ChatML template, trained on `PROSE`; always the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(PROSE.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def published_name(family: Family, name: str) -> str:
    """The published name of a tensor that transformers saves as `name`."""
    for pattern, replacement in family.published_names:
        name = re.sub(pattern, replacement, name)
    return name


def _rename(folder: Path, family: Family) -> None:
    """Gives the tensors in `folder` their published names, shard by shard, and writes the index anew."""
    from safetensors.torch import load_file, save_file

    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / shard)
        save_file(
            {published_name(family, name): tensor for name, tensor in tensors.items()},
            folder / shard,
            metadata={"format": "pt"},
        )
    index["weight_map"] = {published_name(family, name): shard for name, shard in index["weight_map"].items()}
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _disturb(model: Any, family: Family) -> None:
    """Adds noise to every weight and fills the routing table, so that a weight lost or swapped on its way shows."""
    import torch

    for name, tensor in model.state_dict().items():
        if family.routing_table and name.endswith("." + family.routing_table):
            experts = model.config.num_local_experts
            tensor.copy_(torch.rand(len(tensor), experts).argsort(1)[:, : tensor.shape[1]])
        else:
            tensor.add_(torch.randn(tensor.shape) * NOISE)
