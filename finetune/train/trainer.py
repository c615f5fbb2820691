"""TRL's trainer with checkpoints that are whole or absent, known batches, and stops that all ranks agree on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from finetune import checkpoints
from finetune.errors import NumbersError, Preempted
from finetune.ranks import Ranks
from finetune.rundir import append, write_text
from finetune.stop import Request
from finetune.train import state as states
from finetune.train.batch import DIGEST, NUMBER, hex_of
from finetune.train.order import Order
from finetune.train.shared_rows import SharedRows

WEIGHTS = "weights.safetensors"
"""File of a checkpoint with the trained parameters by their names in the model, whole."""


class Kept(Protocol):
    """Something whose memory goes into checkpoints."""

    def memory(self) -> Any:
        """What must be remembered, as JSON can hold it."""

    def remember(self, memory: Any) -> None:
        """Takes up what `memory` gave."""


class Counted(Protocol):
    """Something that every rank counts for itself, and whose sum is what matters."""

    def memory(self) -> Any:
        """The counts, as nested dicts of tensors."""

    def add(self, memory: Any) -> None:
        """Adds what `memory` gave, of this rank or of another that is gone."""


@dataclasses.dataclass(slots=True)
class Keeping:
    """Where checkpoints go and what goes into them beside the trainer's own."""

    root: Path
    """Folder of the checkpoints."""
    newest: int
    """How many to keep."""
    about: dict[str, Any]
    """What the run is, for `identity.changes`."""
    kept: dict[str, Kept]
    """Name -> what is remembered by the first rank."""
    damaged: set[int]
    """Steps of checkpoints that were passed over, until they are written anew."""
    counted: dict[str, Counted]
    """Name -> what every rank counts for itself."""


class Trainer(SFTTrainer):
    """SFTTrainer that writes and reads `finetune.checkpoints`.

    It replaces what Trainer calls to save and to load a state (transformers 5.17.0): `_save_checkpoint`,
    `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state`. None of transformers' own files remain.
    """

    def __init__(
        self,
        *,
        keeping: Keeping,
        ranks: Ranks,
        order: Order,
        shared: SharedRows | None = None,
        in_bf16: bool = False,
        **kwargs: Any,
    ) -> None:
        self.keeping, self.ranks, self.order, self.shared, self.in_bf16 = keeping, ranks, order, shared, in_bf16
        self.update: list[dict[str, torch.Tensor]] = []
        """Numbers and digests of the batches since the last update."""
        self.zero: Any = None
        """`zero.Zero` while DeepSpeed's engine trains."""
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        """Rows in an order that a resumed run finds again."""
        return self.order

    def get_train_dataloader(self) -> Any:
        """Batches of this process; those that share rows get the same ones, whole."""
        loader = super().get_train_dataloader()
        return loader if self.shared is None else self.shared.read_by_groups(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of an update and how many trained tokens they have in all processes, each counted once."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shared is None or not batches:
            return batches, count
        assert count is not None  # else the loss would be a mean of each part's mean
        return [self.shared.part(batch) for batch in batches], count // self.ranks.sharing

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wraps model and optimizer; with DeepSpeed takes up the checkpoint here, which transformers would unpickle."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        from finetune.train.zero import Zero

        made = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.zero = Zero(self.model_wrapped, self.model, begun=bool(resume_from_checkpoint))
        self.accelerator.deepspeed_engine_wrapped = self.zero
        if resume_from_checkpoint:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return made

    @contextmanager
    def without_updates(self) -> Iterator[None]:
        """In the block a backward pass leaves gradients alone, which DeepSpeed would follow by an update."""
        if self.zero is None:
            yield
            return
        self.zero.rehearsing = True
        try:
            yield
        finally:
            self.zero.rehearsing = False
            self.zero.forget()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; notes which rows it is of."""
        self.update.append({name: inputs.pop(name) for name in (NUMBER, DIGEST)})
        with self.shared.attending(inputs) if self.shared else nullcontext():
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward pass over held-out rows."""
        plain = {name: value for name, value in inputs.items() if name not in (NUMBER, DIGEST)}
        return super().prediction_step(model, plain, *args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        """Under FSDP2 and DeepSpeed Accelerate (1.15.0) leaves autocast out, which it applies in every other case."""
        stack = super().compute_loss_context_manager()
        if self.in_bf16:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False))
        return stack

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint together with the other ranks. Raises on all of them what one of them raises."""
        self.store_flos()
        staging = self._stage()
        entries = self._write(staging, self._optimizer_state())
        written = [checkpoints.Entry(*entry) for rank in self.ranks.gather(_plain(entries)) for entry in rank]
        self._together(lambda: self._publish(staging, written))

    def rehearse_save(self, moments: list[torch.Tensor]) -> None:
        """Writes what a checkpoint will hold and removes it, together with the other ranks.

        `moments` stand for what the optimizer keeps, where it has none yet.
        """
        optimizer = self._optimizer_state()
        if moments:
            optimizer["state"] = {0: {str(number): states.whole(value) for number, value in enumerate(moments)}}
        staging = self._stage()
        try:
            self._write(staging, optimizer)
        finally:
            if self.ranks.first:
                shutil.rmtree(staging, ignore_errors=True)
                with suppress(OSError):  # it has checkpoints of a training that goes on
                    self.keeping.root.rmdir()

    def _optimizer_state(self) -> dict[str, Any]:
        return self.zero.memory() if self.zero else states.optimizer_state(self.optimizer)

    def _stage(self) -> Path:
        """The folder that this checkpoint is written to. Raises RunError (DSK-003) when it does not fit."""
        need = sum(p.numel() * p.element_size() for p in states.trainable(self.model).values()) * 3
        return Path(self._together(lambda: checkpoints.stage(self.keeping.root, self.state.global_step, need)))

    def _write(self, staging: Path, optimizer: dict[str, Any]) -> list[checkpoints.Entry]:
        """What this rank wrote of a checkpoint. Raises on all of them what one of them raises."""
        weights = {name: states.whole(p.detach()) for name, p in states.trainable(self.model).items()}
        counts = {name: counted.memory() for name, counted in self.keeping.counted.items()}
        mine = {"random": states.drawn(), "counts": counts} | ({"optimizer": optimizer} if self.zero else {})
        files: dict[str, Any] = {rank_file(self.ranks.rank): mine}
        if self.ranks.first:
            memory = {name: kept.memory() for name, kept in self.keeping.kept.items()}
            files |= {WEIGHTS: weights} | ({} if self.zero else {"optimizer.safetensors": optimizer})
            files |= {"trainer_state.json": dataclasses.asdict(self.state), "memory.json": memory}
            files["scheduler.json"] = self.lr_scheduler.state_dict()
        entries, error = [], None
        try:
            for name, value in files.items():
                data = _bytes(name, value)
                entries.append(checkpoints.put(staging, name, data))
        except BaseException as raised:
            error = raised
        self.ranks.agree(error)
        return entries

    def _publish(self, staging: Path, entries: list[checkpoints.Entry]) -> str:
        path = checkpoints.publish(staging, self.state.global_step, entries, self.keeping.about)
        best = [self.state.best_global_step] if self.state.best_global_step else []
        self.keeping.damaged.discard(self.state.global_step)
        checkpoints.retain(self.keeping.root, self.keeping.newest, best, self.keeping.damaged)
        return path.name

    def _together(self, work: Callable[[], Any]) -> str:
        """What the first rank's work gives, as a text on all ranks; its failure is the failure of all."""
        made, error = "", None
        if self.ranks.first:
            try:
                made = str(work())
            except BaseException as raised:
                error = raised
        self.ranks.agree(error)
        text: str = self.ranks.share(made)
        return text

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Puts a checkpoint's weights into the adapter, and takes up what was remembered beside them."""
        folder = Path(resume_from_checkpoint)
        self.take_weights(folder, model)
        memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
        for name, kept in self.keeping.kept.items():
            kept.remember(memory[name])

    def take_weights(self, folder: Path, model: Any = None) -> None:
        """Puts a checkpoint's weights into the adapter. Raises NumbersError when they are of another one."""
        saved = load_file(folder / WEIGHTS)
        parameters = states.trainable(self.model if model is None else model)
        if saved.keys() != parameters.keys():
            odd = sorted(saved.keys() ^ parameters.keys())
            raise NumbersError("CKP-003", f"{folder} is of another adapter, e.g. {odd[0]}", "", "a new run")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(states.like(saved[name], parameter))

    def restore(self, folder: Path) -> None:
        """Takes up a checkpoint after the last update, when there is nothing left to train."""
        self._load_from_checkpoint(str(folder))
        self._load_rng_state(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Puts a checkpoint's state into optimizer and schedule."""
        if checkpoint is None:
            return
        if self.zero:
            self.zero.remember(states.from_file(Path(checkpoint) / rank_file(self.ranks.rank))["optimizer"])
        else:
            states.restore_optimizer(self.optimizer, states.from_file(Path(checkpoint) / "optimizer.safetensors"))
        schedule = json.loads((Path(checkpoint) / "scheduler.json").read_text(encoding="utf-8"))
        self.lr_scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Goes on drawing where this rank stopped. With fewer ranks than then, the first adds the others' counts."""
        if checkpoint is None:
            return
        files = sorted(Path(checkpoint).glob(rank_file("*")))
        for number, path in enumerate(files):
            if number == self.ranks.rank or (self.ranks.first and number >= self.ranks.world):
                saved = states.from_file(path)
                for name, counted in self.keeping.counted.items():
                    counted.add(saved["counts"][name])
                if number == self.ranks.rank:
                    states.draw_on(saved["random"])


class Boundary(TrainerCallback):
    """What all ranks do at the end of an update: say which rows it was of, refuse odd numbers, agree to stop.

    `names` turns row numbers into what a person can look up. The first rank writes digests of batches to `log`.
    """

    def __init__(self, ranks: Ranks, request: Request, names: Callable[[list[int]], list[str]], log: Path) -> None:
        self.ranks, self.request, self.names, self.log = ranks, request, names, log
        self.trainer: Trainer | None = None
        self.digests: list[str] = []
        self.stopped_by = ""
        self._rows: list[list[int]] = []

    def memory(self) -> list[str]:
        """The digest of every update's batches."""
        return list(self.digests)

    def remember(self, memory: list[str]) -> None:
        """Takes up the digests of a checkpoint."""
        self.digests = list(memory)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises Preempted when a signal came while the base was loading: there is nothing new to save."""
        if signal := next(filter(None, self.ranks.gather(self.request.signal)), ""):
            self.stopped_by = signal
            raise Preempted(signal, state.global_step, state.max_steps)
        if self.ranks.first:  # without those of updates that are done again
            write_text(self.log, "".join(_line(*known) for known in enumerate(self.digests, 1)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says which epoch's order it is; a resumed run begins within one."""
        assert self.trainer is not None
        self.trainer.order.epoch = int(state.epoch + 1e-6)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchanges digests and signals; on a signal every rank saves and stops at this update."""
        assert self.trainer is not None
        update, self.trainer.update = self.trainer.update, []
        self._rows = [batch[NUMBER].tolist() for batch in update]
        told = self.ranks.gather([self.request.signal, [batch[DIGEST].tolist() for batch in update]])
        self.digests.append(hex_of([one for _, digests in told[:: self.ranks.sharing] for one in digests]))
        if self.ranks.first:
            append(self.log, _line(state.global_step, self.digests[-1]))
        signal = next((name for name, _ in told if name), "")
        if signal and state.global_step < state.max_steps:
            self.stopped_by = signal
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Saves when held-out rows were never predicted better, so that this state can become the adapter."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raises NumbersError (NUM-001), on all ranks and before anything is saved, when a number is not finite."""
        looked_at = ("loss", "grad_norm", "eval_loss")
        odd = [name for name in looked_at if logs and name in logs and not math.isfinite(logs[name])]
        if not odd or logs is None:
            return
        if odd == ["eval_loss"]:
            raise NumbersError(
                "NUM-001",
                f"the held-out loss is {logs['eval_loss']} at step {state.global_step}",
                "training cannot go on; earlier checkpoints are kept",
                "a lower train.lr or train.max_grad_norm in a new run",
            )
        numbers = [n for rank in self.ranks.gather(self._rows)[:: self.ranks.sharing] for batch in rank for n in batch]
        names = self.names(numbers)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise NumbersError(
            "NUM-001",
            f"{odd[0]} is {logs[odd[0]]} at step {state.global_step}, of rows {', '.join(names[:8])}{more}",
            "training cannot go on; earlier checkpoints are kept",
            "looking at these rows, or a lower train.lr in a new run",
        )


def rank_file(rank: int | str) -> str:
    """Name of the file that one rank writes."""
    return f"rank-{rank:04d}.safetensors" if isinstance(rank, int) else f"rank-{rank}.safetensors"


def _bytes(name: str, value: Any) -> bytes:
    if name == WEIGHTS:
        return save({key: tensor.cpu().contiguous() for key, tensor in value.items()})
    if name.endswith(".safetensors"):
        return states.to_bytes(value)
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _line(step: int, batch: str) -> str:
    return json.dumps({"step": step, "batch": batch}) + "\n"


def _plain(entries: list[checkpoints.Entry]) -> list[list[Any]]:
    return [[entry.name, entry.size, entry.sha256] for entry in entries]
