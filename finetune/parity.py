"""The figures of the proof that merged weights are what was trained, and what they must be: `Parity`, `refuse`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import GateError
from finetune.recipe import Recipe
from finetune.rundir import read_json

FP32_LIMIT_GIB = 4.0
"""Checkpoints up to this size are compared in fp32, larger ones in bf16."""

NOISE = {"original": 1e-6, "four_bit": 1e-4, "bf16": 5e-3}
"""KL divergence in nats per token that arithmetic alone may make: in fp32 beside the original base; beside one in 4
bits, which training may have unpacked into bf16; and in bf16."""

LOOK = "export.parity_prompts=64 in a new run, to see whether it is chance; report it if not"
"""What to type where a few tokens may have decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far merged weights are from the adapter beside its base, and both from the base alone."""

    prompts: int
    """Held-out rows that were compared."""
    tokens: int
    """Answer tokens in them."""
    precision: str
    """Arithmetic of all sides, fp32 or bf16."""
    reference: str
    """What merged was compared with: the adapter beside the `original` base, or beside the base in `four_bit`."""
    mean_kl: float
    """Mean KL divergence of merged from the reference, nats per token."""
    max_kl: float
    """The largest of them."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    effect_kl: float
    """Mean KL divergence of the bare base from the reference: what the training changed."""
    base_kl: float
    """Mean KL divergence of the bare base from merged: what a user of the merged weights sees of it."""
    original_kl: float
    """Mean KL divergence of merged from the adapter beside the original base."""
    four_bit_kl: float | None
    """The same beside the base in 4 bits, as it was trained; None where it was not trained so."""
    same_answers: int
    """Prompts that merged and reference answer with the same tokens, greedily."""
    answers: int
    """Prompts that were answered."""
    tensors: int
    """Tensors of the checkpoint that have an update."""
    tensors_changed: int
    """How many of them differ on disk from the base's."""
    tensors_zero: int
    """How many have an update of zero: no token reached that expert."""
    tensors_rounded_away: int
    """How many have an update so small that their stored type holds none of it."""
    strangers: list[str]
    """Tensors that differ on disk though they have no update, or do not differ though they should."""
    loaded_by: str
    """What read the merged files: `transformers`, or `finetune` for formats that it cannot read."""
    rounding: float
    """Norm of what the stored types could not hold over that of the update, measured while merging."""
    quantised: str
    """What became of quantised weights: `bf16`, `requantise`, or `none` where the base has none."""

    def as_dict(self) -> dict[str, Any]:
        """For parity.json."""
        return {"schema": 1} | asdict(self)

    @classmethod
    def read(cls, path: Path) -> Parity:
        """The figures in a parity.json."""
        values = read_json(path)
        del values["schema"]
        return cls(**values)

    def sentence(self) -> str:
        """One line a person understands."""
        beside = "its base in 4 bits" if self.reference == "four_bit" else "its base"
        unchanged = [f"{self.tensors_zero} have an update of zero"] if self.tensors_zero else []
        unchanged += [f"{self.tensors_rounded_away} are rounded away"] if self.tensors_rounded_away else []
        return (
            f"merged against adapter on {beside}: mean KL {self.mean_kl:.2e}, max {self.max_kl:.2e} nats per token, "
            f"same likeliest token {self.top1_agreement:.1%} of {self.tokens}, same answer to "
            f"{self.same_answers}/{self.answers}; merged against base: mean KL {self.base_kl:.2e} ({self.precision}); "
            f"{self.tensors_changed} of {self.tensors} tensors with an update differ on disk"
            + "".join(f", {phrase}" for phrase in unchanged)
        )


def explained_kl(parity: Parity) -> float:
    """The mean KL divergence that rounding explains: divergence goes with the square of what is added to the weights.

    Measured on small random models it is within a tenth; a layer whose experts are dropped is 500 times that far away.
    """
    return parity.effect_kl * parity.rounding**2


def largest_kl(parity: Parity, recipe: Recipe) -> float:
    """The largest mean KL divergence that is allowed between merged and adapter."""
    noise = NOISE["bf16" if parity.precision == "bf16" else parity.reference]
    return min(recipe.export.max_kl, recipe.merge.tolerance * explained_kl(parity) + noise)


def refuse(parity: Parity, recipe: Recipe) -> None:
    """Nothing, or GateError (exit code 4) when merged weights are not what was trained.

    MRG-010: they answer otherwise, on average or at some tokens. MRG-011: they are as near to the base as to the
    adapter. MRG-012: other tensors changed on disk than those with an update.
    """
    kept = "merged/ is not published, the adapter is unharmed"
    if parity.strangers:
        what = f"{len(parity.strangers)} tensors are not what the adapter makes of them, e.g. {parity.strangers[0]}"
        raise GateError("MRG-012", what, kept, "the same command again; report it if it comes back")
    limit = largest_kl(parity, recipe)
    if not parity.mean_kl <= limit:
        what = (
            f"merged and adapter differ by {parity.mean_kl:.2e} nats per token, {limit:.2e} are allowed (rounding "
            f"explains {explained_kl(parity):.2e}, times merge.tolerance={recipe.merge.tolerance:g}; export.max_kl="
            f"{recipe.export.max_kl:g})"
        )
        if parity.quantised == "requantise":
            why, how = "eight bits hold too little of the sums", "a new run with merge.quantised=bf16"
        else:
            why, how = "the merged weights are not what was trained", "report this"
        raise GateError("MRG-010", what, f"{why}; {kept}", how)
    if not parity.max_kl <= recipe.export.max_single_kl:
        what = f"at one token merged and adapter differ by {parity.max_kl:.2g} nats"
        what += f", export.max_single_kl={recipe.export.max_single_kl:g} are allowed"
        raise GateError("MRG-010", what, f"their mean of {parity.mean_kl:.2g} hides it; {kept}", LOOK)
    if not parity.top1_agreement >= recipe.export.min_top1:
        what = f"merged and adapter find the same token likeliest at {parity.top1_agreement:.1%} of {parity.tokens}"
        what += f", export.min_top1={recipe.export.min_top1:g} is demanded"
        raise GateError("MRG-010", what, f"the merged weights answer otherwise; {kept}", LOOK)
    if not parity.base_kl > parity.mean_kl:
        what = f"merged is as near to the base ({parity.base_kl:.2g} nats) as to the adapter ({parity.mean_kl:.2g})"
        why = "training changed too little to be seen in the stored weights"
        raise GateError("MRG-011", what, f"{why}; {kept}", "more steps or a larger train.lr")
