from __future__ import annotations

from typing import Any

import pytest

from finetune import check
from finetune.__main__ import main
from finetune.errors import GateError
from finetune.evaluate.gates import gates, require_gates
from finetune.evaluate.intervals import change_of
from finetune.recipe import Evaluate
from finetune.run import require_gates as again
from finetune.rundir import open_run, read_json, write_json
from tests.job import good


def measured(lost: int, of: int) -> dict[str, Any]:
    """Scores in which tuned lost `lost` of `of` general questions and refusals, and gained as many others."""
    down = change_of([1.0] * of, [0.0] * lost + [1.0] * (of - lost), 0.95)
    up = change_of([0.0] * of, [1.0] * lost + [0.0] * (of - lost), 0.95)
    return {
        "metric": {"name": "accuracy", **up},
        "tuned": {"loss": 1.5, "loss_low": 1.4, "loss_high": 1.6},
        "forgetting": down,
        "safety": {"tests": {"refusal": down, "over_refusal": up, "incoherence": up}},
    }


EVERY: dict[str, float] = {
    "max_forgetting": 0.05, "max_refusal_drop": 0.05, "max_over_refusal_rise": 0.05, "max_incoherence_rise": 0.05,
}  # fmt: skip


def test_a_drop_beyond_the_limit_fails_only_where_its_interval_excludes_0() -> None:
    settings = Evaluate(**EVERY)  # type: ignore[arg-type]
    little, shown, few = (gates(measured(*pair), settings) for pair in ((4, 100), (20, 100), (1, 10)))
    assert [gate["passed"] for gate in little] == [True] * 4 and "at most 0.05" in little[0]["why"]
    assert [gate["passed"] for gate in shown] == [False] * 4 and "the interval excludes 0" in shown[0]["why"]
    assert [round(gate["value"], 3) for gate in shown] == [0.2] * 4
    assert all(gate["low"] > 0 and gate["low"] < 0.2 < gate["high"] for gate in shown)
    assert [gate["passed"] for gate in few] == [True] * 4 and few[0]["value"] == pytest.approx(0.1)
    assert all(gate["low"] <= 0 and "no regression is shown" in gate["why"] for gate in few)


def test_a_change_for_the_better_fails_no_gate() -> None:
    better = measured(20, 100)
    up, down = better["metric"], better["forgetting"]
    better |= {"forgetting": up, "safety": {"tests": {"refusal": up, "over_refusal": down, "incoherence": down}}}
    assert all(gate["passed"] and gate["value"] < 0 for gate in gates(better, Evaluate(**EVERY)))  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_not_passed() -> None:
    nothing = {"metric": None, "forgetting": None, "safety": None, "tuned": measured(0, 9)["tuned"]}
    found = gates(nothing, Evaluate(min_gain=0.0, **EVERY))  # type: ignore[arg-type]
    assert len(found) == 5 and not any(gate["passed"] for gate in found)
    assert all(gate["value"] is None and gate["why"].startswith("not measurable") for gate in found)


def test_gain_and_loss_are_compared_by_the_figure_itself() -> None:
    scores = measured(1, 10)
    passed = [[g["passed"] for g in gates(scores, Evaluate(min_gain=gain, max_loss=loss))]
              for gain, loss in ((0.1, 1.5), (0.11, 1.49))]  # fmt: skip
    assert passed == [[True, True], [False, False]]
    assert gates(scores, Evaluate()) == []


def test_every_failed_gate_is_named_in_one_error(tmp_path: Any) -> None:
    scores = measured(20, 100)
    scores["gates"] = gates(scores, Evaluate(min_gain=0.9, max_loss=9, **EVERY))  # type: ignore[arg-type]
    with pytest.raises(GateError, match=r"EVAL-004 evaluate.min_gain=0.9 is not met") as error:
        require_gates(scores)
    assert all(f"evaluate.{name}=0.05 is not met" in error.value.what for name in EVERY)
    assert "max_loss" not in error.value.what and error.value.exit_code == 4
    run_dir = type("Run", (), {"scores": tmp_path / "scores.json"})()
    write_json(run_dir.scores, scores)
    with pytest.raises(GateError) as later:  # a run that is continued stops at the same gates
        again(run_dir)
    assert [later.value.what.count(g["why"]) for g in scores["gates"]] == [1, 0, 1, 1, 1, 1]


def test_gates_without_anything_to_measure_are_refused_before_the_start() -> None:
    def told(**settings: Any) -> str:
        return "\n".join(check.problems(good(**{f"evaluate__{key}": value for key, value in settings.items()})))

    assert told() == ""
    assert "EVL-004 evaluate.max_forgetting=0.02" in told(max_forgetting=0.02)
    assert told(max_forgetting=0.02, general=["general_mmlu"]) == ""
    without = told(max_refusal_drop=0.05, max_over_refusal_rise=0.1, max_incoherence_rise=0.1)
    assert without.count("EVL-005") == 3
    assert told(max_refusal_drop=0.05, drift=True) == ""
    assert "EVL-001 evaluate.slices: colour" in told(slices=["answer", "colour"])
    assert "EVL-003" in told(general=["a", "b", "a"])
    nowhere = told(harmful_file="/nowhere.csv")
    assert "EVL-006" in nowhere and "EVL-007" in nowhere


@pytest.mark.slow
def test_an_impossible_gate_ends_the_command_with_exit_code_4_and_the_reason(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe=legal_quickstart", "scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["evaluate", *words, "evaluate.min_gain=0.99"]) == 4
    said = capsys.readouterr()
    assert "EVAL-004 evaluate.min_gain=0.99 is not met: the gain in accuracy is" in said.out + said.err
    run_dir = open_run(tmp_path / "legal_quickstart" / "0001")
    scores = read_json(run_dir.scores)
    assert [(g["gate"], g["passed"]) for g in scores["gates"]] == [("evaluate.min_gain", False)]
    (general,) = scores["forgetting"]["sets"]
    assert (general["name"], general["rows"], general["chance"]) == ("general_openbookqa", 12, 0.25)
    assert scores["safety"]["prompts"] == scores["safety"]["benign"] == 4 and len(scores["safety"]["seeds"]) == 1
    assert main(["evaluate", f"run={run_dir.path}"]) == 4  # nor does it go on later
    assert not run_dir.merged.exists()
