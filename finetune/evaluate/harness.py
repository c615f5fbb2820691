"""A task taken by a loaded model through lm-evaluation-harness: `take(...)`. The only file that imports it.

The harness gets our model as an object (a subclass of its `HFLM`) and our tasks as tasks; it builds the prompts, asks,
filters and scores row by row. What is made of the rows is ours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluate
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager

from finetune.errors import DataError, FinetuneError
from finetune.evaluate.score import fp32_head
from finetune.foreign.rendering import accepted, limited
from finetune.tasks import Leaf, Task, data_of


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model makes of one row of a task."""

    leaf: str
    """The harness's task."""
    row: int
    """Its number among the task's rows."""
    doc: dict[str, Any]
    """The row."""
    prompt: str
    """Hash of what the model was given."""
    text: str
    """What it wrote; empty where choices were compared."""
    metric: str
    """The first metric of the task, with its filter where that has a name."""
    value: Any
    """Its value: a number, or what the harness aggregates otherwise than by a mean."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for both models."""

    few_shot: int
    """Worked examples before each row; -1 leaves it to the task."""
    chat: bool
    """Prompts go through the chat template."""
    seed: int
    """Of the rows and of worked examples."""
    rows: int
    """Rows of a task; 0 means all."""


class Taker(HFLM):
    """A loaded model as the harness asks it; `cut` counts prompts that were longer than it can read."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, use_cache: bool) -> None:
        with _quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        self.cut = 0
        self._keeps_cache = use_cache
        self._narrow = model.get_output_embeddings().weight.dtype != torch.float32

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As the parent does, within the limits of a template. Raises WeightsError (FRN-009)."""
        with limited():
            return accepted(super().apply_chat_template(chat_history, add_generation_prompt))

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        self.cut += int(inps.shape[0]) if inps.shape[1] >= self.max_length else 0
        with self._head():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        """As the parent does, but with fp32 logits, and without a cache where the family cannot have one."""
        temperature = settings.pop("temperature", 0.0)
        sampled = bool(settings.pop("do_sample", False)) and temperature > 0
        self.cut += int(context.shape[0]) if max_length >= self.max_length else 0
        with self._head(), torch.no_grad():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=self._keeps_cache,
                do_sample=sampled,
                **({"temperature": temperature} if sampled else {}),
                **settings,
            )

    def _head(self) -> Any:
        return fp32_head(self.model) if self._narrow else contextlib.nullcontext()


def load(task: Task, folder: str, cache: Path, data: dict[str, Path]) -> dict[str, Any]:
    """Leaf -> the harness's task, its rows read from disk. `data` has the files of rows from cards, by leaf.

    Raises DataError TSK-003 where data is missing, TSK-010 where the harness cannot make the task of it.
    """
    members = [{"task": leaf.name, **leaf.changes, **_rows_of(leaf, folder, cache, data)} for leaf in task.leaves]
    with _errors_of(task.name), _quiet():
        places = dict.fromkeys(str(leaf.file.parent) for leaf in task.leaves)
        made = TaskManager(include_path=list(places), include_defaults=False)
        found: dict[str, Any] = made.load([{"group": f"asked: {task.name}", "task": members}])["tasks"]
        for loaded in found.values():
            len(loaded.eval_docs)  # reads them
    return found


def take(
    taker: Taker, name: str, tasks: dict[str, Any], drawn: dict[str, list[int]], settings: Settings
) -> list[Answer]:
    """Every drawn row of a task with what the model makes of it, by leaf and row. Raises DataError TSK-010."""
    from transformers import set_seed

    asked = {leaf: tasks[leaf] for leaf, rows in drawn.items() if rows}
    some = {leaf: drawn[leaf] for leaf, task in asked.items() if len(drawn[leaf]) < len(task.eval_docs)}
    with _errors_of(name), _quiet():
        set_seed(settings.seed)
        for task in asked.values():
            fixed = task.get_config("num_fewshot")
            if settings.few_shot >= 0 and fixed != 0:
                task.set_config("num_fewshot", settings.few_shot)
            elif fixed is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=settings.seed)
        # Not simple_evaluate: it does the above and this, and then asks pip and other programs about the machine.
        results = evaluate(
            lm=taker,
            task_dict={"tasks": asked, "groups": {}},
            samples=some,  # of the others all rows
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=True,
        )
        assert results is not None  # one process
        return [answer for leaf, task in asked.items() for answer in _answers(leaf, task, results["samples"][leaf])]


def is_mean(task: Any, metric: str) -> bool:
    """Whether the harness takes the mean of rows for a metric."""
    found = task.aggregation()
    return metric in found and found[metric] is mean


def aggregate(task: Any, metric: str, values: Sequence[Any]) -> float:
    """A metric of rows as the harness makes it."""
    return float(task.aggregation()[metric](list(values)))


def _answers(leaf: str, task: Any, samples: Sequence[dict[str, Any]]) -> Iterator[Answer]:
    first = samples[0]["filter"]
    metric = next(iter(task.aggregation()))
    for sample in sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"]):
        answered = sample["filtered_resps"][0] if sample["filtered_resps"] else ""
        yield Answer(
            leaf=leaf,
            row=sample["doc_id"],
            doc=sample["doc"],
            prompt=sample["prompt_hash"],
            text=answered if isinstance(answered, str) else "",
            metric=metric if first == "none" else f"{metric}, {first}",
            value=sample[metric] if metric in sample else None,
        )


def _rows_of(leaf: Leaf, folder: str, cache: Path, data: dict[str, Path]) -> dict[str, Any]:
    """What must be changed of a leaf so that its rows come from disk, and are unpacked into our own cache."""
    if leaf.said("card"):
        return {"dataset_kwargs": {"data_files": {"test": str(data[leaf.name])}, "cache_dir": str(cache)}}
    try:
        changes = data_of(leaf, folder)
    except LookupError as error:
        code, _, what = str(error.args[0]).partition(" ")
        raise DataError(code, what) from None
    given = leaf.config["dataset_kwargs"] if "dataset_kwargs" in leaf.config else None
    kwargs = changes["dataset_kwargs"] if "dataset_kwargs" in changes else given or {}
    return changes | {"dataset_kwargs": kwargs | {"cache_dir": str(cache)}}


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Whatever the harness, its tasks and its data raise, as one sentence."""
    try:
        yield
    except (FinetuneError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # tasks of the harness raise anything: they are programs of many hands
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            "TSK-010",
            f"the harness cannot run the task {name}",
            f"{type(error).__name__}: {why}",
            "another task, or what the message asks for",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's notes, and off a terminal without its bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
