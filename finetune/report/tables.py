"""What the tables of the page say in words: coverage, the router, what changed most."""

from __future__ import annotations

import math
import re
from typing import Any

from finetune.report.reading import has, percent

GROUPS = {
    "embedding": "embeddings and head",
    "attention": "attention",
    "dense": "dense MLPs",
    "shared": "shared experts",
    "routed": "routed experts",
    "router": "router",
    "other": "norms and the rest",
}
"""Group of the coverage table -> words."""


def coverage_rows(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The coverage table in words: how each group is really stored, and whether it is trained."""
    total = sum(row["parameters"] for row in table)
    told = []
    for row in table:
        count, packed = row["parameters"], row["parameters_4bit"]
        if not count:
            continue
        rest = 8 * (row["bytes"] - packed * 4.5 / 8) / (count - packed) if packed < count else 0.0
        stored = (
            "4-bit"
            if packed == count
            else f"{rest:.0f}-bit"
            if not packed
            else f"{percent(packed / count)} 4-bit, rest {rest:.0f}-bit"
        )
        told.append(
            {
                "name": GROUPS[row["group"]],
                "parameters": count,
                "share": count / total,
                "gib": row["bytes"] / 2**30,
                "bits": 8 * row["bytes"] / count,
                "stored": stored,
                "packed": packed,
                "adapted": row["adapted"],
                "trainable": row["trainable"],
            }
        )
    return told


def storage_sentence(rows: list[dict[str, Any]]) -> str:
    """Which groups are really in 4 bits, said plainly."""
    total, packed = sum(row["parameters"] for row in rows), sum(row["packed"] for row in rows)
    yes = [row["name"] for row in rows if row["packed"] == row["parameters"]]
    no = [row["name"] for row in rows if not row["packed"]]
    partly = [row["name"] for row in rows if 0 < row["packed"] < row["parameters"]]
    if not packed:
        return "No weight of the base is in 4 bits."
    said = f"{percent(packed / total)} of the base is really in 4 bits"
    said += f": {', '.join(yes)}." if yes else "."
    said += f" Partly: {', '.join(partly)}." if partly else ""
    return said + (f" Not in 4 bits: {', '.join(no)}." if no else "")


def router_rows(train: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per layer that routes: tokens of each expert, evenness, the busiest expert, those without a token.

    Empty for a dense base and for files that are older than this count.
    """
    told = []
    for layer, load in (train["router"] if "router" in train else {}).items():
        tokens = load["tokens"]
        told.append(
            {
                "layer": layer_name(layer),
                "tokens": tokens,
                "entropy": load["entropy"],
                "busiest": tokens.index(max(tokens)),
                "busiest_share": load["busiest_share"],
                "even": 1 / len(tokens),
                "idle": load["dead_experts"],
            }
        )
    return told


def router_sentence(rows: list[dict[str, Any]]) -> str:
    """How even the routing was, and whether an expert got nothing: what the colours of the heat map say."""
    least = min(rows, key=lambda row: row["entropy"])
    idle, experts = sum(len(row["idle"]) for row in rows), sum(len(row["tokens"]) for row in rows)
    said = (
        f"{len(rows)} layers, {experts:,} experts. Least even: layer {least['layer']}, evenness {least['entropy']:.3f}"
    )
    said += f" (1 is even); its expert {least['busiest']} got {percent(least['busiest_share'])} of the tokens"
    return f"{said}, an even share is {percent(least['even'])}. Experts without any token: {idle:,}."


def layer_name(path: str) -> str:
    """The number of a layer in a module's path, or the path where it has none."""
    found = re.search(r"\.(\d+)\.", path)
    return found[1] if found else path


def moments(train: dict[str, Any]) -> dict[str, Any]:
    """First, last and lowest loss, highest gradient norm, and tokens per second of the whole training."""
    steps = train["steps"]
    lowest = min(steps, key=lambda step: step["loss"])
    highest = max(steps, key=lambda step: step["grad_norm"])
    counted = [step for step in steps if "tokens" in step and step["seconds"]]
    seconds = sum(step["seconds"] for step in counted)
    return {
        "first": steps[0],
        "last": steps[-1],
        "lowest": lowest,
        "highest_norm": highest,
        "speed": sum(step["tokens"] for step in counted) / seconds if seconds else None,
        "speeds": [(step["step"], step["tokens"] / step["seconds"]) for step in counted],
    }


def gain(scores: dict[str, Any]) -> dict[str, float] | None:
    """How much more often tuned is right than base on the same rows, as a fraction, with an interval; None without.

    What the scores say themselves where they do; of older ones the interval of Agresti and Min (2005): Wald's of a
    paired difference after half a row is added to every cell.
    """
    if metric := has(scores, "metric"):
        return {"mean": metric["change"], "low": metric["low"], "high": metric["high"]}
    test = scores["tests"]["tuned_vs_base"]
    if test is None or scores["base"]["accuracy"] is None:
        return None
    from scipy.stats import norm

    wins, losses, rows = test["wins"] + 0.5, test["losses"] + 0.5, scores["rows_with_choices"] + 2
    middle = (wins - losses) / rows
    spread = math.sqrt(wins + losses - (wins - losses) ** 2 / rows) / rows
    width = float(norm.ppf(0.5 + scores["confidence"] / 2)) * spread
    change = scores["tuned"]["accuracy"] - scores["base"]["accuracy"]
    return {"mean": change, "low": max(-1.0, middle - width), "high": min(1.0, middle + width)}
