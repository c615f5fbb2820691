"""Llama 2 and 3 and what shares their layout, e.g. Yi and SmolLM2: dense, with q, k, v and o maps and a gated MLP.

On disk: the names of the model. Folders converted from other layouts (see internlm.py) may have biases.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers = config["num_hidden_layers"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        *shapes.mlp("mlp", "dense", config["hidden_size"], config["intermediate_size"], layers),
        *(mlp_biases(config, layers) if shapes.stated(config, "mlp_bias", absent=False) else []),
        *shapes.layer_norms(config),
    ]


def mlp_biases(config: shapes.Config, layers: int) -> list[Matrix]:
    """The biases of the MLP's three maps."""
    sizes = (config["intermediate_size"], config["intermediate_size"], config["hidden_size"])
    names = shapes.below("mlp")
    return [shapes.vector(f"{name}.bias", size, layers) for name, size in zip(names, sizes, strict=True)]


FAMILY = Family(
    key="llama",
    chat_templates=(
        "llama3.jinja",
        "llama3_1.jinja",
        "llama3_2.jinja",
    ),
    model_types=("llama",),
    block_class="LlamaDecoderLayer",
    attention=shapes.QKVO,
    dense=shapes.below("mlp"),
    unsloth=True,
    tiny=shapes.TINY | {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 128},
    matrices=matrices,
)
