"""Whether licences allow an export, with what is at hand looked at: the text beside the weights, the data card."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune import check, terms
from finetune.errors import RecipeError, RunError
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json
from finetune.terms import licence_text as licence_text


def verdicts(recipe: Recipe, base: Path | None, accepted: Iterable[str] = ()) -> list[terms.Verdict]:
    """Every licence rule of a recipe. `base` is the folder of the weights, or None where it is not at hand.

    Raises DataError for a data card that is none.
    """
    text = licence_text(base) if base and terms.applies(recipe) else None
    found = terms.verdicts(recipe, text=text, accepted=tuple(accepted), rows=licence_of_rows(recipe))
    return [*found, *([terms.carried(recipe, text)] if base and terms.applies(recipe) else [])]


def refuse(recipe: Recipe, base: Path | None = None, accepted: Iterable[str] = ()) -> None:
    """Nothing, or RecipeError with every broken rule: what may not be exported must not be trained for a day first."""
    if broken := broken_rules(recipe, base or folder_at_hand(recipe), accepted):
        raise RecipeError([verdict.sentence() for verdict in broken])


def broken_rules(recipe: Recipe, base: Path | None, accepted: Iterable[str] = ()) -> list[terms.Verdict]:
    """The rules that forbid an export. A text that is not at hand yet is looked at later: it is fetched."""
    if not terms.applies(recipe):
        return []
    later = {"LIC-007"} if base is None else set()
    return [v for v in verdicts(recipe, base, accepted) if v.passed is False and v.rule not in later]


def folder_at_hand(recipe: Recipe) -> Path | None:
    """The folder of the weights when `model.source` is one."""
    folder = Path(recipe.model.source).expanduser()
    return folder if check.source_kind(recipe.model.source) == "folder" and folder.is_dir() else None


def licence_files(base: Path) -> list[Path]:
    """The files beside a base's weights that speak of its licence: texts, notices, use policies."""
    patterns = (*terms.TEXTS, "NOTICE*", "USE_POLICY*")
    return sorted({path for pattern in patterns for path in base.glob(pattern) if path.is_file()})


def licence_of_rows(recipe: Recipe) -> str:
    """The licence of the rows: what the user says of their own, or the card's; the sample of a card is ours."""
    if not recipe.data.card or recipe.data.sample:
        return recipe.licence.of_rows
    from finetune.data.card import read_card

    return read_card(recipe.data.card).licence


def accepted_in(run_dir: RunDir) -> list[str]:
    """Hashes of licence texts that the user has accepted since the run began."""
    try:
        entries = read_json(run_dir.allowed) if run_dir.allowed.exists() else []
        return [str(entry["licence"]) for entry in entries if "licence" in entry]
    except (ValueError, TypeError, KeyError) as error:
        what = f"{run_dir.allowed} cannot be read"
        raise RunError("RUN-009", what, str(error).splitlines()[0], "the file as it was, or a new run") from None
