"""What the tuned model lost of what its base knew: general questions with choices, scored as held-out rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.evaluate.conclude import side_of
from finetune.evaluate.intervals import change_of
from finetune.evaluate.metric import by_choice
from finetune.evaluate.verdict import SIGNIFICANCE

if TYPE_CHECKING:
    from finetune.data.general import General
    from finetune.evaluate.score import RowScore
    from finetune.recipe import Evaluate

SIDE = ("accuracy", "low", "high", "loss", "loss_low", "loss_high")


def forgetting(model: Any, tokenizer: Any, sets: Sequence[General], settings: Evaluate, seed: int) -> dict[str, Any]:
    """scores["forgetting"] of these sets. `model` is a PEFT model; its base is the same with the adapter disabled."""
    from finetune.evaluate.score import progress, score_rows

    scored = []
    for each in sets:
        with progress(len(each.rows), f"{each.name}, base") as advance, model.disable_adapter():
            base = score_rows(model, tokenizer, each.rows, settings.batch_size, advance)
        with progress(len(each.rows), f"{each.name}, tuned") as advance:
            tuned = score_rows(model, tokenizer, each.rows, settings.batch_size, advance)
        scored.append((each, base, tuned))
    return summary(scored, settings.confidence, seed)


def summary(
    scored: Sequence[tuple[General, Sequence[RowScore], Sequence[RowScore]]], confidence: float, seed: int
) -> dict[str, Any]:
    """Each set's sides and change, and the change of all rows together, each row counting once.

    `chance` is the share that guessing gets right: a base that is not above it has nothing here to forget.
    """
    sets, every_base, every_tuned = [], [], []
    for each, base, tuned in scored:
        marks = by_choice(each.rows, base, tuned)
        every_base += marks.base
        every_tuned += marks.tuned
        sides = {
            name: {key: value for key, value in side_of(each.rows, side, confidence, seed).items() if key in SIDE}
            for name, side in (("base", base), ("tuned", tuned))
        }
        chance = sum(1 / len(row["choices"]) for row in each.rows) / len(each.rows)
        entry = {"name": each.name, "rows": len(each.rows), "left_out": each.left_out, "chance": chance}
        sets.append(entry | sides | change_of(marks.base, marks.tuned, confidence))
    told = {"sets": sets} | change_of(every_base, every_tuned, confidence)
    return told | {"verdict": verdict(told)}


def verdict(told: dict[str, Any]) -> str:
    """What was lost, in words, and what cannot be said."""
    test, ends, change = told["test"], f"{100 * told['low']:+.0f} to {100 * told['high']:+.0f}", told["change"]
    rows = sum(each["rows"] for each in told["sets"])
    guess = [each["name"] for each in told["sets"] if each["base"]["low"] <= each["chance"]]
    moved = f"{abs(100 * change):.0f} points {'less' if change < 0 else 'more'} often ({ends}; p = {test['p']:.1g})"
    said = f"On {rows} general questions tuned is right {moved}"
    if test["p"] >= SIGNIFICANCE:
        said += "; forgetting is not shown."
    elif change > 0 or len(guess) < len(told["sets"]):
        said += f"; that is {'forgetting' if change < 0 else 'no forgetting'}."
    else:
        said += "; what moved is how it answers: nothing shows that its base knew."
    if guess:
        said += f" On {', '.join(guess)} the base is not above guessing, so there is nothing to lose there."
    return said
