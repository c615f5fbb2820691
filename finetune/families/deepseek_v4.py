"""DeepSeek V4: compressed attention of three kinds, hyper-connections between layers, a shared and routed experts.

The first layers route by a table from token to experts, so a forward pass needs `input_ids`; the others by a
square-root softplus score with a correction bias. `self_attn.o_a_proj` is a block-diagonal linear map: a plain LoRA
beside it would be wrong, and it is not in `attention`. Compressors and indexers stay frozen: of their maps, those that
only select get no gradient. Stacks are (E, out, in), gate first, and clamped. On disk: names of its own
(`layers.N.attn`, `ffn`), one w1, w2, w3 per expert in FP4, most of the rest in fp8.
"""

from finetune.families import shapes
from finetune.families.family import Family, Matrix

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATES = {SPARSE: 4, HEAVY: 128}
"""Tokens per compressed entry where the config does not say."""


def matrices(config: shapes.Config) -> list[Matrix]:
    """Every weight of a model with this config."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    experts, intermediate = config["n_routed_experts"], config["moe_intermediate_size"]
    return [
        *shapes.embeddings(config),
        *attention(config),
        *shapes.mlp("mlp.shared_experts", "shared", hidden, intermediate * config["n_shared_experts"], layers),
        *shapes.routed(config, "mlp.experts", experts, intermediate, layers),
        shapes.router(config, "mlp.gate", experts, layers),
        *hyper_connections(config),
        *shapes.layer_norms(config),
    ]


def layer_types(config: shapes.Config) -> list[str]:
    """Kind of attention of each layer. Published files give compression ratios instead, with MTP layers at the end."""
    kinds = {0: SLIDING} | {rate: kind for kind, rate in RATES.items()}
    ratios = shapes.stated(config, "compress_ratios", absent=[])
    types = shapes.stated(config, "layer_types", absent=[kinds[ratio] for ratio in ratios])
    return list(types[: config["num_hidden_layers"]])


def attention(config: shapes.Config) -> list[Matrix]:
    """Attention with one key-value head, a grouped low-rank output map, and compressors by kind of layer."""
    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    layers, rank = config["num_hidden_layers"], config["q_lora_rank"]
    groups, group_rank = config["o_groups"], config["o_lora_rank"]
    types, rates = layer_types(config), shapes.stated(config, "compress_rates", absent=RATES)
    index_heads, index_width = config["index_n_heads"], config["index_head_dim"]
    compressor, indexer, sparse = "self_attn.compressor", "self_attn.compressor.indexer", types.count(SPARSE)
    return [
        shapes.matrix("self_attn.q_a_proj", "attention", rank, hidden, layers),
        shapes.matrix("self_attn.q_b_proj", "attention", heads * width, rank, layers),
        shapes.matrix("self_attn.kv_proj", "attention", width, hidden, layers),
        shapes.matrix("self_attn.o_a_proj", "attention", groups * group_rank, heads * width // groups, layers),
        shapes.matrix("self_attn.o_b_proj", "attention", hidden, groups * group_rank, layers),
        shapes.vector("self_attn.sinks", heads, layers),
        shapes.vector("self_attn.q_a_norm", rank, layers),
        shapes.vector("self_attn.kv_norm", width, layers),
        *compression(compressor, hidden, width, width, rates[HEAVY], types.count(HEAVY)),
        *compression(compressor, hidden, 2 * width, width, rates[SPARSE], sparse),
        *compression(indexer, hidden, 2 * index_width, index_width, rates[SPARSE], sparse),
        shapes.matrix(f"{indexer}.q_b_proj", "attention", index_heads * index_width, rank, sparse),
        shapes.matrix(f"{indexer}.scorer.weights_proj", "attention", index_heads, hidden, sparse),
    ]


def compression(module: str, hidden: int, features: int, width: int, rate: int, layers: int) -> list[Matrix]:
    """The maps that turn `rate` tokens into one entry of `width` numbers, from `features` numbers per token."""
    return [
        shapes.matrix(f"{module}.kv_proj", "attention", features, hidden, layers),
        shapes.matrix(f"{module}.gate_proj", "attention", features, hidden, layers),
        shapes.matrix(f"{module}.position_bias", "other", rate, features, layers),
        shapes.vector(f"{module}.kv_norm", width, layers),
    ]


def hyper_connections(config: shapes.Config) -> list[Matrix]:
    """The maps that mix `hc_mult` residual streams around attention and MLP, and before the output head."""
    layers, streams = config["num_hidden_layers"], config["hc_mult"]
    mixed, outputs = streams * config["hidden_size"], streams * (streams + 2)
    return [
        *(
            matrix
            for name in ("attn_hc", "ffn_hc")
            for matrix in (
                shapes.matrix(f"{name}.fn", "other", outputs, mixed, layers),
                shapes.vector(f"{name}.base", outputs, layers),
                shapes.vector(f"{name}.scale", 3, layers),
            )
        ),
        shapes.matrix("hc_head.hc_fn", "other", streams, mixed, 1),
        shapes.vector("hc_head.hc_base", streams, 1),
        shapes.vector("hc_head.hc_scale", 1, 1),
    ]


def no_gguf(_: shapes.Config) -> str:
    """Merged experts are in bf16, and llama.cpp's converter takes them as published only."""
    return "llama.cpp's converter takes its experts in FP4 only, which holds no update"


FAMILY = Family(
    key="deepseek_v4",
    model_types=("deepseek_v4",),
    block_class="DeepseekV4DecoderLayer",
    attention=shapes.below("self_attn", ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj")),
    experts="mlp.experts",
    experts_class="DeepseekV4Experts",
    router="mlp.gate",
    routing_table="mlp.gate.tid2eid",
    unreachable=("self_attn.compressor.indexer",),
    shared=shapes.below("mlp.shared_experts"),
    published_names=(
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.", ""),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ),
    mixed_dtypes=True,
    licence="mit",
    no_gguf=no_gguf,
    no_served_adapter="its tensors are published under names of their own, and no server takes an adapter for them",
    undivided="its layers look through windows and at compressed tokens",
    packs=False,
    tiny=shapes.TINY
    | {
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, HEAVY, SPARSE],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {SPARSE: 4, HEAVY: 8},
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
        "sliding_window": 128,
        "hc_mult": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    matrices=matrices,
)
