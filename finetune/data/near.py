"""Near copies among millions of rows: a signature of one size per row, buckets on disk, one pass in the rows' order.

A signature is a MinHash (Broder 1997, "On the resemblance and containment of documents"): each of its values is equal
in two texts with a probability that is the share of five-word runs they have in common (Jaccard). So the part of the
values that are equal estimates that share, with a standard error of sqrt(share * (1 - share) / PERMUTATIONS): 0.05 at
0.8, 0.04 at 0.9. A pair right at the wanted share is therefore found about every other time: see `chance`.

Who is compared with whom (Indyk & Motwani 1998, "Approximate nearest neighbors"): the values are cut into bands, and
rows with an equal band meet in a bucket. For every band and row a file holds the row before it in its bucket. The pass
follows these links from kept row to kept row, so that a row costs the same among a hundred thousand equal ones as among
two. Memory is below 20 bytes per row; the rest is on disk: the signatures, and 4 bytes per row and band.
"""

from __future__ import annotations

import math
import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from finetune.data.split import RUN
from finetune.errors import DataError

PERMUTATIONS = 64
"""Values of a signature: 256 bytes per row. Twice as many would make the standard error 0.7 of what it is."""

FOUND = 0.95
"""Pairs at the wanted share that must meet in a bucket."""

BUCKET = 64
"""Kept rows of a bucket that one row is compared with at most, the latest first. Only texts that have a band in common
and are no near copies of each other fill a bucket: boilerplate. A copy of an older one can meet it in another band."""

MOST_ROWS = 1 << 31
"""The highest bit of a row's number says, while buckets are made, on which side it is."""

_SEED = 1
_NOTHING = np.uint32(0xFFFFFFFF)
"""All values of the signature of a text without words, which is a near copy of nothing."""
_BLOCK = 1 << 14
_PLACES = 2
"""Places of all signatures that are sorted at a time."""
_ODD, _HALF, _ROW = np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(MOST_ROWS - 1)
_WORD = re.compile(r"\w+")
_PLAIN = "".join(chr(i) if _WORD.fullmatch(chr(i)) else " " for i in range(128))


def signature(text: str) -> NDArray[np.uint32]:
    """The MinHash of the text's five-word runs, shape (PERMUTATIONS,): the same on every machine.

    Case, punctuation and spacing do not count. A text of fewer than five words is one run; one without words has a
    signature that matches nothing. It is made by rensa 0.5, whose next release may hash differently: a test notices.
    """
    # The same words as the expression finds, in a quarter of its time.
    words = text.lower().translate(_PLAIN).split() if text.isascii() else _WORD.findall(text.lower())
    runs = list(map(" ".join, zip(*(words[i:] for i in range(RUN)), strict=False)))
    minhash = RMinHash(PERMUTATIONS, _SEED)
    minhash.update(runs or [" ".join(words)] * bool(words))
    return np.fromiter(minhash.digest(), np.uint32, PERMUTATIONS)


def near_copies(
    parts: list[NDArray[np.uint32]],
    share: float,
    eligible: NDArray[np.bool_] | None,
    scratch: Path,
    against: NDArray[np.bool_] | None = None,
    tick: Callable[[int, int], None] | None = None,
    common: list[NDArray[np.uint32]] | None = None,
) -> Iterator[tuple[int, int, float]]:
    """(row, kept row that it is a near copy of, their estimated share in common), in the order of rows, each row once.

    `parts`: the signatures of some rows each, (n, PERMUTATIONS), mapped from disk where they are many; row 0 is the
    first row of the first part. `share`: from which estimate on; 0 means never. `eligible`: which rows take part; None:
    all.

    Without `against`, the first of several near copies is kept and a row is compared with kept rows before it only. So
    a chain of small changes does not fall to its first link: what is unlike every kept row is kept.
    With `against`, its rows are all kept, and every other row is compared with them alone, those behind it too. To
    clear two sides: first train against held-out, then each side by itself, with `eligible` less what was dropped.

    `common`, of `common_values`: wording that does not count. A pair must then have `share` of all its runs, and also
    of those that are not common, which is told; rows that have nothing else in common are not compared.

    Where several kept rows are near enough, it is the nearest one, of these the first. Files in `scratch` have no name
    and go when the iterator does; OSError when there is no room for them. `tick(done, total)` hears of progress, in
    steps that are no rows. Raises DataError: NEAR-001 a part without such signatures, NEAR-002 too many rows.
    """
    signatures = _Signatures(parts, common)
    if not share or not len(signatures):
        return
    bands, width = bands_of(share)
    rows, total = len(signatures), len(signatures) * (2 * bands + 1)
    tick = tick or (lambda done, total: None)
    with tempfile.TemporaryFile(dir=scratch) as file:
        taking = np.ones(rows, dtype=bool) if eligible is None else eligible.copy()
        for start, block in signatures.blocks():
            _write_bands(file, block, start, rows, width, signatures.known(block))
            taking[start : start + len(block)] &= (block != _NOTHING).any(axis=1)
            tick(start + len(block), total)
        kept = taking if against is None else taking & against
        for band in range(bands):
            _link(file, band, taking, kept)
            tick(rows * (band + 2), total)
        file.flush()
        links = np.memmap(file, dtype=np.uint32, mode="r+", shape=(bands, rows))
        for start in range(0, rows, _BLOCK):
            block = links[:, start : start + _BLOCK]
            meets = (block != np.arange(start, start + block.shape[1], dtype=np.uint32)).any(axis=0)
            if against is not None:
                meets &= ~against[start : start + _BLOCK]
            yield from _sweep(np.flatnonzero(meets) + start, signatures, links, kept, share)
            tick(rows * (bands + 1) + (start + block.shape[1]) * bands, total)


def common_values(parts: list[NDArray[np.uint32]], eligible: NDArray[np.bool_], least: int) -> list[NDArray[np.uint32]]:
    """For each place of a signature the values, in ascending order, that `least` of the eligible rows or more have.

    A value stands for one run of the text. So these stand for the runs that many rows share: a question's template. The
    smaller of two rows' values is a random run of both together, so that places where it is common can be left out, and
    the others still estimate the share in common of all other runs. Memory is below 20 bytes per row.
    """
    signatures, found = _Signatures(parts, None), []
    for first in range(0, PERMUTATIONS, _PLACES):
        columns, done = np.empty((_PLACES, int(eligible.sum())), np.uint32), 0
        for start, block in signatures.blocks():
            those = block[eligible[start : start + len(block)], first : first + _PLACES]
            columns[:, done : done + len(those)] = those.T
            done += len(those)
        columns.sort(axis=1)
        for column in columns:
            later = column[least - 1 :]
            found.append(np.unique(later[later == column[: len(later)]]))
    return found


def chance(share: float, true: float | None = None) -> float:
    """The probability that `near_copies` at `share` finds a pair whose true share is `true` (left out: `share`).

    Exact for values that are independent of each other: the pair must have enough of them equal and a whole band among
    these. About one half at `share` itself, whatever the number of values, because the estimate errs to both sides. The
    values of rensa 0.5 scatter less (0.8 of that; 3,000 pairs each near 0.7, 0.8, 0.9): it errs less.
    """
    bands, width = bands_of(share)
    true = share if true is None else true
    apart = [1]  # apart[k]: ways to have k values equal and no band whole, band after band
    for _ in range(bands):
        longer = [0] * (len(apart) + width - 1)
        for i, ways in enumerate(apart):
            for k in range(width):
                longer[i + k] += ways * math.comb(width, k)
        apart = longer
    apart += [0] * (PERMUTATIONS + 1 - len(apart))
    return sum(
        (math.comb(PERMUTATIONS, k) - apart[k]) * true**k * (1 - true) ** (PERMUTATIONS - k)
        for k in range(_equal_values(share), PERMUTATIONS + 1)
    )


def chance_to_meet(share: float, true: float | None = None) -> float:
    """The probability that a pair whose true share is `true` (left out: `share`) has a whole band in common.

    Those that meet are then compared by all values. At least FOUND at `share`, unless that is below 0.05. At many
    shares, 0.8 among them, nothing is lost here: with so many equal values one band at least is whole.
    """
    bands, width = bands_of(share)
    return _meet(share if true is None else true, width, bands)


def bands_of(share: float) -> tuple[int, int]:
    """(bands, values in each): the fewest bands with which FOUND of the pairs at `share` meet.

    Fewer and wider bands bring fewer pairs together for nothing.
    """
    widths = [width for width in range(PERMUTATIONS, 0, -1) if PERMUTATIONS % width == 0]
    width = next((w for w in widths if _meet(share, w, PERMUTATIONS // w) >= FOUND), 1)
    return PERMUTATIONS // width, width


def _meet(true: float, width: int, bands: int) -> float:
    return 1 - (1 - true**width) ** bands


def _equal_values(share: float) -> int:
    """So many values must be equal."""
    return math.ceil(share * PERMUTATIONS - 1e-9)


class _Signatures:
    """The rows of all parts one after the other, read from disk where they are looked at."""

    def __init__(self, parts: list[NDArray[np.uint32]], common: list[NDArray[np.uint32]] | None) -> None:
        for part in parts:
            if part.dtype != np.uint32 or part.shape[1:] != (PERMUTATIONS,):
                what = f"a part has no signatures of {PERMUTATIONS} values: {part.dtype} of shape {part.shape}"
                fix = "remove prepared/.parts-* in the cache, so that they are made again"
                raise DataError("NEAR-001", what, "another version wrote it", fix)
        # A memmap checks every slice of it for being one too. A plain array of the same memory does not.
        self.parts = [part.view(np.ndarray) for part in parts]
        self.common = common
        self.starts = [0]
        for part in self.parts:
            self.starts.append(self.starts[-1] + len(part))
        if len(self) > MOST_ROWS:
            why = f"their numbers must fit {MOST_ROWS.bit_length() - 1} bits"
            raise DataError("NEAR-002", f"{len(self)} rows cannot be searched for near copies", why, "fewer rows")

    def __len__(self) -> int:
        return self.starts[-1]

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """(number of its first row, signatures of some rows), in order."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for i in range(0, len(part), _BLOCK):
                yield start + i, part[i : i + _BLOCK]

    def equal(self, row: int, others: list[int]) -> NDArray[np.int64]:
        """How many values of `row` are equal in each of the others. These are in ascending order."""
        own, counts, done = self._rows(row, [row])[0], [], 0
        while done < len(others):
            # As many as lie in the same part.
            behind = self.starts[bisect_right(self.starts, others[done])]
            stop = bisect_right(others, behind - 1)
            counts.append((self._rows(others[done], others[done:stop]) == own).sum(axis=1))
            done = stop
        return np.concatenate(counts)

    def own(self, row: int, others: list[int]) -> NDArray[np.float64]:
        """The share of what `row` and each of the others have in common, without what is common to many rows."""
        mine = self._rows(row, [row])
        theirs = np.concatenate([self._rows(other, [other]) for other in others])
        counts = ~np.where(mine <= theirs, self.known(mine), self.known(theirs))
        shared: NDArray[np.float64] = (counts & (mine == theirs)).sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
        return shared

    def known(self, block: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which values of some signatures are common."""
        known = np.zeros(block.shape, dtype=bool)
        for place, values in enumerate(self.common or []):
            if len(values):
                at = np.minimum(np.searchsorted(values, block[:, place]), len(values) - 1)
                known[:, place] = values[at] == block[:, place]
        return known

    def _rows(self, first: int, rows: list[int]) -> NDArray[np.uint32]:
        part = bisect_right(self.starts, first) - 1
        return self.parts[part][np.array(rows) - self.starts[part]]


def _write_bands(
    file: IO[bytes], block: NDArray[np.uint32], start: int, rows: int, width: int, known: NDArray[np.bool_]
) -> None:
    """Writes 32 bits of hash for every band of the block, 0 where all its values are `known` to be common.

    Texts that meet by accident of these bits are told apart later.
    """
    for band in range(PERMUTATIONS // width):
        hashes = np.zeros(len(block), dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            hashes = (hashes ^ block[:, column]) * _ODD
            hashes ^= hashes >> _HALF
        short = np.maximum((hashes >> _HALF).astype(np.uint32), 1)
        short[known[:, band * width : (band + 1) * width].all(axis=1)] = 0
        file.seek(4 * (band * rows + start))
        file.write(short.tobytes())


def _link(file: IO[bytes], band: int, taking: NDArray[np.bool_], kept: NDArray[np.bool_]) -> None:
    """Puts in place of each row's hash the row before it in its bucket: itself for the first and for who has no bucket.

    Rows that may be dropped stand behind all that are kept from the start.
    """
    rows = len(taking)
    file.seek(4 * band * rows)
    column = np.fromfile(file, dtype=np.uint32, count=rows)
    keys = np.empty(int((taking & (column > 0)).sum()), dtype=np.uint64)  # hash, side, row
    done = 0
    for start in range(0, rows, _BLOCK):
        those = np.flatnonzero(taking[start : start + _BLOCK] & (column[start : start + _BLOCK] > 0)) + start
        side = np.where(kept[those], 0, MOST_ROWS).astype(np.uint64)
        keys[done : done + len(those)] = column[those].astype(np.uint64) << _HALF | side | those.astype(np.uint64)
        done += len(those)
    keys.sort()
    column[:] = np.arange(rows, dtype=np.uint32)
    for start in range(0, len(keys), _BLOCK):
        here = keys[start : start + _BLOCK + 1]
        together = here[1:] >> _HALF == here[:-1] >> _HALF
        numbers = here & _ROW
        column[numbers[1:][together]] = numbers[:-1][together]
    file.seek(4 * band * rows)
    file.write(column.data)


def _sweep(
    rows: NDArray[np.int64], signatures: _Signatures, links: NDArray[np.uint32], kept: NDArray[np.bool_], share: float
) -> Iterator[tuple[int, int, float]]:
    """Those of `rows` that are near copies. They are no longer `kept` from then on."""
    chains = [band.data for band in links]
    keeps = kept.data
    for row in rows.tolist():
        others: set[int] = set()
        for chain in chains:
            if chain[row] != row:
                others.update(_kept_before(row, chain, keeps))
        if not others:
            continue
        candidates = sorted(others)
        equal = signatures.equal(row, candidates)
        near = np.flatnonzero(equal >= _equal_values(share))
        if not len(near):
            continue
        candidates = [candidates[i] for i in near]
        shares = equal[near] / PERMUTATIONS if signatures.common is None else signatures.own(row, candidates)
        nearest = int(shares.argmax())
        if shares[nearest] >= share - 1e-9:
            keeps[row] = False
            yield row, candidates[nearest], float(shares[nearest])


def _kept_before(row: int, chain: memoryview[int], kept: memoryview[int]) -> list[int]:
    """The kept rows before `row` in its bucket, the nearest first, at most BUCKET. From then on it links to the first.

    The row before it has been here, or is the first of the bucket: so its own link leads to a kept row, or to itself.
    """
    before = chain[row]
    if not kept[before]:
        before = chain[before] if kept[chain[before]] else row
        chain[row] = before
    found: list[int] = []
    while before != row and len(found) < BUCKET:
        found.append(before)
        row, before = before, chain[before]
    return found
