"""DeepSeek V3.2: V3 with an indexer in every layer that chooses the `index_topk` tokens a token attends to.

The indexer only selects: transformers runs it without gradients, so an adapter on it would learn nothing. It stays
frozen, in its own precision, and is counted with the attention. A row of up to `index_topk` tokens (2,048 as published)
is attended to whole; in longer rows the tuned model sees what the base's indexer chooses. Router, experts and disk
layout are V3's; the indexer's tensors are `self_attn.indexer.*` on disk too.
"""

from dataclasses import replace

from finetune.families import deepseek_v3, shapes
from finetune.families.family import Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    return [*deepseek_v3.matrices(config), *indexer(config)]


def indexer(config: shapes.Config) -> list[Matrix]:
    """The maps that score earlier tokens: queries from the attention's low-rank ones, one key, a weight per head."""
    hidden, layers, rank = config["hidden_size"], config["num_hidden_layers"], config["q_lora_rank"]
    heads, width = config["index_n_heads"], config["index_head_dim"]
    return [
        shapes.matrix("self_attn.indexer.wq_b", "attention", heads * width, rank, layers),
        shapes.matrix("self_attn.indexer.wk", "attention", width, hidden, layers),
        shapes.matrix("self_attn.indexer.weights_proj", "attention", heads, hidden, layers),
        shapes.vector("self_attn.indexer.k_norm", width, layers),
        shapes.vector("self_attn.indexer.k_norm.bias", width, layers),
    ]


FAMILY = replace(
    deepseek_v3.FAMILY,
    key="deepseek_v32",
    model_types=("deepseek_v32",),
    block_class="DeepseekV32DecoderLayer",
    experts_class="DeepseekV32Experts",
    gguf_tiny="its converter asks for a tokenizer with add_bos_token",
    undivided="its layers choose by an index which tokens they look at",
    unreachable=("self_attn.indexer",),
    tiny={
        **deepseek_v3.FAMILY.tiny,
        "model_type": "deepseek_v32",
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 512,  # a rehearsed row is attended to whole: choosing tokens by noise would hide what was learnt
    },
    matrices=matrices,
)
