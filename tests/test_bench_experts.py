"""The benchmark of experts: that it compares like with like, takes turns, and says what went wrong."""

import gc
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = (
    "hidden_size=64,moe_intermediate_size=64,num_experts=16,num_experts_per_tok=2,head_dim=16,num_attention_heads=4,"
    "num_key_value_heads=2,vocab_size=512,num_hidden_layers=2"
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("finetune.machine.multiplies_bf16", lambda: True)  # on every machine the same bytes
    yield importlib.import_module("bench_experts")
    for name in [name for name in sys.modules if name.startswith("bench_")]:
        del sys.modules[name]
    gc.unfreeze()


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "figures.json")
    sides = "ours,stock-bf16,stock-4bit"  # not those that this machine would add
    shape = ["--workloads", "qwen3_slice", "--shape", TINY, "--tokens", "256", "--length", "64"]
    return [*shape, "--sides", sides, "--out", out]


class Here:
    """Answers what a `Child` answers, from this process."""

    def __init__(self, spec, log):
        self.side = importlib.import_module("bench_experts_side").Side(spec)

    def ask(self, command, **words):
        return json.loads(json.dumps(getattr(self.side, command)(**words)))

    def close(self):
        pass


class Pretender:
    """Needs three seconds a step where ours needs one, and its fp32 losses are off by `off`."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012  # all of a test's sides write into it
    off = 0.0
    failing = ""

    def __init__(self, spec, log):
        self.spec = spec

    def ask(self, command, **words):
        self.asked.append((self.spec.side + (" in fp32" if self.spec.fp32 else ""), command))
        ours = self.spec.side == "ours"
        number = words["number"] if "number" in words else 0
        if command == "load":
            size = {"resident_bytes": 100, "expert_bytes": 80, "load_peak_bytes": 120, "threads": 1}
            return size if ours else {key: 3 * value for key, value in size.items()}
        if command == "step" and self.spec.side == self.failing:
            return {"error": "OutOfMemoryError: CUDA out of memory"}
        if command == "step":
            loss = 2.0 + (self.off if self.spec.fp32 and not ours else 0.0)
            return {"seconds": (1.0 if ours else 3.0) * (number + 1), "loss": loss, "cpu_seconds_asleep": 0.0}
        if command == "count":
            return {"loss": 2.0, "saved_tensor_bytes": 10 if ours else 40, "dequantisations": 5}
        return {"step_peak_bytes": 50 if ours else 200} if command == "peaks" else {}

    def close(self):
        self.asked.append((self.spec.side + (" in fp32" if self.spec.fp32 else ""), "close"))


def pretend(**values):
    return type("Pretending", (Pretender,), {"asked": [], **values})


def test_a_run_on_a_tiny_model_measures_both_sides_on_the_same_files(bench, words, capsys):
    assert (
        bench.main([*words, "--rounds", "1", "--warmup", "1", "--expert-rank", "4", "--loss-steps", "2"], Here) == 0
    ), capsys.readouterr()
    out = Path(words[-1])
    figures = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert figures["expert_bytes_per_param"] == pytest.approx(0.5625)
    assert figures["stock_over_ours_resident"] > 2.5
    assert figures["fp32_loss_max_difference"] <= bench.LOSS_TOLERANCE
    assert figures["versions"]["torch"] == torch.__version__
    rows = {(row["side"], row["routing"]): row for row in figures["rows"]}
    assert len(rows) == 6 and len(figures["rows"]) == 8  # ours stands beside each of the two stock sides
    ours, stock, packed = (rows[side, "uniform"] for side in ("ours", "stock-bf16", "stock-4bit"))
    assert ours["dequantisations"] > packed["dequantisations"] > stock["dequantisations"] == 0
    assert ours["trained_parameters"] == stock["trained_parameters"] == packed["trained_parameters"]
    assert stock["saved_tensor_bytes"] > ours["saved_tensor_bytes"]
    assert stock["expert_bytes_per_param"] == packed["expert_bytes_per_param"] == 2
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], abs=0.1)
    for side in ("ours", "stock-bf16", "stock-4bit"):
        even, zipf = (rows[side, routing]["tokens_per_expert"] for routing in ("uniform", "zipf"))
        # 256 tokens x 2 choices over 16 experts: 32 each; drawn with probabilities 1/rank the first has about 140.
        assert even["most"] < 70 and zipf["most"] > 100 and zipf["most"] > 3 * zipf["50 %"], (side, even, zipf)


def test_the_sizes_of_a_checkpoint_are_those_of_the_model_it_makes(bench, words):
    options = bench.parse(words)
    folder = bench.prepare("qwen3_slice", options).folder
    sizes = importlib.import_module("bench_experts_shape").checkpoint_sizes(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    assert sizes["parameters"] == sum(parameters.values())
    assert sizes["expert_parameters"] == sum(size for name, size in parameters.items() if ".experts." in name)
    assert sizes["largest_group_bytes"] == 2 * max(parameters.values())


def test_sides_take_turns_and_ratios_are_taken_round_by_round(bench, words):
    start = pretend()
    assert bench.main([*words, "--rounds", "4", "--warmup", "2", "--sides", "ours,stock-bf16"], start) == 0
    figures = json.loads(Path(words[-1]).read_text())
    assert figures["stock_over_ours_seconds_median"] == 3.0  # though seconds grow from round to round
    assert figures["pairs"][0]["seconds_ratios"] == [3.0] * 4
    assert figures["peak_ours_over_stock"] == 0.25
    assert figures["load_peak_over_4bit"] == 1.2
    steps = [side for side, command in start.asked if command in ("count", "step")]
    assert steps[:10] == ["ours in fp32"] * 5 + ["stock-bf16 in fp32"] * 5
    assert steps[10:] == ["ours", "stock-bf16", "stock-bf16", "ours"] * 6  # 2 + 4 rounds of each routing
    closed = {side for side, command in start.asked if command == "close"}
    assert closed == {"ours", "stock-bf16", "ours in fp32", "stock-bf16 in fp32"}


def test_losses_that_differ_end_with_1(bench, words, capsys):
    assert bench.main([*words, "--rounds", "1"], pretend(off=2e-4)) == 1
    assert "the fp32 losses differ by 2.00e-04" in capsys.readouterr().err
    assert bench.main([*words, "--rounds", "1"], pretend(off=float("nan"))) == 2
    assert "stock-bf16 in fp32 has the loss nan at step 1" in capsys.readouterr().err


def test_a_side_that_runs_out_of_memory_is_a_row_and_not_the_end(bench, words):
    words = [*words, "--rounds", "1", "--loss-steps", "0"]
    assert bench.main(words, pretend(failing="stock-bf16")) == 0
    figures = json.loads(Path(words[words.index("--out") + 1]).read_text())
    errors = {row["side"] for row in figures["rows"] if "error" in row}
    assert errors == {"stock-bf16"} and figures["stock_over_ours_seconds_median"] == 3.0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--workloads", "mixtral"], "--workloads has mixtral, which is none of quickstart8"),
        (["--sides", "stock-bf16"], "--sides must have ours"),
        (["--tokens", "100"], "--tokens 100 is no multiple of --length 64"),
        (["--rounds", "0"], "--rounds 0 and --warmup 2 must be 1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(bench, words, more, sentence, capsys):
    assert bench.main([*words, *more], pretend()) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_is_reported_with_its_last_words(bench, tmp_path):
    turns = importlib.import_module("bench_experts_turns")
    options = bench.parse([])
    workload = bench.Workload(name="none", folder=tmp_path, routings=(), tokens=(), text=False, fp32=False)
    child = bench.Child(turns.spec(workload, "ours", options, tmp_path), tmp_path / "log")
    for _ in range(2):
        assert "the process ended with 1: " in child.ask("load")["error"]
        assert "has no config.json" in child.ask("load")["error"]
    child.close()
