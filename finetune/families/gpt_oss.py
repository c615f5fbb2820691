"""gpt-oss: attention with biases and sinks; expert stacks (in, out) with biases, gate and up alternating.

The router is a linear map with a bias and a softmax over the chosen experts. On disk: fused stacks under the names of
the model in a bf16 copy; as published each is two tensors in MXFP4, `gate_up_proj_blocks` and `gate_up_proj_scales`.
"""

from dataclasses import replace

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    stacks = shapes.routed(config, "mlp.experts", experts, config["intermediate_size"], layers)
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, layers, biases="qkvo" if config["attention_bias"] else ""),
        shapes.vector("self_attn.sinks", config["num_attention_heads"], layers),
        *stacks,
        *(replace(stack, name=f"{stack.name}_bias", group="other", columns=1) for stack in stacks),
        shapes.router(config, "mlp.router", experts, layers),
        shapes.vector("mlp.router.bias", experts, layers),
        *shapes.layer_norms(config),
    ]


FAMILY = Family(
    key="gpt_oss",
    chat_templates=("gptoss.jinja",),
    model_types=("gpt_oss",),
    block_class="GptOssDecoderLayer",
    attention=shapes.QKVO,
    experts="mlp.experts",
    experts_class="GptOssExperts",
    transposed=True,
    interleaved=True,
    router="mlp.router",
    balances=True,
    licence="apache-2.0",
    no_gguf_adapter="llama.cpp's converter does not know the names of its experts' maps",
    undivided="some of its layers look back through a window, with a sink per head",
    packs=False,
    tiny=shapes.TINY
    | {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "attention_bias": True,
        "sliding_window": 128,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    matrices=matrices,
)
