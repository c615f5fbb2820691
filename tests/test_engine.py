"""Unsloth as an engine: what is refused, what it is given, and that a run with it leaves what every run leaves.

No machine of the tests has a GPU, so the chain runs with `tests/fake_unsloth.py` in its place; one test, marked `gpu`, is
for the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import check, machine
from finetune.compose import load_recipe
from finetune.engine import LIMITS, PACKAGES, engine_absent
from finetune.errors import RunError, WeightsError
from finetune.families import FAMILIES
from finetune.run import run
from finetune.rundir import read_json
from finetune.train import with_unsloth
from tests.job import good, ready

ROOT = Path(__file__).resolve().parents[1]
HERE = ("engine=unsloth", "adapter.double_quantisation=true", "train.precision=bf16", "scale=rehearsal")
PLAIN = ("adapter=lora", "adapter.targets=experts")


def asked(**changes):
    """A recipe without a problem that asks for Unsloth."""
    return good(**({"engine": "unsloth", "adapter__double_quantisation": True} | changes))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_family_and_settings_that_it_covers_are_no_problem():
    assert check.problems(asked()) == []
    assert check.problems(good(engine="finetune")) == []


@pytest.mark.parametrize("key", sorted(FAMILIES))
def test_every_family_is_covered_or_refused_by_name(key):
    family = FAMILIES[key]
    targets = "experts" if family.experts else "all"
    recipe = asked(model__family=key, model__config=dict(family.tiny), adapter__targets=targets)
    found = [sentence for sentence in check.problems(recipe) if sentence.startswith("ENG-")]
    assert (not found) == family.unsloth
    if found:
        assert found[0].startswith("ENG-001 engine=unsloth: ")
        assert f" family {key} " in found[0]
        assert found[0].endswith("Set engine=finetune.")


UNCARRIED = {
    "adapter.double_quantisation": {"adapter__double_quantisation": False},
    "adapter.targets": {"adapter__targets": "all"},
    "adapter.router": {"adapter__router": True},
    "data.packing": {"data__packing": True},
    "train.precision": {"train__precision": "fp32"},
    "train.router_aux_loss_coef": {"train__router_aux_loss_coef": 0.1},
    "train.checkpointed_layers": {"train__checkpointed_layers": 1},
    "launch.devices": {"launch__devices": 2},
    "launch.nodes": {"launch__nodes": 2},
    "launch.distribution": {"launch__distribution": "fsdp2"},
}


def test_every_limit_has_a_case():
    assert list(UNCARRIED) == [limit.key for limit in LIMITS]


@pytest.mark.parametrize("key", UNCARRIED)
def test_a_setting_it_does_not_carry_out_is_refused_with_both_ways_out(key):
    found = [sentence for sentence in check.problems(asked(**UNCARRIED[key])) if sentence.startswith("ENG-")]
    (instead,) = [limit.instead for limit in LIMITS if limit.key == key]
    (sentence,) = found
    assert sentence.startswith(f"ENG-002 {key}=")
    assert sentence.endswith(f"Set {key}={instead}, or engine=finetune.")
    assert not [s for s in check.problems(good(**UNCARRIED[key])) if s.startswith("ENG-")]


def test_all_problems_are_said_at_once():
    recipe = asked(model__family="gpt_oss", adapter__router=True, data__packing=True)
    codes = [sentence.split()[0] for sentence in check.problems(recipe)]
    assert codes.count("ENG-001") == 1
    assert codes.count("ENG-002") == 2


def test_16_bits_need_no_double_quantisation():
    assert check.problems(asked(adapter__load_in_4bit=False, adapter__double_quantisation=False)) == []


def test_dense_families_may_adapt_all():
    recipe = asked(model__family="llama", model__config=dict(FAMILIES["llama"].tiny), adapter__targets="all")
    assert check.problems(recipe) == []


def test_without_a_gpu_and_without_the_package_it_says_both(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    found = machine.launch_problems(asked())
    assert found[0].startswith("ENG-003 engine=unsloth needs an NVIDIA GPU, and this machine has none. Set engine=")
    assert [s.split(":")[1] for s in found[1:]] == [f" the package {name} is missing. Type" for name in PACKAGES]
    assert machine.launch_problems(good()) == []


def test_another_release_is_refused(installed):
    assert list(engine_absent(1)) == []
    installed("2026.10.9")
    sentence = next(engine_absent(1))
    assert sentence.startswith("ENG-004 engine=unsloth: unsloth 2026.10.9 is installed")
    assert "pip install unsloth==2026.10.5" in sentence


def test_the_releases_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["unsloth"] == [f"{name}=={version}" for name, version in PACKAGES.items()]


def test_a_quantised_folder_is_refused_before_it_is_loaded(tmp_path):
    recipe = ready(tmp_path, engine="unsloth")
    assert machine.unfit_weights(recipe) is None
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert machine.unfit_weights(ready_as(tmp_path, "finetune", config)) is None
    error = machine.unfit_weights(ready_as(tmp_path, "unsloth", config))
    assert isinstance(error, WeightsError)
    assert "ENG-005" in error.sentence()
    assert error.sentence().endswith("engine=finetune")


def ready_as(tmp_path, engine, config):
    """`ready` with an engine and a config.json."""
    recipe = ready(tmp_path, engine=engine)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return recipe


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (("recipe=legal_quickstart",), ["ENG-002", "ENG-003", "ENG-004", "ENG-004"]),
        (("recipe=legal_quickstart", *HERE), ["ENG-003", "ENG-004", "ENG-004"]),
        (("recipe=gpt_oss_120b_support", *HERE), ["ENG-001", "ENG-003", "ENG-004", "ENG-004"]),
    ],
)
def test_as_typed_it_is_refused_in_sentences_with_exit_code_2(tmp_path, words, codes):
    if machine.gpu_count():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "finetune", *words, "engine=unsloth", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert [line.split()[0] for line in done.stderr.splitlines()] == codes
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


# --- what it is given -----------------------------------------------------------------------------------------------


def test_what_the_base_is_loaded_with(tmp_path):
    recipe = asked(data__max_length=777, seed=5)
    assert with_unsloth.loading(recipe, tmp_path) == {
        "model_name": str(tmp_path),
        "max_seq_length": 777,
        "dtype": torch.bfloat16,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "load_in_16bit": False,
        "full_finetuning": False,
        "device_map": {"": 0},
        "fix_tokenizer": False,
        "trust_remote_code": False,
        "use_gradient_checkpointing": False,
        "use_exact_model_name": True,
        "offload_embedding": False,
        "fast_inference": False,
        "random_state": 5,
        "local_files_only": True,
    }
    plain = with_unsloth.loading(asked(adapter__load_in_4bit=False, train__gradient_checkpointing=True), tmp_path)
    assert (plain["load_in_4bit"], plain["load_in_16bit"], plain["use_gradient_checkpointing"]) == (False, True, "unsloth")


def test_what_the_adapter_is_made_with():
    family, names = FAMILIES["qwen3_moe"], ["self_attn.q_proj", "self_attn.o_proj"]
    recipe = asked(adapter__rank=4, adapter__expert_rank=2, adapter__alpha=6.0, adapter__expert_alpha=3.0)
    given = with_unsloth.adapting(recipe, family, names)
    assert (given["r"], given["lora_alpha"], given["bias"]) == (4, 6.0, "none")
    assert given["target_modules"] == names
    assert given["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert set(given["rank_pattern"].values()) == {2}
    assert set(given["alpha_pattern"].values()) == {3.0}
    attention = with_unsloth.adapting(asked(adapter__targets="attention"), family, names)
    assert attention["target_parameters"] is None
    assert attention["rank_pattern"] == attention["alpha_pattern"] == {}
    dense = with_unsloth.adapting(asked(adapter__targets="all"), FAMILIES["llama"], names)
    assert dense["target_modules"] == [*names, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert all("." in name for name in dense["target_modules"])


def test_it_reports_nothing_and_writes_nothing_where_the_command_was_typed(tmp_path):
    found = with_unsloth.environment(tmp_path)
    assert found["UNSLOTH_DISABLE_STATISTICS"] == found["HF_HUB_OFFLINE"] == "1"
    assert Path(found["UNSLOTH_COMPILE_LOCATION"]).parent == tmp_path


def test_trl_does_not_switch_recomputing_on_a_second_time():
    recipe = asked(train__gradient_checkpointing=True)
    assert with_unsloth.for_trainer(recipe).train.gradient_checkpointing is False
    assert recipe.train.gradient_checkpointing is True


def test_it_does_not_take_over_a_process_that_uses_transformers(tmp_path):
    import transformers  # noqa: F401

    with pytest.raises(RunError, match="ENG-006 transformers was imported before Unsloth"):
        with_unsloth.take_over(tmp_path)
    assert "unsloth" not in sys.modules


def test_only_one_file_imports_it():
    paths = [p for p in (ROOT / "finetune").rglob("*.py") if "import unsloth" in (t := p.read_text()) or "from unsloth" in t]
    assert [p.name for p in paths] == ["with_unsloth.py"]


# --- a run with something in its place ------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """version -> a folder on the path of this process and of those it starts, with the stand-in and its metadata."""
    folder = tmp_path / "site"

    def install(version):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(ROOT / "tests" / "fake_unsloth.py", folder / "unsloth.py")
        for name in PACKAGES:
            info = folder / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    install("2026.10.5")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setenv("FAKE_UNSLOTH", str(tmp_path / "given.json"))
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    return install


@pytest.fixture
def done(tmp_path, installed):
    """words -> a rehearsal with the stand-in, up to a stage."""

    def make(*words, until="train", recipe="legal_quickstart", engine=HERE):
        places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
        return run(load_recipe(recipe, *engine, *places, *words), until=until)

    return make


def given(tmp_path):
    """What the stand-in wrote down, by call."""
    return {entry["call"]: entry for entry in json.loads((tmp_path / "given.json").read_text())}


def test_a_run_leaves_what_every_run_leaves_and_later_stages_take_it(tmp_path, done, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    tuned = done(*PLAIN, until="export")
    report = read_json(tuned.train)
    assert report["engine"] == "unsloth"
    assert len(report["steps"]) == 4
    assert report["versions"]["unsloth"] == "2026.10.5"
    assert {row["group"] for row in report["coverage"] if row["adapted"]} == {"attention", "routed"}
    assert (tuned.merged / "model.safetensors").exists() or any(tuned.merged.glob("*.safetensors"))
    told = given(tmp_path)
    assert told["import"]["process"] != os.getpid()
    assert told["import"]["imported_before"] == []
    assert told["import"]["environment"]["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert "RANK" not in told["import"]["environment"]
    assert not Path(told["import"]["generated"]).exists()  # it went with the process
    assert list(here.iterdir()) == []
    import transformers

    assert not hasattr(transformers, "patched_by_unsloth")


def test_its_adapter_has_the_keys_shapes_and_settings_of_ours(done):
    theirs = done(*PLAIN)
    ours = done(*PLAIN, engine=("scale=rehearsal", "train.precision=bf16"))
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (theirs, ours))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    a, b = (read_json(run.adapter / "adapter_config.json") for run in (theirs, ours))
    same = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "peft_type")
    assert {key: a[key] for key in same} == {key: b[key] for key in same}
    first, second = (read_json(run.train)["steps"][0]["loss"] for run in (theirs, ours))
    assert first == pytest.approx(second, abs=0.01)  # the same rows, masks and base; no update yet


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(done):
    straight = done(*PLAIN, "train.save_steps=2")
    resumed = done(*PLAIN, "train.save_steps=2")
    wanted = (straight.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(resumed.adapter)
    resumed.train.unlink()
    shutil.rmtree(resumed.checkpoints / "step-000004")
    again = run(load_recipe_of(resumed), run_dir=resumed, until="train")
    assert [entry["after_step"] for entry in read_json(again.train)["resumed"]] == [2]
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == wanted


def load_recipe_of(run_dir):
    """The recipe of a run."""
    from finetune.compose import read_recipe

    return read_recipe(run_dir.recipe)


def test_recomputing_is_its_own_and_changes_no_loss(tmp_path, done):
    plain, recomputed = done(*PLAIN), done(*PLAIN, "train.gradient_checkpointing=true")
    a, b = ([step["loss"] for step in read_json(run.train)["steps"]] for run in (plain, recomputed))
    assert a == pytest.approx(b, abs=1e-2)
    assert given(tmp_path)["get_peft_model"]["use_gradient_checkpointing"] == "unsloth"


def test_an_adapter_that_covers_less_than_was_asked_is_an_error_before_step_1(done, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_UNSLOTH_FAULT", "experts")
    refused(done, capfd, "ADP-010 adapter.targets=experts asks for")


def test_experts_left_in_16_bits_are_an_error_before_step_1(done, capfd):
    """Stock transformers packs linear maps only, as Unsloth does with a stack whose layer it does not know."""
    refused(done, capfd, "ENG-007 Unsloth left ", "adapter=qlora")


def test_an_engine_that_cannot_be_imported_says_why(done, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_UNSLOTH_FAULT", "import")
    refused(done, capfd, "ENG-006 Unsloth cannot be imported here: Unsloth cannot find any torch accelerator?")


def refused(done, capfd, sentence, *words):
    """Asserts that training ends with a sentence on the terminal, without a traceback, a step or an adapter."""
    with pytest.raises(RunError, match="LCH-006"):
        done(*PLAIN, *words)
    said = capfd.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err + said.out
    assert "loss" not in said.out


def test_a_dense_base_in_4_bits_trains(done, tmp_path):
    words = ("model.family=qwen3", "model.upcycle_experts=0", "model.source=", "adapter.targets=all")
    tuned = done(*words)
    rows = {row["group"]: row for row in read_json(tuned.train)["coverage"]}
    assert rows["dense"]["parameters_4bit"] == rows["dense"]["adapted"] == rows["dense"]["parameters"]
    assert given(tmp_path)["from_pretrained"]["load_in_4bit"] is True


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["legal_quickstart", "qwen3_30b_legal"])
def test_the_real_package_trains_experts_in_4_bits(tmp_path, recipe):
    pytest.importorskip("importlib.metadata").version("unsloth")
    places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    tuned = run(load_recipe(recipe, *HERE, *places), until="export")
    rows = {row["group"]: row for row in read_json(tuned.train)["coverage"]}
    assert rows["routed"]["parameters_4bit"] == rows["routed"]["adapted"] == rows["routed"]["parameters"]
    losses = [step["loss"] for step in read_json(tuned.train)["steps"]]
    ours = run(load_recipe(recipe, *HERE[1:], *places), until="train")
    assert losses[0] == pytest.approx(read_json(ours.train)["steps"][0]["loss"], abs=0.05)
