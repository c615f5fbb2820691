"""Qwen3.5 MoE: three layers of linear attention (gated delta rule) to one of full attention; experts in all of them.

Full attention has q (with an output gate), k, v and o maps. Of linear attention the large maps are adapted; the two
that give one decay and one gate per head are not. The router is a softmax in fp32; a shared expert stands behind a gate
of its own, which stays frozen. Stacks are (E, out, in), gate first. On disk: fused stacks below
`model.language_model.`, beside a vision part (`model.visual.`) and `mtp.`, which are not loaded and come through a
merge unchanged.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of the text part of a model with this config."""
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], config["num_experts"]
    full = layer_types(config).count("full_attention")
    return [
        *shapes.embeddings(config),
        *shapes.grouped_attention(config, full, biases=shapes.attention_biases(config), query_factor=2),
        *shapes.head_norms(config, full),
        *linear_attention(config, layers - full),
        *shapes.mlp("mlp.shared_expert", "shared", hidden, config["shared_expert_intermediate_size"], layers),
        shapes.matrix("mlp.shared_expert_gate", "other", 1, hidden, layers),
        *shapes.routed(config, "mlp.experts", experts, config["moe_intermediate_size"], layers),
        shapes.router(config, "mlp.gate", experts, layers),
        *shapes.layer_norms(config),
    ]


def layer_types(config: shapes.Config) -> list[str]:
    """Kind of attention of each layer; a config without the list has full attention in every fourth layer."""
    interval = shapes.stated(config, "full_attention_interval", absent=4)
    return list(
        shapes.stated(
            config,
            "layer_types",
            absent=[
                "linear_attention" if (layer + 1) % interval else "full_attention"
                for layer in range(config["num_hidden_layers"])
            ],
        )
    )


def linear_attention(config: shapes.Config, layers: int) -> list[Matrix]:
    """Gated DeltaNet: one map to queries, keys and values, a short convolution over them, decay and output gates."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    mixed = 2 * keys + values
    return [
        shapes.matrix("linear_attn.in_proj_qkv", "attention", mixed, hidden, layers),
        shapes.matrix("linear_attn.in_proj_z", "attention", values, hidden, layers),
        shapes.matrix("linear_attn.in_proj_a", "attention", heads, hidden, layers),
        shapes.matrix("linear_attn.in_proj_b", "attention", heads, hidden, layers),
        shapes.matrix("linear_attn.out_proj", "attention", hidden, values, layers),
        shapes.matrix("linear_attn.conv1d", "other", mixed, config["linear_conv_kernel_dim"], layers),
        shapes.vector("linear_attn.dt_bias", heads, layers),
        shapes.vector("linear_attn.A_log", heads, layers),
        shapes.vector("linear_attn.norm", config["linear_value_head_dim"], layers),
    ]


FAMILY = Family(
    key="qwen3_5_moe",
    chat_templates=(
        "qwen3_5_think.jinja",
        "qwen3_5_nothink.jinja",
    ),
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    block_class="Qwen3_5MoeDecoderLayer",
    attention=(*shapes.QKVO, *shapes.below("linear_attn", ("in_proj_qkv", "in_proj_z", "out_proj"))),
    experts="mlp.experts",
    experts_class="Qwen3_5MoeExperts",
    router="mlp.gate",
    balances=True,
    shared=shapes.below("mlp.shared_expert"),
    published_names=((r"^model\.", "model.language_model."),),
    published_fused=True,
    text_config="text_config",
    licence="apache-2.0",
    gguf_tiny="llama.cpp rotates more places of a head than a tiny one has",
    undivided="some of its layers carry a state along the row",
    packs=False,
    tiny=shapes.TINY
    | {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    matrices=matrices,
)
