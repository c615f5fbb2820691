"""`report.html`: one page a person opens. Plots, tables and samples of a run; it loads nothing from anywhere."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.compare import compare
from finetune.rundir import RunDir, read_json, write_text

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


def report(run_dir: RunDir) -> None:
    """Writes `report.html` into the run folder from what its stages have left; says which stages are still to come."""
    from rich.console import Console

    write_text(run_dir.report, page(gather(run_dir)))
    Console().print(f"Report: {run_dir.report}", markup=False, highlight=False, soft_wrap=True)


def gather(run_dir: RunDir) -> dict[str, Any]:
    """All that the page shows, as plain values: the files of the run as they are, None for those not there yet."""
    from finetune.compose import read_recipe
    from finetune.licences import find_licence

    recipe = read_recipe(run_dir.recipe)
    stages = {"data": run_dir.data / "report.json", "train": run_dir.train, "evaluate": run_dir.scores}
    stages |= {"merge": run_dir.merged, "export": run_dir.export}
    mask = run_dir.data / "mask.txt"
    facts: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "run": str(run_dir.path),
        "quoted": shlex.quote(str(run_dir.path)),
        "missing": [name for name, path in stages.items() if not path.exists()],
        "plan": _read(run_dir.plan),
        "data": _read(stages["data"]),
        "train": _read(run_dir.train),
        "scores": _read(run_dir.scores),
        "mask": mask.read_text(encoding="utf-8") if mask.exists() else "",
        "ledger": ledger_summary(run_dir.data / "ledger.jsonl"),
        "exported": exported(run_dir.export),
        "parity": _read(run_dir.export / "parity.json"),
    }
    licence = find_licence(recipe.model.licence)
    facts["licence"] = dataclasses.asdict(licence) if licence else None
    return facts


def page(facts: dict[str, Any]) -> str:
    """The whole HTML text. Everything that comes from a file is escaped; only our own SVG is not."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from finetune.report import plots

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "flat": lambda value: list(flat(value))}
    scores, train = facts["scores"], facts["train"]
    drawings = {"intervals": Markup(""), "loss": Markup("")}
    if scores and scores["majority"]:
        rows = [
            (name, scores[key])
            for name, key in (("tuned", "tuned"), ("base", "base"), ("always one answer", "majority"))
        ]
        drawings["intervals"] = Markup(
            plots.intervals([(name, s["accuracy"], s["low"], s["high"]) for name, s in rows], scores["confidence"])
        )
    if train and train["steps"]:
        steps = train["steps"]
        drawings["loss"] = Markup(plots.loss_curve([s["step"] for s in steps], [s["loss"] for s in steps]))
    coverage = coverage_rows(train["coverage"]) if train else []
    facts = facts | {"compared": compare(facts["plan"], train) if train and facts["plan"] else []}
    return environment.get_template("page.html.jinja").render(
        facts, plots=drawings, coverage=coverage, storage=storage_sentence(coverage) if coverage else ""
    )


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


def ledger_summary(path: Path) -> list[tuple[str, int]]:
    """(split or why dropped, rows) from the ledger, most frequent first; empty without a ledger."""
    counts: dict[str, int] = {}
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                what = entry["split"] or f"dropped: {entry['code']}"
                counts[what] = counts.get(what, 0) + 1
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def exported(folder: Path) -> list[dict[str, Any]]:
    """Every exported file with its size in bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
    return [{"path": str(p.relative_to(folder)), "bytes": p.stat().st_size} for p in files]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf of a JSON value, numbers as the file writes them."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for i, part in enumerate(value):
            yield from flat(part, f"{prefix}[{i}]")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for reading: thousands apart, three significant digits below 1000; a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A fraction of 1 in percent, one decimal; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"  # noqa: RUF001


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None
