"""DeepSeek V3 and R1: latent attention, first layers dense, all others with a shared and 256 routed experts.

The router scores with a sigmoid in fp32, adds a correction bias for the choice only, and chooses within groups. Stacks
are (E, out, in), gate first. On disk: one gate_proj, up_proj, down_proj per expert, in fp8 with a scale per block, and
a layer more for multi-token prediction, which transformers leaves out.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    return [
        *shapes.embeddings(config),
        *shapes.latent_attention(config),
        *shapes.first_dense_layers(config),
        *shapes.layer_norms(config),
    ]


def served_config(config: shapes.Config) -> shapes.Config:
    """How the router scores and chooses, which published files say and transformers 5 does not.

    Without it llama.cpp's converter writes another score, and vLLM leaves the correction bias out.
    """
    return {
        "scoring_func": shapes.stated(config, "scoring_func", absent="sigmoid"),
        "topk_method": shapes.stated(config, "topk_method", absent="noaux_tc"),
    }


LATENT_ADAPTER = (
    "llama.cpp keeps the maps of latent attention in another form, takes an adapter of them and applies it wrongly"
)
"""Why llama.cpp must not be given an adapter of such a family."""

FAMILY = Family(
    key="deepseek_v3",
    chat_templates=(
        "deepseekv3.jinja",
        "deepseek_r1_distill.jinja",
    ),
    model_types=("deepseek_v3",),
    block_class="DeepseekV3DecoderLayer",
    attention=shapes.LATENT,
    experts="mlp.experts",
    experts_class="DeepseekV3Experts",
    router="mlp.gate",
    shared=shapes.below("mlp.shared_experts"),
    dense=shapes.below("mlp"),
    licence="mit",
    served_config=served_config,
    converter_config=served_config,
    no_gguf_adapter=LATENT_ADAPTER,
    tiny=shapes.TINY
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "scoring_func": "sigmoid",  # transformers has no other, but converters to other formats read it
    },
    matrices=matrices,
)
