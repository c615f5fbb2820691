"""Words on the command line become a function. Values are import strings, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys

from finetune import collecting
from finetune.commands import Request
from finetune.errors import RecipeError
from finetune.guard import word_problems

VERBS = {
    "run": ("finetune.commands:job", "the whole job (the verb may be left out); with run=PATH, what is left of it"),
    "data": ("finetune.commands:job", "rows, checked, cleaned and tokenised"),
    "data preview": ("finetune.commands:preview", "some of them, with the trained tokens in colour, also as a page"),
    "data explain": ("finetune.commands:explain", "whether they are prepared already, and what is different if not"),
    "data index": ("finetune.commands:index", "hashes of an evaluation set (file=FILE) that must not be trained on"),
    "train": ("finetune.commands:job", "... and the adapter"),
    "evaluate": ("finetune.commands:job", "... and base against tuned"),
    "merge": ("finetune.commands:job", "... and the adapter in the original weights"),
    "export": ("finetune.commands:job", "... and what a server loads"),
    "report": ("finetune.commands:job", "... and a page to look at"),
    "report page": (
        "finetune.report_commands:page",
        "the page of a run as it is now, finished or not (run=PATH; out=page.html)",
    ),
    "report compare": (
        "finetune.report_commands:compare",
        "one page that compares finished runs (runs=[PATH,PATH,...]; out=compare.html)",
    ),
    "plan": (
        "finetune.plan_commands:plan",
        "what it needs, takes and costs; loads and fetches nothing, unless probe=3 trains so many steps",
    ),
    "plan tco": ("finetune.plan_commands:tco", "what its tokens cost on your own node, against an API (plot=FILE.png)"),
    "check": ("finetune.commands:check", "whether it can start here"),
    "table": (
        "finetune.commands:table",
        "scores of all runs in a folder (run=FOLDER), e.g. of a sweep that was queued",
    ),
    "fetch": ("finetune.site_commands:fetch", "what a job needs from outside into the cache, and nothing else"),
    "bundle": (
        "finetune.site_commands:bundle",
        "what a site without a network needs, in one folder or file (out=FOLDER or out=FILE.tar)",
    ),
    "bundle verify": ("finetune.site_commands:bundle_verify", "whether such a bundle is what was packed (PATH)"),
    "sbom": ("finetune.site_commands:sbom", "the packages of this environment and their licences (out=FILE.json)"),
    "audit": (
        "finetune.site_commands:audit",
        "those of them with a known hole, by a local file (advisories=FILE.json, folder or zip)",
    ),
    "recipes": ("finetune.commands:recipes", "the recipes there are"),
    "chat": ("finetune.commands:chat", "a prompt to talk to the tuned model (run=PATH; of=merged without the adapter)"),
    "serve": (
        "finetune.commands:serve",
        "the export on a server of this machine (run=PATH; with=vllm, llama.cpp or transformers; port=8000)",
    ),
    "verify": (
        "finetune.commands:verify",
        "whether a finished run is still what its record says (run=PATH); with serve=URL, whether that server has the\n"
        + " " * 17
        + "tuned model or its base, and with --isolation that both answer as themselves (model=NAME base_model=NAME)",
    ),
}
"""Verb -> function that takes a `Request` and returns the exit code, and what the verb does."""

USAGE = """\
Fine-tune an open-weight Mixture-of-Experts model in 4 bits, here, with proofs.

  python -m finetune recipe=legal_quickstart                  a whole job, on a laptop
  python -m finetune plan recipe=llama4_70b_legal             what a large one needs and costs
  python -m finetune recipe=llama4_70b_legal scale=rehearsal  the same job on a tiny random model
  python -m finetune run=runs/legal_quickstart/0001           carry on where a run stopped
  python -m finetune -m recipe=NAME adapter.rank=8,16         several jobs, a table and a plot of their scores
  python -m finetune -m sweep=runs/NAME/sweep-0001            carry on where that stopped
  python -m finetune recipe=NAME launch=slurm                 as jobs on a Slurm cluster; does not wait

python -m finetune [VERB] recipe=NAME [key=value ...] | run=PATH
"""

OPTIONS = """\
  -m, --multirun     one job for every value of key=a,b,c
  --config-dir DIR   look for recipes, models, data, ... in DIR first
  --json             plan, or what verify found, as JSON
  --here             carry stages out in this process, also with launch.kind=slurm: what the jobs themselves type
  --run-file FILE    keep the run's path in FILE: the same words again carry on that run
  --isolation        `verify serve=URL`: ask base and tuned model of one server in turns
  --show-rows        errors may repeat words of rows, which else they only name by file, line and hash
  --rows N           how many rows `data preview` shows
  --version, --help

Every setting, with its meaning: finetune/recipe.py, judging.py and rates.py. The order of the stages: finetune/run.py.
"""


def main(words: list[str] | None = None) -> int:
    """The exit code of a command line: 0 done, 2 wrong words, 3 machine or files, 4 a gate not met, 130 stopped."""
    from finetune.failures import explain, quiet_threads

    quiet_threads()
    if words is None:
        collecting.seldom()
    request = None
    try:
        given = sys.argv[1:] if words is None else words
        if not given or {"-h", "--help", "help"} & set(given):
            print(help_text(), end="", flush=True)
            return 0
        if "--version" in given:
            from finetune import __version__

            print(__version__, flush=True)
            return 0
        if problems := word_problems(given):
            raise RecipeError(problems)
        request = read(given)
        if request.show_rows:
            os.environ["FINETUNE_SHOW_ROWS"] = "1"  # `data.rows.SHOW_ROWS`; processes that are started here have it too
        module, _, name = VERBS[request.verb][0].partition(":")
        code: int = getattr(importlib.import_module(module), name)(request)
        sys.stdout.flush()
        return code
    except BaseException as error:
        return explain(error, request.run_dir if request else None)


def read(words: list[str]) -> Request:
    """The words, sorted. Raises RecipeError with every word that is not understood."""
    request = Request(verb="run")
    rest, problems = list(words), []
    if "=" not in rest[0] and not rest[0].startswith("-"):
        request.verb = rest.pop(0)
        if rest and f"{request.verb} {rest[0]}" in VERBS:
            request.verb += f" {rest.pop(0)}"
        if request.verb not in VERBS:
            problems.append(f"CFG-011 {request.verb} is no verb.{_near(request.verb)} Verbs: {', '.join(VERBS)}.")
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if word in ("-m", "--multirun"):
            request.sweep = True
        elif word == "--json":
            request.as_json = True
        elif word == "--show-rows":
            request.show_rows = True
        elif word == "--here":
            request.here = True
        elif word == "--isolation":
            request.isolation = True
        elif name == "--run-file" and (value or rest):
            request.run_file = value or rest.pop(0)
        elif name == "--config-dir" and (value or rest):
            request.config_dir = value or rest.pop(0)
        elif name == "--rows" and (value or rest):
            number = value or rest.pop(0)
            request.rows = int(number) if number.isdigit() else 0
            if not request.rows:
                problems.append(f"CFG-011 --rows {number} is no number of rows. Type: --rows 5")
        elif word.startswith("-"):
            problems.append(
                f"CFG-011 {name} is no option. Options: -m, --config-dir DIR, --json, --here, --run-file FILE, "
                "--isolation, --show-rows, --rows N, --version, --help."
            )
        elif word in VERBS and request.verb == "run":
            request.verb = word
        elif request.verb == "bundle verify" and not request.settings:
            request.settings.append(word if word.startswith("path=") else f"path={word}")
        elif "=" not in word and not word.startswith("~"):
            problems.append(f"CFG-011 {word} is not of the form key=value.{_near(word)}")
        elif name == "run":
            request.run = value
            if not value:
                problems.append("CFG-011 run= lacks the path of a run folder. Type: run=runs/NAME/0001")
        else:
            request.settings.append(word)
    if request.sweep and request.verb in VERBS and VERBS[request.verb][0] != VERBS["run"][0]:
        problems.append(f"CFG-011 -m does not go with {request.verb}. Leave one of them out.")
    for option in [name for name, given in (("--here", request.here), ("--run-file", request.run_file)) if given]:
        if request.sweep or (request.verb in VERBS and VERBS[request.verb][0] != VERBS["run"][0]):
            problems.append(f"CFG-011 {option} goes with one job and its stages only. Leave it out.")
    if request.run_file and request.run:
        problems.append("CFG-011 --run-file keeps the path of a new run, run= names one. Leave one of them out.")
    if request.as_json and request.verb not in ("plan", "plan tco", "verify"):
        problems.append("CFG-011 --json goes with plan and verify only. Leave it out.")
    if request.isolation and request.verb != "verify":
        problems.append("CFG-011 --isolation goes with verify only. Leave it out.")
    if problems:
        raise RecipeError(problems)
    return request


def help_text() -> str:
    """What --help prints."""
    verbs = "".join(f"  {verb:<14} {what}\n" for verb, (_, what) in VERBS.items())
    return f"{USAGE}\n{verbs}\n{OPTIONS}"


def _near(word: str) -> str:
    from finetune.compose import nearest

    return nearest(word, list(VERBS))


if __name__ == "__main__":
    sys.exit(main())
