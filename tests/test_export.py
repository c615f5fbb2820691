"""The export is what the merge has proved, and holds no held-out rows."""

import pytest

from finetune.compose import load_recipe
from finetune.errors import RunError
from finetune.export import export, link_tree
from finetune.parity import Parity
from finetune.run import run
from finetune.rundir import read_json


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A rehearsal that has been merged and not exported, with an adapter that is plainly felt."""
    folder = tmp_path_factory.mktemp("export")
    words = ["scale=rehearsal", f"runs_dir={folder}", f"cache_dir={folder / 'cache'}", "train.lr=0.01"]
    return run(load_recipe("qwen3_30b_legal", *words), until="merge")


def test_an_export_holds_the_model_the_adapter_the_proof_and_a_card(merged):
    export(merged)
    names = {path.name for path in merged.export.iterdir()}
    assert names == {"hf", "peft", "parity.json", "README.md", "LICENSE", "NOTICE", "bom.cdx.json"}
    assert read_json(merged.export / "parity.json") == read_json(merged.parity)
    assert not {"parity.json", "answers.json"} & {path.name for path in (merged.export / "hf").iterdir()}
    assert merged.answers.is_file()
    card = (merged.export / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card.split("---")[1]
    assert "in rehearsal" in card
    assert Parity.read(merged.parity).sentence() in card


def test_without_a_proof_there_is_no_export(merged, tmp_path):
    hidden = tmp_path / "parity.json"
    merged.parity.rename(hidden)
    with pytest.raises(RunError, match="RUN-002"):
        export(merged)
    hidden.rename(merged.parity)


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
