"""The proof of a merge: what it measures, what it refuses, and that the stage publishes nothing which fails it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import merge as merging
from finetune.data import load_splits
from finetune.errors import GateError, RunError
from finetune.gpus import Gpu
from finetune.merge import prove
from finetune.merge.changed import compare
from finetune.merge.plan import How, make_plan
from finetune.merge.prove import compared, kl
from finetune.parity import Parity, refuse
from finetune.recipe import Adapter, Evaluate, Export, Merge, Recipe
from finetune.rundir import RESUMED, RunDir, read_json
from tests.quantised import quantised
from tests.tiny_models import adapted, checkpoint, tensors
from tests.warm import proofs_are_forks

ALL = Adapter(targets="all", rank=4, alpha=8.0, expert_rank=3, expert_alpha=5.0, load_in_4bit=False)
RECIPE = Recipe(adapter=ALL, evaluate=Evaluate(max_new_tokens=4))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(base in bf16, adapter, merged, rows)."""
    folder = tmp_path_factory.mktemp("parity")
    base, model = adapted("mixtral", ALL, fp32=False)
    model.save_pretrained(folder / "adapter")
    merging.merge_folder(checkpoint("mixtral"), folder / "adapter", folder / "merged")
    return checkpoint("mixtral"), folder / "adapter", folder / "merged", some_rows(base.tokenizer)


def some_rows(tokenizer):
    rows = []
    for question, answer in (("What does a lease say?", "Who pays the rent."), ("And a licence?", "What is allowed.")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        row = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        labels = [-100] * len(ids) + row[len(ids) :]
        rows.append({"input_ids": row, "labels": labels, "prompt_length": len(ids), "messages": messages})
    return rows


def changed(job, folder=None, how=None):
    base, adapter, merged, _ = job
    return compare(make_plan(base, adapter, how or How()), folder or merged)


@pytest.mark.parametrize(("four_bit", "total"), [(False, 6), (True, 8)])
def test_a_long_proof_says_how_far_it_is(four_bit, total, job, monkeypatch, capsys):
    base, adapter, merged, rows = job
    monkeypatch.setattr(prove, "SECONDS", 0)
    recipe = replace(RECIPE, adapter=replace(ALL, load_in_4bit=four_bit))
    compared(base, adapter, merged, rows, recipe, compare(make_plan(base, adapter, How()), merged))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("proof: ")]
    assert [line.split()[1] for line in said] == [str(n + 1) for n in range(total)]
    assert said[-1] == f"proof: {total} of {total} answers, of adapter, base and merged files"


def test_the_proof_counts_every_tensor_and_keeps_the_answers_of_base_and_tuned(job):
    base, adapter, merged, rows = job
    found = changed(job)
    updated = [k for k, v in tensors(base).items() if not torch.equal(v, tensors(merged)[k])]
    assert found.tensors == found.changed == len(updated) and not found.strangers
    parity, answers = compared(base, adapter, merged, rows, RECIPE, found)
    refuse(parity, RECIPE)
    assert parity.mean_kl <= parity.max_kl < 0.01 < parity.base_kl
    assert parity.mean_kl == parity.original_kl and parity.four_bit_kl is None
    assert parity.base_kl == pytest.approx(parity.effect_kl, rel=0.3)
    assert parity.loaded_by == "transformers" and parity.prompts == 2
    assert f"{len(updated)} of {len(updated)} tensors with an update differ on disk" in parity.sentence()
    json.dumps(answers, allow_nan=False)
    for row, told in zip(rows, answers["prompts"], strict=True):
        assert told["messages"] == row["messages"][:1]
        assert told["ids"] == row["input_ids"][: row["prompt_length"]]
        assert told["text"].endswith("<|im_start|>assistant\n")
        for side in ("base", "tuned"):
            assert 1 <= len(told[side]["ids"]) == len(told[side]["logprobs"]) <= 4
            assert all(value <= 0 for value in told[side]["logprobs"])
        assert len(told["tuned_under_base"]) == len(told["tuned"]["ids"])
    assert any(told["tuned_under_base"] != told["tuned"]["logprobs"] for told in answers["prompts"])


def test_the_answers_are_what_the_merged_model_says_token_by_token(job):
    import transformers

    base, adapter, merged, rows = job
    _, answers = compared(base, adapter, merged, rows, RECIPE, changed(job))
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    for told in answers["prompts"]:
        ids = list(told["ids"])
        for token, expected in zip(told["tuned"]["ids"], told["tuned"]["logprobs"], strict=True):
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
            assert logs[token].item() == pytest.approx(expected, abs=0.05)
            assert logs[token] >= logs.max() - 0.05
            ids.append(token)


@pytest.mark.parametrize("mistake", ["swap gate and up", "permute experts", "drop one layer's experts"])
def test_a_scrambled_merge_is_refused(mistake, job, tmp_path):
    """The classic mistakes of merges: every tensor is there, of its shape, and finite."""
    base, adapter, merged, rows = job
    wrong = tmp_path / "merged"
    shutil.copytree(merged, wrong)
    before, files = tensors(base), {path: load_file(path) for path in wrong.glob("*.safetensors")}
    after = {key: value for values in files.values() for key, value in values.items()}
    swap = {"w1": "w3", "w3": "w1"}
    for path, values in files.items():
        for key in values:
            if ".experts." not in key:
                continue
            head, name, _ = key.rsplit(".", 2)
            if mistake == "swap gate and up" and name in swap:
                values[key] = before[key] + after[f"{head}.{swap[name]}.weight"] - before[f"{head}.{swap[name]}.weight"]
            elif mistake == "permute experts":
                stem, _, expert = head.rpartition(".")
                other = f"{stem}.{(int(expert) + 1) % 4}.{name}.weight"
                values[key] = before[key] + after[other] - before[other]
            elif mistake == "drop one layer's experts" and ".layers.1." in key:
                values[key] = before[key].clone()
        save_file(values, path, metadata={"format": "pt"})
    parity, _ = compared(base, adapter, wrong, rows, RECIPE, changed(job))  # as if no byte had been compared
    with pytest.raises(GateError, match="MRG-010") as caught:
        refuse(parity, RECIPE)
    assert caught.value.exit_code == 4


def test_bytes_that_changed_without_an_update_or_did_not_with_one_are_named(job, tmp_path):
    base, _, merged, _ = job
    wrong = tmp_path / "merged"
    shutil.copytree(merged, wrong)
    before = tensors(base)
    updated = {key for key, value in tensors(merged).items() if not torch.equal(value, before[key])}
    for path in wrong.glob("*.safetensors"):
        values = load_file(path)
        for key in values:
            if key == "model.norm.weight":
                values[key] = values[key].clone()
                values[key].view(torch.int16)[3] ^= 1
            if key == min(updated):
                values[key] = before[key]
        save_file(values, path, metadata={"format": "pt"})
    found = changed(job, wrong)
    assert sorted(found.strangers) == sorted([min(updated), "model.norm.weight"])
    assert found.tensors == len(updated) and found.changed == len(updated) - 1
    shutil.copytree(merged, tmp_path / "cut")
    first = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-2])
    assert changed(job, tmp_path / "cut").strangers == [f"{first.name} (missing, or of another size)"]


def test_updates_of_zero_and_updates_that_rounding_swallows_are_counted_not_refused(job, tmp_path):
    base, adapter, _, _ = job
    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    values = load_file(other / "adapter_model.safetensors")
    heads = sorted(key for key in values if "q_proj.lora_B" in key)
    values[heads[0]] *= 0
    values[heads[1]] *= 1e-12
    save_file(values, other / "adapter_model.safetensors", metadata={"format": "pt"})
    merging.merge_folder(base, other, tmp_path / "merged")
    found = compare(make_plan(base, other, How()), tmp_path / "merged")
    assert (found.zero, found.rounded_away, found.strangers) == (1, 1, [])
    assert found.changed == found.tensors - 2


@pytest.mark.parametrize("quantised_as", ["bf16", "requantise"])
def test_a_base_in_fp8_is_proved_in_both_forms(quantised_as, tmp_path):
    """Merged into fp8 it is read by our own loader: stock transformers cannot read ragged blocks on a CPU."""
    folder, _ = quantised("deepseek_v3", tmp_path)
    from finetune.adapters import attach
    from finetune.base import load_base

    base = load_base(folder, load_in_4bit=False, precision="fp32")
    torch.manual_seed(5)
    model = attach(base, ALL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    how = How(quantised=quantised_as)
    merging.merge_folder(folder, tmp_path / "adapter", tmp_path / "merged", how=how)
    found = compare(make_plan(folder, tmp_path / "adapter", how), tmp_path / "merged")
    assert found.changed == found.tensors > 0 and not found.strangers
    rows = some_rows(base.tokenizer)
    parity, _ = compared(folder, tmp_path / "adapter", tmp_path / "merged", rows, RECIPE, found)
    assert parity.loaded_by == {"bf16": "transformers", "requantise": "finetune"}[quantised_as]
    assert parity.mean_kl < 0.1 * parity.base_kl
    bad = replace(parity, mean_kl=1.0)
    with pytest.raises(GateError, match="merge.quantised=bf16" if quantised_as == "requantise" else "not what was"):
        refuse(bad, RECIPE)


def test_merged_into_what_training_saw_it_is_compared_with_that_and_the_other_distance_is_told(tmp_path):
    adapter = replace(ALL, load_in_4bit=True)
    recipe = replace(RECIPE, adapter=adapter, merge=Merge(base="dequantised"))
    recipe.train.precision = "fp32"
    base, model = adapted("mixtral", adapter, load_in_4bit=True)
    model.save_pretrained(tmp_path / "adapter")
    how = merging.how_of(recipe)
    source = checkpoint("mixtral", True)
    merging.merge_folder(source, tmp_path / "adapter", tmp_path / "merged", how=how)
    found = compare(make_plan(source, tmp_path / "adapter", how), tmp_path / "merged")
    assert found.changed == found.tensors and not found.strangers
    rows = some_rows(base.tokenizer)
    parity, answers = compared(source, tmp_path / "adapter", tmp_path / "merged", rows, recipe, found)
    refuse(parity, recipe)
    assert parity.reference == answers["reference"] == "four_bit"
    assert parity.mean_kl == parity.four_bit_kl < 1e-6 < 1e-4 < parity.original_kl
    assert "its base in 4 bits" in parity.sentence()


def figures(**values):
    usual = dict.fromkeys(("prompts", "tokens", "same_answers", "answers"), 1) | {"precision": "fp32"}
    usual |= dict.fromkeys(("mean_kl", "max_kl", "original_kl"), 1e-3) | dict.fromkeys(("effect_kl", "base_kl"), 1e-2)
    usual |= dict.fromkeys(("tensors", "tensors_changed"), 3) | dict.fromkeys(("tensors_zero",), 0)
    usual |= {"reference": "original", "top1_agreement": 1.0, "four_bit_kl": None, "tensors_rounded_away": 0}
    return Parity(
        **(usual | {"strangers": [], "loaded_by": "transformers", "quantised": "none", "rounding": 0.1} | values)
    )


def test_each_gate_can_fail_and_a_good_proof_passes():
    refuse(figures(), Recipe())
    with pytest.raises(GateError, match="MRG-011 merged is as near to the base"):
        refuse(figures(base_kl=1e-3), Recipe())
    with pytest.raises(GateError, match="MRG-010"):
        refuse(figures(), Recipe(export=Export(max_kl=1e-4)))
    with pytest.raises(GateError, match="MRG-010"):
        refuse(figures(), Recipe(merge=Merge(tolerance=9)))
    with pytest.raises(GateError, match="MRG-010"):
        refuse(figures(rounding=0.03), Recipe())
    refuse(figures(rounding=0.0, precision="bf16"), Recipe())
    with pytest.raises(GateError, match="MRG-010"):
        refuse(figures(mean_kl=float("nan")), Recipe())
    for bad in ({"max_kl": 25.0}, {"max_kl": 2.01}, {"max_kl": float("nan")}):
        with pytest.raises(GateError, match=r"MRG-010 at one token .* export.max_single_kl=2 are allowed"):
            refuse(figures(**bad), Recipe())
    for share in (0.0, 0.74, float("nan")):
        with pytest.raises(GateError, match=r"MRG-010 .* likeliest at .*, export.min_top1=0.75 is demanded"):
            refuse(figures(top1_agreement=share), Recipe())
    refuse(figures(max_kl=25.0, top1_agreement=0.0), Recipe(export=Export(max_single_kl=30.0, min_top1=0.0)))
    with pytest.raises(GateError, match=r"MRG-012 1 tensors are not .*model\.x"):
        refuse(figures(strangers=["model.x"]), Recipe())


def test_kl_is_the_definition():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(kl(p.log(), q.log())[0], expected.double())


def test_the_figures_come_back_from_the_file_as_they_were(tmp_path):
    (tmp_path / "parity.json").write_text(json.dumps(figures().as_dict()))
    assert Parity.read(tmp_path / "parity.json") == figures()


def test_the_stage_proves_in_a_fresh_process_and_leaves_the_proof_beside_the_weights(merged_run):
    run_dir, said = merged_run
    parity = Parity.read(run_dir.parity)
    assert parity.tensors_changed == parity.tensors > 0
    assert parity.mean_kl < 1e-4 < parity.base_kl
    assert parity.four_bit_kl is not None and parity.four_bit_kl > parity.mean_kl
    assert parity.sentence() in said
    answers = read_json(run_dir.answers)
    rows = load_splits(run_dir).heldout
    assert [told["ids"] for told in answers["prompts"]] == [
        row["input_ids"][: row["prompt_length"]] for row in rows.select(range(len(answers["prompts"])))
    ]
    assert not list(run_dir.path.glob(RESUMED + "*"))


def test_a_merge_that_fails_its_proof_is_not_published_and_the_adapter_stays(merged_run, tmp_path, monkeypatch):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(merged_run[0].path, copy.path)
    shutil.rmtree(copy.merged)
    proved = merging.prove_apart

    def damaged(run_dir, folder, say):
        shard = sorted(folder.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
        proved(run_dir, folder, say)

    monkeypatch.setattr(merging, "prove_apart", damaged)
    refused = pytest.raises(GateError, match=r"MRG-012 1 tensors .*the adapter is unharmed")
    with proofs_are_forks(), refused as caught:
        merging.merge(copy)
    assert caught.value.exit_code == 4
    assert copy.adapter.exists() and not copy.merged.exists() and not list(copy.path.glob(RESUMED + "*"))


def test_a_proof_that_dies_keeps_the_merged_files_for_the_next_time(merged_run, tmp_path, monkeypatch):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(merged_run[0].path, copy.path)
    shutil.rmtree(copy.merged)
    monkeypatch.setattr(merging.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="MRG-013 the proof ended with code 1"):
        merging.merge(copy)
    kept = copy.path / (RESUMED + "merged")
    assert not copy.merged.exists() and len(list(kept.glob("model-*.safetensors"))) > 1
    assert len(read_json(kept / ".progress.json")["files"]) == len(list(kept.glob("model-*.safetensors")))


def test_the_proof_goes_where_it_has_room_or_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10 * 2**30)
    said = []
    monkeypatch.setattr(merging, "available_gib", lambda: 12.0)
    for free, environment in ((None, {}), (11.1, {}), (10.9, {"CUDA_VISIBLE_DEVICES": ""})):
        found = [] if free is None else [Gpu(name="a GPU", total_gib=24.0, free_gib=free)]
        monkeypatch.setattr(merging, "gpus", lambda found=found: found)
        assert merging.proof_place(tmp_path, said.append) == environment
    assert said == ["the proof takes 11 GiB, a GPU has 11 free: it runs on the host, slowly"]
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(RunError, match=r"MRG-014 proving the merge takes 22.0 GiB of memory, 12.0 are free"):
        merging.proof_place(tmp_path, said.append)
