"""The export is what the merge has proved, and holds no held-out rows."""

import shutil

import pytest

from finetune.errors import RunError
from finetune.export import export, link_tree
from finetune.parity import Parity
from finetune.rundir import RunDir, read_json


@pytest.fixture
def merged(merged_run, tmp_path):
    """A copy of a run that has been merged and not exported."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(merged_run[0].path, copy.path)
    return copy


def test_an_export_holds_the_model_the_adapter_the_proof_and_a_card(merged):
    export(merged)
    names = {path.name for path in merged.export.iterdir()}
    assert names == {"hf", "peft", "parity.json", "README.md"}
    assert read_json(merged.export / "parity.json") == read_json(merged.parity)
    assert not {"parity.json", "answers.json"} & {path.name for path in (merged.export / "hf").iterdir()}
    assert merged.answers.is_file()
    card = (merged.export / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "in rehearsal" in card
    assert Parity.read(merged.parity).sentence() in card


def test_without_a_proof_there_is_no_export(merged):
    merged.parity.unlink()
    with pytest.raises(RunError, match="RUN-002"):
        export(merged)
    assert not merged.export.exists()


def test_linked_folders_share_bytes_where_they_can_and_copy_where_not(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.mkdir()
    (source / "x").write_text("1")
    link_tree(source, tmp_path / "b")
    assert (tmp_path / "b" / "x").samefile(source / "x")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    link_tree(source, tmp_path / "c")
    assert (tmp_path / "c" / "x").read_text() == "1"
    assert not (tmp_path / "c" / "x").samefile(source / "x")
