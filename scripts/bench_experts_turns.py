"""How `bench_experts.py` compares: two processes that take their steps in turn, and the same steps in fp32."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench_experts_shape import checkpoint_sizes
from bench_experts_side import Spec, as_json

FEWEST = 3
"""Timed rounds of a cell, at least, however long they take."""


class Problem(Exception):
    """Something that keeps the benchmark from running, in a sentence."""


@dataclass(kw_only=True, slots=True)
class Workload:
    """A checkpoint and the steps to take on it."""

    name: str
    folder: Path
    routings: tuple[str, ...]
    tokens: tuple[int, ...]
    """Tokens per step, one cell each; none where only bytes are of interest."""
    text: bool
    fp32: bool
    """Whether both sides are compared in fp32 too."""


@dataclass(slots=True)
class Cell:
    """What is timed together: a workload with one size of step and one routing."""

    workload: Workload
    tokens: int
    routing: str

    def labels(self) -> dict[str, Any]:
        """How rows name it."""
        return {"workload": self.workload.name, "tokens": self.tokens, "routing": self.routing}


class Child:
    """A side in a process of its own."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.log, self.side = log, spec.side
        # A side that waits for its turn must leave the cores to the other one: no spinning between parallel regions.
        quiet = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        command = [sys.executable, str(Path(__file__).with_name("bench_experts_side.py")), as_json(spec)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | quiet | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def ask(self, command: str, **words: Any) -> dict[str, Any]:
        """The answer to a command. It is {"error": ...} when the command failed there, or the process with it."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"command": command} | words) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            code = self.process.wait()
            return {"error": f"the process ended with {code}: {said[-1] if said else 'out of memory?'}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process and waits for its memory to be free."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


Start = Callable[[Spec, Path], Any]
"""Makes a `Child` of a spec and a log file, or in tests something that answers like one."""


def compare(
    workload: Workload,
    stock: str,
    options: argparse.Namespace,
    scratch: Path,
    start: Start,
    rows: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
) -> None:
    """Ours and one stock side on one workload: adds a row per side and cell, and a pair per cell."""
    about = spec(workload, "ours", options, scratch)
    sides = {name: start(replace(about, side=name), scratch / f"{name}.log") for name in ("ours", stock)}
    try:
        loaded: dict[str, dict[str, Any]] = {}
        for name, side in sides.items():
            print(f"{workload.name}: loading {name} ...", end=" ", flush=True)
            loaded[name] = side.ask("load")
            if "error" in loaded[name]:
                if name == "ours":
                    raise Problem(f"{name} cannot load {workload.folder}: {loaded[name]['error']}")
                print(loaded[name]["error"])
            else:
                print(f"{mib(loaded[name]['resident_bytes'])}, peak {mib(loaded[name]['load_peak_bytes'])}", flush=True)
        files = checkpoint_sizes(workload.folder)
        cells = [Cell(workload, tokens, routing) for routing in workload.routings for tokens in workload.tokens]
        found: list[dict[str, dict[str, Any]]] = []
        able = {name: side for name, side in sides.items() if "error" not in loaded[name]}
        for cell in cells:
            found.append(timed(cell, able, options))
        for cell, figures in zip(cells or [Cell(workload, 0, "own")], found or [{}], strict=True):
            made = {}
            for name in sides:
                steps = figures[name] if name in figures else {}
                made[name] = cell.labels() | {"side": name, "beside": ({*sides} - {name}).pop()}
                made[name] |= bytes_per_parameter(loaded[name], files) | steps
            rows += made.values()
            pairs.append(cell.labels() | pair(made["ours"], made[stock]))
    finally:
        for side in sides.values():
            side.close()


def timed(cell: Cell, sides: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Side -> its figures for a cell, after rounds in which the sides step in turn. An error ends a side's part."""
    rows: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        rows[name] = {"seconds": [], "losses": [], "cpu_seconds_asleep": 0.0}
        side.ask("route", routing=cell.routing)
    started = time.monotonic()
    for number in range(options.warmup + options.rounds):
        done = number - options.warmup
        if done >= FEWEST and time.monotonic() - started > 60 * options.minutes:
            break
        kind = "warm-up" if done < 0 else f"round {done + 1}/{options.rounds}"
        print(f"{cell.workload.name} {cell.routing} {cell.tokens} tokens, {kind}:", end="", flush=True)
        for name in sorted(sides, reverse=bool(number % 2)):
            if "error" in rows[name]:
                continue
            answer = sides[name].ask("step" if number else "count", number=number, tokens=cell.tokens)
            if "error" not in answer and not math.isfinite(answer["loss"]):
                answer = {"error": f"the loss is {answer['loss']}"}
            if "error" in answer:
                rows[name]["error"] = answer["error"]
                print(f" {name} {answer['error']}", end="", flush=True)
                continue
            rows[name]["losses"].append(answer.pop("loss"))
            if not number:
                rows[name] |= answer
                print(f" {name} counted", end="", flush=True)
                continue
            print(f" {name} {answer['seconds']:.2f} s", end="", flush=True)
            rows[name]["cpu_seconds_asleep"] += answer["cpu_seconds_asleep"]
            if done >= 0:
                rows[name]["seconds"].append(answer["seconds"])
        print(flush=True)
    for name, side in sides.items():
        rows[name] |= side.ask("peaks")
        if "error" not in rows[name]:
            rows[name]["seconds_median"] = median(rows[name]["seconds"])
            rows[name]["tokens_per_second"] = cell.tokens / rows[name]["seconds_median"]
    return rows


def bytes_per_parameter(loaded: dict[str, Any], files: dict[str, int]) -> dict[str, Any]:
    """What a side's load came to, in terms of what the files hold."""
    if "error" in loaded:
        return {"error": loaded["error"]}
    return loaded | {
        "parameters": files["parameters"],
        "expert_bytes_per_param": loaded["expert_bytes"] / files["expert_parameters"],
        "load_peak_over_resident": loaded["load_peak_bytes"] / loaded["resident_bytes"],
        "largest_group_bytes": files["largest_group_bytes"],
        "load_peak_allowed_bytes": loaded["resident_bytes"] + 2 * files["largest_group_bytes"],
    }


def pair(ours: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """The comparison of two rows: ratios stock/ours, those of seconds taken round by round."""
    found: dict[str, Any] = {"stock": stock["side"]}
    if "resident_bytes" in stock:
        found["resident_ratio"] = stock["resident_bytes"] / ours["resident_bytes"]
    if "seconds_median" in ours and "seconds_median" in stock:
        ratios = [theirs / mine for theirs, mine in zip(stock["seconds"], ours["seconds"], strict=True)]
        found |= {
            "seconds_ratios": ratios,
            "seconds_ratio_median": median(ratios),
            "seconds_ratio_min": min(ratios),
            "seconds_ratio_max": max(ratios),
            "peak_ours_over_stock": ours["step_peak_bytes"] / stock["step_peak_bytes"],
            "saved_ratio": stock["saved_tensor_bytes"] / max(ours["saved_tensor_bytes"], 1),
        }
    return found


def fp32_losses(workload: Workload, options: argparse.Namespace, scratch: Path, start: Start) -> dict[str, Any]:
    """The losses of both sides over some steps with nothing quantised, one side after the other."""
    cell = Cell(workload, workload.tokens[0], workload.routings[0])
    found: dict[str, Any] = {}
    for name in ("ours", "stock-bf16"):
        about = replace(spec(workload, name, options, scratch), fp32=True)
        side = start(about, scratch / f"{name}-fp32.log")
        try:
            steps = [("step", {"number": number, "tokens": cell.tokens}) for number in range(options.loss_steps)]
            answers = []
            for command, words in [("load", {}), ("route", {"routing": cell.routing}), *steps]:
                answer = side.ask(command, **words)
                if "error" in answer:
                    raise Problem(f"{name} in fp32 fails at {command}: {answer['error']}")
                if command == "step":
                    if not math.isfinite(answer["loss"]):
                        raise Problem(f"{name} in fp32 has the loss {answer['loss']} at step {words['number'] + 1}")
                    answers.append(answer)
                    said = f"loss {answer['loss']:.6f}, {answer['seconds']:.2f} s"
                    print(f"{workload.name} fp32, {name}, step {len(answers)}: {said}", flush=True)
        finally:
            side.close()
        found[name.removesuffix("-bf16")] = [answer["loss"] for answer in answers]
        found[name.removesuffix("-bf16") + "_seconds"] = [answer["seconds"] for answer in answers]
    difference = max(abs(a - b) for a, b in zip(found["ours"], found["stock"], strict=True))
    return cell.labels() | {"max_difference": difference} | found


def spec(workload: Workload, side: str, options: argparse.Namespace, scratch: Path) -> Spec:
    """What a side of this workload is."""
    return Spec(
        side=side,
        folder=str(workload.folder),
        adapter=str(scratch / "adapter"),
        fp32=False,
        text=workload.text,
        length=min(options.length, *workload.tokens) if workload.tokens else options.length,
        rank=options.rank,
        expert_rank=options.expert_rank,
        checkpointing=options.checkpointing,
        steps=bool(workload.tokens),
        bf16=options.precision == "bf16",
    )


def mib(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**20:,.0f} MiB"
