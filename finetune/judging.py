"""Settings of `evaluate`: what base and tuned are asked, and the gates that the answers must pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec

from finetune.setting import one_of

SLICES = ("answer", "group", "length", "turns")
"""What held-out rows can be told apart by: `length` is that of the prompt, in four equal parts."""

RANGES: dict[str, tuple[float, float]] = {
    "evaluate.rows": (0, math.inf),
    "evaluate.batch_size": (1, math.inf),
    "evaluate.samples": (0, 1000),
    "evaluate.max_new_tokens": (1, math.inf),
    "evaluate.metric_rows": (0, math.inf),
    "evaluate.general_rows": (0, math.inf),
    "evaluate.drift_prompts": (0, math.inf),
    "evaluate.drift_seeds": (0, 100),
    "evaluate.drift_new_tokens": (1, math.inf),
    "evaluate.task_rows": (0, math.inf),
    "evaluate.few_shot": (-1, 64),
    "evaluate.min_gain": (-1, 1),
    "evaluate.max_loss": (0, math.inf),
    "evaluate.max_forgetting": (0, 1),
    "evaluate.max_refusal_drop": (0, 1),
    "evaluate.max_over_refusal_rise": (0, 1),
    "evaluate.max_incoherence_rise": (0, 1),
}
"""Dotted key -> smallest and largest value."""


@dataclass(kw_only=True, slots=True)
class Evaluate:
    """Base against tuned: the same rows, prompts and settings for both."""

    rows: int = 0
    """Held-out rows to use; 0 means all."""
    batch_size: int = 8
    """Rows per forward pass."""
    samples: int = 10
    """Rows shown side by side in the report: question, base, tuned, expected."""
    max_new_tokens: int = 48
    """Longest answer generated for a sample or the metric, in tokens."""
    confidence: float = 0.95
    """Level of the intervals."""
    metric: str = one_of("auto", "none", "accuracy", "exact", "number", "f1", "rouge_l")
    """What makes an answer right. `accuracy`: the likeliest choice is the expected one; `auto` is that where rows have
    choices, else none. The others read greedy answers: `exact` wording but for case and punctuation, the last `number`,
    words in common (`f1`), longest run of words in common (`rouge_l`, needs the package rouge-score)."""
    metric_rows: int = 100
    """Held-out rows whose answers are generated for that; 0 means all."""
    slices: list[str] = field(default_factory=lambda: ["answer"])
    """Tables of the metric by answer, group, length (of the prompt) or turns; slices of few rows are one, `other`."""
    general: list[str] = field(default_factory=list)
    """Cards of general questions with choices, e.g. [general_mmlu]: what of it was forgotten?"""
    general_rows: int = 200
    """Questions of each such card, drawn by the seed; 0 means all."""
    drift: bool = False
    """Ask both models for things that should be refused, and for harmless ones that sound alike: what has moved?"""
    harmful_file: str = ""
    """Your own prompts that should be refused: CSV or JSONL, HarmBench, XSTest and StrongREJECT by their columns, else
    a column `prompt`. Empty: forty mild ones of ours, which show a large change only."""
    benign_file: str = ""
    """The same of prompts that should be answered. XSTest has both kinds: name it twice."""
    drift_prompts: int = 40
    """Prompts of each kind, drawn by the seed; 0 means all."""
    drift_seeds: int = 3
    """Answers sampled for each prompt beside the greedy one, at temperature 0.7."""
    drift_new_tokens: int = 64
    """Longest such answer, in tokens."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks that base and tuned take: ours (`data/tasks`), of lm-evaluation-harness, or of `tasks_folder`."""
    tasks_folder: str = ""
    """Folder with tasks of your own as YAML, and with data of the harness's tasks at `<dataset_path>`."""
    task_rows: int = 0
    """Rows of each task, drawn by `seed`; 0 means all."""
    few_shot: int = -1
    """Worked examples before each row of a task; -1 leaves it to the task."""
    task_chat: bool = False
    """Put the rows of tasks into the base's chat template. Published scores are mostly without."""
    allow_code: bool = False
    """Run the programs that models write in code tasks. They run confined: no files, no network, limited time."""
    min_gain: float = -1.0
    """Gate: gain of tuned over base in the metric that the run must reach, as a fraction; -1 means no gate."""
    max_loss: float = 0.0
    """Gate: highest loss of tuned on held-out rows, in nats per answer token; 0 means no gate."""
    max_forgetting: float = 1.0
    """Gate: share of the general questions that tuned may lose against base, e.g. 0.02; 1 means no gate. Like the three
    below it is not met when more is lost and the interval of the change excludes 0: few questions forgive much."""
    max_refusal_drop: float = 1.0
    """Gate: the same of refused harmful prompts, e.g. 0.05; 1 means no gate."""
    max_over_refusal_rise: float = 1.0
    """Gate: the same of harmless prompts refused; 1 means no gate."""
    max_incoherence_rise: float = 1.0
    """Gate: the same of prompts without a coherent answer, of both kinds; 1 means no gate."""


def problems(evaluate: Evaluate) -> Iterator[str]:
    """A sentence for every setting that cannot work beside the others."""
    for name in evaluate.slices:
        if name not in SLICES:
            yield (
                f"EVL-001 evaluate.slices: {name} is not one of {', '.join(SLICES)}. For a column of your own, "
                "data.group_by=COLUMN makes it the group."
            )
    if evaluate.metric == "rouge_l" and find_spec("rouge_score") is None:
        yield "EVL-002 evaluate.metric=rouge_l: rouge-score is not installed. Type: pip install rouge-score"
    if doubled := sorted({name for name in evaluate.general if evaluate.general.count(name) > 1}):
        yield f"EVL-003 evaluate.general names {', '.join(doubled)} twice. Name it once."
    if evaluate.max_forgetting < 1 and not evaluate.general:
        yield (
            f"EVL-004 evaluate.max_forgetting={evaluate.max_forgetting:g} has no questions to measure it with. "
            "Set evaluate.general=[general_openbookqa]."
        )
    if not evaluate.drift:
        for key in ("max_refusal_drop", "max_over_refusal_rise", "max_incoherence_rise"):
            if getattr(evaluate, key) < 1:
                yield f"EVL-005 evaluate.{key} has no prompts to measure it with. Set evaluate.drift=true."
        for key in ("harmful_file", "benign_file"):
            if getattr(evaluate, key):
                yield f"EVL-006 evaluate.{key} has no effect with evaluate.drift=false. Set evaluate.drift=true."
