"""OLMoE: every layer has routed experts; queries and keys are normalised over all heads at once.

Attention has q, k, v and o maps; the router is a softmax in fp32. Stacks are (E, out, in), gate first. On disk: one
gate_proj, up_proj, down_proj per expert.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    heads = config["num_attention_heads"]
    width = config["hidden_size"] // heads
    keys = shapes.stated(config, "num_key_value_heads", absent=heads)
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        shapes.vector("self_attn.q_norm", heads * width, layers),
        shapes.vector("self_attn.k_norm", keys * width, layers),
        *shapes.routed(config, "mlp.experts", experts, config["intermediate_size"], layers),
        shapes.router(config, "mlp.gate", experts, layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="olmoe",
    model_types=("olmoe",),
    block_class="OlmoeDecoderLayer",
    attention=shapes.QKVO,
    experts="mlp.experts",
    experts_class="OlmoeExperts",
    router="mlp.gate",
    balances=True,
    licence="apache-2.0",
    gguf_tiny="llama.cpp knows it with as many heads of keys as of queries",
    tiny=shapes.TINY
    | {
        "model_type": "olmoe",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    matrices=matrices,
)
