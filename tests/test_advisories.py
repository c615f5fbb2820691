"""Installed packages are found in local advisories where they are affected, and nowhere else."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from finetune import advisories
from finetune.__main__ import main
from finetune.advisories import AdvisoryError, audit


def advisory(name: str = "Some_Package", *events: dict[str, str], **more: Any) -> dict[str, Any]:
    """An advisory about a package, for a range of versions."""
    listed = list(events) or [{"introduced": "0"}, {"fixed": "2.0"}]
    affected = {
        "package": {"name": name, "ecosystem": "PyPI"},
        "ranges": [{"type": "ECOSYSTEM", "events": listed}, {"type": "GIT", "events": [{"introduced": "0"}]}],
    }
    return {"id": "PYSEC-2026-1", "modified": "2026-11-01T00:00:00Z", "affected": [affected], **more}


def written(tmp_path: Path, value: Any, name: str = "all.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(value))
    return path


def hit(tmp_path: Path, value: Any, version: str, package: str = "some-package") -> bool:
    return bool(audit(written(tmp_path, value), {package: version}).findings)


@pytest.mark.parametrize(
    ("events", "affected", "safe"),
    [
        ([{"introduced": "0"}, {"fixed": "2.0"}], ["0.1", "1.9.9", "2.0rc1"], ["2.0", "2.0.post1", "3"]),
        ([{"introduced": "1.0"}, {"last_affected": "1.5"}], ["1.0", "1.5"], ["0.9", "1.5.1", "2"]),
        (
            [{"introduced": "1"}, {"fixed": "1.2"}, {"introduced": "2"}, {"fixed": "2.1"}],
            ["1.1", "2.0.9"],
            ["1.2", "2.1"],
        ),
        ([{"fixed": "1.10"}, {"introduced": "1.9"}], ["1.9", "1.9.5"], ["1.8", "1.10"]),
        ([{"introduced": "1.0"}], ["1.0", "99"], ["0.9"]),
        ([{"introduced": "1.0", "fixed": "1.1"}], ["1.0"], ["1.1"]),
    ],
)
def test_a_version_is_affected_from_introduced_to_fixed(
    events: list[dict[str, str]], affected: list[str], safe: list[str], tmp_path: Path
) -> None:
    assert [v for v in affected if not hit(tmp_path, advisory("Some_Package", *events), v)] == []
    assert [v for v in safe if hit(tmp_path, advisory("Some_Package", *events), v)] == []


def test_a_listed_version_another_package_and_another_ecosystem(tmp_path: Path) -> None:
    one = advisory()
    one["affected"][0] |= {"versions": ["7.0"]}
    assert hit(tmp_path, one, "7.0") and not hit(tmp_path, one, "7.1") and not hit(tmp_path, one, "1.0", "other")
    one["affected"][0]["package"]["ecosystem"] = "npm"
    with pytest.raises(AdvisoryError, match="AUD-003"):
        hit(tmp_path, one, "1.0")


def test_a_withdrawn_advisory_counts_no_longer_and_a_version_that_cannot_be_compared_counts(tmp_path: Path) -> None:
    assert not hit(tmp_path, advisory(withdrawn="2026-01-01T00:00:00Z"), "1.0")
    assert hit(tmp_path, advisory(), "1.0-unknown-build")


def test_one_hole_under_two_names_is_one_line_that_says_what_mends_it(tmp_path: Path) -> None:
    both = [
        advisory(aliases=["CVE-2026-1"], summary="reads\nanything"),
        advisory(id="GHSA-aaaa", aliases=["CVE-2026-1"]),
        advisory(id="GHSA-bbbb"),
    ]
    found = audit(written(tmp_path, both), {"some-package": "1.0"})
    assert [f.sentence() for f in found.findings] == [
        "AUD-001 some-package 1.0: CVE-2026-1, GHSA-aaaa, PYSEC-2026-1 (fixed in 2.0): reads anything",
        "AUD-001 some-package 1.0: GHSA-bbbb (fixed in 2.0)",
    ]
    assert (found.advisories, found.newest) == (3, "2026-11-01")


def test_a_folder_a_zip_yaml_and_an_answer_of_osv_are_read_alike(tmp_path: Path) -> None:
    import yaml

    folder = tmp_path / "vulns" / "some"
    folder.mkdir(parents=True)
    (folder / "PYSEC-2026-1.yaml").write_text(yaml.safe_dump(advisory()))
    (folder / "README.md").write_text("no advisory")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a/PYSEC-2026-1.json", json.dumps(advisory()))
    answer = written(tmp_path, {"vulns": [advisory()]})
    for path in (tmp_path / "vulns", tmp_path / "all.zip", answer):
        assert [f.package for f in audit(path, {"some-package": "1.0"}).findings] == ["some-package"]


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "{}",
        '[{"id": 3}]',
        '{"id": "A", "affected": 3}',
        '{"id": "A", "affected": [{"package": {"ecosystem": "PyPI"}}]}',
        "[" * 100_000,
        json.dumps(advisory("some-package", {"introduced": "x y"})),
        json.dumps(advisory("some-package", {"begins": "1"})),
        json.dumps(
            {"id": "A", "affected": [{"package": {"name": "some-package", "ecosystem": "PyPI"}, "ranges": [7]}]}
        ),
        json.dumps(advisory("some-package") | {"aliases": [7]}),
    ],
)
def test_what_is_no_advisory_ends_the_check_instead_of_being_passed_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(text)
    with pytest.raises(AdvisoryError, match="AUD-002"):
        audit(path, {"some-package": "1.0"})


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisories, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", " " * 1001)
    with pytest.raises(AdvisoryError, match=r"AUD-002 a\.json has 1,001 bytes"):
        audit(tmp_path / "all.zip", {})


def test_the_verb_ends_with_3_and_a_line_where_there_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(
        tmp_path, [advisory("PyTest", {"introduced": "0"}), advisory("numpy", {"introduced": "0"}, {"fixed": "1"})]
    )
    assert main(["audit", f"advisories={path}"]) == 3
    said = capsys.readouterr().out
    assert said.count("AUD-001") == 1 and "AUD-001 pytest " in said and "(no version mends it)" in said
    assert main(["audit", f"advisories={path}", "ignore=PYSEC-2026-1"]) == 0
    assert "0 findings, 1 ignored" in capsys.readouterr().out
    assert main(["audit", f"advisories={tmp_path / 'none.json'}"]) == 2
    assert main(["audit"]) == 2
