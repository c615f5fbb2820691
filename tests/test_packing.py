"""Packed rows are all there, none is cut, and none sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.output import dataset
from finetune.data.packing import PackedBatch
from finetune.data.tokens import IGNORED
from finetune.families import FAMILIES
from tests.test_data import jsonl, qa
from tests.test_shape import prepare
from tests.tiny_models import checkpoint

PACKED = [key for key, family in FAMILIES.items() if family.packs]


def test_every_row_is_in_one_sequence_whole_and_with_positions_of_its_own(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"question {i}", "a" * (1 + i % 90)) for i in range(300)))
    folder = prepare(tmp_path, base, path, packing=True, max_length=256)
    rows, packed = dataset(folder / "train.arrow"), dataset(folder / "packed.arrow")
    found = []
    for sequence in packed:
        ids, positions = sequence["input_ids"], sequence["position_ids"]
        assert len(ids) == len(sequence["labels"]) == len(positions) <= 256
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end] == list(range(end - start))
            found.append((ids[start:end], sequence["labels"][start:end]))
    key = lambda pair: (len(pair[0]), pair[0])  # noqa: E731
    assert sorted(found, key=key) == sorted(zip(rows["input_ids"], rows["labels"], strict=True), key=key)
    assert len(packed) < len(rows) / 2


def test_packing_twice_gives_the_same_bytes(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"question {i}", "a" * (1 + i % 40)) for i in range(60)))
    one = prepare(tmp_path / "one", base, path, packing=True, max_length=256)
    two = prepare(tmp_path / "two", base, path, packing=True, max_length=256)
    assert (one / "packed.arrow").read_bytes() == (two / "packed.arrow").read_bytes()


def test_padding_is_a_row_of_its_own_that_nobody_learns_from() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [5], "labels": [5], "position_ids": [0]},
    ]
    batch = PackedBatch(pad=0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch["labels"][1].tolist() == [5, IGNORED, IGNORED, IGNORED]


def logits(model: Any, rows: list[list[int]], pad_to: int) -> torch.Tensor:
    """Logits of rows packed into one sequence, with padding behind them."""
    ids = [token for row in rows for token in row]
    positions = [i for row in rows for i in range(len(row))]
    sequences = [
        {"input_ids": ids, "labels": ids, "position_ids": positions},
        {"input_ids": [7] * pad_to, "labels": [7] * pad_to, "position_ids": list(range(pad_to))},
    ]
    batch = PackedBatch(pad=0)(sequences)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]


def load(key: str) -> Any:
    from finetune.base import load_base

    return load_base(checkpoint(key, fp32=True), load_in_4bit=False, precision="fp32").model


@pytest.mark.parametrize("key", PACKED)
def test_a_row_answers_as_if_it_were_alone_whatever_stands_before_it(key: str) -> None:
    model = load(key)
    draw = torch.Generator().manual_seed(1)
    before, other, row = (torch.randint(8, 60, (n,), generator=draw).tolist() for n in (11, 11, 9))
    alone = logits(model, [row], 24)[:9]
    after_one = logits(model, [before, row], 24)[11:20]
    after_other = logits(model, [other, row], 24)[11:20]
    assert torch.allclose(after_one, after_other, atol=1e-5)
    assert torch.allclose(after_one, alone, atol=1e-4)


def test_families_that_would_let_rows_see_each_other_are_known() -> None:
    refused = sorted(set(FAMILIES) - set(PACKED))
    assert refused
    for key in refused:
        model = load(key)
        draw = torch.Generator().manual_seed(1)
        before, other, row = (torch.randint(8, 60, (n,), generator=draw).tolist() for n in (11, 11, 9))
        one, two = (logits(model, [first, row], 24)[11:20] for first in (before, other))
        assert not torch.allclose(one, two, atol=1e-5), f"{key} packs after all: set packs=True"
