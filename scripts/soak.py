"""Trains again and again while things go wrong, and checks that nothing is lost beyond the last save.

    python scripts/soak.py --minutes 30

Faults, drawn at random: kill -9 at any time and in the middle of a save, SIGTERM, SIGINT, SIGUSR1, a full disk, and a
flipped, missing or cut file of the newest checkpoint. After each the run goes on with the same command. A run that ends
must be bit-identical to one that nothing happened to. Writes scripts/bench_results/soak_<machine>.json and says how
many of each fault there were, and what came of them. Needs Linux; a full disk needs root (a small tmpfs).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checkpoints import faults, newest
from finetune.compose import load_recipe, read_recipe
from finetune.machine import gpu_count
from finetune.record import versions
from finetune.run import carry_on, start
from finetune.rundir import TEMPORARY, RunDir, read_json, write_json

STEPS = 45
CASES = {
    "experts in 4 bits": ["train.accumulation=2"],
    "LoRA fp32, dropout, packing": [
        "adapter=lora", "adapter.targets=attention", "adapter.dropout=0.1", "data.packing=true", "train.precision=fp32",
    ],
    "2 processes": ["launch.devices=2", "train.batch_size=1"],
    "2 processes, FSDP2": ["launch.devices=2", "train.batch_size=1", "launch.distribution=fsdp2"],
    "adapter of the best state": [  # that of step 24, far from the last
        "train.evaluate_steps=4", "train.adapter_of=best", "train.lr=0.03", "train.schedule=constant_with_warmup",
    ],
}  # fmt: skip
FSDP2_ON_CPU = ("tests.trained", "tests.fsdp_on_cpu", "2", "train")
"""What stands for `finetune train` where FSDP2 has no GPUs."""
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}
DAMAGE = ("flipped byte", "missing file", "cut file")
FAULTS = ("kill -9", "kill -9 in a save", *SIGNALS, *DAMAGE, "full disk")


@dataclass
class Soak:
    """What was done and what came of it."""

    injected: Counter[str] = field(default_factory=Counter)
    came_of_it: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)

    def note(self, fault: str, outcome: str) -> None:
        """Counts an injected fault and its outcome."""
        self.injected[fault] += 1
        self.came_of_it.setdefault(fault, Counter())[outcome] += 1
        print(f"{time.strftime('%H:%M:%S')}  {fault}: {outcome}", flush=True)


def main() -> int:
    """0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bench_results" / "soak_cpu.json")
    options = parser.parse_args()
    if not gpu_count():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    draw, soak, begun = random.Random(options.seed), Soak(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Disk(Path(folder)) as disk:
        straight = {name: reference(disk.path, words) for name, words in CASES.items()}
        number = 0
        while time.monotonic() - begun < options.minutes * 60:
            name = list(CASES)[number % len(CASES)]
            number += 1
            one_run(name, disk, straight[name], soak, draw)
    result = {
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seed": options.seed,
        "steps_per_run": STEPS,
        "finished_runs": dict(soak.runs),
        "injected": dict(soak.injected),
        "came_of_it": {fault: dict(outcomes) for fault, outcomes in soak.came_of_it.items()},
        "violations": soak.violations,
        "full_disk": "tmpfs" if disk.mounted else "not tried: it needs root",
        "machine": {"processors": os.cpu_count(), "cpu": cpu()},
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.out, result)
    print(table(result))
    return 1 if soak.violations else 0


def one_run(name: str, disk: Disk, straight: list[Any], soak: Soak, draw: random.Random) -> None:
    """A run with faults until it ends; what it computed must be what the undisturbed one did."""
    run_dir = prepared(disk.path, CASES[name])
    while not run_dir.train.exists():
        fault = draw.choice(FAULTS if disk.mounted else FAULTS[:-1])
        if fault in DAMAGE and newest(run_dir.checkpoints).checkpoint is None:
            fault = "kill -9"
        before = step_of(run_dir)
        if fault in DAMAGE:
            kept = whole_ones(run_dir)
            damage(run_dir, fault, draw)
            whole = step_of(run_dir)
            if whole != (kept[1] if len(kept) > 1 else 0):
                soak.violations.append(f"{name}: {fault} of step {kept[0]} of {kept}, and {whole} is left")
            said = let_alone(training(run_dir), run_dir, draw)
            named = "passed over" in said
            if not named or whole >= before:
                soak.violations.append(f"{name}: {fault} at step {before} was not noticed")
            soak.note(fault, f"named, went on from {before - whole} steps before" if named else "NOT NOTICED")
            continue
        saved = whole_ones(run_dir)
        process = training(run_dir)
        outcome = inject(fault, process, run_dir, disk, draw)
        if step_of(run_dir) < before:
            soak.violations.append(f"{name}: {fault}: step {before} is lost, {step_of(run_dir)} is the newest")
        if step_of(run_dir) >= max([0, *saved]) + 6 and len(whole_ones(run_dir)) < 2 and not run_dir.train.exists():
            soak.violations.append(f"{name}: {fault}: two saves, and one is left")
        soak.note(fault, outcome)
    said = let_alone(training(run_dir), run_dir, draw)
    soak.runs[name] += 1
    if told(run_dir) != straight:
        soak.violations.append(f"{name}: {run_dir.path.name} computed something else than the undisturbed run")
    print(
        f"{time.strftime('%H:%M:%S')}  a run of {name} has ended; went on {len(resumptions(run_dir))} times", flush=True
    )
    remove(run_dir)


def inject(fault: str, process: subprocess.Popen[str], run_dir: RunDir, disk: Disk, draw: random.Random) -> str:
    """Does it at a random moment of the training, and says how the process ended."""
    at = step_of(run_dir) + draw.randrange(1, 12)
    wait(process, lambda: step_of(run_dir) >= at, 90)
    time.sleep(draw.random() * 0.3)
    if fault == "full disk":
        with disk.full():
            code, said = ended(process, 60)
        return "said so, and stopped" if "DSK-00" in said else outcome_of(code)
    if fault == "kill -9 in a save":
        wait(process, lambda: any(run_dir.checkpoints.glob(f"{TEMPORARY}*")), 30, 0.0005)
    if process.poll() is not None:
        return "had ended before"
    if fault in SIGNALS:
        os.kill(process.pid, SIGNALS[fault])
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return outcome_of(ended(process, 120)[0])


def outcome_of(code: int) -> str:
    """How a process ended, in words."""
    words = {0: "ended first", 75: "checkpoint, exit code 75", -9: "died at once", 3: "said why, exit code 3"}
    return words[code] if code in words else f"exit code {code}"


def damage(run_dir: RunDir, fault: str, draw: random.Random) -> None:
    """Breaks one file of the newest checkpoint."""
    found = newest(run_dir.checkpoints).checkpoint
    assert found is not None
    file = draw.choice(sorted(found.path.iterdir()))
    data = bytearray(file.read_bytes())
    if fault == "missing file":
        file.unlink()
    elif fault == "cut file":
        file.write_bytes(data[: draw.randrange(len(data))])
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)


class Disk:
    """A small disk of its own for the runs, where this process may mount one; else a folder."""

    def __init__(self, folder: Path, mebibytes: int = 120) -> None:
        self.path, self.mebibytes, self.mounted = folder / "disk", mebibytes, False

    def __enter__(self) -> Disk:
        self.path.mkdir()
        if os.geteuid() == 0:
            words = ["mount", "-t", "tmpfs", "-o", f"size={self.mebibytes}m", "tmpfs", str(self.path)]
            self.mounted = subprocess.run(words, check=False, capture_output=True).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.path)], check=False)

    def full(self) -> Full:
        """A context in which the disk has no room."""
        return Full(self.path / "ballast")


class Full:
    """Fills a disk, and gives the room back."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def __enter__(self) -> None:
        with self.ballast.open("wb", buffering=0) as file:  # a buffer would be written once more when it is closed
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass  # full, as it should be

    def __exit__(self, *_: object) -> None:
        self.ballast.unlink()


def prepared(disk: Path, words: list[str]) -> RunDir:
    """A run whose rows are prepared; the cache is outside the small disk."""
    places = [f"runs_dir={disk / 'runs'}", f"cache_dir={disk.parent / 'cache'}"]
    training_words = [f"train.max_steps={STEPS}", "train.save_steps=3", "train.report_to=[]"]
    recipe = load_recipe("legal_quickstart", "scale=rehearsal", *places, *training_words, *words)
    return carry_on(start(recipe), until="data")


def reference(disk: Path, words: list[str]) -> list[Any]:
    """What an undisturbed run computes."""
    run_dir = prepared(disk, words)
    code, said = ended(training(run_dir), 300)
    assert code == 0, said
    found = told(run_dir)
    remove(run_dir)
    return found


def training(run_dir: RunDir) -> subprocess.Popen[str]:
    """The command that begins a training and goes on with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    words = ["finetune", "train", f"run={run_dir.path}"]
    if read_recipe(run_dir.recipe).launch.distribution == "fsdp2" and not gpu_count():
        words = [*FSDP2_ON_CPU, str(run_dir.path)]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """(exit code, what it said); a process that hangs is a failure of the soak."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def let_alone(process: subprocess.Popen[str], run_dir: RunDir, draw: random.Random) -> str:
    """What the command says when it is let alone for a while and then killed, if it has not ended."""
    at = step_of(run_dir)
    wait(process, lambda: step_of(run_dir) > at, 60)
    time.sleep(draw.random())
    if process.poll() is None and not run_dir.train.exists():
        os.killpg(process.pid, signal.SIGKILL)
    return ended(process, 120)[1]


def wait(process: subprocess.Popen[str], until: Any, seconds: float, pause: float = 0.005) -> None:
    """Until something is so, the process has ended, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not until():
        time.sleep(pause)


def step_of(run_dir: RunDir) -> int:
    """The newest step that verifies; a folder may be taken away while it is read."""
    for _ in range(5):
        try:
            found = newest(run_dir.checkpoints).checkpoint
            return found.step if found else 0
        except OSError:
            time.sleep(0.01)
    return 0


def whole_ones(run_dir: RunDir) -> list[int]:
    """The steps of all checkpoints that verify, the newest first."""
    folders = sorted((int(p.name[5:]), p) for p in run_dir.checkpoints.glob("step-*"))
    return [step for step, path in reversed(folders) if not faults(path, step)]


def told(run_dir: RunDir) -> list[Any]:
    """Losses, gradient norms, learning rates and batch digests, also as a file, and the bytes of the adapter."""
    steps = [[s[k] for k in ("loss", "grad_norm", "lr", "batch")] for s in read_json(run_dir.train)["steps"]]
    return [steps, run_dir.batches.read_text(), (run_dir.adapter / "adapter_model.safetensors").read_bytes()]


def resumptions(run_dir: RunDir) -> list[Any]:
    """Every time the run went on."""
    found: list[Any] = read_json(run_dir.train)["resumed"]
    return found


def remove(run_dir: RunDir) -> None:
    """Makes room on the small disk."""
    subprocess.run(["rm", "-rf", str(run_dir.path)], check=True)


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(result: dict[str, Any]) -> str:
    """What was injected and what came of it, for a person."""
    lines = [f"{'injected':>8}  fault"]
    for fault, count in sorted(result["injected"].items()):
        came = ", ".join(f"{n} {what}" for what, n in sorted(result["came_of_it"][fault].items()))
        lines.append(f"{count:8}  {fault}: {came}")
    lines.append(f"finished and compared: {json.dumps(result['finished_runs'])}")
    lines.append("violations: " + ("none" if not result["violations"] else "; ".join(result["violations"])))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
