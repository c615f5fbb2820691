"""Qwen3 MoE: routed experts in every layer, or in some, the others dense.

Attention has q, k, v and o maps with norms per head; the router is a softmax in fp32. Stacks are (E, out, in), gate
first. On disk: one gate_proj, up_proj, down_proj per expert.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    experts = shapes.stated(config, "num_experts", "num_local_experts", absent=0)
    step, dense_layers = config["decoder_sparse_step"], config["mlp_only_layers"]
    sparse = sum(layer not in dense_layers and experts > 0 and (layer + 1) % step == 0 for layer in range(layers))
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        *shapes.head_norms(config, layers),
        *shapes.mlp("mlp", "dense", hidden, config["intermediate_size"], layers - sparse),
        *shapes.routed(config, "mlp.experts", experts, config["moe_intermediate_size"], sparse),
        shapes.router(config, "mlp.gate", experts, sparse),
        *shapes.layer_norms(config),
    ]


def served_config(config: shapes.Config) -> shapes.Config:
    """Two names that other loaders know and transformers 5 does not write."""
    experts = shapes.stated(config, "num_experts", "num_local_experts", absent=0)
    return {
        "num_experts": experts,
        "max_window_layers": shapes.stated(config, "max_window_layers", absent=config["num_hidden_layers"]),
    }


def no_gguf(config: shapes.Config) -> str:
    """llama.cpp knows the family with experts in all layers, as it is published."""
    return (
        "llama.cpp knows it with experts in every layer only"
        if shapes.stated(config, "mlp_only_layers", absent=[])
        else ""
    )


FAMILY = Family(
    key="qwen3_moe",
    chat_templates=(
        "qwen3.jinja",
        "qwen3_instruct_2507.jinja",
    ),
    model_types=("qwen3_moe",),
    block_class="Qwen3MoeDecoderLayer",
    attention=shapes.QKVO,
    experts="mlp.experts",
    experts_class="Qwen3MoeExperts",
    router="mlp.gate",
    balances=True,
    dense=shapes.below("mlp"),
    licence="apache-2.0",
    unsloth=True,
    served_config=served_config,
    no_gguf=no_gguf,
    tiny=shapes.TINY
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    matrices=matrices,
)
