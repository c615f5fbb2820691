"""Llama 4 (text part): a shared and one routed expert per token; Maverick has a dense MLP in every second layer.

Attention has q, k, v and o maps. The router is a linear map whose sigmoid scales an expert's input, not its output, and
the block hands every expert every token. Stacks are (E, in, out), gate first. On disk: fused stacks below
`language_model.`, beside a vision part that is not loaded and comes through a merge unchanged.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of the text part of a model with this config."""
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], config["num_local_experts"]
    step = config["interleave_moe_layer_step"]
    sparse = len(shapes.stated(config, "moe_layers", absent=range(step - 1, layers, step)))
    intermediate = config["intermediate_size"]
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases=shapes.attention_biases(config)),
        *shapes.mlp("feed_forward", "dense", hidden, config["intermediate_size_mlp"], layers - sparse),
        *shapes.mlp("feed_forward.shared_expert", "shared", hidden, intermediate, sparse),
        *shapes.routed(config, "feed_forward.experts", experts, intermediate, sparse),
        shapes.router(config, "feed_forward.router", experts, sparse),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="llama4",
    model_types=("llama4_text", "llama4"),
    block_class="Llama4TextDecoderLayer",
    attention=shapes.QKVO,
    experts="feed_forward.experts",
    experts_class="Llama4TextExperts",
    transposed=True,
    repeats_tokens=True,
    router="feed_forward.router",
    shared=shapes.below("feed_forward.shared_expert"),
    dense=shapes.below("feed_forward"),
    published_names=((r"^", "language_model."),),
    text_config="text_config",
    undivided="some of its layers look back within chunks of positions only",
    licence="llama4",
    no_gguf_adapter="llama.cpp's converter does not know the names of its experts' maps",
    tiny=shapes.TINY
    | {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "attention_bias": False,
        "attention_chunk_size": 128,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
    matrices=matrices,
)
