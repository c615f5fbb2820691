"""What a model family is: the words of its grammar. One `Family(...)` constant per file beside this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal["embedding", "attention", "dense", "shared", "routed", "router", "other"]
"""Where a weight belongs in the coverage table and in the plan."""

GROUPS: tuple[Group, ...] = ("embedding", "attention", "dense", "shared", "routed", "router", "other")

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
"""The path of a weight inside a decoder layer: number of the layer, path below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One kind of weight of a model, `count` times in it. A fused expert stack is one Matrix with `experts` > 0."""

    name: str
    """Path below the decoder layer, or below the model for embeddings, e.g. `self_attn.q_proj`."""
    group: Group
    """Its row in the coverage table and in the plan."""
    rows: int
    """Output features of one expert, or of the linear map."""
    columns: int
    """Input features. Vectors (norms, biases, sinks) have 1."""
    count: int
    """How often the model has it, usually the number of layers of that kind."""
    experts: int = 0
    """Experts stacked in it; 0 means it is no stack."""
    active: int = 0
    """Experts of the stack that one token uses."""

    @property
    def parameters(self) -> int:
        """All parameters of this kind in the model."""
        return self.rows * self.columns * self.count * max(self.experts, 1)

    @property
    def active_parameters(self) -> int:
        """Parameters of this kind that one token is multiplied with."""
        return self.rows * self.columns * self.count * (self.active if self.experts else 1)


def _nothing(_: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _no_reason(_: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The grammar of one model family. Names are module paths below a decoder layer, as transformers has them."""

    key: str
    """Our name of the family, as recipes write it in `model.family`."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json (of the text part first) that belong to this family."""
    block_class: str
    """Class name of a decoder layer; what FSDP wraps."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers auto class that loads it. Some text models are registered only with the multimodal ones."""
    attention: tuple[str, ...]
    """Linear maps of the attention that LoRA adapts. A name that a layer lacks is passed over there."""
    experts: str = ""
    """The module that holds the fused expert stacks, e.g. `mlp.experts`; empty for a dense family."""
    experts_class: str = ""
    """Class name of that module."""
    expert_parameters: tuple[str, ...] = ("gate_up_proj", "down_proj")
    """Its stacks, in the order in which the class registers them."""
    transposed: bool = False
    """The stacks are (E, in, out) instead of (E, out, in)."""
    interleaved: bool = False
    """gate and up alternate (gate at even positions) instead of gate first, then up."""
    repeats_tokens: bool = False
    """The stock block hands every expert every token, scaled by a score that is zero for experts not chosen."""
    router: str = ""
    """The router, e.g. `mlp.gate`."""
    routing_table: str = ""
    """Buffer of a layer that maps a token id to its experts, (vocabulary, top-k); empty where only scores route."""
    shared: tuple[str, ...] = ()
    """Linear maps of the experts that every token uses."""
    dense: tuple[str, ...] = ()
    """Linear maps of the MLPs of layers without experts."""
    unreachable: tuple[str, ...] = ()
    """Modules of a decoder layer that only choose what others look at: no gradient reaches them."""
    published_names: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements, in order, that turn the tensor names transformers saves into those of the
    published files. Empty where they agree."""
    published_fused: bool = False
    """Published files hold fused expert stacks where transformers would save one tensor per expert."""
    balances: bool = False
    """A load-balancing loss over its routers is added when it is asked for. GraniteMoe's is not (transformers 5.17.0
    records no router of it), and TRL 1.14.2 cannot add that of DeepSeek V4."""
    mixed_dtypes: bool = False
    """transformers keeps some weights in fp32, and a bf16 forward pass of the stock model fails outside autocast."""
    packs: bool = True
    """Several rows in one sequence stay apart by their positions. False where a layer carries a state along the
    sequence, or compresses it, whatever the positions say."""
    undivided: str = ""
    """Why several devices cannot share a row of it (`launch.context_parallel`); empty where they can: where a token
    sees every earlier one of its row, and nothing else goes from token to token."""
    unsloth: bool = False
    """Unsloth (the release in `engine.PACKAGES`) trains it: it has layers for the class of the expert stacks by name,
    keeps them in 4 bits, and reads the published folder as this text model. Dense families need no such layers."""
    text_config: str = ""
    """Key of the text part inside config.json for multimodal checkpoints, e.g. `text_config`."""
    chat_templates: tuple[str, ...] = ()
    """Chat templates that it was published with, by their names in TRL's collection; empty where that has none."""
    licence: str = ""
    """Licence key of the family's best-known release; a model card may say otherwise."""
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What servers call the maps of one expert: gate, up, down."""
    served_experts: str = ""
    """Where servers look for the experts, below a layer; empty means where the model has them."""
    served_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing
    """Fields that servers look for in config.json and transformers 5 no longer writes, from the text part."""
    converter_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing
    """Fields that llama.cpp's converter reads in another way than transformers, from the text part."""
    no_gguf: Callable[[Mapping[str, Any]], str] = _no_reason
    """Why there is no GGUF file of a model, from the text part of its config.json; empty where there is one."""
    gguf_tiny: str = ""
    """Why there is none of a tiny model of this family; empty where there is."""
    no_served_adapter: str = ""
    """Why its adapter is not written with one pair per expert; empty where servers take it so."""
    no_gguf_adapter: str = ""
    """Why llama.cpp must not be given its adapter, only merged weights; empty where it may."""
    tiny: Mapping[str, Any]
    """Config fields of a random model of a few hundred thousand parameters with every kind of layer the family has."""
    matrices: Callable[[Mapping[str, Any]], list[Matrix]]
    """Every weight of the model that a config.json describes (text part, without multi-token-prediction layers).

    It takes the text part of the config. Names are parameter paths without `.weight`; one with two shapes stands twice.
    """

    def group_of(self, path: str) -> Group:
        """The group of a parameter by its path in the bare model."""
        match = LAYER.search(path)
        if not match:
            return "embedding" if ("embed_tokens" in path or "lm_head" in path) else "other"
        below = match[2]
        module = below.rpartition(".")[0]
        if self.experts and (module == self.experts or below.startswith(self.experts + ".")):
            return "routed"
        if self.router and (module == self.router or module.startswith(self.router + ".")):
            return "router"
        if module in self.shared:
            return "shared"
        if module in self.dense:
            return "dense"
        blocks = {name.partition(".")[0] for name in self.attention}
        return "attention" if below.partition(".")[0] in blocks else "other"

    def text_part(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text part of a config.json: itself, unless it is a multimodal one of this family."""
        if self.text_config and self.text_config in config:
            part: Mapping[str, Any] = config[self.text_config]
            return part
        return config
