"""How much work a recipe is: rows, tokens, updates and floating-point operations. Arithmetic only, no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune import sizes
from finetune.compute import per_token as flops_per_token
from finetune.families import shapes
from finetune.figure import Basis, Figure, assumed, computed, given
from finetune.memory import parts_of_a_row
from finetune.recipe import Recipe

ASSUMED_ROWS = 1000
"""Training rows where nothing says how many there are."""
ASSUMED_HELDOUT = 100
"""Held-out rows where nothing says how many there are."""


def work(recipe: Recipe, prepared: Path | None) -> tuple[Figure, ...]:
    """Rows, tokens, updates and FLOPs of the training, without evaluation and merge. `prepared` is a run's data folder.

    Forward 2, backward through the base's weights 2, adapter 6 (forward, backward, its own gradients) FLOPs per
    parameter and token; a token counts its own experts only. Weights of the base that are trained cost 2 more.
    """
    train, devices = recipe.train, recipe.launch.nodes * recipe.launch.devices
    flops = flops_per_token(recipe)
    rows, length = _rows(recipe, prepared), _tokens_per_row(recipe, prepared)
    sharing = parts_of_a_row(recipe)
    per_update, plural = train.batch_size * train.accumulation * (devices // sharing), "s" if devices > 1 else ""
    shared = f" / {sharing} that share a row" if sharing > 1 else ""
    seen = train.max_steps * per_update if train.max_steps else math.ceil(rows.value * train.epochs)
    steps = train.max_steps or math.ceil(seen / per_update)
    tokens = seen * length.value
    basis: Basis = "assumed" if "assumed" in (rows.basis, length.basis) else "computed"
    again = flops.recompute * tokens
    scores, passes = attention_per_token(recipe, length.value), 4 if train.gradient_checkpointing else 3

    def counted(name: str, value: float, unit: str, how: str) -> Figure:
        return Figure(name=name, value=value, unit=unit, basis=basis, how=how)

    per_token = "2 x active parameters x tokens"
    return (
        rows,
        length,
        computed(
            "rows per update",
            per_update,
            "rows",
            f"{devices} device{plural}{shared} x {train.batch_size} rows x {train.accumulation} accumulated",
        ),
        counted("steps", steps, "updates", "train.max_steps" if train.max_steps else f"{seen:,} rows / {per_update}"),
        counted("tokens", tokens, "tokens", f"{seen:,} rows x {length.value:,.0f}"),
        counted("forward", flops.forward * tokens, "FLOP", f"{per_token}, attention scores apart"),
        counted("backward", flops.backward * tokens, "FLOP", f"{per_token}, through the base's weights"),
        counted(
            "weight gradients" if recipe.adapter.method == "full" else "adapter maths",
            flops.trained * tokens,
            "FLOP",
            f"{flops.each} x trainable parameters of a token's experts x tokens",
        ),
        counted(
            "attention scores",
            passes * scores * tokens,
            "FLOP",
            f"at most: forward, backward twice{', recompute' if passes == 4 else ''}, {scores:.3g} each per token, as "
            "if every layer read the whole row",
        ),
        counted(
            "recompute",
            again,
            "FLOP",
            "a second forward pass, if memory demands it of all layers" if again else "no gradient checkpointing",
        ),
    )


def attention_per_token(recipe: Recipe, length: float) -> float:
    """FLOPs of one forward pass per token for queries times keys and scores times values, in rows of `length` tokens.

    A token sees half the row on average. Layers with a window or without scores do less: this is the most.
    """
    config = sizes.shape_config(recipe.model)
    heads, usual = config["num_attention_heads"], shapes.head_dim(config)
    keys = shapes.stated(config, "qk_nope_head_dim", absent=0) + shapes.stated(config, "qk_rope_head_dim", absent=0)
    if "qk_nope_head_dim" not in config or not keys:  # no low-rank attention, whose heads are wider than the usual
        keys = usual
    values = shapes.stated(config, "v_head_dim", absent=usual)
    return float(config["num_hidden_layers"] * heads * (keys + values) * length)


def heldout_rows(recipe: Recipe, prepared: Path | None) -> Figure:
    """Held-out rows that are scored: counted in prepared data, else the limits of recipe and card, else assumed."""
    name, data = "held-out rows", recipe.data
    report = _report(prepared)
    if report and "heldout" in report["splits"]:
        there, how = given, "the prepared data of this run"
        rows = int(report["splits"]["heldout"]["rows"])
    elif data.card and not data.sample:
        from finetune.data.card import read_card

        there, rows, how = given, read_card(data.card).heldout_rows, f"the data card {data.card}"
    else:
        there, rows, how = assumed, ASSUMED_HELDOUT, "assumed"
    for limit, key in ((data.heldout_rows, "data.heldout_rows"), (recipe.evaluate.rows, "evaluate.rows")):
        if limit and limit < rows:
            rows, how = limit, key
    return there(name, rows, "rows", how)


def _rows(recipe: Recipe, prepared: Path | None) -> Figure:
    """Training rows: counted in prepared data or the user's files, else the limit of recipe or card, else assumed."""
    name, unit, data = "training rows", "rows", recipe.data
    if report := _report(prepared):
        return given(name, _sequences(report), unit, "the prepared data of this run")
    files = [Path(f).expanduser() for f in data.train_files]
    if files and all(f.is_file() and f.suffix == ".jsonl" for f in files):
        lines = sum(_lines(f) for f in files)
        held = 0.0 if data.heldout_files else data.heldout_fraction
        kept = math.floor(lines * (1 - held))
        rows = min(kept, data.train_rows) if data.train_rows else kept
        return given(name, rows, unit, f"{lines:,} lines, {held:.0%} held out")
    most = _card_rows(recipe)
    if data.train_rows and (not most or data.train_rows < most):
        return given(name, data.train_rows, unit, "data.train_rows, if the source has as many")
    if most:
        return given(name, most, unit, f"the most that the data card {data.card} takes")
    return assumed(name, ASSUMED_ROWS, unit, "the data is not prepared yet")


def _card_rows(recipe: Recipe) -> int:
    """Most training rows of the recipe's data card, or of its sample; 0 where it sets no limit."""
    if not recipe.data.card:
        return 0
    from finetune.data.card import read_card

    card = read_card(recipe.data.card)
    return _lines(card.folder / card.sample) if recipe.data.sample else card.train_rows


def _tokens_per_row(recipe: Recipe, prepared: Path | None) -> Figure:
    name, unit = "tokens per row", "tokens"
    if report := _report(prepared):
        mean = report["splits"]["train"]["tokens"] / _sequences(report)
        return given(name, mean, unit, "mean of the prepared data of this run")
    return assumed(name, recipe.data.max_length, unit, "every row as long as data.max_length allows")


def longest_row(recipe: Recipe, prepared: Path | None) -> int:
    """Tokens of the longest row that trains: of prepared data, else the most that the recipe allows."""
    report, most = _report(prepared), recipe.data.max_length
    if not report or "packing" in report or "longest" not in report["splits"]["train"]:
        return most
    return min(most, int(report["splits"]["train"]["longest"]))


def _sequences(report: dict[str, Any]) -> int:
    """Training sequences of prepared data: its rows, or what they are packed into."""
    count: int = report["packing"]["sequences"] if "packing" in report else report["splits"]["train"]["rows"]
    return count


def _report(prepared: Path | None) -> dict[str, Any]:
    """The report of prepared data, or nothing."""
    file = prepared / "report.json" if prepared else None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    return found


def _lines(file: Path) -> int:
    with file.open("rb") as handle:
        return sum(1 for line in handle if line.strip())
