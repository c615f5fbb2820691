"""Mixtral: every layer has routed experts and nothing else.

Attention has q, k, v and o maps; the router is a softmax in fp32, renormalised over the chosen experts. Stacks are (E,
out, in), gate first. On disk: one w1, w2, w3 per expert below `block_sparse_moe`.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers),
        *shapes.routed(config, "mlp.experts", experts, config["intermediate_size"], layers),
        shapes.router(config, "mlp.gate", experts, layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="mixtral",
    model_types=("mixtral",),
    block_class="MixtralDecoderLayer",
    attention=shapes.QKVO,
    experts="mlp.experts",
    experts_class="MixtralExperts",
    router="mlp.gate",
    balances=True,
    licence="apache-2.0",
    unsloth=True,
    expert_names=("w1", "w3", "w2"),
    served_experts="block_sparse_moe.experts",
    tiny=shapes.TINY
    | {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    matrices=matrices,
)
