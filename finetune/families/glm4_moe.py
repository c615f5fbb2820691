"""GLM-4.5: the first layers are dense, all others have a shared and routed experts.

Attention has q, k and v maps with biases and an o map without. The router scores with a sigmoid and a correction bias,
as DeepSeek V3 does. Stacks are (E, out, in), gate first. On disk: one gate_proj, up_proj, down_proj per expert, and a
layer more for multi-token prediction, which transformers leaves out.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers = config["num_hidden_layers"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases="qkv" if config["attention_bias"] else ""),
        *(shapes.head_norms(config, layers) if config["use_qk_norm"] else []),
        *shapes.first_dense_layers(config),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="glm4_moe",
    chat_templates=("glm4moe.jinja",),
    model_types=("glm4_moe",),
    block_class="Glm4MoeDecoderLayer",
    attention=shapes.QKVO,
    experts="mlp.experts",
    experts_class="Glm4MoeExperts",
    router="mlp.gate",
    shared=shapes.below("mlp.shared_experts"),
    dense=shapes.below("mlp"),
    licence="mit",
    gguf_tiny="its converter asks for a tokenizer with [gMASK] and its roles",
    tiny=shapes.TINY
    | {
        "model_type": "glm4_moe",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    matrices=matrices,
)
