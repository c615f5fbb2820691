"""The bill of materials of this environment is a valid one, and says what packages say of themselves."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from finetune import sbom
from finetune.__main__ import main


def made(folder: Path, name: str, *lines: str) -> metadata.Distribution:
    """An installed package with these lines of metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines]) + "\n")
    return metadata.Distribution.at(info)


def invalid(value: Any) -> Any:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(value))


def test_it_is_valid_cyclonedx_and_has_every_installed_package_once() -> None:
    found = sbom.bom("1.2.3")
    assert invalid(found) is None
    assert invalid(found | {"components": [{"type": "no-such-type"}]}) is not None, "the validator says yes to anything"
    listed = [canonicalize_name(part["name"]) for part in found["components"]]
    here = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    assert sorted(listed) == sorted(here - {"finetune"}) and len(listed) > 50
    versions = {part["name"]: part["version"] for part in found["components"]}
    assert versions["transformers"] == metadata.version("transformers")
    needs = {entry["ref"]: entry["dependsOn"] for entry in found["dependencies"] if "dependsOn" in entry}
    assert any(
        ref.startswith("pkg:pypi/tokenizers@") for ref in needs[f"pkg:pypi/transformers@{versions['transformers']}"]
    )


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        (("License-Expression: MIT OR Apache-2.0", "License: other"), "MIT OR Apache-2.0"),
        (("License: BSD-3-Clause",), "BSD-3-Clause"),
        (("License: UNKNOWN", "Classifier: License :: OSI Approved :: MIT License"), "MIT License"),
        (("Classifier: License :: OSI Approved",), "unknown"),
        ((), "unknown"),
        ((f"License: {'a whole text ' * 20}",), "unknown"),
    ],
)
def test_a_licence_is_what_the_package_says_and_else_unknown(
    lines: tuple[str, ...], licence: str, tmp_path: Path
) -> None:
    assert sbom.licence_of(made(tmp_path, "some", *lines)) == licence


@pytest.mark.parametrize(
    "name", ["GPL-3.0-only", "LGPL", "AGPL-3.0", "GNU General Public License v3 (GPLv3)", "MPL-2.0"]
)
def test_copyleft_is_flagged(name: str) -> None:
    assert sbom.copyleft(name)


@pytest.mark.parametrize("name", ["MIT", "Apache-2.0", "BSD License", "unknown", "PSF-2.0", "ISC"])
def test_what_is_not_copyleft_is_not(name: str) -> None:
    assert not sbom.copyleft(name)


def test_the_verb_writes_it_and_names_what_one_must_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "nobody-knows")
    made(tmp_path, "asks-something", "License-Expression: AGPL-3.0-only")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["sbom", f"out={tmp_path / 'sbom.json'}"]) == 0
    said = capsys.readouterr().out
    assert "  nobody-knows: unknown\n" in said and "  asks-something: AGPL-3.0-only (copyleft)\n" in said
    found = json.loads((tmp_path / "sbom.json").read_text())
    marks = {c["name"]: [p["name"] for p in c["properties"]] for c in found["components"] if "properties" in c}
    assert marks["nobody-knows"] == ["finetune:licence-unknown"] and marks["asks-something"] == ["finetune:copyleft"]
    assert main(["sbom"]) == 2
