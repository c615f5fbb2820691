"""The weights that families share, as lists of `Matrix`: embeddings, attention, MLPs, expert stacks, norms.

Names are those of transformers 5.17. Sizes come from a published config.json; a field that older files leave out is
asked for with `stated` and the meaning of its absence. A vector (norm, bias, sink) has one column and is in group
`other`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.family import Group, Matrix

Config = Mapping[str, Any]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three linear maps of a gated MLP."""


def stated(config: Config, *names: str, absent: Any) -> Any:
    """The value of the first of `names` that the config states; `absent` where it states none of them, or null."""
    for name in names:
        if name in config and config[name] is not None:
            return config[name]
    return absent


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(stated(config, "head_dim", absent=config["hidden_size"] // config["num_attention_heads"]))


def matrix(name: str, group: Group, rows: int, columns: int, count: int) -> Matrix:
    """A weight that is no stack."""
    return Matrix(name=name, group=group, rows=rows, columns=columns, count=count)


def vector(name: str, size: int, count: int) -> Matrix:
    """A norm, bias or sink of `size` numbers."""
    return matrix(name, "other", size, 1, count)


def embeddings(config: Config) -> list[Matrix]:
    """Token embedding, output head unless it is tied to the embedding, and the norm before the head."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    names = ["embed_tokens"] if config["tie_word_embeddings"] else ["embed_tokens", "lm_head"]
    return [*(matrix(name, "embedding", vocabulary, hidden, 1) for name in names), vector("norm", hidden, 1)]


def layer_norms(config: Config) -> list[Matrix]:
    """The norms before attention and before the MLP of every layer."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return [vector(name, hidden, layers) for name in ("input_layernorm", "post_attention_layernorm")]


def grouped_attention(config: Config, layers: int, *, biases: str = "", query_factor: int = 1) -> list[Matrix]:
    """Attention with q, k, v and o maps in `layers` layers; key and value heads are shared by groups of query heads.

    `biases` names the maps that have one, as letters of `qkvo`. `query_factor` is 2 where q also yields an output gate.
    """
    hidden, width = config["hidden_size"], head_dim(config)
    queries = config["num_attention_heads"] * width
    keys = stated(config, "num_key_value_heads", absent=config["num_attention_heads"]) * width
    shapes = {"q": (queries * query_factor, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    maps = [matrix(f"self_attn.{key}_proj", "attention", *shape, layers) for key, shape in shapes.items()]
    return maps + [vector(f"self_attn.{key}_proj.bias", shapes[key][0], layers) for key in biases]


def attention_biases(config: Config) -> str:
    """Letters of the attention maps that have a bias, for `grouped_attention`: all four, or none."""
    return "qkvo" if stated(config, "attention_bias", absent=False) else ""


def head_norms(config: Config, layers: int) -> list[Matrix]:
    """Norms over one head of queries and of keys."""
    return [vector(f"self_attn.{name}_norm", head_dim(config), layers) for name in "qk"]


def latent_attention(config: Config) -> list[Matrix]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values through low-rank maps."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    queries = heads * (plain + rotated)
    shapes = {
        "kv_a_proj_with_mqa": (rank + rotated, hidden),
        "kv_b_proj": (heads * (plain + value), rank),
        "o_proj": (hidden, heads * value),
    }
    norms = {"kv_a_layernorm": rank}
    if query_rank is None:
        shapes["q_proj"] = (queries, hidden)
    else:
        shapes |= {"q_a_proj": (query_rank, hidden), "q_b_proj": (queries, query_rank)}
        norms["q_a_layernorm"] = query_rank
    biased = [name for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if name in shapes]
    return [
        *(matrix(f"self_attn.{name}", "attention", *shape, layers) for name, shape in shapes.items()),
        *(vector(f"self_attn.{name}", size, layers) for name, size in norms.items()),
        *(vector(f"self_attn.{name}.bias", shapes[name][0], layers) for name in biased if attention_biases(config)),
    ]


def mlp(name: str, group: Group, hidden: int, intermediate: int, layers: int) -> list[Matrix]:
    """A gated MLP in `layers` layers."""
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return [
        matrix(f"{name}.{projection}", group, *shape, layers)
        for projection, shape in zip(PROJECTIONS, shapes, strict=True)
    ]


def routed(config: Config, module: str, experts: int, intermediate: int, layers: int) -> list[Matrix]:
    """The two expert stacks of `layers` layers. Rows are outputs whichever way round the stack is stored."""
    hidden, active = config["hidden_size"], config["num_experts_per_tok"]
    shapes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
    return [
        Matrix(
            name=f"{module}.{name}",
            group="routed",
            rows=rows,
            columns=columns,
            count=layers,
            experts=experts,
            active=active,
        )
        for name, (rows, columns) in shapes.items()
    ]


def router(config: Config, module: str, experts: int, layers: int) -> Matrix:
    """The map from a token to one score per expert."""
    return matrix(module, "router", experts, config["hidden_size"], layers)


def first_dense_layers(config: Config) -> list[Matrix]:
    """Where the first `first_k_dense_replace` layers have an MLP and all others shared and routed experts."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    experts, intermediate = config["n_routed_experts"], config["moe_intermediate_size"]
    dense = min(config["first_k_dense_replace"], layers)
    sparse = layers - dense
    return [
        *mlp("mlp", "dense", hidden, config["intermediate_size"], dense),
        *mlp("mlp.shared_experts", "shared", hidden, intermediate * config["n_shared_experts"], sparse),
        *routed(config, "mlp.experts", experts, intermediate, sparse),
        router(config, "mlp.gate", experts, sparse),
    ]


def below(module: str, names: tuple[str, ...] = PROJECTIONS) -> tuple[str, ...]:
    """`module.name` for each name: the paths of a module's linear maps."""
    return tuple(f"{module}.{name}" for name in names)


QKVO = below("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
"""The linear maps of grouped attention."""
LATENT = below("self_attn", ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
"""The linear maps of latent attention, with and without a low-rank query."""

TINY: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
"""What tiny models have in common. Widths are multiples of 64, the block of 4-bit storage."""
