"""What the verbs `plan` and `plan tco` do. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.commands import Request, recipe_of
from finetune.errors import RecipeError


def plan(request: Request) -> int:
    """Prints what a recipe or a run needs, takes and costs; with probe=3 after so many training steps here."""
    from finetune.check import problems
    from finetune.gpus import gpus
    from finetune.machine import missing_weights, settled, unfit_weights
    from finetune.plan import plan as make_plan
    from finetune.show import show_comparison, show_plan

    steps = _steps(request)
    recipe = settled(recipe_of(request))
    if found := problems(recipe):
        raise RecipeError(found)
    rows: tuple[Any, ...] = ()
    if steps:
        from finetune.probe import probe

        probed = probe(recipe, steps)
        figures, rows = probed.plan, probed.rows
    else:
        figures = make_plan(recipe, prepared=request.run_dir.data if request.run_dir else None, gpus=gpus())
    if request.as_json:
        compared = {"probe": [row.as_json() for row in rows]} if rows else {}
        print(json.dumps(figures.as_json() | compared, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    from rich.console import Console

    console = Console()
    show_plan(figures, console)
    show_comparison(rows, console)
    if wrong := missing_weights(recipe) or unfit_weights(recipe):
        console.print(wrong.sentence(), markup=False, highlight=False, soft_wrap=True)
    return 0


def tco(request: Request) -> int:
    """Prints what tokens of the tuned model cost on your own node, against an API; plot=FILE draws it."""
    from finetune.show_tco import tell
    from finetune.tco import tco as reckon

    plot = _word(request, "plot")
    reckoned = reckon(recipe_of(request))
    if plot:
        from finetune.tco_plot import draw

        draw(Path(plot).expanduser(), reckoned)
    if request.as_json:
        print(json.dumps(reckoned.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    tell(reckoned, plot)
    return 0


def _word(request: Request, name: str) -> str:
    """The value of a word `name=value` that is no setting, taken out of the settings; empty without one."""
    found = [word.partition("=")[2] for word in request.settings if word.startswith(f"{name}=")]
    request.settings = [word for word in request.settings if not word.startswith(f"{name}=")]
    return found[-1] if found else ""


def _steps(request: Request) -> int:
    """The number of probe=N, 0 without it. Raises RecipeError (PLN-003) for what is no number of steps."""
    word = _word(request, "probe")
    if word and (not word.isdigit() or not 1 <= int(word) <= 1000):
        raise RecipeError([f"PLN-003 probe={word} is no number of training steps from 1 to 1000. Type: probe=3"])
    return int(word or 0)
