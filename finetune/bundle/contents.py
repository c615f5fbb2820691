"""What goes into a bundle for a recipe: `contents(recipe)`, with the recipe as it will be read there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune import fetch
from finetune.bundle.verify import BundleError
from finetune.check import source_kind
from finetune.compose import compose, recipe_yaml
from finetune.data.card import Card, card_folder, read_card
from finetune.data.files import sources
from finetune.licences import find_licence
from finetune.outside import bring
from finetune.recipe import Recipe

SUFFIX = "_bundled"
"""What the bundled recipe's name has behind the name of the recipe that it was."""


@dataclass(kw_only=True, slots=True)
class Contents:
    """The parts of a bundle that depend on the recipe."""

    files: dict[str, Path] = field(default_factory=dict)
    """Name in the bundle -> file here."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name in the bundle -> what it says."""
    recipe: Recipe
    """The recipe with every path as it is there, relative to the bundle."""
    words: list[str]
    """What follows `python -m finetune --config-dir recipes` there."""


def contents(recipe: Recipe) -> Contents:
    """Base, rows and converter (fetched where `network` is true), cards and the frozen recipe.

    Raises FetchError and WeightsError for what is not at hand, BundleError BND-003 for a recipe that cannot be packed.
    """
    _refuse(recipe)
    brought = bring(recipe)
    found = Contents(recipe=replace(recipe, cache_dir="cache", runs_dir="runs", network=False), words=[])
    base = brought["base"]
    if source_kind(recipe.model.source) == "folder" and not recipe.model.tiny:
        place = "base"
        found.recipe = replace(found.recipe, model=replace(recipe.model, source=place))
    else:  # where the program looks for what it has made or fetched
        place = f"cache/{base.parent.name}/{base.name}"
    found.files |= {f"{place}/{path.relative_to(base).as_posix()}": path for path in _files(base)}
    for what in ("rows", "converter"):
        if what in brought and brought[what].is_file():
            found.files[f"cache/packages/{brought[what].name}"] = brought[what]
    _own_rows(recipe, found)
    if recipe.data.card:
        found.files[f"cards/{recipe.data.card}.yaml"] = card_folder() / f"{recipe.data.card}.yaml"
    found.texts["licences/NOTICE.txt"] = _notice(recipe)
    name = f"{recipe.name}{SUFFIX}"
    found.texts[f"recipes/recipe/{name}.yaml"] = (
        f"# @package _global_\n# The recipe {recipe.name} with all its settings; paths are those of the bundle.\n"
        + recipe_yaml(found.recipe)
    )
    found.words = [f"recipe={name}", *(["scale=rehearsal"] if recipe.scale == "rehearsal" else [])]
    return found


def reads_back(found: Contents, folder: Path) -> None:
    """Nothing, when the words give the same recipe with `folder` as --config-dir. Raises BundleError BND-003."""
    there = compose(found.words, str(folder))
    if there != found.recipe:
        here, read = dataclasses.asdict(found.recipe), dataclasses.asdict(there)
        odd = sorted(key for key in here if here[key] != read[key])
        what = f"settings under {', '.join(odd)} would be others there"
        raise BundleError("BND-003", what, "scale=rehearsal has the last word on them", "leave out scale=, or them")


def _refuse(recipe: Recipe) -> None:
    if recipe.sign:
        why = "a private key is not put into a bundle"
        raise BundleError("BND-003", f"sign={recipe.sign}", why, "leave it out here, and type it there")
    if recipe.data.card.endswith((".yaml", ".yml")):
        why = "only the program's own cards are packed"
        raise BundleError("BND-003", f"data.card={recipe.data.card}", why, "data.train_files=[...] instead of a card")


def _own_rows(recipe: Recipe, found: Contents) -> None:
    """The user's own files of rows, and the settings that name them, as they are there."""
    data, renamed = recipe.data, {}
    lists: dict[str, list[str]] = {}
    for side in ("train_files", "heldout_files"):
        lists[side] = []
        for number, pattern in enumerate(getattr(data, side)):
            place = f"rows/{side}-{number}"
            listed = sources([pattern])
            found.files |= {f"{place}/{source.name}": source.path for source in listed}
            renamed[pattern] = place
            lists[side].append(place)
    indexes = {f"rows/benchmarks-{n}-{Path(path).name}": path for n, path in enumerate(data.benchmarks)}
    found.files |= {place: Path(path).expanduser() for place, path in indexes.items()}
    changed = replace(
        data,
        train_files=lists["train_files"],
        heldout_files=lists["heldout_files"],
        mixture={renamed[pattern]: share for pattern, share in data.mixture.items()},
        benchmarks={place: data.benchmarks[path] for place, path in indexes.items()},
    )
    found.recipe = replace(found.recipe, data=changed)


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, by content where they are links, sorted; not what is hidden, but our own notes."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and (not hidden or path.name == fetch.HUB_MANIFEST):
            yield path


def _notice(recipe: Recipe) -> str:
    """Under which licences the parts of a bundle are, as far as is known."""
    licence = find_licence(recipe.model.licence)
    title = licence.title if licence else recipe.model.licence or "not stated"
    base = (
        "random weights of a rehearsal, under no licence"
        if recipe.model.tiny
        else f"{title} {recipe.model.licence_url}"
    )
    lines = [f"base: {recipe.model.title or recipe.model.name}: {base.strip()}"]
    if recipe.data.card:
        card: Card = read_card(recipe.data.card)
        lines += [f"rows: {card.title}: {card.licence}", f"      {card.licence_source}", f"      {card.attribution}"]
    else:
        lines.append(f"rows: your own: {recipe.licence.of_rows or 'no licence stated'}")
    lines += ["program: Apache-2.0, see LICENSE", "packages: as each says itself, see packages.json"]
    return "\n".join([*lines, "", "Information, not legal advice."]) + "\n"
