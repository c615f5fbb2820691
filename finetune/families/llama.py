"""Llama 2 and 3 and what shares their layout, e.g. SmolLM2: dense."""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers = config["num_hidden_layers"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers),
        *shapes.mlp("mlp", "dense", config["hidden_size"], config["intermediate_size"], layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="llama",
    model_types=("llama",),
    block_class="LlamaDecoderLayer",
    attention=shapes.QKVO,
    dense=shapes.below("mlp"),
    tiny=shapes.TINY | {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 128},
    matrices=matrices,
)
