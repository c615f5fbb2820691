"""How much was computed, by two methods that must agree: from parameters and tokens, and from hours and the device.

Own arithmetic on purpose: the count that transformers keeps takes all parameters of a Mixture-of-Experts model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune import sizes
from finetune.recipe import Recipe

PEAK_TFLOPS = (
    (r"A100", 312.0),
    (r"H100 PCIe", 756.0),
    (r"H100 .*HBM3", 989.0),
    (r"H200", 989.0),
    (r"L4", 121.0),
    (r"L40S", 362.0),
    (r"GeForce RTX 4090", 165.0),
)
"""How NVIDIA's driver names a device, and its dense bf16 TFLOP/s by the data sheet. Others are not known here."""
DIFFERENCE = 0.3
"""Relative difference of the two methods from which they are said to disagree."""
DUTY_SHARE = 1 / 3
"""Share of the original's compute above which the Commission's guidelines of 18 July 2025 see a provider's duties."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerToken:
    """Floating-point operations per trained token."""

    forward: float
    """2 per active parameter; a token counts its own experts only, attention scores are not counted."""
    backward: float
    """The same again, through the base's weights."""
    trained: float
    """`each` per trainable parameter that the token meets."""
    each: int
    """6 of an adapter's: forward, backward, its own gradient. 2 of the base's own: the gradient; the rest is above."""
    recompute: float
    """A second forward pass where all layers recompute their activations, else 0."""


def per_token(recipe: Recipe) -> PerToken:
    """What a token costs by the shapes of the base and the adapter. Raises RecipeError for a card without shapes."""
    weights, family = sizes.matrices(recipe.model), sizes.family_of_card(recipe.model)
    active = sizes.active_parameters(weights)
    trainable = sizes.active_trained_parameters(weights, family, recipe.adapter)
    each = 2 if recipe.adapter.method == "full" else 6
    again = 2 * active if recipe.train.gradient_checkpointing else 0
    return PerToken(forward=2 * active, backward=2 * active, trained=each * trainable, each=each, recompute=again)


def compute(recipe: Recipe, train: dict[str, Any]) -> dict[str, Any]:
    """The compute of a finished training, from its train.json: two methods, their agreement, the share it adds."""
    token, tokens = per_token(recipe), train["tokens"]
    flops = (token.forward + token.backward + token.trained) * tokens
    told: dict[str, Any] = {
        "by_parameters": {
            "flop": flops,
            "recompute_flop": token.recompute * tokens,
            "tokens": tokens,
            "how": f"(2 + 2) x active parameters + {token.each} x trainable ones of a token's experts, x trained "
            "tokens without padding; attention scores, evaluation and merge not counted; recompute apart",
        },
        "by_hours": _by_hours(recipe, train, flops + token.recompute * tokens),
        "original": _original(recipe, flops),
    }
    return told


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its driver's name, or None when it is not known."""
    for pattern, peak in PEAK_TFLOPS:
        if re.fullmatch(rf"NVIDIA {pattern}(-(SXM|PCIE)[\w-]*| \d+GB)?", device):
            return peak
    return None


def _by_hours(recipe: Recipe, train: dict[str, Any], flops: float) -> dict[str, Any]:
    device, count = train["device"], train["processes"]
    hours = train["seconds"] * count / 3600
    told = {"device": device, "device_hours": hours, "utilisation_assumed": recipe.costs.utilisation}
    unknown = {"peak_tflops": None, "flop": None, "difference": None, "agrees": None, "utilisation_reached": None}
    peak = peak_tflops(device)
    if peak is None:
        return told | unknown | {"how": f"the peak of {device} is not known, so this method gives nothing"}
    most = hours * 3600 * peak * 1e12
    by_hours = most * recipe.costs.utilisation
    difference = abs(by_hours - flops) / max(by_hours, flops) if max(by_hours, flops) else 0.0
    return told | {
        "peak_tflops": peak,
        "flop": by_hours,
        "difference": difference,
        "agrees": difference <= DIFFERENCE,
        "utilisation_reached": flops / most if most else None,
        "how": "device-hours of the updates x peak (data sheet) x costs.utilisation, which is assumed; with recompute",
    }


def _original(recipe: Recipe, flops: float) -> dict[str, Any]:
    """The share of the original's compute, where its publisher has said on how many tokens it was trained."""
    model = recipe.model
    told: dict[str, Any] = {"flop": None, "share": None, "above_a_third": None, "source": model.pretraining_source}
    if model.tiny:
        return told | {"source": "", "how": "a tiny random model made here: there is no original"}
    if not model.pretraining_tokens or not model.pretraining_source:
        return told | {"source": "", "how": "nobody has said on how many tokens the original was trained"}
    original = 6 * sizes.active_parameters(sizes.matrices(model)) * model.pretraining_tokens
    share = flops / original
    return told | {
        "flop": original,
        "share": share,
        "above_a_third": share > DUTY_SHARE,
        "how": f"6 x active parameters x {model.pretraining_tokens:.3g} tokens",
    }
