"""A recipe without a problem, and stages that write what real ones do in a millisecond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.families import FAMILIES
from finetune.licences import find_licence
from finetune.parity import Parity
from finetune.recipe import Data, Model, Recipe
from finetune.rundir import RunDir, sha256_tree, write_json, write_text
from finetune.sealed import seal


def good(**changes: Any) -> Recipe:
    """A recipe without a problem, with dotted settings changed. Its name is one that the family's licence allows."""
    family = FAMILIES["mixtral"]
    recipe = Recipe(
        name="job",
        model=Model(name="m", family="mixtral", config=dict(family.tiny), licence="apache-2.0"),
        data=Data(card="legal_licences"),
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        target: Any = recipe
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    licence = find_licence(FAMILIES[recipe.model.family].licence) if recipe.model.family in FAMILIES else None
    if licence and licence.name_prefix and not recipe.export.name:
        recipe.export.name = f"{licence.name_prefix}-job"
    return recipe


HEADER = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"w"
"""A safetensors file of one byte."""


def ready(tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe whose base is a folder here and whose runs go below `tmp_path`."""
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text('{"model_type": "mixtral"}')
    (base / "model.safetensors").write_bytes(WEIGHTS)
    places = {"runs_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "cache"), "model__source": str(base)}
    return good(**(places | changes))


REPORT = {
    "source": {"kind": "own files", "licence": "the user's own", "attribution": ""},
    "rows_read": 12,
    "kept": 11,
    "dropped": {"copy": 1},
    "splits": {"train": {"rows": 10, "tokens": 500}, "heldout": {"rows": 1, "tokens": 50}},
    "content_sha256": "0" * 64,
}
"""What the data stage says, as far as others read it."""

TRAIN = {
    "steps": [],
    "tokens": 500,
    "trainable_tokens": 100,
    "seconds": 36.0,
    "device": "cpu",
    "processes": 1,
    "distribution": "none",
    "peak_memory_gib": 0.5,
}
"""The same of the training."""


PARITY = Parity(
    prompts=2,
    tokens=9,
    precision="fp32",
    reference="original",
    mean_kl=1e-5,
    max_kl=2e-5,
    top1_agreement=1.0,
    effect_kl=0.2,
    base_kl=0.2,
    original_kl=1e-5,
    four_bit_kl=None,
    same_answers=2,
    answers=2,
    tensors=1,
    tensors_changed=1,
    tensors_zero=0,
    tensors_rounded_away=0,
    strangers=[],
    loaded_by="transformers",
    rounding=0.01,
    quantised="none",
).as_dict()
"""The same of the merge's proof."""


SIDE = {"loss": 1.5, "right": None, "mark": None}
RESULT = {"row": "a" * 64, "input": "b" * 64, "group": 0, "tokens": 3, "base": SIDE, "tuned": SIDE}
"""What scores_rows.jsonl says of its only row."""


class Stages:
    """Stands in for `launch`: notes the stages and writes their outputs. `fail` names a stage that raises `error`."""

    def __init__(self, fail: str = "", error: BaseException | None = None, passed: bool = True) -> None:
        self.done: list[str] = []
        self.fail, self.error, self.passed = fail, error, passed

    def __call__(self, stage: str, run_dir: RunDir) -> None:
        """Carries out one stage."""
        if stage == self.fail and self.error is not None:
            raise self.error
        self.done.append(stage)
        scores = {
            "base": {"loss": 2.0, "accuracy": None},
            "tuned": {"loss": 1.0, "accuracy": None},
            "rows": 1,
            "verdict": "Too few rows to say.",
            "forgetting": {"verdict": "Forgetting is not shown."},
            "safety": None,
            "gates": [{"gate": "gain", "limit": 0.1, "value": 0.0, "passed": self.passed}],
        }
        if stage == "data":
            write_json(run_dir.data / "report.json", REPORT)
        elif stage == "train":
            write_text(run_dir.adapter / "adapter_model.safetensors", "adapter")
            write_json(run_dir.train, TRAIN)
            write_text(run_dir.logs / "events", "log")
        elif stage == "evaluate":
            write_text(run_dir.scores_rows, json.dumps(RESULT) + "\n")
            write_json(run_dir.scores, scores)
        elif stage == "merge":
            write_text(run_dir.merged / "model.safetensors", stage)
            write_json(run_dir.parity, PARITY)
            write_json(
                run_dir.merged / "merge.json", {"schema": 2, "trained": sha256_tree(run_dir.adapter), "sha256": {}}
            )
            seal(run_dir.merged)
        elif stage == "export":
            write_text(run_dir.export / "model.safetensors", stage)
        else:
            write_text(run_dir.report, "<html>")
