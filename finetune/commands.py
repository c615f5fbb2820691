"""What each verb of the command line does. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError
from finetune.recipe import Recipe
from finetune.rundir import RunDir, open_run


@dataclass(kw_only=True, slots=True)
class Request:
    """The words of a command line, sorted."""

    verb: str
    """The verb, or `run` for the whole job."""
    settings: list[str] = field(default_factory=list)
    """`key=value` words, run= apart."""
    run: str = ""
    """Path given with run=, or empty."""
    config_dir: str | None = None
    """Folder given with --config-dir."""
    sweep: bool = False
    """Whether -m was given."""
    as_json: bool = False
    """Whether --json was given."""
    rows: int = 5
    """Number given with --rows."""
    here: bool = False
    """Whether --here was given."""
    run_file: str = ""
    """File given with --run-file, or empty."""
    isolation: bool = False
    """Whether --isolation was given."""
    show_rows: bool = False
    """Whether --show-rows was given."""
    run_dir: RunDir | None = None
    """The run that is worked on, as soon as it is known: errors name it."""


def job(request: Request) -> int:
    """Carries out the whole job, or its stages up to the verb, of a new or an existing run."""
    from rich.console import Console

    until = "report" if request.verb == "run" else request.verb
    console = Console()
    if request.sweep:
        from finetune.sweep import sweep

        _no_run(request)
        return sweep(request.settings, request.config_dir, until, console)
    from finetune.run import before_training, carry_on, start

    recipe = recipe_of(request)
    queued = recipe.launch.kind == "slurm" and not request.here
    if queued and not request.run_dir:
        _ready(recipe, console)
    request.run_dir = request.run_dir or start(recipe, until)
    if request.run_file:
        _keep(request.run_dir, request.run_file)
    if queued:
        return _submit(request.run_dir, until, console)
    run_dir = carry_on(request.run_dir, until=until)
    if recipe.launch.kind == "slurm" and until == "data" and not run_dir.train.exists():
        # The rest of the job starts the training itself.
        before_training(recipe, run_dir, "report")
    if until == "report":
        for what, where in (
            ("report", run_dir.report),
            ("model", run_dir.export),
            ("talk to it", f"python -m finetune chat run={run_dir.path}"),
            ("check it later", f"python -m finetune verify run={run_dir.path}"),
        ):
            console.print(f"{what}: {where}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"run: {run_dir.path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def table(request: Request) -> int:
    """Prints the scores of the runs in a folder and writes them there, with a plot, as a sweep does at its end."""
    from rich.console import Console

    from finetune.sweep import tabled

    if not request.run or request.settings:
        raise RecipeError(["CFG-010 table takes run=FOLDER alone. Type: python -m finetune table run=runs/NAME"])
    try:
        found = tabled(Path(request.run), Console())
    except OSError as error:  # of somebody else's folder: what was asked for is on the terminal
        _print(f"note: not written: {error.filename}: {error.strerror}")
        return 0
    plot = " and sweep.png" if found.picture.exists() else ""
    _print(f"written: {found.path / 'sweep.md'}, sweep.json{plot}")
    return 0


def check(request: Request) -> int:
    """Says whether a recipe or a run can start here, or everything that stops it."""
    from finetune.run import permit, refuse

    recipe = recipe_of(request)
    refuse(recipe)
    permit(recipe, request.run_dir, "report")
    print(f"{recipe.name}: nothing stands in the way.")
    return 0


def preview(request: Request) -> int:
    """Prints prepared rows with their trained tokens coloured, and writes them as a page beside."""
    from rich.console import Console

    from finetune.data.output import dataset
    from finetune.data.page import say, show_rows, write_page
    from finetune.data.prepare import prepared
    from finetune.data.store import decoder
    from finetune.machine import settled
    from finetune.source import base_folder

    recipe = settled(recipe_of(request))
    base = base_folder(recipe)
    run_dir = request.run_dir
    folder = run_dir.data if run_dir and run_dir.data.exists() else prepared(recipe, base)
    rows = dataset(folder / "train.arrow")
    shown = [rows[i] for i in range(min(request.rows, len(rows)))]
    console, tokenizer = Console(), decoder(base)
    show_rows(shown, tokenizer, console)
    target = (run_dir.path if run_dir else Path()) / "data_preview.html"
    write_page(shown, tokenizer, f"{recipe.name}: {len(shown)} of {len(rows)} training rows", target)
    say(console, f"\nthe same as a page: {target}")
    return 0


def explain(request: Request) -> int:
    """Says whether the rows of a recipe are prepared already, and if not, what is different."""
    from finetune.data.prepare import store_of
    from finetune.data.store import explain as reasons
    from finetune.machine import settled
    from finetune.source import base_folder

    recipe = settled(recipe_of(request))
    store = store_of(recipe, base_folder(recipe))
    print("\n".join(reasons(store.root, store.address)))
    return 0


def index(request: Request) -> int:
    """Makes the index of an evaluation set, against which training rows are checked: hashes, no text."""
    from finetune.data.benchmarks import items_of_card
    from finetune.data.contamination import build
    from finetune.data.items import read_items

    words = dict(word.split("=", 1) for word in request.settings)
    usage = (
        "Type: python -m finetune data index file=FILE.jsonl, or card=NAME network=true; as you like with name=NAME, "
        "kind=text|code, out=NAME.index"
    )
    unknown = sorted(set(words) - {"file", "card", "network", "cache_dir", "name", "kind", "out"})
    kind = words["kind"] if "kind" in words else "text"
    if unknown or ("file" in words) == ("card" in words) or kind not in ("text", "code"):
        what = f"{unknown[0]} is not known here" if unknown else "it takes file= or card=, and kind=text or kind=code"
        raise RecipeError([f"CFG-012 data index: {what}. {usage}"])
    source = words["file"] if "file" in words else words["card"]
    if "file" in words:
        items = read_items(Path(source).expanduser())
    else:
        cache = words["cache_dir"] if "cache_dir" in words else ""
        network = "network" in words and words["network"] == "true"
        items = items_of_card(source, Recipe(cache_dir=cache, network=network))
    name = words["name"] if "name" in words else Path(source).stem
    out = Path(words["out"] if "out" in words else f"{name}.index").expanduser()
    made = build(items, name, kind)
    made.save(out)
    print(f"{out}: {len(made)} items of {source}, as hashes. Use it: data.benchmarks={{{out}: fail}} (or drop, report)")
    print("\n".join(f"not detected: {limit}" for limit in made.limits()))
    return 0


def recipes(request: Request) -> int:
    """Prints the recipes and what they are for."""
    from finetune.compose import recipe_purposes

    found = recipe_purposes(request.config_dir)
    width = max(map(len, found), default=0)
    for name, purpose in found.items():
        print(f"{name:{width}}  {purpose}")
    return 0


def verify(request: Request) -> int:
    """Checks a finished run against its record and its files; with serve=URL, whether a server has the tuned model."""
    if request.isolation or any(word.startswith("serve=") for word in request.settings):
        return _verify_server(request)
    from finetune.verify import as_json, signature_state
    from finetune.verify import verify as verify_run

    keys = [word.removeprefix("public_key=") for word in request.settings if word.startswith("public_key=")]
    request.settings = [word for word in request.settings if not word.startswith("public_key=")]
    run_dir, key = _run_dir(request), Path(keys[-1]) if keys else None
    if request.as_json:
        found = as_json(run_dir, key)
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return 0 if found["verified"] else 3
    print(f"{verify_run(run_dir, key)} files are as recorded in {run_dir.record}")
    if (signed := signature_state(run_dir, key)) != "none":
        print(f"signatures: {signed}" + ("" if key else ", give public_key=pub.pem"))
    return 0


def _verify_server(request: Request) -> int:
    """Asks a server the prompts that were recorded at the merge."""
    from finetune import canary

    usage = "serve=http://127.0.0.1:8000 run=runs/NAME/0001 [model=NAME] [--isolation [base_model=NAME]]"
    words = _words(request, ["serve", "model", *(["base_model"] if request.isolation else [])], usage)
    if "serve" not in words:
        raise RecipeError([f"CFG-010 --isolation needs a server. Type: python -m finetune verify {usage}"])
    run_dir = _run_dir(request)
    server = words.pop("serve")
    if request.isolation:
        canary.isolation(run_dir, server, _print, **words)
    else:
        canary.canary(run_dir, server, _print, **words)
    return 0


def serve(request: Request) -> int:
    """Serves the export of a run on this machine until Ctrl-C."""
    from finetune.serve import serve as serve_run

    usage = "run=runs/NAME/0001 [with=vllm|llama.cpp|transformers] [port=8000]"
    words = _words(request, ["with", "port"], usage)
    port = words["port"] if "port" in words else "8000"
    if not port.isdigit() or int(port) > 65535:
        raise RecipeError([f"CFG-010 port={port} is no port. Type: port=8000, or port=0 for any free one"])
    run_dir = _run_dir(request)
    try:
        serve_run(run_dir, _print, name=words["with"] if "with" in words else "", port=int(port))
    except KeyboardInterrupt:
        _print("the server is ended.")
    return 0


def chat(request: Request) -> int:
    """Talks with the tuned model of a run."""
    from finetune.chat import SIDES
    from finetune.chat import chat as talk

    words = _words(request, ["of"], "run=runs/NAME/0001 [of=adapter|merged]")
    of = words["of"] if "of" in words else SIDES[0]
    if of not in SIDES:
        raise RecipeError([f"CFG-010 of={of}: one can talk to {' or '.join(SIDES)}. Type: of={SIDES[0]}"])
    talk(_run_dir(request), of)
    return 0


def _words(request: Request, known: list[str], usage: str) -> dict[str, str]:
    """The key=value words that a verb has of its own, taken out of the request. Raises RecipeError for any other."""
    words = dict(word.split("=", 1) for word in request.settings if "=" in word)
    if unknown := sorted(set(words) - set(known)):
        what = f"CFG-010 {request.verb}: {unknown[0]}= is not known here."
        raise RecipeError([f"{what} Type: python -m finetune {request.verb} {usage}"])
    if empty := [name for name, value in words.items() if not value]:
        raise RecipeError([f"CFG-010 {empty[0]}= lacks its value. Type: python -m finetune {request.verb} {usage}"])
    request.settings = []
    return words


def _print(text: str) -> None:
    print(text, flush=True)


def recipe_of(request: Request) -> Recipe:
    """The recipe of the words, or the frozen one of run=."""
    from finetune.compose import compose, read_recipe

    if request.run_file and not request.run and Path(request.run_file).is_file():
        return _kept(request, compose(request.settings, request.config_dir))
    if not request.run:
        return compose(request.settings, request.config_dir)
    if not request.settings:
        request.run_dir = open_run(request.run)
        return read_recipe(request.run_dir.recipe)
    from finetune import beside_run

    beside_run.refuse(request.settings, request.verb, request.run)
    request.run_dir = open_run(request.run)
    beside_run.allow(request.run_dir, request.settings)
    return read_recipe(request.run_dir.recipe)


def _keep(run_dir: RunDir, file: str) -> None:
    """Writes the path of the run into the file of --run-file, before anything is done in it."""
    from finetune.rundir import write_text

    write_text(Path(file).absolute(), f"{run_dir.path.absolute()}\n")


def _kept(request: Request, wanted: Recipe) -> Recipe:
    """The frozen recipe of the run that the file of --run-file names. Raises RunError when the words have changed."""
    from dataclasses import replace

    from finetune.compose import read_recipe
    from finetune.errors import RunError

    request.run_dir = open_run(Path(request.run_file).read_text(encoding="utf-8").strip())
    frozen = read_recipe(request.run_dir.recipe)
    if wanted.train.precision == "auto":  # decided where the run began, which may be another machine
        wanted = replace(wanted, train=replace(wanted.train, precision=frozen.train.precision))
    if wanted != frozen:
        what = f"{request.run_dir.path}, which --run-file {request.run_file} names, was started with other settings"
        raise RunError("RUN-006", what, "a run keeps its settings", f"another file, or: rm {request.run_file}")
    return frozen


def _ready(recipe: Recipe, console: Any) -> None:
    """Nothing, or what stands in the way of a new run as Slurm jobs: said before there is a folder of it."""
    from finetune.machine import settled
    from finetune.submit import ready

    ready([settled(recipe)], lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))


def _submit(run_dir: RunDir, until: str, console: Any) -> int:
    """Queues what is not done in a run."""
    from finetune.submit import submit

    console.print(f"run: {run_dir.path}", markup=False, highlight=False, soft_wrap=True)
    submit([run_dir], until, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    return 0


def _run_dir(request: Request) -> RunDir:
    """The run of run=, which these verbs need."""
    if not request.run or request.settings:
        raise RecipeError(
            [f"CFG-010 {request.verb} takes run=PATH alone. Type: python -m finetune {request.verb} run=runs/NAME/0001"]
        )
    request.run_dir = open_run(request.run)
    return request.run_dir


def _no_run(request: Request) -> None:
    if request.run:
        raise RecipeError(["CFG-010 -m starts new runs: it does not go with run=. Leave one of them out."])
