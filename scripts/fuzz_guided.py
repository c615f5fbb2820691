"""Broken inputs found by coverage: atheris (libFuzzer) hunts in the parsers of scripts/fuzz.py that are Python's own.

    .venv/bin/python -m pip install --require-hashes --no-deps --target .venv/atheris -r tests/atheris.lock
    PYTHONPATH=.venv/atheris .venv/bin/python scripts/fuzz_guided.py --seconds 1200

What scripts/fuzz.py draws at random, this grows from what reached new code, and it demands the same of every input.
Each parser has an even share of the time and a process of its own. An input is the number of a seed, the number of one
of its files, and that file's bytes. Writes scripts/bench_results/fuzz_guided_<machine>.json; an input that broke
something is printed and kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LONGEST = 64 * 2**10
"""Bytes of one input."""
START = 120
"""Seconds that a process may take to import what it tries, and to end, beside its share."""
EVENT = re.compile(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+)")
"""How libFuzzer tells of the inputs so far, and of the edges of code that they reached."""


def main() -> int:
    """0 when nothing broke, 2 when atheris is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of all parsers together, each one an even share")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="parsers whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench_results" / "fuzz_guided_cpu.json")
    parser.add_argument("--hunt", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options, further = parser.parse_known_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            f"fuzz_guided: atheris is not installed.\n  Try: {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr
        )
        return 2
    if options.hunt:
        return hunt(options.hunt, options.folder, further)

    from finetune.record import versions
    from finetune.rundir import write_json
    from scripts.fuzz import parsers
    from scripts.soak import cpu

    names = [p.name for p in parsers() if options.only in p.name and not p.native]
    share = max(1.0, options.seconds * options.jobs / max(1, len(names)))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = hunted(names, share, options, Path(folder))
    result = {
        "inputs": sum(told["inputs"] for told in found.values()),
        "crashes": sum(len(told["crashes"]) for told in found.values()),
        "seconds": round(time.monotonic() - begun),
        "seconds_of_a_parser": round(share),
        "jobs": options.jobs,
        "seed": options.seed,
        "parsers": found,
        "machine": {"processors": os.cpu_count(), "cpu": cpu()},
        "versions": versions() | {"python": sys.version.split()[0], "atheris": importlib.metadata.version("atheris")},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.out, result)
    print(table(result))
    return 1 if result["crashes"] else 0


# --- one parser, in a process of its own -----------------------------------------------------------------------------


def hunt(name: str, folder: Path, words: list[str]) -> int:
    """Runs libFuzzer on the parser of that name; it ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["finetune"]):  # what is imported from here on counts its edges
        from scripts.fuzz import parsers
        from tests import fuzzing

        (parser,) = [p for p in parsers() if p.name == name]
    seeds = parser.seeds()
    place = folder / "place"
    for seed in seeds:
        fuzzing.place(place / fuzzing.INPUT, seed)
        parser.parse(place / fuzzing.INPUT)  # what it imports is not watched
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        for at, file in enumerate(sorted(seed)):
            (corpus / f"{number}-{at}").write_bytes(bytes([number, at]) + seed[file])

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        files = dict(seeds[data[0] % len(seeds)])
        files[sorted(files)[data[1] % len(files)]] = data[2:]
        fuzzing.attempt(parser, place, files)

    atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={folder}/crash-", str(corpus)], one)
    atheris.Fuzz()
    return 0


# --- from outside ----------------------------------------------------------------------------------------------------


def hunted(names: list[str], share: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Name of a parser -> what came of its share of the time; so many at once as there are jobs."""
    waiting, running, found = deque(enumerate(names)), {}, {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            number, name = waiting.popleft()
            place = folder / str(number)
            place.mkdir()
            running[name] = (begin(name, share, options, place), place)
        time.sleep(0.2)
        for name, (process, place) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                found[name] = told(name, process.returncode, place)
                print(f"{time.strftime('%H:%M:%S')}  {name}: {found[name]['inputs']:,} inputs", flush=True)
    return {name: found[name] for name in names}


def begin(name: str, share: float, options: argparse.Namespace, place: Path) -> subprocess.Popen[bytes]:
    """Starts the hunt in one parser."""
    words = [f"-max_total_time={share:.0f}", f"-seed={options.seed or 1}", f"-max_len={LONGEST}", "-rss_limit_mb=0"]
    command = [sys.executable, str(Path(__file__).resolve()), f"--hunt={name}", f"--folder={place}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    with (place / "log").open("wb") as log:
        limit = ["timeout", "--kill-after=5", str(share + START)]
        return subprocess.Popen([*limit, *command], env=environment, stdout=log, stderr=subprocess.STDOUT)


def told(name: str, code: int, place: Path) -> dict[str, Any]:
    """What the log of a hunt says. A hunt that tried nothing, died or hung is a crash too."""
    log = (place / "log").read_text(errors="replace")
    events = [(int(n), what, int(cov)) for n, what, cov, _ in EVENT.findall(log)]
    begun = [cov for _, what, cov in events if what == "INITED"]
    crashes = []
    if code or not begun:
        why = re.findall(r"^(?:tests\.fuzzing\.)?Crash: .*|^\w*Error: .*|^==\d+== ?ERROR.*", log, re.MULTILINE)
        crashes.append(f"{name}: {why[0] if why else f'the process ended with {code}: {log[-300:]}'}")
        print(f"CRASH {crashes[-1]}", flush=True)
        for path in place.glob("crash-*"):
            kept = Path(tempfile.mkdtemp(prefix="fuzz-crash-")) / path.name
            kept.write_bytes(path.read_bytes())
            print(f"  its input is {kept}", flush=True)
    return {
        "inputs": max((n for n, _, _ in events), default=0),
        "edges_of_seeds": begun[0] if begun else 0,
        "edges": max((cov for _, _, cov in events), default=0),
        "crashes": crashes,
    }


def table(result: dict[str, Any]) -> str:
    """What was tried and how far it came, for a person."""
    lines = [f"{'inputs':>9} {'edges':>7} {'of seeds':>9} {'crashes':>8}  parser"]
    for name, one in result["parsers"].items():
        lines.append(f"{one['inputs']:9,} {one['edges']:7,} {one['edges_of_seeds']:9,} {len(one['crashes']):8}  {name}")
    lines.append(f"{result['inputs']:9,} inputs in {result['seconds']} s: {result['crashes']} crashes")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
