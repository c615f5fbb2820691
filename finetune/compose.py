"""From words and YAML files to a typed `Recipe`. The only module that knows Hydra."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import itertools
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import guard, keys
from finetune.errors import RecipeError
from finetune.recipe import Recipe

GROUPS = ("recipe", "model", "adapter", "data", "train", "launch", "evaluate", "merge", "export", "costs", "scale")
"""Folders of a recipes folder; `group=option` on the command line chooses a file in one."""

OPTION = re.compile(r"[A-Za-z0-9][\w.-]*|")
"""Name of a file in one of them, or none."""


MOST_JOBS = 10_000
"""Jobs of one sweep. Every setting with several values multiplies them."""


def load_recipe(name: str, *overrides: str, config_dir: str | Path | None = None) -> Recipe:
    """The recipe `recipes/recipe/<name>.yaml` with `key=value` overrides; `config_dir` is looked through first.

    Raises RecipeError with every problem found.
    """
    return compose([f"recipe={name}", *overrides], config_dir)


def compose(words: Sequence[str], config_dir: str | Path | None = None) -> Recipe:
    """The recipe that words of the command line describe, e.g. `["recipe=legal_quickstart", "adapter.rank=8"]`.

    Raises RecipeError with every problem found.
    """
    folders = recipe_folders(config_dir)
    plain, problems = _read_words(words, folders)
    if config_dir:
        problems += _folder_problems(folders[0])
    if problems:
        raise RecipeError(problems)
    tree, files = _hydra_compose(plain, folders)
    try:
        recipe = from_config(tree)
    except RecipeError as error:
        raise RecipeError([_with_place(p, words, files) for p in error.problems]) from None
    if recipe.data.card and recipe.data.train_files:
        print(f"data: your train_files take the place of the card {recipe.data.card}", file=sys.stderr, flush=True)
        recipe.data.card, recipe.data.sample, recipe.data.excerpt_words = "", False, 0
    return recipe


def from_config(config: Any) -> Recipe:
    """The typed recipe in a plain tree of settings (or an OmegaConf object); defaults fill what it leaves out.

    Raises RecipeError that names every unknown key, every value of a wrong type and everything that is not allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    forbidden = guard.forbidden(tree)
    problems = list(forbidden.values())
    schema = OmegaConf.structured(Recipe)
    known = keys.settings(Recipe)
    references = []
    for key, value in keys.flatten(tree, known):
        if any(bad == key or bad.startswith(key + ".") for bad in forbidden):
            continue
        if key not in known:
            problems.append(keys.unknown(key, known))
            continue
        try:
            OmegaConf.update(schema, key, value)
        except (OmegaConfBaseException, ValueError):
            problems.append(keys.wrong_type(key, value, known[key]))
        if isinstance(value, str) and "${" in value:
            references.append((key, value))
    for key, value in references:
        try:
            OmegaConf.select(schema, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            problems.append(
                f"CFG-007 {key}={value} cannot be resolved: {str(error).splitlines()[0]}. Write the value out."
            )
    if problems:
        raise RecipeError(problems)
    try:
        recipe = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise RecipeError([f"CFG-004 {str(error).splitlines()[0]}. Give every setting a value."]) from None
    assert isinstance(recipe, Recipe)
    return recipe


def with_settings(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """A recipe with other values of some settings, given as `key=value`. Raises RecipeError with every problem."""
    parsed, problems = _parse(words)
    tree = dataclasses.asdict(recipe)
    for word, override in parsed:
        if override.is_sweep_override() or override.is_delete():
            problems.append(f"CFG-003 {word}: one value is needed. Write {override.key_or_group}=VALUE.")
            continue
        *path, last = override.key_or_group.split(".")
        functools.reduce(dict.__getitem__, path, tree)[last] = override.value()
    if problems:
        raise RecipeError(problems)
    return from_config(tree)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a frozen recipe.yaml. Raises RecipeError when it is not one; imports no Hydra."""
    small = path.stat().st_size <= guard.MAX_YAML_BYTES
    return copy.deepcopy(_read(path, path.read_bytes() if small else b""))


@functools.lru_cache(maxsize=4)
def _read(path: Path, content: bytes) -> Recipe:
    """What `read_recipe` gives, kept by the bytes that the file has: a job reads its own fifteen times."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if problem := guard.yaml_problem(path):
        raise RecipeError([problem])
    try:
        return from_config(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError([f"CFG-008 {path}: {' '.join(str(error).split())}. Mend this file."]) from None


def recipe_yaml(recipe: Recipe) -> str:
    """The text of recipe.yaml: every setting with its value. `read_recipe` gives back an equal recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """One list of words per job: `adapter.rank=8,16` gives two. Hydra's grammar: `a,b`, `range(1,4)`, `choice(a,b)`.

    Raises RecipeError for a word that is no `key=value`.
    """
    parsed, problems = _parse(words)
    if problems:
        raise RecipeError(problems)
    choices = []
    for word, override in parsed:
        if not override.is_sweep_override():
            choices.append([word])
        elif override.is_discrete_sweep() and not _is_glob(override):
            values = itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1)
            choices.append([f"{override.get_key_element()}={value}" for value in values])
        else:
            problems.append(
                f"CFG-003 {word}: this kind of sweep has no list of values. Write key=a,b,c or key=range(1,4)."
            )
    if math.prod(map(len, choices)) > MOST_JOBS:
        problems.append(f"CFG-003 {' '.join(words)}: more than {MOST_JOBS:,} jobs. Give fewer values.")
    if problems:
        raise RecipeError(problems)
    return [list(job) for job in itertools.product(*choices)]


def recipe_folders(config_dir: str | Path | None = None) -> list[Path]:
    """Folders with settings, the first wins: the user's own, then the checkout's `recipes/` or the wheel's copy.

    Raises RecipeError when `config_dir` is no folder.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "recipes"
    ours = checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "_recipes"
    if not config_dir:
        return [ours]
    mine = Path(config_dir).expanduser().resolve()
    if not mine.is_dir():
        groups = ", ".join(GROUPS)
        raise RecipeError([f"CFG-009 --config-dir {config_dir} is not a folder. Give a folder with any of: {groups}."])
    return [mine, ours]


def recipe_names(config_dir: str | Path | None = None) -> list[str]:
    """Names that `recipe=` takes, sorted. Reads folder listings only."""
    return options("recipe", recipe_folders(config_dir))


def recipe_purposes(config_dir: str | Path | None = None) -> dict[str, str]:
    """Name -> purpose of every recipe, read without Hydra."""
    purposes = {}
    for name in recipe_names(config_dir):
        found = next(f / "recipe" / f"{name}.yaml" for f in recipe_folders(config_dir) if _is_option(f, "recipe", name))
        tree, _ = guard.yaml_tree(found)
        purposes[name] = str(tree["purpose"]) if isinstance(tree, dict) and "purpose" in tree else ""
    return purposes


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """Names that `group=` takes, sorted."""
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def nearest(name: str, names: Sequence[str]) -> str:
    """` Nearest: x.` for a misspelt name, or an empty text."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Nearest: {close[0]}." if close else ""


def _is_option(folder: Path, group: str, name: str) -> bool:
    return (folder / group / f"{name}.yaml").is_file()


def _parse(words: Sequence[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed, problems = [], []
    for word in words:
        key, _, value = word.partition("=")
        if len(word) > guard.MAX_WORD or guard.depth(word) > guard.MAX_DEPTH:
            what = f"at most {guard.MAX_WORD:,} characters, nested at most {guard.MAX_DEPTH} deep"
            problems.append(f"CFG-003 {key[:80]}: the value is too long or too deep ({what}). Put it into a file.")
            continue
        if guard.is_secret(key, value):
            problems.append(guard.secret_problem(key.lstrip("+~")))
            continue
        try:
            parsed.append((word, parser.parse_override(word)))
        except HydraException as error:
            reason = str(error).splitlines()[0] if value else "it is not of the form key=value"
            quoted = f" A value with = , or brackets needs quotes inside: '{key}=\"{value}\"'" if value else ""
            problems.append(f"CFG-003 {word}: {reason}.{quoted}")
    return parsed, problems


def _read_words(words: Sequence[str], folders: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Words in the one form that Hydra gets (`group=option`, `++key=value`), and problems."""
    parsed, problems = _parse(words)
    plain = []
    for word, override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            problems.append(f"CFG-003 {word} gives several values, which is a sweep. Add -m, or quote the value.")
        elif key.split(".")[0].split("/")[0] == "hydra":
            problems.append(f"CFG-005 {word}: Hydra's own settings cannot be changed here. Leave it out.")
        elif override.is_delete():
            problems.append(f"CFG-003 {word}: a setting cannot be removed, it always has a value. Write {key}=VALUE.")
        elif override.package is not None or "/" in key:
            problems.append(
                f"CFG-003 {word}: settings cannot be moved to another place. Write group=option or key=value."
            )
        elif key in GROUPS:
            option, exist = override.value(), options(key, folders)
            if option in exist:
                plain.append(f"{key}={option}")
            else:
                problems.append(
                    f"CFG-002 {key}={option} does not exist.{nearest(str(option), exist)} Exist: {', '.join(exist)}."
                )
        elif isinstance(override.value(), str) and guard.has_resolver(override.value()):
            problems += guard.forbidden({key: override.value()}).values()
        else:
            plain.append("++" + word.lstrip("+"))
    return plain, problems


def _hydra_compose(plain: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, Any], list[Path]]:
    """The composed tree, unresolved and unchecked, and the files it was made of."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Hydra looks through its first folder before any other, and wants config.yaml there: a folder with nothing else in
    # it lets the user's files come before ours.
    first = next(f / "config.yaml" for f in folders if (f / "config.yaml").is_file())
    quoted = ", ".join(f'"file://{folder}"' for folder in folders)
    try:
        with tempfile.TemporaryDirectory() as root, initialize_config_dir(root, version_base="1.3"):
            shutil.copy(first, root)
            config = compose("config", overrides=[*plain, f"hydra.searchpath=[{quoted}]"], return_hydra_config=True)
        tree: Any = OmegaConf.to_container(config, resolve=False)
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).strip("/").rpartition("/")
        exist = options(group, folders)
        sentence = f"CFG-002 {group}={option} does not exist.{nearest(option, exist)} Exist: {', '.join(exist)}."
        raise RecipeError([sentence if group in GROUPS else f"CFG-002 {str(error).splitlines()[0]}."]) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RecipeError([f"CFG-003 the settings do not fit together: {why}. Leave out the words it names."]) from None
    choices = tree.pop("hydra")["runtime"]["choices"]
    chosen = ["config", *(f"{group}/{option}" for group, option in choices.items() if not group.startswith("hydra/"))]
    return tree, [p for name in chosen for f in folders if (p := f / f"{name}.yaml").is_file()]


def _folder_problems(folder: Path) -> list[str]:
    """What may not be in a user's folder of settings: bad YAML, Hydra's own settings, classes, secrets, resolvers."""
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        group = path.relative_to(folder).parts[0]
        if not path.resolve().is_relative_to(folder):
            problems.append(f"CFG-005 {path}: a link that leads out of the folder of settings. Put the file there.")
            continue
        if group not in (*GROUPS, "config.yaml"):
            if group == "hydra":
                problems.append(
                    f"CFG-005 {path}: Hydra's own settings cannot be changed here. Remove the folder {group}/."
                )
            continue
        tree, problem = guard.yaml_tree(path)
        if problem:
            problems.append(problem)
            continue
        found = list(guard.forbidden(tree).values())
        if isinstance(tree, dict) and "hydra" in tree:
            found.append("CFG-005 hydra: Hydra's own settings cannot be changed here. Remove the key.")
        found += [*_defaults_problems(tree), *_package_problems(path)]
        problems += [f"{p} ({path})" for p in found]
    return problems


def _defaults_problems(tree: Any) -> Iterator[str]:
    """A sentence for every entry of a defaults list that is not one of our groups: `- model: NAME`, `- _self_`."""
    entries = tree["defaults"] if isinstance(tree, dict) and isinstance(tree.get("defaults"), list) else []
    for entry in entries:
        names = entry if isinstance(entry, dict) else {entry: ""}
        for name, option in names.items():
            group = str(name).removeprefix("optional ").removeprefix("override ").removeprefix("/")
            option = "" if option is None else str(option)
            if entry != "_self_" and (group not in GROUPS or not OPTION.fullmatch(option)):
                shown = f"{name}: {option}" if option else name
                yield f"CFG-005 defaults: {shown} is none of {', '.join(GROUPS)}. Write - GROUP: OPTION."


def _package_problems(path: Path) -> Iterator[str]:
    """A sentence for a first line that moves a file's settings elsewhere, as `# @package hydra` does."""
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"#\s*@package\s+(.*)", line)
        if found and found[1].strip() not in ("_global_", "_group_"):
            yield f"CFG-005 # @package {found[1].strip()}: settings cannot be moved to another place. Remove the line."


def _with_place(problem: str, words: Sequence[str], files: Sequence[Path]) -> str:
    """The problem with the file it stands in, when it does not come from the words."""
    key = problem.split(" ", 2)[1].rstrip(":").partition("=")[0]
    if any(word.lstrip("+").partition("=")[0] == key for word in words):
        return problem
    leaf = key.rpartition(".")[2] + ":"
    found = [
        str(f)
        for f in files
        if any(line.strip().startswith(leaf) for line in f.read_text(encoding="utf-8").splitlines())
    ]
    return f"{problem} (in {', '.join(found)})" if found else problem


def _is_glob(override: Any) -> bool:
    return type(override.value()).__name__ == "Glob"
