"""Benchmarks for `evaluate`: which there are, what they consist of, where their data is. The harness is not imported.

A task is a YAML file in the words of lm-evaluation-harness. Its name is looked for in the folder of the user
(`evaluate.tasks_folder`), then in `data/tasks` (ours, on the rows of data cards), then in the package lm_eval, which
brings thousands. A group or a tag of the harness is one task here, made of its members.

Nothing is fetched for a task of the harness: its data lies at `<tasks_folder>/<dataset_path>`, as it is on the hub.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from finetune.fetch import cache_folder, find_package
from finetune.recipe import Recipe

HARNESS = "lm-eval"
"""The package of the extra [tasks]."""
BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Kinds of files that `dataset_path` may name; others run code or unpack objects."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NO_MODULE = re.compile(r"(^|[./])(code_eval|humaneval|humaneval_infilling|mbpp|cruxeval|longproc)[./]")
"""Parts of the harness that run generated code, or load what does, in the process that evaluates."""
_NAMES = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#\[\]{}]+)", re.MULTILINE)
_INCLUDE = re.compile(r"^[\"']?include[\"']?:[ \t]*[\"']?([^\s\"'#\[\]{}]+)", re.MULTILINE)
_TAGS = re.compile(r"^[\"']?tag[\"']?:[ \t]*(?:\[([^\]\n]*)\]|([^\s#\[]+)|((?:\n[ \t]*-[ \t]*\S+)+))", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One task of the harness."""

    name: str
    """Its name there."""
    file: Path
    """Its YAML file."""
    config: dict[str, Any]
    """What the file says, includes and the settings of groups above it in; functions as their names."""
    changes: dict[str, Any]
    """What groups above it set."""
    ours: bool
    """It is one of `data/tasks`."""

    @property
    def about(self) -> dict[str, Any]:
        """Its `metadata`: for our own tasks `card`, `fields`, `sample`, `slice` and `scorer`."""
        given = self.config["metadata"] if "metadata" in self.config else {}
        return given if isinstance(given, dict) else {}

    def said(self, key: str) -> Any:
        """A key of `metadata`, "" where it has none."""
        return self.about[key] if key in self.about else ""

    @property
    def runs_code(self) -> bool:
        """Answers are programs, scored by running them in the sandbox."""
        return bool(self.said("scorer") == "code")


@dataclass(frozen=True, slots=True)
class Task:
    """What `evaluate.tasks` names: one task, or the members of a group or tag."""

    name: str
    """As it is named there."""
    leaves: list[Leaf] = field(default_factory=list)
    """What is run; at least one."""


def own_folder() -> Path:
    """The folder of our own tasks: `data/tasks` of the checkout when there is one, else the copy in the package."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "data"
    in_checkout = beside.is_dir() and (package.parent / "pyproject.toml").is_file()
    return (beside if in_checkout else package / "_data") / "tasks"


def own_names() -> list[str]:
    """Names of our own tasks, sorted."""
    return sorted(path.stem for path in own_folder().glob("*.yaml"))


def find(name: str, folder: str) -> Task:
    """The task of that name. Raises LookupError with a sentence (TSK-002, TSK-004) where there is none that can run."""
    places = [own_folder()]
    if folder and Path(folder).expanduser().is_dir():
        places.insert(0, Path(folder).expanduser())
    if not any(name in _files(place) for place in places) and (harness := harness_folder()):
        places.append(harness)
    leaves = list(_expanded(name, places, {}, ()))
    once = {leaf.name: leaf for leaf in leaves}
    return Task(name, list(once.values()))


def task_problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for everything about `evaluate.tasks` that cannot work, on this machine or anywhere."""
    asked = recipe.evaluate
    if not asked.tasks:
        usual = {"tasks_folder": "", "few_shot": -1, "allow_code": False, "task_chat": False}
        for key in (key for key, value in usual.items() if getattr(asked, key) != value):
            yield f"TSK-008 evaluate.{key} has no effect without evaluate.tasks. Leave it out, or name tasks."
        return
    if asked.tasks_folder and not Path(asked.tasks_folder).expanduser().is_dir():
        yield f"TSK-007 evaluate.tasks_folder={asked.tasks_folder} is no folder in {Path.cwd()}. Give the path of one."
    for name in sorted({name for name in asked.tasks if asked.tasks.count(name) > 1}):
        yield f"TSK-008 evaluate.tasks names {name} twice. Name it once."
    for name in dict.fromkeys(asked.tasks):
        try:
            task = find(name, asked.tasks_folder)
        except LookupError as error:
            yield str(error.args[0])
            continue
        yield from _of_task(task, recipe)


def tasks_absent(recipe: Recipe) -> list[str]:
    """A sentence for every package that the tasks of a recipe need and that is not at hand. Imports none of them."""
    if not recipe.evaluate.tasks:
        return []
    found = []
    if harness_folder() is None:
        found.append(
            "TSK-001 evaluate.tasks needs the package lm-eval, which is not installed. "
            f"Type: pip install '{HARNESS}==0.4.13', or leave evaluate.tasks out."
        )
    for name in recipe.evaluate.tasks if not (recipe.data.sample or recipe.network) else []:
        try:
            cards = dict.fromkeys(leaf.said("card") for leaf in find(name, recipe.evaluate.tasks_folder).leaves)
        except LookupError:
            continue  # said by task_problems
        for card in filter(None, cards):
            source = yaml.safe_load((own_folder().parent / f"{card}.yaml").read_text(encoding="utf-8"))
            wheel = source["package"], source["version"], source["sha256"]
            if not find_package(*wheel, cache=cache_folder(recipe)):
                found.append(
                    f"TSK-003 evaluate.tasks: the rows of {name} are in the package {wheel[0]} {wheel[1]}, which is "
                    f"not in {cache_folder(recipe) / 'packages'}, and network=false. Set network=true, or put it there."
                )
    return found


def harness_folder() -> Path | None:
    """Where the harness keeps its tasks; None where it is not installed. Does not import it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def data_of(leaf: Leaf, folder: str) -> dict[str, Any]:
    """What must be changed of a leaf so that its data is read from disk; empty for the rows of a card.

    Raises LookupError TSK-003 with the folder or file that is missing.
    """
    config = leaf.config
    if leaf.said("card"):
        return {}
    source = str(config["dataset_path"]) if "dataset_path" in config else ""
    if source in BUILDERS:
        kwargs = dict(config["dataset_kwargs"]) if "dataset_kwargs" in config else {}
        files = kwargs["data_files"] if "data_files" in kwargs else {}
        splits = files if isinstance(files, dict) else {"train": files}
        found = {split: [_file(leaf, name) for name in _listed(names)] for split, names in splits.items()}
        if not found:
            raise LookupError(_missing(leaf, "dataset_kwargs.data_files, which it does not name"))
        return {"dataset_kwargs": kwargs | {"data_files": found}}
    places = [Path(folder).expanduser() / source] if folder else []
    places += [leaf.file.parent / source, Path(source)] if not HUB_ID.fullmatch(source) else []
    given = config["dataset_name"] if "dataset_name" in config else None
    name = str(given) if given else ""
    for place in places:
        if source and place.is_dir():
            if name and (place / name).is_dir() and not (place / "README.md").is_file():
                return {"dataset_path": str((place / name).resolve()), "dataset_name": None}
            keep = name if (place / "README.md").is_file() else None
            return {"dataset_path": str(place.resolve()), "dataset_name": keep}
    where = places[0] if places else Path("FOLDER") / source
    raise LookupError(_missing(leaf, f"the folder {where}, with the files of the data set {source} as they are"))


def data_files(leaf: Leaf, folder: str) -> list[Path]:
    """The files on disk that the rows of a leaf come from, in order. Raises what `data_of` raises."""
    changes = data_of(leaf, folder)
    if "dataset_path" in changes:
        return sorted(path for path in Path(changes["dataset_path"]).rglob("*") if path.is_file())
    given = changes["dataset_kwargs"]["data_files"] if "dataset_kwargs" in changes else {}
    return [Path(name) for split in sorted(given) for name in given[split]]


def _of_task(task: Task, recipe: Recipe) -> Iterator[str]:
    asked = recipe.evaluate
    said = set()
    for leaf in task.leaves:
        if refusal := _refused(leaf):
            said.add(refusal)
        elif leaf.runs_code and not asked.allow_code:
            said.add(
                f"TSK-005 evaluate.tasks: {task.name} runs code that the models write. It runs confined, with no files "
                "and no network; set evaluate.allow_code=true, or leave the task out."
            )
        else:
            try:
                data_of(leaf, asked.tasks_folder)
            except LookupError as error:
                said.add(str(error.args[0]))
        fixed = "num_fewshot" in leaf.config and leaf.config["num_fewshot"] == 0
        if fixed and asked.few_shot > 0:
            said.add(
                f"TSK-008 evaluate.few_shot={asked.few_shot}: {task.name} fixes it to 0. Set evaluate.few_shot=-1."
            )
        if leaf.runs_code and asked.task_chat:
            said.add(
                f"TSK-008 evaluate.task_chat=true: {task.name} continues a program, which a chat template breaks up. "
                "Set evaluate.task_chat=false."
            )
    yield from sorted(said)[:3]


def _refused(leaf: Leaf) -> str:
    """Why a leaf cannot run here, or ""."""
    config, functions = leaf.config, list(_functions(leaf.config))
    unsafe = "unsafe_code" in config and config["unsafe_code"]
    if unsafe or any(NO_MODULE.search(name) for name in functions):
        return (
            f"TSK-006 evaluate.tasks: the scorer of {leaf.name} runs generated code inside the evaluating process. "
            "Set evaluate.tasks=[code_humaneval] evaluate.allow_code=true, which runs it confined."
        )
    harness = harness_folder()
    foreign = [name for name in functions if harness is None or not Path(name).is_relative_to(harness)]
    what = "class" if "class" in config else "custom_dataset" if "custom_dataset" in config else ""
    if foreign or what:
        named = f"the function {Path(foreign[0]).name}" if foreign else f"Python ({what})"
        return (
            f"TSK-004 evaluate.tasks: {leaf.name} names {named} to load, and a task is data here. "
            "Say it with templates, filters and metrics, or choose another task."
        )
    return ""


def _expanded(name: str, places: list[Path], changes: dict[str, Any], above: tuple[str, ...]) -> Iterator[Leaf]:
    """The leaves of a task, a group or a tag."""
    place = next((place for place in places if name in _files(place)), None)
    if place is None or name in above:
        raise LookupError(_unknown(name, places, above))
    for file in _files(place)[name]:
        config = read_task(file)
        if "group" in config and name == config["group"]:
            for item in config["task"] if "task" in config and isinstance(config["task"], list) else []:
                yield from _member(item, places, changes, (*above, name))
            continue
        own = str(config["task"])
        ours = place == own_folder()
        yield Leaf(own, file, config | changes, changes, ours)


def _member(item: Any, places: list[Path], changes: dict[str, Any], above: tuple[str, ...]) -> Iterator[Leaf]:
    """The leaves of one member of a group: a name, or a mapping with a name and changes, or a group within it."""
    if not isinstance(item, dict):
        yield from _expanded(str(item), places, changes, above)
        return
    if "group" in item and isinstance(item["task"] if "task" in item else "", list):
        for inner in item["task"]:
            yield from _member(inner, places, changes, above)
        return
    name = str(item["task"] if "task" in item else item["group"])
    more = {key: value for key, value in item.items() if key not in ("task", "group")}
    yield from _expanded(name, places, changes | more, above)


def read_task(file: Path) -> dict[str, Any]:
    """What a YAML task says, with what it includes; functions as the names of what they would load.

    Raises LookupError TSK-004 for a file that is none.
    """
    try:
        config = _Loader(file.read_bytes(), file.parent).get_single_data()
        included = config.pop("include") if "include" in config else []
        merged: dict[str, Any] = {}
        for name in _listed(included):
            merged |= read_task(file.parent / name)
        return merged | config
    except (yaml.YAMLError, OSError, AttributeError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise LookupError(f"TSK-004 evaluate.tasks: {file} is no task ({why}). Mend it.") from None


class _Function(str):
    """A function that a task names: the path that it would be loaded from."""


class _Loader(yaml.SafeLoader):
    """YAML in which `!function name` is a name and nothing is loaded."""

    def __init__(self, stream: bytes, folder: Path) -> None:
        super().__init__(stream)
        self.folder = folder


def _function(loader: _Loader, node: yaml.Node) -> _Function:
    assert isinstance(node, yaml.ScalarNode)
    return _Function((loader.folder / loader.construct_scalar(node)).resolve())


_Loader.add_constructor("!function", _function)


def _functions(value: Any) -> Iterator[str]:
    """The functions named anywhere in a task."""
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _functions(inner)


@lru_cache(maxsize=8)
def _files(folder: Path) -> dict[str, list[Path]]:
    """Name of a task, group or tag -> its file, or the files of all tasks with that tag. Text search only."""
    found: dict[str, list[Path]] = {}
    tagged: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        names = _NAMES.findall(file.read_text(encoding="utf-8", errors="replace"))
        if names:
            found.setdefault(names[-1], [file])
            for tag in _tags(file):
                tagged.setdefault(tag, []).append(file)
    return tagged | found


@lru_cache(maxsize=4096)
def _tags(file: Path) -> tuple[str, ...]:
    """The tags of a task, or of what it includes when it has none itself."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not (own := _TAGS.search(text)):
        return _tags(file.parent / included[1]) if (included := _INCLUDE.search(text)) else ()
    words = re.split(r"[\s,]+(?:-[ \t]+)?", next(filter(None, own.groups()), ""))
    return tuple(word.strip("\"'") for word in words if word.strip("\"'"))


def _unknown(name: str, places: list[Path], above: tuple[str, ...]) -> str:
    if above:
        return f"TSK-004 evaluate.tasks: {above[0]} has a member {name}, which is no task of its own. Name its members."
    known = sorted({known for place in places for known in _files(place)})
    near = difflib.get_close_matches(name, known, 3, 0.6)
    meant = (
        f"Did you mean {', '.join(near)}?" if near else f"There are {', '.join(own_names())}, and the harness's own."
    )
    if harness_folder() is None:
        meant += " (The harness is not installed: pip install 'lm-eval==0.4.13'.)"
    return f"TSK-002 evaluate.tasks: there is no task {name}. {meant}"


def _missing(leaf: Leaf, what: str) -> str:
    return (
        f"TSK-003 evaluate.tasks: the data of {leaf.name} is not here; nothing is fetched for it. It needs {what}. "
        "Put it there and set evaluate.tasks_folder=FOLDER."
    )


def _file(leaf: Leaf, name: str) -> str:
    path = leaf.file.parent / Path(name).expanduser()
    if not path.is_file():
        raise LookupError(_missing(leaf, f"the file {path}"))
    return str(path.resolve())


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
