"""Checkpoints in fp8 and fp4 read like their unquantised twins; one matrix at a time; and nothing is left over."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.base import load_base
from finetune.errors import WeightsError
from finetune.shards import Weight, quantisation_of, read_headers, weights_of
from tests.quantised import quantised, write
from tests.tiny_models import checkpoint, some_ids, tensors

QUANTISED = ["deepseek_v3", "mistral4", "gpt_oss", "deepseek_v4"]


@pytest.fixture(scope="module", params=QUANTISED)
def pair(request, tmp_path_factory):
    """(folder in the family's published number format, its fp32 twin)."""
    return quantised(request.param, tmp_path_factory.mktemp(request.param))


def settings_of(folder):
    return quantisation_of(json.loads((folder / "config.json").read_text()))


def edit(folder, change):
    """Rewrites every tensor of a folder through `change(dict)`."""
    content = tensors(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    change(content)
    write(folder, content)


def test_every_weight_reads_as_in_the_twin_whole_and_matrix_by_matrix(pair):
    folder, twin = pair
    expected = tensors(twin)
    found = weights_of(folder, settings_of(folder))
    assert found.keys() == expected.keys()
    quantised_weights = 0
    for key, weight in found.items():
        assert weight.shape == tuple(expected[key].shape), key
        assert torch.equal(weight[...].float(), expected[key].float()), key
        if len(weight.shape) == 3:
            assert torch.equal(weight[1].float(), expected[key][1].float()), key
        quantised_weights += len(weight.entries) == 2
    assert quantised_weights >= 4


def test_a_base_in_fp8_or_fp4_is_packed_to_the_same_bits_as_its_twin(pair):
    folder, twin = pair
    ours = load_base(folder, load_in_4bit=True, precision="fp32")
    theirs = load_base(twin, load_in_4bit=True, precision="fp32")
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    ids = some_ids(ours)
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=ids).logits, theirs.model(input_ids=ids).logits)


def test_a_base_in_fp8_or_fp4_loads_without_4_bits_too(pair):
    folder, twin = pair
    ours = load_base(folder, load_in_4bit=False, precision="fp32").model
    expected = dict(load_base(twin, load_in_4bit=False, precision="fp32").model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.named_parameters())


def test_every_scale_is_used_and_dropping_it_changes_the_numbers(tmp_path):
    folder, _ = quantised("mistral4", tmp_path)
    before = {key: weight[...] for key, weight in weights_of(folder, settings_of(folder)).items()}

    def double(content):
        for key in content:
            if key.endswith("_scale_inv"):
                content[key] = content[key] * 2

    edit(folder, double)
    after = weights_of(folder, settings_of(folder))
    changed = [key for key, tensor in before.items() if not torch.equal(after[key][...], tensor)]
    assert len(changed) == sum(key.endswith("_scale_inv") for key in read_headers(folder))


@pytest.mark.parametrize("family", QUANTISED)
def test_a_missing_scale_is_told(family, tmp_path):
    folder, _ = quantised(family, tmp_path)
    lost = next(
        k for k in sorted(read_headers(folder)) if ".experts." in k and k.endswith(("_inv", "_scales", ".scale"))
    )
    edit(folder, lambda content: content.pop(lost))
    with pytest.raises(WeightsError, match=r"WGT-006 .*(has no scale|without a scale)"):
        load_base(folder, load_in_4bit=True, precision="bf16")


def test_a_scale_of_no_weight_is_told(tmp_path):
    folder, _ = quantised("deepseek_v3", tmp_path)
    edit(folder, lambda content: content.update({"model.layers.0.odd.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(WeightsError, match=r"WGT-006 .*odd\.weight_scale_inv is a scale of no weight"):
        load_base(folder, load_in_4bit=True, precision="bf16")


def test_a_scale_of_the_wrong_shape_is_told(tmp_path):
    folder, _ = quantised("deepseek_v3", tmp_path)
    key = next(k for k in read_headers(folder) if k.endswith("_scale_inv"))
    edit(folder, lambda content: content.update({key: torch.ones(7, 5)}))
    with pytest.raises(WeightsError, match=r"WGT-00[46] .*(7|5) scales do not fit"):
        load_base(folder, load_in_4bit=True, precision="bf16")


def test_other_quantisations_are_refused_by_name(tmp_path):
    with pytest.raises(WeightsError, match=r"WGT-007 .*'gptq'.*unquantised files"):
        quantisation_of({"model_type": "mixtral", "quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_no_index_is_told(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="WGT-003"):
        weights_of(tmp_path, {})


@pytest.mark.parametrize(
    "family", ["mixtral", "llama4", "gpt_oss", "granitemoe", "gpt_oss in mxfp4", "mistral4 in fp8"]
)
def test_a_stack_is_never_in_memory_as_a_whole(family, monkeypatch, tmp_path):
    """Counted, not timed: how many numbers of unpacked expert matrices are alive at once while loading."""
    name, _, kind = family.partition(" in ")
    folder = quantised(name, tmp_path)[0] if kind else checkpoint(name)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []
    read = Weight.read

    def counted(self, expert=None):
        tensor = read(self, expert)
        if self.deferred:
            alive.add(tensor)
            gc.collect(0)
            most.append(sum(t.numel() for t in alive))
        return tensor

    monkeypatch.setattr(Weight, "read", counted)
    base = load_base(folder, load_in_4bit=True, precision="bf16")
    modules = [m for m in base.model.modules() if hasattr(m, "finetune_layout")]
    experts, rows, columns = max(
        (s for m in modules for s in m.finetune_layout.shapes.values()), key=lambda shape: shape[1] * shape[2]
    )
    stacks = sum(len(m.finetune_layout.shapes) for m in modules)
    assert len(most) >= stacks * experts
    assert max(most) <= 2 * rows * columns < experts * rows * columns


@pytest.mark.slow
def test_loading_grows_by_less_than_the_packed_size_and_two_groups(tmp_path):
    """Measured in a process of its own, on a model whose groups are large beside Python's own memory."""
    import subprocess
    import sys

    write = """
import sys
from dataclasses import replace
from pathlib import Path
import finetune.tiny
from finetune.families import FAMILIES
family = FAMILIES["mixtral"]
wide = {**family.tiny, "hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 16}
finetune.tiny.SHARD_SIZE = "40MB"
finetune.tiny.write_tiny(replace(family, tiny=wide), Path(sys.argv[1]), 0)
"""
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "base")], check=True)
    load = """
import json, sys
from pathlib import Path
from finetune.base import load_base
base = load_base(Path(sys.argv[1]), load_in_4bit=True, precision="bf16")
print(json.dumps([base.load_peak_gib, base.resident_gib, base.largest_group_gib]))
"""
    done = subprocess.run(
        [sys.executable, "-c", load, str(tmp_path / "base")], check=True, capture_output=True, text=True
    )
    peak, resident, group = json.loads(done.stdout.splitlines()[-1])
    assert group == pytest.approx(16 * 4096 * 1024 * 2 / 2**30)
    assert peak <= resident + 2 * group


def test_a_checkpoint_in_one_file_needs_no_index(tmp_path):
    source = checkpoint("qwen3_moe")
    for path in source.iterdir():
        if "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    everything = {}
    for shard in source.glob("*.safetensors"):
        everything |= load_file(shard)
    save_file(everything, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_base(tmp_path, load_in_4bit=True, precision="bf16")
