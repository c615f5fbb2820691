"""A finished run written by hand, for tests of its pages: every file that they read, with text that must not run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune import evaluate
from finetune.compose import recipe_yaml
from finetune.evaluate.rows import write_lines
from finetune.recipe import Evaluate, Model, Recipe
from finetune.rundir import RunDir, write_json, write_text

NASTY = "<script>alert('x')</script> & \"quotes\" {{ recipe.name }} $a_1$"
GIB = 2**30


def scores(choices: list[str]) -> dict[str, Any]:
    """Scores of twelve rows with figures that do not repeat."""
    rows = [
        {"row": str(i), "group": f"g{i // 2}", "answer": "ab"[i % 2], "choices": choices, "prompt_length": 9}
        for i in range(12)
    ]
    base, tuned = (
        [
            SimpleNamespace(
                loss=loss + i / 37,
                logprobs=np.full(2 + i % 3, -loss - i / 37, dtype=np.float32),
                choice=("ab"[(i + (i % 4 == 0) * wrong) % 2]) if choices else None,
                tied=i == 5,
            )
            for i in range(12)
        ]
        for loss, wrong in ((2.7, 1), (0.31 + 1 / 7, 0))
    )
    train = {"answer": ["a"] * 3, "choices": [choices] * 3, "group": ["g0"] * 3}
    made = evaluate.conclude(rows, base, tuned, train, Evaluate(min_gain=0.123))  # type: ignore[arg-type]
    samples = [{"row": "7", "question": NASTY, "expected": "a" + NASTY, "base": "b" + NASTY, "tuned": "c" + NASTY}]
    return made | {"adapter_effect": {"largest_nats": 1.25, "mean_nats": 0.0625}, "samples": samples}


def results(wrong: int = 0) -> list[dict[str, Any]]:
    """The same row by row; `wrong` rows from the end are wrong, and their losses higher."""
    good = 12 - wrong
    return [
        {
            "row": f"{i:064x}", "input": f"{i:064x}", "group": i // 2, "tokens": 2 + i % 3,
            "base": {"loss": 2.7 + i / 37, "right": i % 4 != 0, "mark": float(i % 4 != 0)},
            "tuned": {"loss": 0.31 + i / 37 + (i >= good), "right": i < good, "mark": float(i < good)},
        }
        for i in range(12)
    ]  # fmt: skip


def coverage(routed_4bit: int = 800) -> list[dict[str, Any]]:
    rest = 800 - routed_4bit
    return [
        {"group": "embedding", "parameters": 100, "bytes": 200, "parameters_4bit": 0, "adapted": 0, "trainable": 0},
        {"group": "attention", "parameters": 100, "bytes": 57, "parameters_4bit": 100, "adapted": 100, "trainable": 9},
        {"group": "dense", "parameters": 0, "bytes": 0, "parameters_4bit": 0, "adapted": 0, "trainable": 0},
        {
            "group": "routed",
            "parameters": 800,
            "bytes": int(routed_4bit * 4.5 / 8) + 2 * rest,
            "parameters_4bit": routed_4bit,
            "adapted": 800,
            "trainable": 64,
        },
    ]


def finished(folder: Path) -> RunDir:
    """A run in which every stage has finished, with markup in every text that comes from outside."""
    run = RunDir(folder)
    run.path.mkdir()
    model = Model(title="Base " + NASTY, licence="apache-2.0", licence_url="https://example.org/licence")
    write_text(run.recipe, recipe_yaml(Recipe(name="toy", purpose="Purpose " + NASTY, model=model)))
    steps = [{"step": i + 1, "loss": 3 - i / 20, "lr": 1e-4, "grad_norm": 1.5, "seconds": 0.25} for i in range(40)]
    write_json(
        run.train,
        {
            "steps": steps, "rows": 3, "passes": 1.5, "tokens": 12345, "trainable_tokens": 678, "seconds": 91.5,
            "peak_memory_gib": 2.345, "load_peak_gib": 1.234, "load_seconds": 3.5, "resident_gib": 0.567,
            "coverage": coverage(), "experts_without_update": {}, "expert_rows_with_a_gradient": {},
            "versions": {"torch": "2.13.0", "peft": "0.21.2"},
            "seed": 17, "device": "cpu",
        },
    )  # fmt: skip
    write_json(run.scores, scores(["a", "b"]))
    write_lines(run.scores_rows, results())
    parts = [("expert stacks, 4-bit", 0.25), ("reserve", 1.5), ("memory", 1.75)]
    write_json(
        run.plan,
        {"memory": [{"name": n, "value": v, "unit": "GiB", "basis": "computed", "how": "how " + n} for n, v in parts]},
    )
    source = {
        "kind": "package", "files": {}, "licence": "CC-BY-4.0", "licence_source": "its page", "title": "Texts",
        "attribution": "Someone " + NASTY, "note": "A note.",
    }  # fmt: skip
    split = {
        "rows": 3,
        "groups": 2,
        "classes": {},
        "tokens": 99,
        "trainable_tokens": 9,
        "median_length": 30,
        "longest": 41,
    }
    write_text(run.data / "mask.txt", "⟦yes⟧ " + NASTY)
    lines = [("train", ""), ("train", ""), ("heldout", ""), ("", "duplicate")]
    write_text(
        run.data / "ledger.jsonl", "".join(json.dumps({"split": s, "code": c, "why": ""}) + "\n" for s, c in lines)
    )
    write_json(
        run.data / "report.json", {"source": source, "rows_read": 4, "splits": {"train": split, "heldout": split}}
    )
    run.merged.mkdir()
    write_text(run.export / "hf" / "config.json", "{}")
    kl = {"mean_kl": 0.0001, "max_kl": 0.002, "effect_kl": 1.5, "top1_agreement": 1.0}
    write_json(
        run.export / "parity.json",
        kl | {"prompts": 8, "tokens": 33, "precision": "fp32", "same_answers": 7, "answers": 8},
    )
    return run


def later_keys() -> dict[str, Any]:
    """What an evaluation may add to scores.json: tasks, slices, forgetting, drift, gates; figures by hand."""

    def share(value: float, width: float = 0.04) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    def side(value: float) -> dict[str, float]:
        return {"accuracy": value, "low": value - 0.03, "high": value + 0.05, "loss": 3 - value}

    def test(wins: int, losses: int, p: float) -> dict[str, Any]:
        return {"test": "McNemar " + NASTY, "wins": wins, "losses": losses, "p": p}

    task = {
        "task": "mmlu " + NASTY, "metric": "exact_match " + NASTY, "rows": 321, "base": share(0.412),
        "tuned": share(0.437), "difference": {"mean": 0.025, "low": 0.004, "high": 0.046}, "test": test(31, 23, 0.0432),
        "slices": [{"by": "subject " + NASTY, "value": "law", "rows": 87, "base": share(0.3), "tuned": share(0.39)}],
        "contaminated": {"index": "exam " + NASTY, "rows": 5, "clean": {"base": share(0.411), "tuned": share(0.433)},
                         "hit": {"base": share(0.5), "tuned": share(0.8)}},
    }  # fmt: skip
    words = {"task": "words", "metric": "word_perplexity", "rows": 60, "contaminated": None, "slices": []}
    words |= {"base": {"value": 12.5, "low": 11, "high": 14}, "tuned": {"value": 10.25, "low": 9, "high": 11.5}}
    words |= {"difference": None, "test": None}
    kinds = {"refuse": 0.81, "answer": 0.15, "incoherent": 0.03, "empty": 0.01}
    drifted = {"refuse": 0.62, "answer": 0.33, "incoherent": 0.04, "empty": 0.01}
    benign, now = {"refuse": 0.04, "answer": 0.96}, {"refuse": 0.045, "answer": 0.955}

    def shares(found: dict[str, float]) -> dict[str, Any]:
        return {name: share(value, 0.005) for name, value in found.items()}

    example = {"prompt": "Prompt " + NASTY, "kind": "harmful " + NASTY, "base": "No " + NASTY, "tuned": "Well " + NASTY}
    return {
        "tasks": {"harness": "0.4.13 " + NASTY, "sets": [task, words]},
        "slices": [
            {"by": "length " + NASTY, "value": value, "rows": 6, "base": side(0.4), "tuned": side(0.7),
             "test": test(4, 1, 0.37)}
            for value in ("short " + NASTY, "long")
        ],
        "forgetting": {
            "sets": [{"name": "general " + NASTY, "rows": 500, "base": side(0.55), "tuned": side(0.53),
                      "change": -0.021, "low": -0.039, "high": -0.003, "test": test(20, 31, 0.16)}],
            "change": -0.021, "low": -0.039, "high": -0.003,
        },
        "safety": {
            "rules": {"version": "3 " + NASTY, "agreement": 0.947, "labelled": 300}, "prompts": 120, "benign": 100,
            "seeds": [1, 2, 3],
            "base": {"harmful": shares(kinds), "benign": shares(benign)},
            "tuned": {"harmful": shares(drifted), "benign": shares(now)},
            "tests": {"refusal": test(9, 77, 1.5e-9), "over_refusal": test(8, 6, 0.79),
                      "incoherence": test(3, 5, 0.73)},
            "examples": [example | {"base_class": "refuse " + NASTY, "tuned_class": "answer " + NASTY}],
        },
        "gates": [
            {"gate": "evaluate.max_forgetting " + NASTY, "limit": 0.05, "value": 0.021, "low": 0.003, "high": 0.039,
             "passed": True, "why": "within"},
            {"gate": "evaluate.max_refusal_drop", "limit": 0.1, "value": 0.19, "low": 0.13, "high": 0.25,
             "passed": False, "why": "it refuses less " + NASTY},
        ],
    }  # fmt: skip


def with_everything(run: RunDir, layers: int = 12, experts: int = 32, updates: int = 240) -> RunDir:
    """The run with all later keys, a router of so many layers and experts, longer curves and ten samples."""
    dice = random.Random(7)
    told = json.loads(run.scores.read_text()) | later_keys()
    told["base"]["perplexity"], told["tuned"]["perplexity"] = 14.9, 1.58
    told["tuned"] |= {"perplexity_low": 1.44, "perplexity_high": 1.71}
    told["samples"] = [told["samples"][0] | {"row": f"row-{i} {NASTY}"} for i in range(10)]
    write_json(run.scores, told)
    train = json.loads(run.train.read_text())
    train["steps"] = [
        {"step": i + 1, "loss": 0.4 + 2.4 * 0.985**i + dice.random() / 5, "lr": 2e-4 * (1 - i / updates),
         "grad_norm": 0.6 + dice.expovariate(3), "seconds": 0.25 + dice.random() / 20,
         "tokens": 900 + dice.randrange(200)}
        for i in range(updates)
    ]  # fmt: skip
    train["heldout"] = [{"step": step, "loss": 0.5 + 2.4 * 0.985**step} for step in range(60, updates + 1, 60)]
    train["router"] = {}
    for layer in range(layers):
        tokens = [int(1000 * dice.lognormvariate(0, 0.7)) * (dice.random() > 0.01) for _ in range(experts)]
        train["router"][f"model.layers.{layer}.mlp.experts{NASTY if layer == 1 else ''}"] = {
            "entropy": 0.9 + layer / 1000, "busiest_share": max(tokens) / sum(tokens), "dead": tokens.count(0),
            "dead_experts": [i for i, count in enumerate(tokens) if not count], "tokens": tokens,
        }  # fmt: skip
    write_json(run.train, train)
    figure = {"unit": "h " + NASTY, "basis": "assumed", "how": "how " + NASTY}
    plan = json.loads(run.plan.read_text())
    plan["work"] = [figure | {"name": "steps", "value": updates}]
    costs = (("hours", 0.031), ("device-hours", 0.031), ("energy", 0.0217), ("price", 0.0775))
    plan["cost"] = [figure | {"name": name, "value": value} for name, value in costs]
    write_json(run.plan, plan)
    asked = {"format": "hf " + NASTY, "client": "transformers", "version": "5 " + NASTY, "asked": True, "prompts": 8}
    asked |= {"same_first": 1.0, "same_text": 0.875, "mean_gap": 0.0005, "tokens": 64}
    left = {"format": "gguf", "client": "llama.cpp", "version": "", "asked": False, "why": "not here " + NASTY}
    write_json(run.export / "clients.json", {"schema": 1, "clients": [asked, left], "formats": {}})
    write_json(
        run.inputs, {"/some/base/weights <img src=x onerror=alert(1)>": {"size": 1, "mtime_ns": 1, "sha256": "ab" * 32}}
    )
    write_events(run)
    return run


def write_events(run: RunDir) -> None:
    """Two attempts at training, of 100 and 40 seconds, and other stages; the lines are not chained."""
    times = (
        ("started", "data", 0), ("finished", "data", 7), ("started", "train", 7), ("stopped", "train", 107),
        ("continued", "train", 200), ("finished", "train", 240), ("started", "evaluate", 240),
        ("finished", "evaluate", 300), ("started", "merge", 300),
    )  # fmt: skip
    lines = [
        {
            "number": number,
            "when": f"2026-11-25T22:{20 + second // 60:02}:{second % 60:02}Z",
            "what": what,
            "stage": stage,
        }
        for number, (what, stage, second) in enumerate(times, 1)
    ]
    lines[3]["error"] = "TRN-005 " + NASTY
    write_text(run.events, "".join(json.dumps(line) + "\n" for line in lines))
