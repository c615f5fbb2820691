"""Gives every parser that a stranger's bytes reach many thousands of broken inputs, and looks at what it does.

    python scripts/fuzz.py --inputs 200000

The parsers, their seeds and what must hold are those of tests/test_fuzz_*.py: nothing but an error of ours may come
out, within 5 s of processor time, without a file elsewhere, a program or a pickle. Half of the inputs are seeds with
changed bytes, half have the right form and strange values. Writes scripts/bench_results/fuzz_<machine>.json; an input
that broke something is printed and kept. A process that dies (a fault in a native library) or hangs is seen too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.record import versions  # noqa: E402
from finetune.rundir import read_json, write_json  # noqa: E402
from scripts.soak import cpu  # noqa: E402
from tests import fuzzing  # noqa: E402

SILENT_SECONDS = 300
"""A worker that has finished no input for so long hangs where Python cannot see it."""
MEMORY = 24 * 2**30
"""Address space of a worker: a bomb becomes a MemoryError, which is a crash."""


def parsers() -> list[fuzzing.Parser]:
    """Every parser of tests/test_fuzz_*.py."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_fuzz_*.py")):
        found += importlib.import_module(f"tests.{path.stem}").PARSERS
    return found


def main() -> int:
    """0 when nothing broke."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200_000, help="of all parsers together, by their weights")
    parser.add_argument(
        "--seconds", type=float, default=0, help="no new input of a parser after its even share of these"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="parsers whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench_results" / "fuzz_cpu.json")
    parser.add_argument("--page", action="store_true", help="print the table of SECURITY.md from what was written last")
    parser.add_argument("--worker", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker >= 0:
        work(options)
        return 0
    if options.page:
        print(page(read_json(options.out), read_json(options.out.with_name("soak_cpu.json"))))
        return 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = watched(options, Path(folder))
    result = {
        "inputs": sum(told["inputs"] for told in found.values()),
        "crashes": sum(len(told["crashes"]) for told in found.values()),
        "slowest_seconds": max(told["slowest_seconds"] for told in found.values()),
        "seconds": round(time.monotonic() - begun),
        "jobs": options.jobs,
        "seed": options.seed,
        "parsers": found,
        "machine": {"processors": os.cpu_count(), "cpu": cpu()},
        "versions": versions() | {"python": sys.version.split()[0]},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.out, result)
    print(table(result))
    print("SECURITY.md has these figures: python scripts/fuzz.py --page")
    return 1 if result["crashes"] else 0


def chosen(options: argparse.Namespace) -> list[tuple[fuzzing.Parser, int]]:
    """The parsers with how many inputs each worker gives them."""
    wanted = [parser for parser in parsers() if options.only in parser.name]
    weights = sum(parser.weight for parser in wanted)
    return [(p, max(1, round(options.inputs * p.weight / weights / options.jobs))) for p in wanted]


# --- a worker -------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Tries the inputs of one worker, parser by parser; a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    every = chosen(options)
    for number, (parser, count) in list(enumerate(every))[options.skip :]:
        (options.folder / "at").write_text(str(number))
        seconds = options.seconds / len(every) if options.seconds else float("inf")
        told = tried(
            parser, count, random.Random(f"{options.seed} {options.worker} {parser.name}"), options.folder, seconds
        )
        with (options.folder / "told.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": parser.name, **told}) + "\n")


def tried(parser: fuzzing.Parser, count: int, draw: random.Random, folder: Path, seconds: float) -> dict[str, Any]:
    """What became of so many inputs of one parser."""
    seeds = parser.seeds()
    place = folder / "place"
    for seed in seeds:
        fuzzing.place(place / fuzzing.INPUT, seed)
        parser.parse(place / fuzzing.INPUT)
    codes: Counter[str] = Counter()
    crashes: dict[str, None] = {}
    slowest, done, begun_at, beat, end = 0.0, 0, time.process_time(), time.monotonic(), time.monotonic() + seconds
    while done < count and time.monotonic() < end:
        files = parser.shaped(draw) if done % 2 else fuzzing.mutated(seeds, draw)
        begun = time.process_time()
        try:
            codes[fuzzing.attempt(parser, place, files)] += 1
        except fuzzing.Crash as crash:
            if str(crash) not in crashes and len(crashes) < 20:
                crashes[str(crash)] = None
                keep(parser, str(crash), files)
        slowest, done = max(slowest, time.process_time() - begun), done + 1
        if time.monotonic() - beat > 1:
            beat = time.monotonic()
            (folder / "beat").write_text(f"{parser.name}: {done:,} of {count:,}")
    taken = codes.pop("", 0)
    ordered = dict(sorted(codes.items()))
    return {
        "inputs": done,
        "taken": taken,
        "errors": ordered,
        "slowest_seconds": round(slowest, 2),
        "cpu_seconds": round(time.process_time() - begun_at, 1),
        "crashes": list(crashes),
    }


def keep(parser: fuzzing.Parser, why: str, files: fuzzing.Files) -> None:
    """Keeps an input that broke something, and says where."""
    target = Path(tempfile.mkdtemp(prefix="fuzz-crash-"))
    for name, data in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    print(f"CRASH {why}\n  its input is in {target}", flush=True)


# --- from outside ---------------------------------------------------------------------------------------------------


def watched(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts the workers, starts one that died again behind what killed it, and puts together what they tell."""
    names = [parser.name for parser, _ in chosen(options)]
    places = [folder / str(number) for number in range(options.jobs)]
    dead: list[tuple[str, str]] = []
    workers = {}
    for number, place in enumerate(places):
        place.mkdir()
        workers[number] = begin(options, number, place, 0)
    said = time.monotonic()
    while workers:
        time.sleep(0.5)
        for number, worker in list(workers.items()):
            place = places[number]
            quiet = time.time() - max((p.stat().st_mtime for p in place.glob("*") if p.is_file()), default=time.time())
            if worker.poll() is None and quiet > SILENT_SECONDS:
                os.kill(worker.pid, signal.SIGKILL)
                worker.wait()
            if worker.poll() is None:
                continue
            del workers[number]
            if worker.returncode:
                at = int((place / "at").read_text())
                end = "hung" if quiet > SILENT_SECONDS else "died"
                how = f"{names[at]}: the process {end} ({worker.returncode})"
                dead.append((names[at], how))
                target = Path(tempfile.mkdtemp(prefix="fuzz-crash-"))
                shutil.copytree(place / "place" / fuzzing.INPUT, target, dirs_exist_ok=True)
                print(f"CRASH {how}\n  its input is in {target}", flush=True)
                if at + 1 < len(names):
                    workers[number] = begin(options, number, place, at + 1)
        if time.monotonic() - said > 15:
            said = time.monotonic()
            beats = [(place / "beat").read_text() for place in places if (place / "beat").is_file()]
            print(f"{time.strftime('%H:%M:%S')}  {'; '.join(beats)}", flush=True)
    return together(names, places, dead)


def begin(options: argparse.Namespace, number: int, place: Path, skip: int) -> subprocess.Popen[bytes]:
    """A worker in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), f"--worker={number}", f"--folder={place}", f"--skip={skip}"]
    words += [
        f"--inputs={options.inputs}",
        f"--seconds={options.seconds}",
        f"--seed={options.seed}",
        f"--jobs={options.jobs}",
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TRANSFORMERS_VERBOSITY": "critical",
    }
    (place / "beat").write_text("starting")
    return subprocess.Popen([*words, f"--only={options.only}"], env=environment)


def together(names: list[str], places: list[Path], dead: list[tuple[str, str]]) -> dict[str, Any]:
    """Name of a parser -> what all workers tell of it."""
    lines = [line for place in places if (place / "told.jsonl").is_file() for line in (place / "told.jsonl").open()]
    every = [json.loads(line) for line in lines]
    found = {}
    for name in names:
        told = [one for one in every if one["name"] == name]
        errors: Counter[str] = Counter()
        for one in told:
            errors.update(one["errors"])
        found[name] = {
            "inputs": sum(one["inputs"] for one in told),
            "taken": sum(one["taken"] for one in told),
            "errors": dict(sorted(errors.items())),
            "slowest_seconds": max((one["slowest_seconds"] for one in told), default=0.0),
            "cpu_seconds": round(sum(one["cpu_seconds"] for one in told), 1),
            "crashes": sorted({c for one in told for c in one["crashes"]} | {how for who, how in dead if who == name}),
        }
    return found


def page(fuzz: dict[str, Any], soak: dict[str, Any]) -> str:
    """The table of SECURITY.md: what was tried, how often, what came of it, what was lost."""
    lines = ["| tried on | how often | what came of it | broken or lost |", "|---|---|---|---|"]
    for name, told in fuzz["parsers"].items():
        refused = f"refused {told['inputs'] - told['taken']:,} ({', '.join(told['errors']) or 'never'})"
        came = f"read {told['taken']:,}, {refused}"
        lines.append(f"| {name} | {told['inputs']:,} inputs | {came} | {len(told['crashes']) or 'nothing'} |")
    for fault, count in soak["injected"].items():
        came = ", ".join(f"{n} {what}" for what, n in soak["came_of_it"][fault].items())
        lines.append(f"| a training: {fault} | {count} times | {came} | nothing |")
    whole = f"{fuzz['inputs']:,} inputs, {sum(soak['injected'].values())} faults"
    ended = f"{sum(soak['finished_runs'].values())} trainings compared with undisturbed ones"
    lines.append(f"| **all** | {whole} | {ended} | **{fuzz['crashes'] + len(soak['violations']) or 'nothing'}** |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """What was tried and what came of it, for a person."""
    lines = [f"{'inputs':>8} {'taken':>8} {'slowest':>8} {'crashes':>8}  parser (errors it ended with)"]
    for name, told in result["parsers"].items():
        figures = f"{told['inputs']:8,} {told['taken']:8,} {told['slowest_seconds']:6.2f} s {len(told['crashes']):8}"
        lines.append(f"{figures}  {name} ({', '.join(told['errors']) or 'none'})")
    lines.append(
        f"{result['inputs']:8,} inputs in {result['seconds']} s, seed {result['seed']}: {result['crashes']} crashes"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
