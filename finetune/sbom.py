"""The bill of materials of this Python environment, as CycloneDX 1.6: `bom()`; its licences: `licences()`.

Written as plain JSON from what installed packages say of themselves (importlib.metadata); nothing is looked up.
"""

from __future__ import annotations

import re
import sys
import time
import uuid
from importlib import metadata
from typing import Any

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

UNKNOWN = "unknown"
"""Licence of a package that names none."""
LONG = 120
"""A licence field with more characters, or several lines, is a text and not a name."""
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EUPL|EPL|CDDL|OSL|SSPL|CC-BY-SA)|\bGNU\b|Mozilla Public|Eclipse Public", re.I)
_SPDX = re.compile(r"[A-Za-z0-9.+-]+")


def bom(own_version: str) -> dict[str, Any]:
    """sbom.cdx.json: every installed package with version, licence and what it needs, our own at the root."""
    found = packages()
    refs = {name: f"pkg:pypi/{name}@{dist.version}" for name, dist in found.items()}
    root = "finetune" if "finetune" in found else ""
    main = {"type": "application", "bom-ref": refs[root] if root else "finetune", "name": "finetune"}
    needs = [{"ref": refs[name], "dependsOn": sorted(refs[n] for n in needed(found, name))} for name in found]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tools": {"components": [{"type": "application", "name": "finetune", "version": own_version}]},
            "component": main | {"version": own_version, "licenses": [{"license": {"id": "Apache-2.0"}}]},
            "properties": [{"name": "finetune:python", "value": sys.version.split()[0]}],
        },
        "components": [_component(dist, refs[name]) for name, dist in found.items() if name != root],
        "dependencies": needs if root else [{"ref": "finetune"}, *needs],
    }


def packages() -> dict[str, metadata.Distribution]:
    """Normal name -> installed package, sorted. Of two of one name the first on the path, as Python imports it."""
    found: dict[str, metadata.Distribution] = {}
    for dist in metadata.distributions():
        if dist.metadata["Name"]:
            found.setdefault(canonicalize_name(dist.metadata["Name"]), dist)
    return dict(sorted(found.items()))


def needed(found: dict[str, metadata.Distribution], name: str) -> set[str]:
    """Names of the installed packages that one asks for, extras apart."""
    names: set[str] = set()
    for line in found[name].requires or []:
        try:
            wanted = Requirement(line)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        except (InvalidRequirement, UndefinedEnvironmentName):
            continue
        if applies:
            names.add(canonicalize_name(wanted.name))
    return names & set(found)


def licences() -> dict[str, str]:
    """Normal name -> licence of every installed package, as it says itself; UNKNOWN where it says nothing."""
    return {name: licence_of(dist) for name, dist in packages().items()}


def licence_of(dist: metadata.Distribution) -> str:
    """The licence of a package: its SPDX expression, else its short licence field, else its classifiers."""
    said = dist.metadata
    if expression := (said["License-Expression"] or "").strip():
        return expression
    field = (said["License"] or "").strip()
    if field and field.upper() != "UNKNOWN" and "\n" not in field and len(field) <= LONG:
        return field
    names = [line.split(" :: ")[-1] for line in said.get_all("Classifier") or [] if line.startswith("License :: ")]
    return ", ".join(name for name in names if name != "OSI Approved") or UNKNOWN


def copyleft(licence: str) -> bool:
    """Whether the name of a licence is that of one that asks something of those who pass the package on."""
    return COPYLEFT.search(licence) is not None


def _component(dist: metadata.Distribution, ref: str) -> dict[str, Any]:
    licence = licence_of(dist)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": ref,
        "name": dist.metadata["Name"],
        "version": dist.version,
        "purl": ref,
    }
    expression = (dist.metadata["License-Expression"] or "").strip()
    if expression and (" " in expression or not _SPDX.fullmatch(expression)):
        component["licenses"] = [{"expression": expression}]
    elif expression:
        component["licenses"] = [{"license": {"name" if expression.startswith("LicenseRef-") else "id": expression}}]
    elif licence != UNKNOWN:
        component["licenses"] = [{"license": {"name": licence}}]
    marks = {"finetune:licence-unknown": licence == UNKNOWN, "finetune:copyleft": copyleft(licence)}
    if told := [{"name": name, "value": "true"} for name, holds in marks.items() if holds]:
        component["properties"] = told
    return component
