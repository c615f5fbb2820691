"""`loss.png` of a run: loss, gradient norm and learning rate of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.curves import ACCENT, SOFT, draw_loss, new_figure, save_png, tidy


def draw_training(target: Path, steps: list[dict[str, Any]], title: str) -> None:
    """Draws the steps of train.json, one curve above the other over the same updates."""
    numbers = [step["step"] for step in steps]
    figure, (loss, norm, rate) = new_figure(8, 7, nrows=3, sharex=True, height_ratios=(3, 1.4, 1.4))
    window = draw_loss(loss, numbers, [step["loss"] for step in steps], accent=ACCENT, soft=SOFT)
    loss.set_ylabel("loss, nats per token")
    loss.set_title(title + (f" (bold: mean of the last {window})" if window > 1 else ""), loc="left")
    norms = [step["grad_norm"] for step in steps]
    norm.plot(numbers, norms, color=ACCENT, linewidth=1.1)
    if max(norms) > 20 * (sorted(norms)[len(norms) // 2] or 1):  # a spike would flatten the rest
        norm.set_yscale("log")
    else:
        norm.set_ylim(bottom=0)
    norm.set_ylabel("gradient norm")
    rate.plot(numbers, [step["lr"] for step in steps], color=ACCENT, linewidth=1.8)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("update")
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, norm, rate):
        tidy(axes)
    figure.align_ylabels()
    save_png(figure, target)
