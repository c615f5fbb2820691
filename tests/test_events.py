"""What happened to a run stands in a chain that no line can leave, enter or change unseen."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import energy, events
from finetune.errors import NumbersError, Preempted
from finetune.run import carry_on, run
from finetune.rundir import RunDir
from finetune.verify import differences
from tests.job import Stages, ready


@pytest.fixture
def chain(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    for number in range(4):
        events.note(run_dir, "thing", size=number)
    return run_dir


def test_a_chain_as_it_was_written_has_no_breaks(chain: RunDir) -> None:
    assert [event["number"] for event in events.events(chain)] == [1, 2, 3, 4]
    assert events.breaks(chain, events.head(chain)) == []


@pytest.mark.parametrize("line", [0, 1, 2, 3])
def test_a_changed_line_breaks_it_wherever_it_stands(chain: RunDir, line: int) -> None:
    end, lines = events.head(chain), chain.events.read_text().splitlines()
    lines[line] = lines[line].replace(f'"size": {line}', '"size": 7')
    chain.events.write_text("\n".join(lines) + "\n")
    behind = f"event {line + 2} does not follow the line before it"
    assert events.breaks(chain, end) == [behind if line < 3 else "event 4 is not the one that was recorded"]


def test_a_line_that_was_taken_out_put_in_or_moved_breaks_it(chain: RunDir) -> None:
    end, lines = events.head(chain), chain.events.read_text().splitlines(keepends=True)
    for others in (
        [*lines[:1], *lines[2:]],
        lines[:3],
        [lines[0], lines[0], *lines[1:]],
        [lines[1], lines[0], *lines[2:]],
    ):
        chain.events.write_text("".join(others))
        assert events.breaks(chain, end)
    chain.events.unlink()
    assert events.breaks(chain, end) == ["there are 0 events, recorded are 4"]


def test_a_line_that_a_dying_machine_cut_stays_and_the_chain_goes_on(chain: RunDir) -> None:
    whole = chain.events.read_bytes()
    chain.events.write_bytes(whole[:-20])
    events.note(chain, "after")
    assert [event["what"] for event in events.events(chain)] == ["thing"] * 3 + ["after"]
    assert events.breaks(chain, events.head(chain)) == []
    cut = chain.events.read_bytes().replace(b'"size": 3', b'"size": 4')
    chain.events.write_bytes(cut)
    assert events.breaks(chain, events.head(chain)) == ["event 5 does not follow the line before it"]


def test_a_stage_that_failed_or_was_stopped_is_noted_by_its_code_and_without_words(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for error in (Preempted("USR1", 3, 9), NumbersError("NUM-001", "row 7 holds secret words"), OSError("disk")):
        with pytest.raises(type(error)), events.stage(run_dir, "train"):
            raise error
    told = [(e["what"], e["error"]) for e in events.events(run_dir) if "error" in e]
    assert told == [("stopped", "TRN-005"), ("failed", "NUM-001"), ("failed", "OSError")]
    assert [e["what"] for e in events.events(run_dir)][::2] == ["started", "continued", "continued"]
    assert "secret words" not in run_dir.events.read_text()


def test_a_run_that_goes_on_adds_to_its_chain_and_verify_names_a_forged_event(tmp_path: Path) -> None:
    broken = Stages(fail="evaluate", error=OSError("disk"))
    with pytest.raises(OSError):
        run(ready(tmp_path), launch=broken)
    (run_dir,) = (RunDir(path.parent) for path in (tmp_path / "runs").rglob("recipe.yaml"))
    carry_on(run_dir, launch=Stages())
    assert [(e["what"], e["stage"]) for e in events.events(run_dir)][4:8] == [
        ("started", "evaluate"),
        ("failed", "evaluate"),
        ("continued", "evaluate"),
        ("finished", "evaluate"),
    ]
    assert differences(run_dir) == []
    text = run_dir.events.read_text()
    run_dir.events.write_text(text.replace('"failed"', '"finished"'))
    assert differences(run_dir) == ["events.jsonl: event 7 does not follow the line before it"]
    run_dir.events.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert "events.jsonl: there are 13 events, recorded are 14" in differences(run_dir)


def at(what: str, joules: dict[str, float], host: str = "a") -> dict[str, object]:
    return {"what": what, "stage": "train", "host": host, "joules": joules}


def test_energy_is_the_difference_of_the_counters_over_all_gpus_and_stretches() -> None:
    told = energy.used(
        [
            at("started", {"g0": 1000.0, "g1": 500.0}),
            at("stopped", {"g0": 2000.0, "g1": 1500.0}),
            at("continued", {"g0": 5000.0, "g1": 5000.0}),
            at("finished", {"g0": 3_603_000.0, "g1": 5000.0}),
        ]
    )
    assert told["kwh"] == pytest.approx((1000 + 1000 + 3_598_000) / 3_600_000) and told["whole"]


@pytest.mark.parametrize(
    "second",
    [
        [at("continued", {"g0": 9.0}), at("finished", {"g0": 10.0})],  # the first stretch was killed
        [at("finished", {"g0": 9.0}, host="b")],
    ],
)
def test_a_stretch_that_was_not_counted_is_said(second: list[dict[str, object]]) -> None:
    told = energy.used([at("started", {"g0": 1.0}), *second])
    assert not told["whole"] and told["kwh"] in (None, pytest.approx(1 / 3_600_000))


def test_energy_that_nobody_measured_is_null_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_counters", dict)
    with events.stage(RunDir(tmp_path), "train"):
        pass
    told = energy.used(events.events(RunDir(tmp_path)))
    assert told["kwh"] is None and not told["whole"]
    assert told["how"] in (
        "not measured: the package nvidia-ml-py (extra [energy]) is not installed",
        "not measured: there was no NVIDIA GPU that counts its energy",
    )
    assert energy.used([])["how"] == "not measured: no stage was noted"


def test_counters_are_read_through_nvml_in_joules_by_the_ids_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def old(handle: int) -> int:
        if handle == 1:
            raise NVMLError  # an old GPU does not count
        return 5_000

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetTotalEnergyConsumption=old,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert energy.reading()["joules"] == {"GPU-0": 5.0}
