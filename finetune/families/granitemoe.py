"""Granite 3 MoE: every layer has routed experts, below `block_sparse_moe`, and nothing else.

Attention has q, k, v and o maps; the router is a linear map in fp32 with a softmax over the chosen experts. Stacks are
(E, out, in), gate first. On disk: fused stacks named input_linear and output_linear, and `router.layer`.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        *shapes.routed(config, "block_sparse_moe.experts", experts, config["intermediate_size"], layers),
        shapes.router(config, "block_sparse_moe.router", experts, layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="granitemoe",
    model_types=("granitemoe",),
    block_class="GraniteMoeDecoderLayer",
    attention=shapes.QKVO,
    experts="block_sparse_moe.experts",
    experts_class="GraniteMoeExperts",
    router="block_sparse_moe.router",
    licence="apache-2.0",
    no_gguf_adapter="llama.cpp's converter does not know the names of its experts' maps",
    tiny=shapes.TINY
    | {
        "model_type": "granitemoe",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    matrices=matrices,
)
