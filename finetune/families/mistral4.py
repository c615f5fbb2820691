"""Mistral Small 4 and Mistral Large 3: latent attention, a softmax router, a shared and routed experts.

Some first layers may be dense; experts may be chosen within groups. Stacks are (E, out, in), gate first. On disk: fused
stacks, below `language_model.` in a multimodal folder (Mistral3ForConditionalGeneration, loaded with its vision part,
which stays frozen and in its own precision) and without that prefix in a text-only one (Mistral4ForCausalLM). Published
files are in fp8.
"""

from finetune.families import deepseek_v3, shapes
from finetune.families.family import Family, Matrix


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of the text part of a model with this config."""
    return [
        *shapes.embeddings(config),
        *shapes.latent_attention(config),
        *shapes.first_dense_layers(config),
        *shapes.layer_norms(config),
    ]


def converter_config(config: shapes.Config) -> shapes.Config:
    """The class under which llama.cpp's converter knows the text model, with or without a vision part."""
    return {"architectures": ["Mistral3ForConditionalGeneration"]}


FAMILY = Family(
    key="mistral4",
    model_types=("mistral4",),
    block_class="Mistral4DecoderLayer",
    auto_class="AutoModelForImageTextToText",
    attention=shapes.LATENT,
    experts="mlp.experts",
    experts_class="Mistral4Experts",
    router="mlp.gate",
    shared=shapes.below("mlp.shared_experts"),
    dense=shapes.below("mlp"),
    text_config="text_config",
    licence="apache-2.0",
    converter_config=converter_config,
    gguf_tiny="its converter asks for a tokenizer that llama.cpp knows",
    no_gguf_adapter=deepseek_v3.LATENT_ADAPTER,
    tiny=shapes.TINY
    | {
        "model_type": "mistral4",
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
        "n_group": 1,
        "topk_group": 1,
    },
    matrices=matrices,
)
