"""What a person sees of the scores: three short tables and a sentence under each."""

from __future__ import annotations

from typing import Any

from finetune.evaluate.rules import CLASSES


def show(scores: dict[str, Any]) -> None:
    """Prints held-out rows, forgetting, drift and gates, as far as they were measured."""
    from rich.console import Console

    console = Console()
    console.print(_heldout(scores))
    console.print(scores["verdict"], markup=False, highlight=False)
    for part, table in (("forgetting", _forgetting), ("safety", _drift)):
        if scores[part] is not None:
            console.print(table(scores[part]))
            console.print(scores[part]["verdict"], markup=False, highlight=False)
    for gate in scores["gates"]:
        said = f"gate {gate['gate']}={gate['limit']:g}: {'passed' if gate['passed'] else 'NOT MET'}, {gate['why']}"
        console.print(said, markup=False, highlight=False)


def _heldout(scores: dict[str, Any]) -> Any:
    from rich.table import Table

    metric = scores["metric"]
    answered = metric is not None and metric["name"] != "accuracy"
    more = (metric["name"], "interval") if answered else ()
    table = Table("", "loss", "perplexity", "right", "interval", *more, title=f"{scores['rows']} held-out rows")
    for name in ("base", "tuned", "majority"):
        side = scores[name]
        if side is None:
            continue
        loss = "loss" in side
        cells = [
            name if name != "majority" else f"always '{side['answer']}'",
            f"{side['loss']:.3f}" if loss else "",
            f"{side['perplexity']:.4g}" if loss and side["perplexity"] is not None else "",
            *_interval(side, "accuracy"),
        ]
        table.add_row(*cells, *(_interval(metric[name], "value") if answered and name in metric else ()))
    return table


def _forgetting(told: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("", "rows", "base", "tuned", "change", "interval", title="forgetting: general questions")
    for each in told["sets"]:
        shares = (_interval(each[name], "accuracy")[0] for name in ("base", "tuned"))
        table.add_row(each["name"], str(each["rows"]), *shares, *_points(each))
    if len(told["sets"]) > 1:
        table.add_row("all", str(sum(each["rows"] for each in told["sets"])), "", "", *_points(told))
    return table


def _drift(told: dict[str, Any]) -> Any:
    from rich.table import Table

    draws = 1 + len(told["seeds"])
    title = f"drift against base: {told['prompts']} harmful and {told['benign']} harmless prompts, {draws} answers each"
    table = Table("", *CLASSES, title=title)
    for kind, words in (("harmful", "harmful"), ("benign", "harmless")):
        for name in ("base", "tuned"):
            shares = told[name][kind]
            table.add_row(f"{words}, {name}", *(f"{100 * shares[c]['value']:.0f} %" for c in CLASSES))
    return table


def _interval(side: dict[str, Any], key: str) -> tuple[str, str]:
    if side[key] is None:
        return "", ""
    ends = "" if side["low"] is None else f"{100 * side['low']:.1f} to {100 * side['high']:.1f} %"
    return f"{100 * side[key]:.1f} %", ends


def _points(told: dict[str, Any]) -> tuple[str, str]:
    return f"{100 * told['change']:+.1f} points", f"{100 * told['low']:+.1f} to {100 * told['high']:+.1f}"
