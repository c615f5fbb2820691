"""Whether a finished run is still what its record says: `differences(run_dir)`."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import RunError
from finetune.record import output_names
from finetune.rundir import RunDir, read_json, sha256_file


def verify(run_dir: RunDir) -> int:
    """How many files are as recorded. Raises RunError (VER-001) naming each that changed, is missing or is new."""
    record = _read(run_dir)
    if found := differences(run_dir):
        raise RunError(
            "VER-001",
            f"{run_dir.path} is not what its record says",
            "; ".join(found),
            "a copy that verifies, or a new run",
        )
    return len(record["inputs"]) + len(record["outputs"])


def differences(run_dir: RunDir) -> list[str]:
    """A phrase for every file that differs from the record of the run. Reads every byte of inputs and outputs."""
    record = _read(run_dir)
    outputs = record["outputs"]
    found = [_compare(run_dir.path / name, name, sha) for name, sha in outputs.items()]
    found += [_compare(Path(name), name, sha) for name, sha in record["inputs"].items()]
    found += [f"{name} is not in the record" for name in output_names(run_dir) if name not in outputs]
    return [phrase for phrase in found if phrase]


def _compare(path: Path, name: str, sha256: str) -> str:
    if not path.is_file():
        return f"{name} is missing"
    return "" if sha256_file(path) == sha256 else f"{name} has changed"


def _read(run_dir: RunDir) -> dict[str, dict[str, str]]:
    run_dir.require(run_dir.record, "report")
    try:
        record = read_json(run_dir.record)
        for part in ("inputs", "outputs"):
            if not all(isinstance(name, str) and isinstance(sha, str) for name, sha in record[part].items()):
                raise TypeError(part)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            "VER-002", f"{run_dir.record} is not a record", "it was changed or cut", "a copy that verifies"
        ) from None
    parts: dict[str, dict[str, str]] = {"inputs": record["inputs"], "outputs": record["outputs"]}
    return parts
