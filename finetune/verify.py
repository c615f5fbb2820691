"""Whether a finished run is still what its record says: `verify(run_dir)`, `look(run_dir)`. Offline.

Looked at: the form of the record, every hash, what follows from the run's files, the chain of events, parity against
its limits, the licences' rules, and the signatures when there is a key to check them with.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import __version__, events, parity, permits, record, signing
from finetune.compose import read_recipe
from finetune.errors import FinetuneError, GateError, RunError
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json, sha256_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as recorded, or not as it must be."""

    about: str
    """`file`, `record`, `events`, `parity`, `licence` or `signature`."""
    name: str
    """The file, the part of the record, or the rule."""
    what: str
    """What is wrong with it, as the end of a sentence that begins with its name."""

    def phrase(self) -> str:
        """Name and finding."""
        return f"{self.name} {self.what}"


def verify(run_dir: RunDir, public_key: Path | None = None, say: Callable[[str], None] = print) -> int:
    """How many files are as recorded; `say` is told what could not be looked at.

    Raises RunError (VER-001) naming all that is not as it was or must be.
    """
    found, unchecked = look(run_dir, public_key)
    for phrase in unchecked:
        say(f"not checked: {phrase}")
    if found:
        raise RunError(
            "VER-001",
            f"{run_dir.path} is not what its record says",
            "; ".join(finding.phrase() for finding in found),
            "a copy that verifies, or a new run",
        )
    read = _read(run_dir)
    return len(read["inputs"]) + len(read["outputs"])


def differences(run_dir: RunDir) -> list[str]:
    """A phrase for every finding, signatures apart."""
    return [finding.phrase() for finding in findings(run_dir)]


def findings(run_dir: RunDir, public_key: Path | None = None) -> list[Finding]:
    """Everything that is not as recorded. Raises what `look` raises."""
    return look(run_dir, public_key)[0]


def look(run_dir: RunDir, public_key: Path | None = None) -> tuple[list[Finding], list[str]]:
    """(everything that is not as recorded, a phrase for all that could not be looked at).

    Reads every byte of inputs and outputs. Raises RunError when there is no record (RUN-002), or none that can be read
    (VER-002).
    """
    read = _read(run_dir)
    unchecked: list[str] = []
    wrong = [Finding(about="record", name="run.json:", what=phrase) for phrase in record.schema_problems(read)]
    files = list(_files(run_dir, read))
    found = [*wrong, *files]
    if not wrong:
        changed = {finding.name for finding in files} & {*read["outputs"]}
        found += _events(run_dir, read)
        if "recipe.yaml" not in changed:
            recipe = read_recipe(run_dir.recipe)
            found += [*_parity(recipe, read), *_licences(run_dir, recipe, read)]
            if not changed:  # named already, and by the file
                derived, unchecked = _derived(run_dir, recipe, read)
                found += derived
    return found + _signatures(run_dir, read, public_key), unchecked


def as_json(run_dir: RunDir, public_key: Path | None = None) -> dict[str, Any]:
    """The findings of a run as plain values, with what was looked at."""
    (found, unchecked), read = look(run_dir, public_key), _read(run_dir)
    return {
        "run": str(run_dir.path),
        "verified": not found,
        "files": len(read["inputs"]) + len(read["outputs"]),
        "not_checked": unchecked,
        "signature": signature_state(run_dir, public_key),
        "findings": [{"about": f.about, "name": f.name, "what": f.what} for f in found],
    }


def signature_state(run_dir: RunDir, public_key: Path | None) -> str:
    """What was done about signatures: `checked`, `not checked` where there is no key to do it with, or `none`."""
    return "checked" if public_key else "not checked" if signing.is_signed(run_dir) else "none"


def _files(run_dir: RunDir, read: dict[str, Any]) -> Iterator[Finding]:
    outputs = read["outputs"]
    told = [(name, _compare(run_dir.path / name, sha)) for name, sha in outputs.items()]
    told += [(name, _compare(Path(name), sha)) for name, sha in read["inputs"].items()]
    told += [(name, "is not in the record") for name in record.output_names(run_dir) if name not in outputs]
    yield from (Finding(about="file", name=name, what=what) for name, what in told if what)


def _compare(path: Path, sha256: str) -> str:
    if not os.path.isfile(path):  # noqa: PTH113  # false for names that no file can have, where pathlib raises
        return "is missing"
    return "" if sha256_file(path) == sha256 else "has changed"


def _events(run_dir: RunDir, read: dict[str, Any]) -> list[Finding]:
    broken = events.breaks(run_dir, read["events"])
    return [Finding(about="events", name="events.jsonl:", what=phrase) for phrase in broken]


def _derived(run_dir: RunDir, recipe: Recipe, read: dict[str, Any]) -> tuple[list[Finding], list[str]]:
    """(parts of the record that its own files contradict, why they were not compared): other numbers were written."""
    from finetune.source import base_folder

    numbers = "whether the numbers of the record follow from its files"
    if read["finetune"] != __version__:  # which derives other things
        then = read["finetune"]
        return [], [f"{numbers}: finetune {then} wrote it, this is {__version__}. Try: pip install finetune=={then}"]
    base = None
    try:
        base = base_folder(recipe)
        now = json.loads(json.dumps(record.derived(run_dir, recipe, base)))
    except Exception as error:  # whoever made the files can have put anything where a number belongs
        why = error.sentence() if isinstance(error, FinetuneError) else type(error).__name__
        if base is None and isinstance(error, FinetuneError):
            return [], [f"{numbers}: {why}"]  # the base is not here: its files are named as missing
        return [Finding(about="record", name="run.json:", what=f"cannot be compared with its files ({why})")], []
    now["recipe"] = _as_then(now["recipe"], read["recipe"], json.loads(json.dumps(dataclasses.asdict(Recipe()))))
    what = "is not what the files of the run say"
    other = [part for part, value in now.items() if part != "events" and value != read[part]]  # those in words
    return [Finding(about="record", name=f"run.json: {part}", what=what) for part in other], []


def _as_then(now: dict[str, Any], then: dict[str, Any], unset: dict[str, Any]) -> dict[str, Any]:
    """Settings, less those at their default that the record does not name: it was made before there were such."""
    kept: dict[str, Any] = {}
    for name, value in now.items():
        if name not in then:
            kept |= {} if name in unset and value == unset[name] else {name: value}
        elif all(isinstance(part, dict) for part in (value, then[name], unset.get(name))):
            kept[name] = _as_then(value, then[name], unset[name])
        else:
            kept[name] = value
    return kept


def _parity(recipe: Recipe, read: dict[str, Any]) -> Iterator[Finding]:
    """The proof of the merge against its limits, which may not have been those of then."""
    if read["parity"] is None:
        return
    try:
        parity.refuse(
            parity.Parity(**{name: value for name, value in read["parity"].items() if name != "schema"}), recipe
        )
    except GateError as error:
        yield Finding(about="parity", name="parity:", what=error.what)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        yield Finding(about="parity", name="parity:", what="is no proof of a merge: figures are missing or strange")


def _licences(run_dir: RunDir, recipe: Recipe, read: dict[str, Any]) -> Iterator[Finding]:
    """Rules that forbid what was exported, as they stand now: licences.yaml may know more than when it was made."""
    names = {Path(name).parent for name in read["inputs"] if Path(name).name == "config.json"}
    base = next((folder for folder in sorted(names) if folder.is_dir()), None)
    if not run_dir.export.exists():
        return
    try:
        broken = permits.broken_rules(recipe, base, permits.accepted_in(run_dir))
    except FinetuneError as error:
        yield Finding(about="licence", name="licences:", what=f"cannot be looked at: {error.sentence()}")
        return
    for verdict in broken:
        yield Finding(about="licence", name=verdict.rule, what=f"{verdict.what} ({verdict.source})")


def _signatures(run_dir: RunDir, read: dict[str, Any], public_key: Path | None) -> list[Finding]:
    if public_key:
        told = [phrase.partition(" ") for phrase in signing.signature_problems(run_dir, public_key)]
        return [Finding(about="signature", name=name, what=what) for name, _, what in told]
    recipe = read["recipe"] if isinstance(read["recipe"], dict) else {}
    if "sign" in recipe and recipe["sign"] and not signing.is_signed(run_dir):
        return [Finding(about="signature", name="signature:", what="is missing, and the recipe asks for one")]
    return []


def _read(run_dir: RunDir) -> dict[str, Any]:
    run_dir.require(run_dir.record, "report")
    try:
        read: dict[str, Any] = read_json(run_dir.record)
        for part in ("inputs", "outputs"):
            if not all(isinstance(name, str) and isinstance(sha, str) for name, sha in read[part].items()):
                raise TypeError(part)
        if not isinstance(read["recipe"], dict):
            raise TypeError("recipe")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            "VER-002", f"{run_dir.record} is not a record", "it was changed or cut", "a copy that verifies"
        ) from None
    return read
