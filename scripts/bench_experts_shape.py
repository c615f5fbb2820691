"""Random weights in the shape of Qwen3-30B-A3B, with a router whose popularity can be set. For `bench_experts.py`.

Keys are those of the published files, one gate_proj, up_proj and down_proj per expert, and stacks straddle shards.

How routing is set: every token's embedding has the same value in channel 0, large enough that after the norms each
router sees `router_input` there. The router's weights in this channel are therefore a bias per expert. For `uniform`
it is 0; for `zipf` it is -log(rank of the expert) + noise of the token, so that drawing the top k resembles drawing k
experts without replacement with probabilities 1/rank. Ranks are shuffled in every layer. What it came to is counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from finetune.compose import load_recipe
from finetune.rundir import atomic_folder, write_json

EXPERTS_PER_SHARD = 48
"""No divisor of 128 on purpose: the experts of a layer stand in shards of unequal size."""
GUMBEL_STD = math.pi / math.sqrt(6)
"""Spread of the router's scores at which the top k follow the probabilities best (Gumbel noise has this one)."""
ROUTINGS = ("uniform", "zipf")


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """config.json values of Qwen3-30B-A3B by our model card, with changes."""
    card = load_recipe("legal_quickstart", "model=qwen3_30b").model.config
    return dict(card) | {"norm_topk_prob": True} | changes


def layers_that_fit(config: dict[str, Any], cache: Path) -> int:
    """How many layers of the shape (at most all) there is room for on the disk of `cache`, a tenth left free."""
    cache.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(cache).free * 0.9 - 4 * config["vocab_size"] * config["hidden_size"]
    layer = 6 * config["num_experts"] * config["hidden_size"] * config["moe_intermediate_size"]
    return max(0, min(config["num_hidden_layers"], int(room // (1.05 * layer))))


def shape_folder(config: dict[str, Any], cache: Path) -> Path:
    """The folder with random weights of this config, written on first use; needs the memory of one shard."""
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{config['model_type']}-{config['num_hidden_layers']}x{config['num_experts']}-{key}"
    folder = cache / "bench" / name
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            _write(config, partial)
    return folder


def _write(config: dict[str, Any], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from finetune.tiny import train_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], config["num_experts"]
    inner, width = config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    quiet = 1 / math.sqrt(2 * layers)  # what a layer adds stays small beside the embedding, so channel 0 stays put
    weight_map: dict[str, str] = {}

    def random(rows: int, columns: int, spread: float) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(spread).cpu()

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return random(rows, columns, 0.9 * scale / math.sqrt(columns))

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def shard(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    embedding = random(config["vocab_size"], hidden, 1.0)
    embedding[:, 0] = math.sqrt(hidden) / 2
    head = {"lm_head.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": ones(hidden)}
    shard({"model.embed_tokens.weight": embedding} | head)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        # Channels other than 0 reach the router with the share of the norm that channel 0 leaves them.
        router = random(experts, hidden, GUMBEL_STD * math.sqrt(1.25 / hidden))
        router[:, 0] = 0
        shard(
            {
                at + "input_layernorm.weight": ones(hidden),
                at + "self_attn.q_proj.weight": matrix(queries, hidden),
                at + "self_attn.k_proj.weight": matrix(keys, hidden),
                at + "self_attn.v_proj.weight": matrix(keys, hidden),
                at + "self_attn.o_proj.weight": matrix(hidden, queries, quiet),
                at + "self_attn.q_norm.weight": ones(width),
                at + "self_attn.k_norm.weight": ones(width),
                at + "post_attention_layernorm.weight": ones(hidden),
                at + "mlp.gate.weight": router,
            }
        )
        for first in range(0, experts, EXPERTS_PER_SHARD):
            tensors = {}
            for e in range(first, min(first + EXPERTS_PER_SHARD, experts)):
                tensors[f"{at}mlp.experts.{e}.gate_proj.weight"] = matrix(inner, hidden)
                tensors[f"{at}mlp.experts.{e}.up_proj.weight"] = matrix(inner, hidden)
                tensors[f"{at}mlp.experts.{e}.down_proj.weight"] = matrix(hidden, inner, quiet)
            shard(tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    fields = dict(config) | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(folder)
    train_tokenizer(min(config["vocab_size"], 1024)).save_pretrained(folder)


def router_input(hidden: int) -> float:
    """What a router of `_write` sees in channel 0: sqrt(hidden) / 2 over the norm of unit noise and itself."""
    return math.sqrt(hidden) / 2 / math.sqrt(1.25)


def set_routing(model: Any, router: str, routing: str) -> None:
    """Sets the bias per expert of every router of a model made by `_write`. `router` is the family's module path."""
    import torch

    found = [module for path, module in model.named_modules() if path.endswith("." + router)]
    with torch.no_grad():
        for layer, module in enumerate(found):
            experts, hidden = module.weight.shape
            ranks = 1 + torch.randperm(experts, generator=torch.Generator().manual_seed(layer))
            bias = -torch.log(ranks.float()) if routing == "zipf" else torch.zeros(experts)
            module.weight[:, 0] = (bias / router_input(hidden)).to(module.weight)


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """What the files of a checkpoint hold, by their headers: parameters, those of experts, bytes of the largest group.

    A group is what becomes one tensor in memory: the gate and up matrices of all experts of a layer, the down matrices
    of all experts of a layer, or any other tensor by itself.
    """
    from safetensors import safe_open

    parameters = expert_parameters = 0
    groups: dict[str, int] = defaultdict(int)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                size = math.prod(file.get_slice(key).get_shape())
                layer, experts, rest = key.partition(".experts.")
                down = re.search(r"(^|\.)(w2|down_proj)(\.|$)", rest) is not None
                groups[f"{layer} {down}" if experts else key] += size
                parameters += size
                expert_parameters += size if experts else 0
    largest = 2 * max(groups.values())  # the files of this benchmark are bf16
    return {"parameters": parameters, "expert_parameters": expert_parameters, "largest_group_bytes": largest}
