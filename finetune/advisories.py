"""Installed packages against a local file of security advisories in the OSV form: `audit(path)`. No network.

Takes what osv.dev and the PyPA's advisory database publish: a JSON object, a list of them, a folder or a zip of JSON
and YAML files. Every advisory is read or the check ends: one that is passed over in silence could be the one.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from finetune.errors import FinetuneError
from finetune.sbom import packages

LARGEST = 64 * 2**20
"""Bytes of the largest file, and of the largest member of a zip when it is unpacked."""
SUFFIXES = (".json", ".yaml", ".yml")


class AdvisoryError(FinetuneError):
    """Advisories that cannot be read."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """An installed package with a known hole."""

    package: str
    """Its normal name."""
    version: str
    """What is installed."""
    names: tuple[str, ...]
    """Ids of the advisory and its aliases, sorted."""
    fixed: tuple[str, ...]
    """Versions in which it is mended, of those that are newer; empty where there is none."""
    summary: str
    """What it is, in the advisory's words."""

    def sentence(self) -> str:
        """One line."""
        mend = f"fixed in {', '.join(self.fixed)}" if self.fixed else "no version mends it"
        told = f": {' '.join(self.summary.split())[:120]}" if self.summary else ""
        return f"AUD-001 {self.package} {self.version}: {', '.join(self.names)} ({mend}){told}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What an audit saw."""

    findings: tuple[Finding, ...]
    """What is wrong, by package."""
    packages: int
    """Installed packages."""
    advisories: int
    """Advisories about Python packages that were read."""
    newest: str
    """Date of the newest change among them."""


def audit(path: Path, installed: dict[str, str] | None = None) -> Audit:
    """The installed packages (or `installed`: normal name -> version) against the advisories in `path`.

    Raises AdvisoryError: AUD-002 a file is not one of advisories, AUD-003 there is none about Python packages in it.
    """
    here = installed if installed is not None else {name: dist.version for name, dist in packages().items()}
    found: list[Finding] = []
    count, newest = 0, ""
    for where, advisory in advisories(path):
        about = [one for one in _affected(advisory, where) if _ecosystem(one) == "PyPI"]
        count += bool(about)
        newest = max(newest, str(advisory["modified"]) if "modified" in advisory else "")
        if advisory.get("withdrawn"):
            continue
        for one in about:
            name = canonicalize_name(one["package"]["name"])
            if name in here and _hit(one, here[name], where):
                names = {advisory["id"], *(advisory.get("aliases") or [])}
                fixed = tuple(_fixes(one, here[name]))
                summary = str(advisory.get("summary") or "")
                finding = Finding(
                    package=name, version=here[name], names=tuple(sorted(names)), fixed=fixed, summary=summary
                )
                found.append(finding)
    if not count:
        what = f"{path} has no advisory about Python packages"
        raise AdvisoryError("AUD-003", what, "", "the PyPI part of osv.dev (all.zip), or PyPA's advisory database")
    return Audit(findings=tuple(_together(found)), packages=len(here), advisories=count, newest=newest[:10])


def advisories(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, advisory) of every advisory in a file, a folder or a zip. Raises AdvisoryError AUD-002."""
    for name, text in _files(path):
        try:
            value = _parsed(name, text)
        except (ValueError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise AdvisoryError("AUD-002", f"{name} is not readable", why, "fetch it again") from None
        for number, one in enumerate(_listed(value), 1):
            where = name if not isinstance(value, list) else f"{name}, number {number}"
            if not (isinstance(one, dict) and isinstance(one.get("id"), str)):
                raise AdvisoryError("AUD-002", f"{where} is not an advisory", "it has no id", "files in the OSV form")
            yield where, one


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
                yield str(file), _small(str(file), file.stat().st_size) or file.read_bytes()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if Path(info.filename).suffix in SUFFIXES:
                        yield info.filename, _small(info.filename, info.file_size) or archive.read(info)
        else:
            yield str(path), _small(str(path), path.stat().st_size) or path.read_bytes()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise AdvisoryError("AUD-002", f"advisories={path} cannot be read", why, "advisories=FILE.json") from None


def _small(name: str, size: int) -> bytes:
    """Nothing; raises AdvisoryError for a file that is too large to be one of advisories."""
    if size > LARGEST:
        raise AdvisoryError("AUD-002", f"{name} has {size:,} bytes", f"at most {LARGEST:,} are read", "smaller files")
    return b""


def _parsed(name: str, text: bytes) -> Any:
    if not name.endswith((".yaml", ".yml")):
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict) and isinstance(value.get("vulns"), list):  # an answer of osv.dev
        return list(value["vulns"])
    return value if isinstance(value, list) else [value]


def _affected(advisory: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Its `affected`, each with a package. Raises AdvisoryError when they are not of the OSV form."""
    _list_of(str, advisory, "aliases", where)
    named = [one for one in _list_of(dict, advisory, "affected", where) if isinstance(one.get("package"), dict)]
    for one in named:
        if not isinstance(one["package"].get("name"), str):
            raise AdvisoryError("AUD-002", f"{where}: a package has no name", "", "files in the OSV form")
        _list_of(str, one, "versions", where)
        for span in _list_of(dict, one, "ranges", where):
            for event in _list_of(dict, span, "events", where):
                if not all(isinstance(text, str) for text in event.values()):
                    raise AdvisoryError("AUD-002", f"{where}: an event has no version", "", "files in the OSV form")
    return named


def _list_of(kind: type, value: dict[str, Any], key: str, where: str) -> list[Any]:
    """The list behind a key, empty where there is none. Raises AdvisoryError when it is another thing."""
    listed = value[key] if key in value and value[key] is not None else []
    if not isinstance(listed, list) or not all(isinstance(one, kind) for one in listed):
        raise AdvisoryError("AUD-002", f"{where}: `{key}` is not a list of the right kind", "", "files in the OSV form")
    return listed


def _ecosystem(one: dict[str, Any]) -> str:
    return str(one["package"].get("ecosystem"))


def _hit(one: dict[str, Any], version: str, where: str) -> bool:
    """Whether a version is among those that are affected. One that cannot be compared counts as affected."""
    if version in (one.get("versions") or []):
        return True
    ranges = [r for r in one.get("ranges") or [] if r.get("type") == "ECOSYSTEM"]
    try:
        return any(_within(r.get("events") or [], Version(version), where) for r in ranges)
    except InvalidVersion:
        return True


def _within(events: list[dict[str, str]], version: Version, where: str) -> bool:
    """Whether a version lies in a range: between an `introduced` and the next `fixed` or `last_affected`."""
    ordered = []
    for event in events:
        for kind, text in event.items():
            if kind not in ("introduced", "fixed", "last_affected", "limit"):
                raise AdvisoryError("AUD-002", f"{where}: an event is called {kind}", "", "files in the OSV form")
            # At one version `introduced` comes before `last_affected`, and `fixed` before `introduced`.
            rank = ("fixed", "limit", "introduced", "last_affected").index(kind)
            ordered.append((Version("0.dev0") if text == "0" else _bound(text, where), rank, kind))
    inside = False
    for bound, _, kind in sorted(ordered):
        if kind == "introduced" and version >= bound:
            inside = True
        elif (kind in ("fixed", "limit") and version >= bound) or (kind == "last_affected" and version > bound):
            inside = False
    return inside


def _bound(text: str, where: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise AdvisoryError("AUD-002", f"{where}: {text} is no version", "", "files in the OSV form") from None


def _fixes(one: dict[str, Any], version: str) -> Iterator[str]:
    for r in one.get("ranges") or []:
        for event in (r.get("events") or []) if r.get("type") == "ECOSYSTEM" else []:
            try:
                if "fixed" in event and Version(event["fixed"]) > Version(version):
                    yield event["fixed"]
            except InvalidVersion:
                yield event["fixed"]


def _together(findings: list[Finding]) -> Iterator[Finding]:
    """The findings with those joined that are one hole under several names, by package."""
    for package in sorted({finding.package for finding in findings}):
        groups: list[list[Finding]] = []
        for finding in (f for f in findings if f.package == package):
            same = [g for g in groups if any(set(f.names) & set(finding.names) for f in g)]
            groups = [g for g in groups if g not in same] + [[*(f for g in same for f in g), finding]]
        for group in groups:
            yield Finding(
                package=package,
                version=group[0].version,
                names=tuple(sorted({name for f in group for name in f.names})),
                fixed=tuple(sorted({v for f in group for v in f.fixed})),
                summary=next((f.summary for f in group if f.summary), ""),
            )
