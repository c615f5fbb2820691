"""A tokenizer and a Mixture-of-Experts model that a test can build, and rows as the data stage makes them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (  # the answer follows a space, so that its first token is not the one it has on its own
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDS = "yes no maybe Permissive Copyleft Proprietary which licence is this user assistant yes: no: is this a licence"


def tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 320 tokens with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [WORDS] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = template
    return made


def model(seed: int = 0, vocabulary: int = 320) -> MixtralForCausalLM:
    """A random two-layer Mixtral with four experts, in fp32."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    return MixtralForCausalLM(config).eval()


def adapted(seed: int = 0, trained: bool = True) -> Any:
    """The model with LoRA on attention; `trained` gives it random weights that change the answers."""
    from peft import LoraConfig, get_peft_model

    base = model(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=not trained)
    return get_peft_model(base, config).eval()


def row(
    tok: Any,
    number: int,
    question: str,
    answer: str,
    choices: list[str],
    group: str = "",
    earlier: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """One prepared row; `earlier` is a first turn that is trained too."""
    turns = [
        *([{"role": "user", "content": earlier[0]}, {"role": "assistant", "content": earlier[1]}] if earlier[0] else [])
    ]
    messages = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids: list[int] = []
    labels: list[int] = []
    for end in range(2, len(messages) + 1, 2):
        head = tok.apply_chat_template(messages[: end - 1], tokenize=False, add_generation_prompt=True)
        whole = tok.apply_chat_template(messages[:end], tokenize=False)
        before = tok(head, add_special_tokens=False).input_ids
        after = tok(whole, add_special_tokens=False).input_ids
        assert after[: len(before)] == before
        last = len(after) - after[::-1].index(tok.eos_token_id)  # the newline after the turn is not trained
        labels = (
            labels + [-100] * (len(before) - len(labels)) + after[len(before) : last] + [-100] * (len(after) - last)
        )
        ids = after
    return {
        "row": f"row-{number}",
        "group": group,
        "input_ids": ids,
        "labels": labels,
        "prompt_length": next(i for i, label in enumerate(labels) if label != -100),
        "messages": messages,
        "answer": answer,
        "choices": choices,
    }
