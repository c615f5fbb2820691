"""Preparing rows: ours with all checks on against TRL's own preparation, flat memory, and a warm cache.

    .venv/bin/python scripts/bench_data.py [--rows 20000] [--rounds 3] [--few 100000] [--many 2000000]

Writes scripts/bench_results/data_<machine>.json. Both sides read the same JSONL file in a process of their own with an
empty cache and two worker processes, in turn, now one first, now the other. Imports are not counted, nor what a side
needs to start on two rows (TRL its trainer, ours its workers), measured on a second try; `start_seconds` says what that
is. Ratios are taken per round and the median reported. Memory is what the process and its workers hold (Pss: shared
pages count once), sampled; a `--many` of 0 leaves that part out. Rows are synthetic: sentences of made-up words, all
different, with personal data in one of fifty and a near copy in one of a hundred.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench_quickstart import RESULTS, machine

WORKERS = 2
MAX_LENGTH = 1024
TAGS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with the marks that TRL needs to train answers only. Ours reads the same text without them."""


def main(words: list[str]) -> None:
    """Runs all parts, or the side that a parent asks for."""
    if words[:1] == ["--side"]:
        print(json.dumps({"ours": ours, "trl": trl, "warm": warm}[words[1]](*words[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the comparison with TRL")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of it")
    parser.add_argument("--few", type=int, default=100_000, help="rows of the smaller set for memory")
    parser.add_argument("--many", type=int, default=2_000_000, help="rows of the larger one; 0 leaves memory out")
    parser.add_argument("--words", type=int, default=25, help="words of a message in the sets for memory")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        figures = run(options, Path(scratch))
    slug = "".join(c if c.isalnum() else "-" for c in machine().lower()).strip("-")
    target = RESULTS / f"data_{'-'.join(filter(None, slug.split('-')))}.json"
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every figure."""
    from finetune.record import versions

    base = base_folder(scratch / "base")
    figures: dict[str, Any] = {}
    rows = write_rows(scratch / "rows.jsonl", options.rows, 60)
    rounds = []
    for number in range(options.rounds):
        taken = {}
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            taken[side] = child(side, rows, base, scratch / f"cache-{side}-{number}")
            shutil.rmtree(scratch / f"cache-{side}-{number}", ignore_errors=True)
            print(f"round {number + 1}/{options.rounds}: {side} {options.rows / taken[side]['seconds']:,.0f} rows/s")
        rounds.append(taken)
    ratios = [r["trl"]["seconds"] / r["ours"]["seconds"] for r in rounds]
    figures["ours_over_trl_rows_per_second_median"] = round(statistics.median(ratios), 3)
    figures["ratios"] = [round(ratio, 3) for ratio in ratios]
    for side in ("ours", "trl"):
        figures[f"{side}_rows_per_second"] = [round(options.rows / r[side]["seconds"]) for r in rounds]
        figures[f"{side}_start_seconds"] = [r[side]["start_seconds"] for r in rounds]
    figures["tokens_agree"] = rounds[0]["ours"]["tokens"] == rounds[0]["trl"]["tokens"]
    figures["trained_agree"] = rounds[0]["ours"]["trained"] == rounds[0]["trl"]["trained"]
    if options.many:
        figures["memory"] = [memory(n, options.words, base, scratch) for n in (options.few, options.many)]
        few, many = (row["peak_mib"] for row in figures["memory"])
        figures["memory_growth"] = round(many / few - 1, 4)
    return figures | {
        "rows": options.rows,
        "rounds": options.rounds,
        "workers": WORKERS,
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def memory(rows: int, words: int, base: Path, scratch: Path) -> dict[str, Any]:
    """Highest memory, seconds and bytes of preparing `rows` short rows once, and seconds of opening them again."""
    path, cache = write_rows(scratch / "many.jsonl", rows, words), scratch / "cache-many"
    cold = child("ours", path, base, cache)
    again = child("warm", path, base, cache)
    found = {
        "rows": rows,
        "file_mib": round(path.stat().st_size / 2**20, 1),
        "seconds": round(cold["seconds"], 1),
        "rows_per_second": round(rows / cold["seconds"]),
        "peak_mib": cold["peak_mib"],
        "parent_peak_mib": cold["parent_peak_mib"],
        "kept": cold["kept"],
        "warm_seconds": again["seconds"],
        "warm_seconds_with_imports": again["with_imports"],
    }
    print(f"{rows:,} rows: {found}")
    shutil.rmtree(cache)
    path.unlink()
    return found


def child(side: str, rows: Path, base: Path, cache: Path) -> dict[str, Any]:
    """One side, in a process of its own."""
    environment = os.environ | {"HF_HOME": str(cache / "hf"), "HF_DATASETS_CACHE": str(cache / "datasets")}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    command = [sys.executable, __file__, "--side", side, str(rows), str(base), str(cache)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def recipe_of(rows: str, cache: str) -> Any:
    """All checks on."""
    from finetune.recipe import Data, Recipe

    data = Data(
        train_files=[rows],
        heldout_fraction=0.01,
        max_length=MAX_LENGTH,
        near_duplicates="report",
        privacy="report",
        quality="report",
        on_bad_row="drop",
        workers=WORKERS,
    )
    return Recipe(name="bench", cache_dir=cache, data=data)


def ours(rows: str, base: str, cache: str) -> dict[str, Any]:
    """Prepares the rows."""
    from finetune.data import mapping
    from finetune.data.prepare import prepared
    from finetune.rundir import read_json

    mapping.ALONE = 0  # workers even for two rows
    few = Path(cache) / "few.jsonl"
    few.parent.mkdir(parents=True)
    recipe = recipe_of(str(few), cache)
    recipe.data.heldout_fraction = 0.5
    with Path(rows).open(encoding="utf-8") as handle:
        for _ in range(2):
            few.write_text("".join(next(handle) for _ in range(2)), encoding="utf-8")
            started = time.monotonic()
            prepared(recipe, Path(base))
            idle = time.monotonic() - started
    with Peak() as peak:
        started = time.monotonic()
        folder = prepared(recipe_of(rows, cache), Path(base))
        seconds = time.monotonic() - started - idle
    report = read_json(folder / "report.json")
    return {
        "seconds": seconds,
        "start_seconds": round(idle, 2),
        "tokens": sum(split["tokens"] for split in report["splits"].values()),
        "trained": sum(split["trainable_tokens"] for split in report["splits"].values()),
        "kept": report["kept"],
        "peak_mib": round(peak.mib),
        "parent_peak_mib": round(peak.own_mib),
    }


def warm(rows: str, base: str, cache: str) -> dict[str, Any]:
    """Opens rows that are prepared already, and reads one."""
    begun = time.monotonic()
    from finetune.data.output import dataset
    from finetune.data.prepare import prepared

    dataset(prepared(recipe_of(rows, cache), Path(base)) / "train.arrow")[0]
    with_imports = time.monotonic() - begun
    started = time.monotonic()
    dataset(prepared(recipe_of(rows, cache), Path(base)) / "train.arrow")[0]
    return {"seconds": round(time.monotonic() - started, 3), "with_imports": round(with_imports, 3)}


def trl(rows: str, base: str, cache: str) -> dict[str, Any]:
    """TRL's trainer prepares the rows; what it takes to start on two rows is taken off."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.chat_template = TAGS
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    settings = SFTConfig(
        output_dir=cache,
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        dataset_num_proc=WORKERS,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    def start(files: str, split: str) -> Any:
        data = load_dataset("json", data_files=files, split=split)
        return SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=data, processing_class=tokenizer)

    for some in ("train[2:4]", "train[:2]"):
        started = time.monotonic()
        start(rows, some)
        idle = time.monotonic() - started
        shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    started = time.monotonic()
    made = start(rows, "train").train_dataset
    seconds = time.monotonic() - started - idle
    return {
        "seconds": seconds,
        "start_seconds": round(idle, 2),
        "tokens": sum(map(len, made["input_ids"])),
        "trained": sum(label != -100 for labels in made["labels"] for label in labels),
    }


class Peak:
    """Highest memory of this process and its children inside the block, in MiB, sampled five times a second."""

    def __enter__(self) -> Peak:
        self.mib = self.own_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            children = _children()
            own, theirs = _pss(os.getpid()), sum(map(_pss, children))
            self.own_mib = max(self.own_mib, own)
            if children == _children():  # a fork in between would count what it shares twice
                self.mib = max(self.mib, own + theirs)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in _read(task).split()}


def _pss(pid: int) -> float:
    """Anonymous and shared memory of a process in MiB; pages of mapped files, which can be dropped, do not count."""
    sizes = {
        line.split(":")[0]: int(line.split()[1])
        for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
        if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    }
    return sum(sizes.values()) / 1024


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def base_folder(target: Path) -> Path:
    """A folder with the quickstart's tokenizer, whose template is the text of TAGS without the marks."""
    from finetune.compose import load_recipe
    from finetune.source import base_folder as base_of

    target.mkdir()
    source = base_of(load_recipe("legal_quickstart"))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
        "generation_config.json",
    ):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    plain = TAGS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (target / "chat_template.jinja").write_text(plain, encoding="utf-8")
    return target


def write_rows(path: Path, count: int, words: int) -> Path:
    """`count` conversations of two messages with about `words` words each; equal on every machine."""
    draw = random.Random(17)
    syllables = [a + b for a in "bdfglmnprstv" for b in ("a", "e", "i", "o", "an", "en", "or", "il")]
    vocabulary = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(20_000)]
    last = ""
    with path.open("w", encoding="utf-8") as handle:
        for i in range(count):
            asked, told = (
                " ".join(draw.choices(vocabulary, k=draw.randint(words // 2, words + words // 2))) for _ in "ab"
            )
            if i % 50 == 7:
                told += f" Write to row{i}@example.com or call +44 20 7946 0{i % 1000:03d}."
            if i % 100 == 9:
                told = f"{last} indeed"
            last = told
            row = {"messages": [{"role": "user", "content": f"{asked}?"}, {"role": "assistant", "content": f"{told}."}]}
            handle.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
