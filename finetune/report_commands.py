"""What the verbs `report page` and `report compare` do. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.commands import Request
from finetune.errors import RecipeError
from finetune.rundir import RunDir, open_run, write_text

PAGE = "python -m finetune report page run=runs/NAME/0001 out=page.html"
USAGE = "python -m finetune report compare runs=[runs/NAME/0001,runs/NAME/0002] out=compare.html"


def page(request: Request) -> int:
    """Writes the page of a run as it is now, beside the run: its own report.html means that all stages are done.

    Raises RecipeError with all that is wrong with the words, RunError for a folder that is no run.
    """
    _, out, problems = _words(request, [], "page.html", PAGE)
    if not request.run:
        problems.append(f"CFG-010 report page takes run=PATH. Type: {PAGE}")
    if problems:
        raise RecipeError(problems)
    request.run_dir = open_run(request.run)
    from finetune.report.gather import gather
    from finetune.report.render import page as page_of

    write_text(out, page_of(gather(request.run_dir)))
    print(f"the run as it is now: {out}", flush=True)
    return 0


def compare(request: Request) -> int:
    """Writes one page that compares finished runs. Raises RecipeError with all that is wrong with the words."""
    words, out, problems = _words(request, ["runs"], "compare.html", USAGE)
    if request.run:
        problems.append(f"CFG-010 report compare: run= is not known here, runs= is. Type: {USAGE}")
    paths = [path.strip() for path in words["runs"].strip().strip("[]").split(",")] if "runs" in words else []
    run_dirs = [RunDir(Path(path).expanduser()) for path in paths if path]
    problems += run_problems(run_dirs)
    if problems:
        raise RecipeError(problems)
    from finetune.pairwise import against_first
    from finetune.report.comparison import compare_runs

    write_text(out, compare_runs(run_dirs, against_first(run_dirs)))
    print(f"{len(run_dirs)} runs compared: {out}", flush=True)
    return 0


def run_problems(run_dirs: list[RunDir]) -> list[str]:
    """Why these runs cannot be compared, a sentence each: too few or many, one twice, missing, without scores."""
    from finetune.report.comparison import FEWEST, MOST

    if not FEWEST <= len(run_dirs) <= MOST:
        return [f"RPT-002 runs= names {len(run_dirs)} runs, a comparison takes {FEWEST} to {MOST}. Type: {USAGE}"]
    problems, seen = [], set()
    for run_dir in run_dirs:
        quoted, real = shlex.quote(str(run_dir.path)), run_dir.path.resolve()
        if real in seen:
            problems.append(f"RPT-003 {run_dir.path} stands twice in runs=. Name each run once.")
        elif not run_dir.recipe.is_file():
            problems.append(f"RPT-004 {run_dir.path} is not a run folder: it has no recipe.yaml. Type: {USAGE}")
        elif not run_dir.scores.is_file():
            what = f"RPT-005 {run_dir.path} has no scores: its evaluate stage has not finished."
            problems.append(f"{what} Type: python -m finetune evaluate run={quoted}")
        seen.add(real)
    return problems


def _words(request: Request, known: list[str], default: str, usage: str) -> tuple[dict[str, str], Path, list[str]]:
    """The words of a verb by name, where it writes to, and what is wrong with them."""
    words = dict(word.split("=", 1) for word in request.settings if "=" in word)
    unknown = sorted(set(words) - {*known, "out"})
    problems = [f"CFG-010 {request.verb}: {name}= is not known here. Type: {usage}" for name in unknown]
    out = Path(words["out"] if "out" in words else default).expanduser()
    if out.suffix != ".html":
        problems.append(f"RPT-001 out={out} does not end with .html. Type: out={default}")
    return words, out.absolute(), problems
