"""Qwen3 dense models: q, k, v and o maps with norms per head, and a gated MLP. On disk: the names of the model."""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers = config["num_hidden_layers"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        *shapes.head_norms(config, layers),
        *shapes.mlp("mlp", "dense", config["hidden_size"], config["intermediate_size"], layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="qwen3",
    chat_templates=(
        "qwen3.jinja",
        "qwen3_instruct_2507.jinja",
    ),
    model_types=("qwen3",),
    block_class="Qwen3DecoderLayer",
    attention=shapes.QKVO,
    dense=shapes.below("mlp"),
    licence="apache-2.0",
    unsloth=True,
    tiny=shapes.TINY
    | {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    },
    matrices=matrices,
)
