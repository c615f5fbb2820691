"""The bill of materials of an export, as CycloneDX 1.6 (ML-BOM): model, base, rows and files, with hashes and licences.

Written as plain JSON: the library for CycloneDX has no model cards. The tests check it against the official schema.
Paths of the machine do not stand in it, names of files do.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from finetune import __version__, terms
from finetune.export.card import Facts, base_model
from finetune.licences import find_licence
from finetune.recipe import Recipe

Component = dict[str, Any]


def bom(
    name: str, recipe: Recipe, facts: Facts, read: tuple[Path, dict[str, str]], files: dict[str, str]
) -> dict[str, Any]:
    """bom.cdx.json. `read`: the base's folder, and path -> sha256 of all that the run read; `files`: of the export."""
    folder, inputs = read[0].absolute(), {Path(path): sha for path, sha in read[1].items()}
    base_files = {path.name: sha for path, sha in inputs.items() if path.parent == folder}
    own_rows = {path: sha for path, sha in inputs.items() if path.parent != folder}
    alone = len({path.name for path in own_rows}) == len(own_rows)
    named_rows = {path.name if alone else f"{path.parent.name}/{path.name}": sha for path, sha in own_rows.items()}
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "licenses": _licences(recipe, facts),
        "modelCard": _model_card(recipe, facts),
        "components": _files("model", files),
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tools": {"components": [{"type": "application", "name": "finetune", "version": __version__}]},
            "component": model,
        },
        "components": [_base(recipe, facts, base_files), _rows(facts, named_rows)],
        "dependencies": [
            {"ref": "model", "dependsOn": ["base", "rows"]},
            {"ref": "base"},
            {"ref": "rows"},
        ],
    }


def _model_card(recipe: Recipe, facts: Facts) -> Component:
    card: Component = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": recipe.model.family,
            "datasets": [{"ref": "rows"}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "properties": [
            {"name": "finetune:recipe", "value": recipe.name},
            {"name": "finetune:method", "value": recipe.adapter.method},
            {"name": "finetune:seed", "value": str(recipe.seed)},
        ],
    }
    if facts["metrics"]:
        card["quantitativeAnalysis"] = {"performanceMetrics": _metrics(facts["metrics"])}
    if facts["compute"]:
        flop = facts["compute"]["by_parameters"]["flop"]
        card["properties"].append({"name": "finetune:training-flop", "value": f"{flop:.6g}"})
    if facts["energy"]["kwh"] is not None:
        card["properties"].append({"name": "finetune:energy-kwh", "value": f"{facts['energy']['kwh']:.6g}"})
    return card


def _metrics(scores: dict[str, Any]) -> list[Component]:
    found: list[Component] = []
    for side in ("base", "tuned"):
        for kind in ("loss", "accuracy"):
            value = scores[side][kind]
            if value is None:
                continue
            metric: Component = {"type": kind, "value": f"{value:.6g}", "slice": f"heldout, {side}"}
            if kind == "accuracy" and "low" in scores[side] and scores[side]["low"] is not None:
                ends = {"lowerBound": f"{scores[side]['low']:.6g}", "upperBound": f"{scores[side]['high']:.6g}"}
                metric["confidenceInterval"] = ends
            found.append(metric)
    return found


def _base(recipe: Recipe, facts: Facts, files: dict[str, str]) -> Component:
    model = recipe.model
    component: Component = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": f"random weights of the family {model.family}" if model.tiny else base_model(recipe),
        "components": _files("base", files),
    }
    if model.revision and not model.tiny:
        component["version"] = model.revision
    if terms.applies(recipe):
        component["licenses"] = _licences(recipe, facts)
    return component


def _rows(facts: Facts, files: dict[str, str]) -> Component:
    source = facts["licences"]["rows"]
    component: Component = {
        "type": "data",
        "bom-ref": "rows",
        "name": source["title"] if "title" in source else "rows of the user's own",
        "data": [{"type": "dataset"}],
        "components": _files("rows", files),
    }
    if "licence" in source:
        component["licenses"] = [{"license": {"name": source["licence"]}}]
    if source.get("attribution"):
        component["copyright"] = source["attribution"]
    if facts["data"] and "content_sha256" in facts["data"]:
        component["hashes"] = [{"alg": "SHA-256", "content": facts["data"]["content_sha256"]}]
    return component


def _licences(recipe: Recipe, facts: Facts) -> list[Component]:
    licence, told = find_licence(terms.key_of(recipe)), facts["licences"]
    if licence and licence.spdx:
        return [{"license": {"id": licence.spdx}}]
    named: Component = {"name": told["title"] or told["base"] or "unknown"}
    return [{"license": named | ({"url": told["url"]} if told["url"] else {})}]


def _files(of: str, files: dict[str, str]) -> list[Component]:
    return [
        {"type": "file", "bom-ref": f"{of}/{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": sha}]}
        for name, sha in sorted(files.items())
    ]
