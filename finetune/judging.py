"""Settings of `evaluate`: what base and tuned are asked, and the gates that the answers must pass."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Evaluate:
    """Base against tuned, on the same held-out rows."""

    rows: int = 0
    """Held-out rows to use; 0 means all."""
    batch_size: int = 8
    """Rows per forward pass."""
    samples: int = 5
    """Rows shown side by side in the report: question, base, tuned, expected."""
    max_new_tokens: int = 48
    """Longest answer generated for a sample, in tokens."""
    confidence: float = 0.95
    """Level of the intervals."""
    min_gain: float = -1.0
    """Gate: accuracy gain of tuned over base that the run must reach, as a fraction; -1 means no gate."""
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
