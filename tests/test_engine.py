"""Unsloth as an engine: what is refused, what it is given, and that a run with it leaves what every run leaves.

No machine of the tests has a GPU, so the chain runs with `tests/fake_unsloth.py` in its place; one test, marked `gpu`,
is for the real one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
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
from finetune.run import carry_on, run
from finetune.rundir import RunDir, read_json
from finetune.train import with_unsloth
from finetune.train.learnt import unlearnt
from finetune.train.state import trainable
from tests.job import good, ready
from tests.warm import Forked, proofs_are_forks, ranks_are_forks

ROOT = Path(__file__).resolve().parents[1]
HERE = ("engine=unsloth", "adapter.double_quantisation=true", "train.precision=bf16", "scale=rehearsal")
ADAPTER = "adapter_model.safetensors"
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
    "adapter.method": {"adapter__method": "dora", "adapter__targets": "attention"},
    "adapter.rslora": {"adapter__rslora": True},
    "adapter.init": {"adapter__init": "gaussian"},
    "adapter.rank_pattern": {"adapter__rank_pattern": {"q_proj": 4}},
    "adapter.alpha_pattern": {"adapter__alpha_pattern": {"q_proj": 4.0}},
    "adapter.lora_plus_ratio": {"adapter__lora_plus_ratio": 16.0},
    "data.packing": {"data__packing": True},
    "train.precision": {"train__precision": "fp32"},
    "train.neftune_alpha": {"train__neftune_alpha": 5.0},
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


def test_another_release_is_refused(tmp_path, monkeypatch):
    site = Site(tmp_path, monkeypatch)
    assert list(engine_absent(1)) == []
    site.install("2026.10.9")
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
        (("recipe=legal_quickstart", "train.precision=bf16"), ["ENG-002", "ENG-003", "ENG-004", "ENG-004"]),
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
    assert (plain["load_in_4bit"], plain["load_in_16bit"], plain["use_gradient_checkpointing"]) == (
        False,
        True,
        "unsloth",
    )


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
    found = re.compile(r"^\s*(import|from) unsloth\b", re.MULTILINE)
    modules = list((ROOT / "finetune").rglob("*.py"))
    assert len(modules) > 100
    assert [p.name for p in modules if found.search(p.read_text())] == ["with_unsloth.py"]


# --- a run with something in its place ------------------------------------------------------------------------------


def forked_training():
    """A context in which training is a fork of a process that has imported torch, and not what Unsloth changes."""
    return ranks_are_forks(functools.partial(Forked, outputs=(1, 2), imported="torch"))


class Site:
    """A folder on the path of this process and of those it starts, with the stand-in and its metadata; runs with it."""

    def __init__(self, root, patch):
        self.root, self.patch, self.folder = root, patch, root / "site"
        patch.syspath_prepend(self.folder)
        patch.setenv("PYTHONPATH", f"{self.folder}:{ROOT}")
        patch.setenv("FAKE_UNSLOTH", str(root / "given.json"))
        patch.setattr(machine, "gpu_count", lambda: 1)
        self.install("2026.10.5")

    def install(self, version):
        """Puts a release there in place of the one before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shutil.copy(ROOT / "tests" / "fake_unsloth.py", self.folder / "unsloth.py")
        for name in PACKAGES:
            info = self.folder / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def run(self, *words, until="train", engine=HERE, typed=False):
        """A rehearsal up to a stage; the prepared rows and the tiny base are shared by all.

        The process of its training is a fork, or with `typed` the command itself.
        """
        places = (f"runs_dir={self.root / 'runs'}", f"cache_dir={self.root / 'cache'}")
        with contextlib.nullcontext() if typed else forked_training(), proofs_are_forks():
            return run(load_recipe("legal_quickstart", *engine, *places, *words), until=until)

    def given(self):
        """What the stand-in wrote down, by call, of the last run."""
        return {entry["call"]: entry for entry in json.loads((self.root / "given.json").read_text())}

    def refuses(self, capfd, sentence, *words):
        """Asserts that training ends with a sentence on the terminal, without a traceback or a step."""
        with pytest.raises(RunError, match="LCH-006"):
            self.run(*PLAIN, *words)
        said = capfd.readouterr()
        assert sentence in said.err
        assert "Traceback" not in said.err + said.out
        assert "loss" not in said.out


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Site(tmp_path_factory.mktemp("unsloth"), patch)


@pytest.fixture(scope="module")
def whole(site):
    """(a run with the stand-in up to the export, what it wrote down, files that appeared where it was typed)."""
    here = site.root / "here"
    here.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done = site.run(*PLAIN, "train.save_steps=2", until="export", typed=True)
    return done, site.given(), list(here.iterdir())


@pytest.mark.slow
def test_a_run_leaves_what_every_run_leaves_and_later_stages_take_it(whole):
    done, told, strangers = whole
    report = read_json(done.train)
    assert report["engine"] == "unsloth"
    assert report["versions"]["unsloth"] == "2026.10.5"
    assert {row["group"] for row in report["coverage"] if row["adapted"]} == {"attention", "routed"}
    assert [len(report["steps"]), len(list(done.checkpoints.glob("step-*")))] == [4, 2]
    assert read_json(done.scores)["gates"] is not None
    assert any(done.merged.glob("*.safetensors"))
    assert done.export.exists()
    assert strangers == []
    assert not Path(told["import"]["generated"]).exists()  # it went with the process


@pytest.mark.slow
def test_only_the_training_process_is_patched(whole):
    import transformers

    _, told, _ = whole
    assert not hasattr(transformers, "patched_by_unsloth")
    assert {entry["process"] for entry in told.values()} != {os.getpid()}
    assert told["import"]["imported_before"] == []
    assert told["import"]["environment"]["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert "RANK" not in told["import"]["environment"]
    assert told["get_peft_model"]["untouched"] == told["from_pretrained"]["model_name"]


@pytest.mark.slow
def test_its_adapter_has_the_keys_shapes_and_settings_of_ours(site, whole):
    theirs, ours = whole[0], site.run(*PLAIN, engine=("scale=rehearsal", "train.precision=bf16"))
    a, b = (load_file(done.adapter / ADAPTER) for done in (theirs, ours))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert {v.dtype for v in a.values()} == {torch.float32}
    a, b = (read_json(done.adapter / "adapter_config.json") for done in (theirs, ours))
    same = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "peft_type")
    assert {key: a[key] for key in same} == {key: b[key] for key in same}
    first, second = (read_json(done.train)["steps"][0]["loss"] for done in (theirs, ours))
    assert first == pytest.approx(second, abs=0.01)  # the same rows, masks and base; no update yet


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(whole, tmp_path):
    path = tmp_path / "0001"
    shutil.copytree(whole[0].path, path)
    again = RunDir(path)
    wanted = (again.adapter / ADAPTER).read_bytes()
    shutil.rmtree(again.adapter)
    again.train.unlink()
    shutil.rmtree(again.checkpoints / "step-000004")
    with forked_training():
        again = carry_on(again, until="train")
    assert [entry["after_step"] for entry in read_json(again.train)["resumed"]] == [2]
    assert (again.adapter / ADAPTER).read_bytes() == wanted


@pytest.mark.slow
def test_recomputing_is_its_own_and_changes_no_loss(site, whole):
    recomputed = site.run(*PLAIN, "train.gradient_checkpointing=true")
    a, b = ([step["loss"] for step in read_json(done.train)["steps"]] for done in (whole[0], recomputed))
    assert a == pytest.approx(b, abs=1e-2)
    assert site.given()["get_peft_model"]["use_gradient_checkpointing"] == "unsloth"


@pytest.mark.slow
def test_a_dense_base_in_4_bits_trains(site):
    tuned = site.run("model.family=qwen3", "model.upcycle_experts=0", "model.source=", "adapter.targets=all")
    rows = {row["group"]: row for row in read_json(tuned.train)["coverage"]}
    assert rows["dense"]["parameters_4bit"] == rows["dense"]["adapted"] == rows["dense"]["parameters"]
    assert site.given()["from_pretrained"]["load_in_4bit"] is True


@pytest.mark.slow
def test_an_adapter_that_covers_less_than_was_asked_is_an_error_before_step_1(site, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_UNSLOTH_FAULT", "experts")
    site.refuses(capfd, "ADP-010 adapter.targets=experts asks for")


@pytest.mark.slow
def test_experts_left_in_16_bits_are_an_error_before_step_1(site, capfd):
    """Stock transformers packs linear maps only, as Unsloth does with a stack whose layer it does not know."""
    site.refuses(capfd, "ENG-007 Unsloth left ", "adapter=qlora")


@pytest.mark.slow
def test_an_engine_that_cannot_be_imported_says_why(site, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_UNSLOTH_FAULT", "import")
    site.refuses(capfd, "ENG-006 Unsloth cannot be imported here: Unsloth cannot find any torch accelerator?")


def test_experts_without_an_update_are_found_in_stock_layers_too():
    model = stock_adapter()
    weights = {name: p.detach().clone() for name, p in trainable(model).items()}
    for name, weight in weights.items():
        if name.endswith(".lora_B.default.weight"):
            weight.normal_()
        if name.endswith("experts" + ".lora_B.default.weight"):  # of down_proj; (out, r*E), the expert runs fastest
            weight.view(weight.shape[0], -1, 4)[..., 2] = 0
    idle, heard = unlearnt(model, weights)
    assert set(map(tuple, idle.values())) == {(2,)}
    assert {path.rpartition(".")[2] for path in idle} == {"down_proj"}
    assert heard == {}


def stock_adapter():
    """A tiny model with stock PEFT layers on its expert stacks."""
    import transformers
    from peft import LoraConfig, get_peft_model

    values = dict(FAMILIES["qwen3_moe"].tiny)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks))


def test_a_process_that_was_started_for_training_alone_ends_with_its_parent(tmp_path):
    """As several do: a killed parent leaves no training behind."""
    mark = tmp_path / "child"
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    child = (
        "import os, time, pathlib; from finetune.worker import _end_with_parent; _end_with_parent(); "
        f"how = 'group' if {names!r} & os.environ.keys() else 'alone'; "
        f"pathlib.Path({str(mark)!r}).write_text(f'{{os.getpid()}} {{how}}'); time.sleep(60)"
    )
    code = f"import sys; from finetune.launch import together; together([sys.executable, '-c', {child!r}], 1)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    number, rank = mark.read_text().split()
    assert rank == "alone"
    parent.kill()
    parent.wait()
    while Path(f"/proc/{number}").exists() and running(number) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(number)


def running(number):
    """Whether a process runs; one that ended and was not waited for does not."""
    status = Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["legal_quickstart", "qwen3_30b_legal"])
def test_the_real_package_trains_experts_in_4_bits(tmp_path, recipe):
    places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    tuned = run(load_recipe(recipe, *HERE, *places), until="export")
    rows = {row["group"]: row for row in read_json(tuned.train)["coverage"]}
    assert rows["routed"]["parameters_4bit"] == rows["routed"]["adapted"] == rows["routed"]["parameters"]
    losses = [step["loss"] for step in read_json(tuned.train)["steps"]]
    ours = run(load_recipe(recipe, *HERE[1:], *places), until="train")
    assert losses[0] == pytest.approx(read_json(ours.train)["steps"][0]["loss"], abs=0.05)
