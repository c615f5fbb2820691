"""The adapter added to the original weights, tensor by tensor, in the original checkpoint's files and keys.

Sums are in fp32 and rounded once to each tensor's own type. Every other byte is copied, so that keys, order, files
and tensors without an update come out as they were. A base in fp8 or fp4 comes out in bf16 under the keys of its
unquantised twin, or in fp8 with new scales where the recipe says so. Memory: the adapter, and one matrix for each of up
to eight files at a time. Then a fresh process proves what was written (`prove.py`); only a merge that passes gets its
name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from finetune import sealed
from finetune.compose import read_recipe
from finetune.errors import RunError
from finetune.gpus import gpus
from finetune.machine import available_gib
from finetune.merge.four_bit import FourBit
from finetune.merge.lanes import lanes
from finetune.merge.plan import How, Plan, make_plan
from finetune.merge.shard import Halted, Sheet, sheets, write_sheet
from finetune.merge.staging import Finisher, Staging, identity, require_room, staging
from finetune.parity import FP32_LIMIT_GIB, Parity, refuse
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from rich.console import Console

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""What is copied beside the weights: config, tokenizer, template, licence."""

PROOF_MARGIN = 1.1
"""Memory of the proof over that of the weights it loads."""

QUIET_BYTES = 2**28
"""Merges up to this size are done before anybody asks how far they are."""

SWALLOWED = 0.5
"""Share of the update that rounding may take (as a norm) before a person is warned."""


def merge(run_dir: RunDir) -> None:
    """Writes merged/ of a run: the base with its adapter added, parity.json and answers.json.

    Raises WeightsError (MRG-001 to MRG-005) when they do not fit, GateError (MRG-010 to MRG-012, exit code 4) when the
    proof fails: then there is no merged/, and the adapter stays.
    """
    from rich.console import Console

    from finetune.source import base_folder

    recipe, console = read_recipe(run_dir.recipe), Console()
    adapter = run_dir.require(run_dir.trained, "train")
    with merging(base_folder(recipe), adapter, run_dir.merged, how_of(recipe), console) as folder:
        _say(console, "proving it in a fresh process: the same prompts to adapter, base and merged files ...")
        prove_apart(run_dir, folder, lambda sentence: _say(console, sentence))
        parity = Parity.read(folder / "parity.json")
        _say(console, parity.sentence())
        refuse(parity, recipe)
        sealed.seal(folder)  # the proof itself, too


def merge_folder(
    base: Path, adapter: Path, target: Path, console: Console | None = None, how: How | None = None
) -> None:
    """Writes the checkpoint in `base` with the PEFT adapter in `adapter` added, into `target`, without the proof.

    Raises what `make_plan` raises before a byte is written, and RunError DSK-002 when the disk is too small.
    """
    with merging(base, adapter, target, how or How(), console):
        pass


@contextmanager
def merging(base: Path, adapter: Path, target: Path, how: How, console: Console | None = None) -> Iterator[Path]:
    """The finished folder of a merge, which becomes `target` when the block ends well.

    Killed at any moment, the same merge goes on with the files that it had finished.
    """
    with ThreadPoolExecutor(1, "identity") as aside:  # hashing the adapter takes as long as planning
        what = aside.submit(identity, base, adapter, how)
        plan = make_plan(base, adapter, how)
        planned = sheets(plan)
    with staging(target, what.result()) as place:
        _write_all(plan, planned, place, console)
        _write_small(plan, planned, place.folder)
        told = summary(plan, place)
        write_json(place.folder / sealed.NOTE, told)
        sealed.seal(place.folder)
        if console is not None:
            for sentence in sentences(told):
                _say(console, sentence)
        yield place.folder


def how_of(recipe: Recipe) -> How:
    """What a recipe says of quantised weights. A rehearsal's tiny base has none, and nothing to requantise."""
    adapter = recipe.adapter
    seen = recipe.merge.base == "dequantised"
    four_bit = FourBit(recipe.train.precision, adapter.double_quantisation) if seen else None
    return How(quantised="bf16" if recipe.model.tiny else recipe.merge.quantised, four_bit=four_bit)


def prove_apart(run_dir: RunDir, folder: Path, say: Callable[[str], None]) -> None:
    """Writes parity.json and answers.json into the folder of a merge, by a process of its own.

    Nothing that the merging process holds can help it: it reads what is on disk. Raises RunError: MRG-013 when it
    ends without a proof, MRG-014 when there is too little memory for one.
    """
    command = [sys.executable, "-m", "finetune.merge.prove", str(run_dir.path), str(folder)]
    done = subprocess.run(command, check=False, env=os.environ | proof_place(folder, say))
    if done.returncode or not (folder / "parity.json").is_file():
        what = f"the proof ended with code {done.returncode}"
        why = "it says why above, or the system ended it; merged files are kept until it has passed"
        raise RunError("MRG-013", what, why, f"python -m finetune merge run={run_dir.path}")


def proof_place(folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Environment of the proof: without GPUs where the first of them has no room for the weights as they are compared.

    Base and merged weights are loaded one after the other and unquantised, however training held the base. Raises
    RunError MRG-014 when the host has no room either; merged files are kept.
    """
    size_gib = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    eight_bits = "quantization_config" in read_json(folder / "config.json")
    need = size_gib * (2 if size_gib <= FP32_LIMIT_GIB else 1) * (2 if eight_bits else 1) * PROOF_MARGIN
    found = gpus()
    if found and need <= found[0].free_gib:
        return {}
    if found:
        free, name = found[0].free_gib, found[0].name
        say(f"the proof takes {need:.0f} GiB, {name} has {free:.0f} free: it runs on the host, slowly")
    if need > (free := available_gib()):
        what = f"proving the merge takes {need:.1f} GiB of memory, {free:.1f} are free"
        why = "base and merged weights are compared as they are stored, not in 4 bits; merged files are kept"
        raise RunError("MRG-014", what, why, "the same command where there is more memory: it goes on from here")
    return {"CUDA_VISIBLE_DEVICES": ""} if found else {}


def summary(plan: Plan, place: Staging) -> dict[str, Any]:
    """What merge.json holds: what was merged into what, and what of it the stored types lost."""
    tally = place.tally()
    wanted = [change for change in (*plan.changes.values(), *plan.extras) if change.is_wanted]
    types = sorted({"BF16" if c.weight.is_quantised and not plan.keeps_layout else _type(c) for c in wanted})
    return {
        "schema": sealed.SCHEMA,
        "model_type": str(plan.names.model_type),
        "base": "dequantised" if plan.how.four_bit else "original",
        "quantised": plan.how.quantised if plan.quantisation else "none",
        "updates": len(plan.updates),
        "tensors": sum(change.share is not None for change in wanted),
        "tensors_from_4bit": sum(change.in_4bit for change in wanted),
        "files": len(place.files),
        "untied": plan.untied,
        "stored_as": types,
        "rounding_over_update": tally.lost(),
        "four_bit_over_update": tally.distance() if plan.how.four_bit else None,
        "trained": place.identity["adapter"],
        "sha256": {name: entry["sha256"] for name, entry in sorted(place.files.items())},
    }


def sentences(told: dict[str, Any]) -> Iterator[str]:
    """What a person is told of a merge, from merge.json."""
    types = ", ".join(told["stored_as"])
    layout = {"none": "keys, files and types are the base's", "bf16": "fp8 and fp4 weights became bf16"}
    how = layout.get(told["quantised"], "keys, files and types are the base's, scales are new")
    yield (
        f"merged: {told['updates']} updates into {told['tensors']} tensors of {told['files']} files; {how}; rounding "
        f"to {types} took {told['rounding_over_update']:.2%} of the update"
    )
    if told["base"] == "dequantised":
        yield (
            f"merge.base=dequantised: {told['tensors_from_4bit']} tensors begin with what training in 4 bits saw of "
            f"them, which is {told['four_bit_over_update']:.1f} times the update away from the original weights"
        )
    if told["untied"]:
        yield "the adapter changes one end of tied embeddings: both are written, tie_word_embeddings is false now"
    if told["rounding_over_update"] > SWALLOWED:
        yield (
            f"MRG-006 rounding to {types} took {told['rounding_over_update']:.0%} of the update: merged weights hold "
            "little of what was trained. Serve the adapter beside its base (export.formats=[peft]), or train longer."
        )


def _type(change: Any) -> str:
    return str(change.weight.entries[0].dtype)


def _write_all(plan: Plan, planned: list[Sheet], place: Staging, console: Console | None) -> None:
    """Writes every file that is not finished yet."""
    for name in place.damaged:
        _say(console, f"{name} is not what it was when it was finished: written again")
    left = [sheet for sheet in planned if sheet.name not in place.files]
    if len(left) < len(planned):
        _say(console, f"going on with a merge that was stopped: {len(planned) - len(left)} of {len(planned)} files")
    require_room(place.folder, sum(sheet.size for sheet in left))
    halt = Event()
    with Finisher(place) as finisher, _watched(console, left) as advance, lanes() as pool:

        def write(sheet: Sheet) -> None:
            try:
                finisher.finish(sheet.name, *write_sheet(plan, sheet, place.partial(sheet.name), advance, halt))
            except BaseException:
                halt.set()  # what the others write would be of no use before this is mended
                raise

        begun = [pool.submit(write, sheet) for sheet in left]
        try:
            wait(begun, return_when=FIRST_EXCEPTION)
        finally:
            halt.set()
            pool.shutdown(cancel_futures=True)
        for future in begun:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, Halted):
                raise error


def _write_small(plan: Plan, planned: list[Sheet], folder: Path) -> None:
    """Copies config, tokenizer and their like; of quantised and untied ones a config that says what they are now."""
    for pattern in SMALL_FILES:
        for path in plan.base.glob(pattern):
            if path.name != "finetune.json":
                shutil.copy2(path, folder / path.name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if not plan.keeps_layout:
            part.pop("quantization_config", None)
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if not plan.keeps_layout or plan.untied:
        write_json(path, config)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            where = {key: sheet.name for sheet in planned for key in sheet.keys}
            total = sum(sheet.size - len(sheet.header) for sheet in planned)
            write_json(index, {"metadata": {"total_size": total}, "weight_map": where})


@contextmanager
def _watched(console: Console | None, left: list[Sheet]) -> Iterator[Callable[[int], None]]:
    """A function that is told of written bytes: a bar on a terminal, a line every tenth of the work elsewhere."""
    total, done, lock = sum(sheet.size for sheet in left), 0, Lock()
    if console is not None and console.is_terminal:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress("merging", *columns, console=console, expand=True) as bar:
            task = bar.add_task("merging", total=total)
            yield lambda count: bar.advance(task, count)  # may be called by any thread
        return

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            before, done = done * 10 // max(total, 1), done + count
            now = done
        if total > QUIET_BYTES and now * 10 // total > before:
            _say(console, f"merging: {now / 2**30:.1f} of {total / 2**30:.1f} GiB, {len(left)} files")

    yield advance


def _say(console: Console | None, sentence: str) -> None:
    if console is not None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
