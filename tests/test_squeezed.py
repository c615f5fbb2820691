"""What is squeezed is read as the bytes that it holds, frame after frame, and a file that was cut says so."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from finetune.data.squeezed import SQUEEZED, opened

LINE = b'{"text": "a"}\n'
PACKED = {"gzip": gzip.compress, "zstd": zstandard.compress}


def test_every_kind_is_tried() -> None:
    assert set(PACKED) == set(SQUEEZED.values())


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("lines", [0, 1, 50_000])
def test_parts_that_were_squeezed_apart_are_read_as_one(tmp_path: Path, kind: str, lines: int) -> None:
    path = tmp_path / "rows"
    path.write_bytes(PACKED[kind](LINE) + PACKED[kind](b"") + PACKED[kind](LINE * lines))
    with opened(path, kind) as handle:
        assert handle.readline() == LINE
        assert handle.read() == LINE * lines


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_that_was_cut_says_so_even_where_no_row_was(tmp_path: Path, kind: str) -> None:
    path, whole = tmp_path / "rows", PACKED[kind](LINE * 1000)
    for cut in (1, 2, len(whole) // 2, len(whole) - 1):
        path.write_bytes(PACKED[kind](LINE) + whole[:-cut])
        with opened(path, kind) as handle, pytest.raises((EOFError, OSError)):
            handle.read()
    path.write_bytes(PACKED[kind](LINE) + b"no such thing")
    with opened(path, kind) as handle, pytest.raises((EOFError, OSError)):
        handle.read()
