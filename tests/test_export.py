"""The export counts only when stock transformers answers from it as the adapter does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.compose import load_recipe
from finetune.errors import GateError
from finetune.export import export, link_tree, refuse_drift
from finetune.export.parity import Parity, _kl
from finetune.recipe import Export, Recipe
from finetune.run import run
from finetune.rundir import read_json


@pytest.fixture
def merged(tmp_path):
    """A rehearsal that has been merged and not exported, with an adapter that is plainly felt."""
    words = ["scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "train.lr=0.01"]
    return run(load_recipe("qwen3_30b_legal", *words), until="merge")


def test_an_export_holds_the_model_the_adapter_the_proof_and_a_card(merged):
    export(merged)
    names = {path.name for path in merged.export.iterdir()}
    assert names == {"hf", "peft", "parity.json", "README.md", "LICENSE", "NOTICE", "bom.cdx.json"}
    proof = read_json(merged.export / "parity.json")
    assert proof["mean_kl"] < 1e-4 < proof["effect_kl"]
    assert proof["same_answers"] == proof["answers"] == 2
    card = (merged.export / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card.split("---")[1]
    assert "in rehearsal" in card


def test_a_merged_file_that_is_not_what_was_trained_stops_the_export_and_keeps_the_adapter(merged):
    shard = sorted(merged.merged.glob("*.safetensors"))[0]
    values = {k: torch.randn_like(v) for k, v in load_file(shard).items()}
    save_file(values, shard, metadata={"format": "pt"})
    with pytest.raises(GateError, match="MRG-010 export and adapter differ") as caught:
        export(merged)
    assert caught.value.exit_code == 4
    assert not merged.export.exists()
    assert merged.adapter.exists()
    assert not list(merged.path.glob(".partial-*"))


def parity(mean_kl: float, effect_kl: float) -> Parity:
    return Parity(1, 1, "fp32", mean_kl, mean_kl, 1.0, effect_kl, 1, 1)


def test_an_export_that_is_as_near_to_the_base_as_to_the_adapter_is_refused():
    with pytest.raises(GateError, match="MRG-011"):
        refuse_drift(parity(1e-3, 1e-3), Recipe())
    refuse_drift(parity(1e-3, 1e-2), Recipe())
    with pytest.raises(GateError, match="MRG-010"):
        refuse_drift(parity(1e-3, 1e-2), Recipe(export=Export(max_kl=1e-4)))


def test_kl_is_the_definition():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(_kl(p.log(), q.log())[0], expected.double())


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
