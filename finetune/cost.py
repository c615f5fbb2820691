"""How long a job takes and what it costs, at an assumed speed or a measured one: `cost(recipe, effort, probe)`."""

from __future__ import annotations

from dataclasses import dataclass

from finetune import sizes
from finetune.figure import Figure, assumed, measured
from finetune.recipe import Recipe

DISK_GIB_PER_SECOND = 0.5
"""Assumed for reading the base and writing the merged weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What some real training steps on this machine took (`finetune.probe`)."""

    steps: int
    """How many were timed; one before them, which warms up, was not."""
    seconds_per_step: float
    """Their median."""
    tokens_per_second: float
    """Tokens of all processes, padding left out."""
    tflops: float
    """TFLOP/s of all devices, by the plan's own count of operations."""
    peak_gib: float
    """Highest memory of the first process: of its GPU, or of the whole process where there is none."""
    device: str
    """What trained."""
    when: str
    """The day."""


def cost(
    recipe: Recipe, effort: tuple[Figure, ...], heldout: Figure, length: Figure, probe: Probe | None = None
) -> tuple[Figure, ...]:
    """Hours, energy and money of a job of so much work. `heldout` is rows, `length` tokens per row."""
    costs, devices = recipe.costs, recipe.launch.nodes * recipe.launch.devices
    speed = costs.device_tflops * 1e12 * costs.utilisation
    flops = sum(f.value for f in effort if f.unit == "FLOP")
    steps = next(f.value for f in effort if f.name == "steps")
    if probe is None:
        hours = flops / speed / 3600 / devices
        how = f"{flops:.3g} FLOP at {costs.device_tflops:g} TFLOP/s x {costs.utilisation:.0%}"
        time = assumed("hours", hours, "h", f"{how}{f' x {devices}' if devices > 1 else ''}, training alone")
        shown: tuple[Figure, ...] = ()
    else:
        hours = steps * probe.seconds_per_step / 3600
        how = f"{steps:,.0f} updates x {probe.seconds_per_step:.3g} s, measured here on {probe.device}, {probe.when}"
        time = measured("hours", hours, "h", f"{how}; training alone")
        seen = f"median of {probe.steps} updates after one, measured here"
        shown = (
            measured("seconds per update", probe.seconds_per_step, "s", seen),
            measured("tokens per second", probe.tokens_per_second, "1/s", "padding not counted, measured here"),
            measured("speed reached", probe.tflops, "TFLOP/s", "operations of an update above / its seconds"),
        )
    weights = sizes.matrices(recipe.model)
    scored = 2 * 2 * sizes.active_parameters(weights) * heldout.value * length.value / speed / 3600
    moved = sizes.weights_gib(recipe.model) + 2 * sizes.merged_gib(recipe.model)
    written = moved / DISK_GIB_PER_SECOND / 3600
    device_hours = hours * devices
    every = device_hours + scored + written
    per_hour = f"{costs.price_per_hour:g} {costs.currency}"
    basis = assumed if probe is None else measured
    return (
        *shown,
        time,
        basis("device-hours", device_hours, "h", f"{devices} x {costs.device if probe is None else probe.device}"),
        assumed("energy", device_hours * costs.device_kw, "kWh", f"device-hours x {costs.device_kw:g} kW, the device"),
        assumed("price", device_hours * costs.price_per_hour, costs.currency, f"device-hours x {per_hour}"),
        assumed(
            "evaluation, rough",
            scored,
            "h",
            f"base and tuned read {heldout.value:,.0f} held-out rows ({heldout.how}); written answers are left out",
        ),
        assumed(
            "merge and export, rough",
            written,
            "h",
            f"{moved:,.1f} GiB at {DISK_GIB_PER_SECOND:g} GiB/s; the proof and other formats are left out",
        ),
        assumed("price with these", every * costs.price_per_hour, costs.currency, f"all device-hours x {per_hour}"),
    )
