"""A small real run, trained until its answers differ from its base's and merged: made once per machine, then found.

Base: the quickstart's, 4 experts, 373 M parameters (fetched from the package index the first time). It takes minutes.
`python -m tests.serving_job` makes it and prints its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.compose import load_recipe, read_recipe
from finetune.run import carry_on, start
from finetune.rundir import RunDir, open_run, read_json, write_json, write_text

WORDS = [
    "recipe=legal_quickstart",
    "data.train_rows=208",
    "train.max_steps=26",
    "evaluate.rows=16",
    "evaluate.samples=2",
    "train.rehearse_memory=false",
]
"""The job: enough updates for other answers, few enough for a test machine."""


def finished(until: str = "merge") -> RunDir:
    """The run, with every stage up to `until` done. Later calls, also by other processes, find it."""
    with _held(folder()):
        kept = folder() / "RUN"
        if kept.exists():
            run_dir = open_run(kept.read_text(encoding="utf-8").strip())
        else:
            run_dir = start(load_recipe(*_words()))
            write_text(kept, str(run_dir.path))
        carry_on(run_dir, until=until)
        return run_dir


def folder() -> Path:
    """Where the run lies: below the temporary folder, one per user, set of words and version of ours."""
    key = hashlib.sha256("\n".join([__version__, *WORDS]).encode()).hexdigest()[:12]
    made = Path(tempfile.gettempdir()) / f"finetune-serving-{os.getuid()}" / key
    made.mkdir(parents=True, exist_ok=True, mode=0o700)
    assert made.parent.stat().st_uid == os.getuid(), f"{made.parent} belongs to somebody else"
    return made


def answers(run_dir: RunDir) -> dict[str, Any]:
    """What base and tuned model answered when they were merged, as `merged/answers.json` holds it."""
    path = run_dir.merged / "answers.json"
    if not path.exists():
        write_json(path, record(run_dir))
    found: dict[str, Any] = read_json(path)
    return found


def record(run_dir: RunDir) -> dict[str, Any]:
    """The same, computed here: argmax after argmax of full forward passes in fp32, no cache and no generate."""
    import torch

    from finetune.adapters import load_adapter
    from finetune.base import load_base
    from finetune.data import load_splits
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    base = load_base(base_folder(recipe), load_in_4bit=False, precision="fp32")
    model, tok = load_adapter(base, run_dir.adapter).eval(), base.tokenizer
    limit = recipe.evaluate.max_new_tokens

    def scores(ids: list[int], count: int) -> Any:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1]
        return torch.log_softmax(logits.float(), -1)

    def greedy(prompt: list[int]) -> dict[str, Any]:
        ids: list[int] = []
        while len(ids) < limit and (not ids or ids[-1] != tok.eos_token_id):
            ids.append(int(scores([*prompt, *ids, 0], 1)[0].argmax()))
        logprobs = of(prompt, ids)
        return {"ids": ids, "text": tok.decode(ids, skip_special_tokens=True), "logprobs": logprobs}

    def of(prompt: list[int], ids: list[int]) -> list[float]:
        table = scores([*prompt, *ids], len(ids))
        return [round(float(table[place, token]), 6) for place, token in enumerate(ids)]

    prompts = []
    rows = load_splits(run_dir).heldout
    with torch.inference_mode(), base.arithmetic():
        for row in rows.select(range(recipe.export.parity_prompts)):
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"][:-1]]
            text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tok(text, add_special_tokens=False).input_ids
            tuned = greedy(ids)
            with model.disable_adapter():
                bare, under = greedy(ids), of(ids, tuned["ids"])
            sides = {"base": bare, "tuned": tuned, "tuned_under_base": under}
            prompts.append({"messages": messages, "text": text, "ids": ids, **sides})
    return {"schema": 1, "precision": "fp32", "max_new_tokens": limit, "prompts": prompts}


def _words() -> tuple[str, ...]:
    name, *words = WORDS
    return (name.removeprefix("recipe="), f"runs_dir={folder() / 'runs'}", *words)


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """One process at a time makes it; the others wait."""
    with (place / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    made = finished()
    answers(made)
    print(made.path)
