"""Merging into the original files: every family, against the adapter and stock PEFT, and what must be refused."""

import hashlib
import json
import re
import shutil
import sys
from collections import defaultdict
from threading import Event

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.adapters import attach, load_adapter
from finetune.base import load_base
from finetune.errors import AdapterError, WeightsError
from finetune.families import FAMILIES
from finetune.merge import merge_folder, sentences, sums
from finetune.merge.four_bit import FourBit
from finetune.merge.plan import How, make_plan
from finetune.merge.shard import PIECE, Digest, Halted, sheets, write_at, write_sheet
from finetune.merge.updates import Update
from finetune.recipe import Adapter
from finetune.shards import weights_of
from tests.quantised import quantised
from tests.tiny_models import adapted, checkpoint, some_ids, tensors

ALL = Adapter(targets="all", rank=4, alpha=8.0, expert_rank=3, expert_alpha=5.0)


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """family -> (folder of an adapter, ids, the adapted model's logits)."""
    made = {}

    def make(family):
        if family not in made:
            base, model = adapted(family, ALL)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            ids = some_ids(base)
            with torch.no_grad():
                made[family] = folder, ids, model(input_ids=ids).logits
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_answers_as_the_adapter_does_and_keeps_every_key(family, adapter_of, tmp_path):
    adapter, ids, logits = adapter_of(family)
    source = checkpoint(family, True)
    merge_folder(source, adapter, tmp_path / "merged")
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert list(before) == list(after)
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    model = getattr(transformers, FAMILIES[family].auto_class).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [key for key, family in FAMILIES.items() if not family.repeats_tokens])
def test_in_fp32_it_is_bit_for_bit_what_merge_and_unload_of_stock_peft_makes(family, adapter_of, tmp_path):
    adapter, _, _ = adapter_of(family)
    source = checkpoint(family, True)
    merge_folder(source, adapter, tmp_path / "merged")
    auto = getattr(transformers, FAMILIES[family].auto_class)
    stock = PeftModel.from_pretrained(auto.from_pretrained(source, dtype=torch.float32), adapter).merge_and_unload()
    ours = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    different = [name for name, value in stock.state_dict().items() if not torch.equal(ours[name], value)]
    assert different == []


MOE = [key for key, family in FAMILIES.items() if family.experts]


@pytest.mark.parametrize("family", MOE)
def test_layers_straddle_shards_in_these_checkpoints(family):
    """The tests above would be weaker without: in some layer the experts must lie in more than one file."""
    index = json.loads((checkpoint(family, True) / "model.safetensors.index.json").read_text())["weight_map"]
    homes = defaultdict(set)
    for key, shard in index.items():
        if re.search(r"\.(experts|input_linear|output_linear)\.", key):
            homes[re.search(r"layers\.(\d+)\.", key)[1]].add(shard)
    assert max(len(files) for files in homes.values()) >= 2


def test_tensors_without_an_update_are_the_same_bytes(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("deepseek_v3")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("deepseek_v3", True), source)
    first = sorted(source.glob("*.safetensors"))[0]
    extra = {"model.layers.61.mtp.weight": torch.randn(3, 5, dtype=torch.float64)}
    save_file(load_file(first) | extra, first, metadata={"format": "pt"})
    merge_folder(source, adapter, tmp_path / "merged")
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert torch.equal(after["model.layers.61.mtp.weight"], extra["model.layers.61.mtp.weight"])
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.61.mtp.weight"} <= set(same)


def test_an_adapter_of_another_base_is_refused(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    with pytest.raises(WeightsError, match="MRG-001"):
        merge_folder(checkpoint("llama", True), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.iterdir())


def test_an_update_that_finds_only_part_of_its_weight_is_refused(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("mixtral", True), source)
    for shard in source.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(shard).items() if ".0.block_sparse_moe.experts.1.w3." not in k}
        save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="do not reach the checkpoint whole"):
        merge_folder(source, adapter, tmp_path / "merged")


def test_a_weight_stored_in_eight_bits_takes_no_update(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("mixtral", True), source)
    for shard in source.glob("*.safetensors"):
        values = load_file(shard)
        values = {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in values.items()}
        save_file(values, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="MRG-002"):
        merge_folder(source, adapter, tmp_path / "merged")


@pytest.mark.parametrize("mutation", ["swap gate and up", "drop the scale", "permute B"])
@pytest.mark.parametrize("family", MOE)
def test_a_scrambled_adapter_is_seen_by_the_comparison(family, mutation, adapter_of, tmp_path):
    """The parity test can fail: each classic layout mistake moves the merged logits by far more than its tolerance."""
    adapter, ids, logits = adapter_of(family)
    wrong, told = tmp_path / "adapter", FAMILIES[family]
    shutil.copytree(adapter, wrong)
    values = load_file(wrong / "adapter_model.safetensors")
    config = json.loads((wrong / "adapter_config.json").read_text())
    before = {key: value.clone() for key, value in values.items()}
    for key, value in list(values.items()):
        if f".{told.experts}." not in key:
            continue
        if mutation == "swap gate and up" and ".base_layer." in key:
            if told.interleaved and ".lora_B." in key:  # gate and up in turn
                values[key] = torch.stack([value[1::2], value[0::2]], 1).reshape(value.shape).contiguous()
            elif told.transposed and not told.interleaved and ".lora_A." in key:  # PEFT's A is at the outputs
                values[key] = value.roll(value.shape[1] // 2, 1).contiguous()
            elif not told.transposed and ".lora_B." in key:
                values[key] = value.roll(value.shape[0] // 2, 0).contiguous()
        elif mutation == "permute B" and ".lora_B." in key:
            values[key] = value.reshape(value.shape[0], -1, 3).mT.reshape(value.shape).contiguous()
    if mutation == "drop the scale":
        assert set(config["alpha_pattern"].values()) == {5.0}
        config["alpha_pattern"] = dict.fromkeys(config["alpha_pattern"], 3.0)
    else:
        assert any(not torch.equal(value, before[key]) for key, value in values.items())
    save_file(values, wrong / "adapter_model.safetensors", metadata={"format": "pt"})
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    merge_folder(checkpoint(family, True), wrong, tmp_path / "merged")
    model = getattr(transformers, told.auto_class).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - logits).abs().max() > 1e-2


def test_four_bit_training_merges_into_the_original_weights(tmp_path):
    """The adapter of a 4-bit run on the original base equals the merged checkpoint: the NF4 error is not merged in."""
    base, model = adapted("qwen3_moe", ALL, load_in_4bit=True)
    model.save_pretrained(tmp_path / "adapter")
    merge_folder(checkpoint("qwen3_moe", True), tmp_path / "adapter", tmp_path / "merged")
    ids = some_ids(base)
    plain = load_base(checkpoint("qwen3_moe", True), load_in_4bit=False, precision="fp32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = load_adapter(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "mistral4", "gpt_oss", "deepseek_v4"])
def test_a_base_in_fp8_or_fp4_is_merged_into_bf16_like_its_twin(family, published, tmp_path):
    """The same numbers as merging the fp32 twin and rounding once; no scale is left, and transformers loads it."""
    folder, twin, adapter, ids, logits = published(family)
    merge_folder(folder, adapter, tmp_path / "merged")
    merge_folder(twin, adapter, tmp_path / "merged-twin")
    found, expected = tensors(tmp_path / "merged"), tensors(tmp_path / "merged-twin")
    assert found.keys() == expected.keys()
    rounded = 0
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
        rounded += tensor.dtype == torch.bfloat16
    assert rounded >= 4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    auto = getattr(transformers, FAMILIES[family].auto_class)
    stock, info = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = stock.eval()(input_ids=ids).logits - logits
    assert difference.norm() <= 2e-2 * logits.norm()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """family -> (folder in its published number format, fp32 twin, adapter, ids, logits of the adapter beside it)."""
    made = {}

    def make(family, targets="all"):
        if (family, targets) not in made:
            place = tmp_path_factory.mktemp(f"{family}-{targets}")
            folder, twin = quantised(family, place)
            base = load_base(folder, load_in_4bit=False, precision="fp32")
            torch.manual_seed(5)
            model = attach(base, Adapter(targets=targets, rank=4, expert_rank=3)).eval()
            ids = some_ids(base)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".lora_B." in name:
                        parameter.normal_(0, 0.1)
                logits = model(input_ids=ids).logits
            model.save_pretrained(place / "adapter")
            made[family, targets] = folder, twin, place / "adapter", ids, logits
        return made[family, targets]

    return make


AGAIN = How(quantised="requantise")


@pytest.mark.parametrize(
    ("family", "targets"), [("deepseek_v3", "all"), ("mistral4", "all"), ("deepseek_v4", "attention")]
)
def test_a_base_in_fp8_is_merged_into_fp8_with_new_scales_in_its_own_layout(family, targets, published, tmp_path):
    """Ragged blocks, a scale per expert, exponents as scales; values and scales lie in different files here."""
    folder, twin, adapter, ids, logits = published(family, targets)
    merge_folder(folder, adapter, tmp_path / "merged", how=AGAIN)
    merge_folder(twin, adapter, tmp_path / "exact")
    before, after = tensors(folder), tensors(tmp_path / "merged")
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "merged")]
    assert configs[0] == configs[1] and "quantization_config" in configs[0]
    settings = configs[0]["quantization_config"]
    found = weights_of(tmp_path / "merged", settings)
    exact, original = tensors(tmp_path / "exact"), tensors(twin)
    updated = {key for key in exact if not torch.equal(exact[key], original[key])}
    for key, weight in found.items():
        raw = [key, *(name for name in before if name.startswith(key + "_scale") or name == scale_of(key))]
        same = all(torch.equal(bits(before[name]), bits(after[name])) for name in raw)
        assert same == (key not in updated), key
        if key in updated and weight.is_quantised:
            values = weight.read().float()
            # e4m3 has three bits of mantissa: half a step is 1/16 of a value, or of the smallest normal one; a scale
            # that is a power of two may be twice as large.
            close = (values - exact[key]).abs() <= exact[key].abs() / 16 + exact[key].abs().max() * 2.0**-14
            assert close.all(), key
    base = load_base(tmp_path / "merged", load_in_4bit=False, precision="fp32")
    with torch.no_grad():
        difference = base.model(input_ids=ids).logits - logits
    assert difference.norm() <= 0.25 * logits.norm()  # small random layers are far more sensitive than trained ones
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["rounding_over_update"] > 0


def scale_of(key):
    return key.removesuffix("weight") + "scale"


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("family", "why"), [("gpt_oss", "4 bits"), ("deepseek_v4", "4 bits"), ("mixtral", "no effect")]
)
def test_no_update_goes_into_four_bits_and_requantising_plain_numbers_is_refused(
    family, why, published, adapter_of, tmp_path
):
    plain = family == "mixtral"
    folder = checkpoint(family, True) if plain else published(family)[0]
    adapter = adapter_of(family)[0] if plain else published(family)[2]
    with pytest.raises(WeightsError, match=rf"MRG-003 .*{why}.*merge.quantised=bf16"):
        merge_folder(folder, adapter, tmp_path / "merged", how=AGAIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "double"), [("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", False), ("deepseek_v3", True)]
)
def test_merged_into_what_training_saw_it_answers_as_the_adapter_beside_the_base_in_4_bits(family, double, tmp_path):
    base = load_base(checkpoint(family, True), load_in_4bit=True, precision="fp32", double_quantisation=double)
    torch.manual_seed(5)
    model = attach(base, ALL).eval()
    ids = some_ids(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    how = How(four_bit=FourBit("fp32", double))
    merge_folder(checkpoint(family, True), tmp_path / "adapter", tmp_path / "merged", how=how)
    merge_folder(checkpoint(family, True), tmp_path / "adapter", tmp_path / "original")
    answers = []
    for place in ("merged", "original"):
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32).eval()
        with torch.no_grad():
            answers.append(merged(input_ids=ids).logits)
    torch.testing.assert_close(answers[0], logits, rtol=0, atol=1e-5)
    assert (answers[1] - logits).abs().max() > 1e-3
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert told["base"] == "dequantised" and told["four_bit_over_update"] > 0


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A dense checkpoint whose head is its embedding and is not in the file."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    shutil.copytree(checkpoint("qwen3", True), folder)
    for shard in folder.glob("*.safetensors"):
        kept = {key: value for key, value in load_file(shard).items() if key != "lm_head.weight"}
        save_file(kept, shard, metadata={"format": "pt"})
    for name, change in {
        "config.json": lambda values: values | {"tie_word_embeddings": True},
        "model.safetensors.index.json": lambda values: {
            "metadata": {},
            "weight_map": {k: v for k, v in values["weight_map"].items() if k != "lm_head.weight"},
        },
    }.items():
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(values)))
    return folder


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
        {"target_modules": ["lm_head"], "target_parameters": ["embed_tokens.weight"]},
    ],
    ids=["head", "embedding", "both"],
)
def test_tied_embeddings_with_an_update_at_one_end_are_parted(where, tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    model = get_peft_model(stock, LoraConfig(r=3, **where)).eval()
    ids = torch.randint(5, 100, (2, 11))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_folder(tied, tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {*tensors(tied), "lm_head.weight"} == set(tensors(tmp_path / "merged"))
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, logits, rtol=0, atol=1e-5)


def test_an_adapter_of_the_embedding_as_a_module_is_refused_with_its_name(tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    stock = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model = get_peft_model(stock, LoraConfig(r=3, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(AdapterError, match=r"ADP-016 .*lora_embedding"):
        merge_folder(tied, tmp_path / "adapter", tmp_path / "merged")


class Largest(TorchDispatchMode):
    """Counts the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return made


@pytest.mark.parametrize(
    ("family", "how"), [("llama4", How()), ("gpt_oss", How()), ("mistral4", AGAIN), ("mistral4", How())]
)
def test_no_stack_of_experts_is_ever_in_memory_as_a_whole(family, how, published, adapter_of, tmp_path):
    """Also not its update. The stacks have four experts; one in fp32 is the most that may be there."""
    plain = family == "llama4"
    folder, adapter = (checkpoint(family, True), adapter_of(family)[0]) if plain else published(family)[0:3:2]
    plan = make_plan(folder, adapter, how)
    stacks = [w for w in plan.weights.values() if len(w.shape) == 3 and w.key in plan.changes]
    assert stacks and all(stack.shape[0] == 4 for stack in stacks)
    planned = sheets(plan)
    matrices = [weight.shape[-2:] for weight in plan.weights.values() if weight.key in plan.changes]
    most = max(4 * rows * columns for rows, columns in matrices)
    assert most < max(4 * w.shape[0] * w.shape[1] * w.shape[2] for w in stacks)
    with Largest() as largest:
        for sheet in planned:
            write_sheet(plan, sheet, tmp_path / sheet.name)
    assert 0 < largest.bytes <= most


@pytest.mark.parametrize(
    ("family", "how"), [("mixtral", How()), ("gpt_oss", How()), ("mistral4", AGAIN), ("deepseek_v3", AGAIN)]
)
def test_the_hash_taken_while_a_file_is_written_is_that_of_the_file(family, how, published, adapter_of, tmp_path):
    plain = family == "mixtral"
    folder, adapter = (checkpoint(family, True), adapter_of(family)[0]) if plain else published(family)[0:3:2]
    plan = make_plan(folder, adapter, how)
    for sheet in sheets(plan):
        counted = []
        _, digest = write_sheet(plan, sheet, tmp_path / sheet.name, counted.append)
        assert digest == hashlib.sha256((tmp_path / sheet.name).read_bytes()).hexdigest()
        assert sum(counted) == sheet.size


def test_a_file_that_cannot_be_written_ends_the_others_and_keeps_what_is_finished(adapter_of, tmp_path, monkeypatch):
    source, adapter = checkpoint("mixtral", True), adapter_of("mixtral")[0]
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) > 2
    genuine, begun, halted = write_sheet, Event(), []

    def write(plan, sheet, path, advance, halt):
        if sheet.name == names[1]:
            assert begun.wait(60)
            raise OSError(28, "No space left on device")
        if sheet.name == names[2]:  # is in the middle of its file when another breaks
            begun.set()
            halted.append(halt.wait(60))
        return genuine(plan, sheet, path, advance, halt)

    monkeypatch.setattr(sys.modules["finetune.merge.lanes"], "processors", lambda: 2)
    monkeypatch.setattr("finetune.merge.write_sheet", write)
    with pytest.raises(OSError, match="No space left"):
        merge_folder(source, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    kept = {path.name for path in (tmp_path / ".merging-merged").glob("[!.]*.safetensors")}
    assert kept == {names[0]}
    assert halted == [True]
    monkeypatch.undo()
    merge_folder(source, adapter, tmp_path / "merged")
    merge_folder(source, adapter, tmp_path / "straight")
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "straight").keys()
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_a_file_written_in_any_order_has_the_hash_of_its_bytes(order, tmp_path):
    pieces = [bytes([number]) * (PIECE + number) for number in range(4)]
    places = [sum(map(len, pieces[:number])) for number in range(4)]
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        digest = Digest()
        for number in order:
            write_at(file.fileno(), pieces[number], places[number])
            digest.update(memoryview(pieces[number]), places[number])
        assert digest.finish(file.fileno()) == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_file_that_is_halted_is_left(adapter_of, tmp_path):
    plan = make_plan(checkpoint("mixtral", True), adapter_of("mixtral")[0], How())
    halt = Event()
    halt.set()
    with pytest.raises(Halted):
        write_sheet(plan, sheets(plan)[0], tmp_path / "part", halt=halt)


def test_rounding_that_takes_most_of_an_update_is_measured_and_warned_of(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    small = tmp_path / "adapter"
    shutil.copytree(adapter, small)
    values = load_file(small / "adapter_model.safetensors")
    values = {key: value * 1e-4 if ".lora_B." in key else value for key, value in values.items()}
    save_file(values, small / "adapter_model.safetensors", metadata={"format": "pt"})
    base = checkpoint("mixtral")  # bf16
    merge_folder(base, small, tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    plan, before, after = make_plan(base, small, How()), tensors(base), tensors(tmp_path / "merged")
    rounding = update = 0.0
    for key, change in plan.changes.items():
        pair = change.share.pair(None)
        delta = pair.scale * (pair.left_Or.double() @ pair.right_rI.double())
        exact = before[key].double() + delta
        rounding += float((after[key].double() - exact).square().sum())
        update += float(delta.square().sum())
    assert told["rounding_over_update"] == pytest.approx((rounding / update) ** 0.5, rel=1e-3)
    assert told["rounding_over_update"] > 0.5
    assert any(sentence.startswith("MRG-006") for sentence in sentences(told))
    assert not any(s.startswith("MRG-006") for s in sentences(told | {"rounding_over_update": 0.1}))


def test_what_rounding_takes_is_told_from_a_part_of_a_large_matrix():
    """From a sixteenth of its rows: within a few per cent of all of it, and the sums are the same to the bit."""
    generator = torch.Generator().manual_seed(5)
    rows, columns, rank = 2048, 1024, 4
    base = (torch.randn(rows, columns, generator=generator) * torch.linspace(0.5, 2, rows)[:, None]).bfloat16()
    left, right = torch.randn(rows, rank, generator=generator) * 1e-2, torch.randn(rank, columns, generator=generator)
    assert base.numel() >= 8 * sums.VALUES
    for scale in (2.0, 1.5):
        out, tally = torch.empty_like(base), sums.Tally()
        sums.add(base, Update("weight", left, right, scale).pair(None), out, tally)
        exact = (left @ right) * scale + base.float()
        other = out != exact.bfloat16()  # where the last bit of fp32 decides, which depends on the processor
        assert other.float().mean() < 1e-4
        bits = [values[other].view(torch.int16).int() for values in (out, exact.bfloat16())]
        assert all((bits[0] - bits[1]).abs() == 1)
        assert tally.rounding == pytest.approx(float((exact - out.float()).square().sum()), rel=0.05)
        assert tally.update == pytest.approx(float(((left @ right) * scale).square().sum()), rel=1e-4)
