"""Curves: the loss as the report and loss.png draw it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.curves import running_mean
from finetune.train.picture import draw_training


def steps(count: int, spike: float = 1.5) -> list[dict]:
    return [
        {"step": i + 1, "loss": 3 - i / count, "grad_norm": spike if i == count // 2 else 1.5, "lr": 1e-4 * (i + 1)}
        for i in range(count)
    ]


def axes_of(monkeypatch, found: list[dict]):
    figures = []
    monkeypatch.setattr("finetune.train.picture.save_png", lambda figure, target: figures.append(figure))
    draw_training(Path("unused"), found, "job-0001")
    return figures[0].axes


@pytest.mark.parametrize("count", [1, 5, 60])
def test_loss_norm_and_rate_of_every_step_are_drawn(monkeypatch, count):
    found = steps(count)
    loss, norm, rate = axes_of(monkeypatch, found)
    for axes, key in ((loss, "loss"), (norm, "grad_norm"), (rate, "lr")):
        line = axes.get_lines()[0]
        assert list(line.get_xdata()) == [step["step"] for step in found]
        assert list(line.get_ydata()) == [step[key] for step in found]
        assert axes.get_ylabel()
    assert len(loss.get_lines()) == (2 if count == 60 else 1)
    assert rate.get_xlabel() == "update" and loss.get_ylim()[0] == 0
    if count == 60:
        assert list(loss.get_lines()[1].get_ydata()) == running_mean([step["loss"] for step in found], 5)
        assert "mean of the last 5" in loss.get_title(loc="left")


def test_one_large_gradient_does_not_flatten_the_others(monkeypatch):
    assert axes_of(monkeypatch, steps(60, spike=1000.0))[1].get_yscale() == "log"
    assert axes_of(monkeypatch, steps(60))[1].get_yscale() == "linear"


def test_a_running_mean_begins_with_what_there_is():
    assert running_mean([1, 3, 8], 2) == [1, 2, 5.5]


def test_the_same_steps_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        draw_training(tmp_path / f"{name}.png", steps(9), "job-0001")
    draw_training(tmp_path / "c.png", steps(9, spike=2.0), "job-0001")
    first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second != other
