"""Near copies: what is found, what is not, who is kept, and what it costs."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data import near
from finetune.data.near import (
    BUCKET,
    FOUND,
    PERMUTATIONS,
    bands_of,
    chance,
    chance_to_meet,
    common_values,
    near_copies,
    signature,
)
from finetune.errors import DataError

VOCABULARY = [f"word{i}" for i in range(5000)]


def words(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def changed(text: list[str], count: int, seed: int) -> list[str]:
    """`count` of the words are others now."""
    new = list(text)
    for i in random.Random(seed).sample(range(len(new)), count):
        new[i] = f"other{i}"
    return new


def exact_share(one: list[str], other: list[str]) -> float:
    a, b = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, other))
    return len(a & b) / len(a | b)


def saved(folder: Path, signatures: Any, *, parts: int = 1) -> list[Any]:
    """Signatures that lie on disk, as those of prepared rows do."""
    folder.mkdir(exist_ok=True)
    mapped = []
    for i, part in enumerate(np.array_split(np.asarray(signatures, dtype=np.uint32), parts)):
        path = folder / f"{parts}-{i:05d}.npy"
        np.save(path, part)
        mapped.append(np.load(path, mmap_mode="r"))
    return mapped


def of(texts: list[list[str]]) -> Any:
    return np.stack([signature(" ".join(text)) for text in texts])


def noise(rows: int, seed: int = 1) -> Any:
    """Signatures of texts that have nothing in common."""
    return np.random.default_rng(seed).integers(0, 2**32, (rows, PERMUTATIONS), dtype=np.uint32)


def altered(signatures: Any, values: int, seed: int) -> Any:
    """The same with `values` of the values, at places that differ from row to row, replaced."""
    new, rng = signatures.copy(), np.random.default_rng(seed)
    for row in new:
        row[rng.choice(PERMUTATIONS, values, replace=False)] = rng.integers(0, 2**32, values)
    return new


def greedy(signatures: Any, share: float) -> list[int]:
    """Rows that are near a kept one before them, found by comparing each with each."""
    kept: list[int] = []
    copies = []
    for row, own in enumerate(signatures):
        if kept and ((signatures[kept] == own).mean(axis=1) >= share).any():
            copies.append(row)
        else:
            kept.append(row)
    return copies


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by the number of signatures that a row is compared with."""
    counts: list[int] = []
    equal = near._Signatures.equal

    def counted(self: Any, row: int, others: list[int]) -> Any:
        counts.append(len(others))
        return equal(self, row, others)

    monkeypatch.setattr(near._Signatures, "equal", counted)
    yield counts


def test_a_signature_is_the_same_on_every_machine() -> None:
    text = "The tenant pays the rent on the third working day of each month, in advance."
    made = signature(text)
    assert made.dtype == np.uint32 and made.shape == (PERMUTATIONS,)
    assert made[:6].tolist() == [41037775, 3240890656, 1164221886, 2945629580, 2514631442, 3289025174]
    assert int(made.astype(np.uint64).sum()) == 170_345_481_593


def test_case_punctuation_and_spacing_do_not_count_and_words_do() -> None:
    plain = signature("one two three four five six")
    assert (signature(" One,two\n\nTHREE -- four (five) six!") == plain).all()
    assert (signature("six five four three two one") != plain).any()
    assert (signature("one two_three four five six") != plain).any()


def test_ascii_texts_and_others_are_cut_into_the_same_words() -> None:
    everything = "".join(map(chr, range(128))) * 2 + " a_b 3.5 don't x\x1cy\x0bz"
    plain = near._WORD.findall(everything.lower())
    assert (signature(everything) == signature(" ".join(plain))).all()
    assert (signature(everything + " é") == signature(" ".join([*plain, "é"]))).all()
    assert (signature("“é”—è… a_b„c") == signature("é è a_b c")).all()
    assert (signature("Éa üb ñc ød åe") == signature("éA ÜB, ÑC; ØD: ÅE")).all()


def test_a_text_of_fewer_than_five_words_is_one_run() -> None:
    assert (signature("Yes, of course.") == signature("yes of course")).all()
    assert (signature("yes of course not") == signature("yes of course")).sum() < 3


def test_a_text_without_words_is_a_near_copy_of_nothing(tmp_path: Path) -> None:
    rows = np.stack([signature(text) for text in ("", "...", "", " \n", "word", "word")])
    assert list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path)) == [(5, 4, 1.0)]


def test_one_changed_word_in_sixty_and_an_appended_sentence_are_found(tmp_path: Path) -> None:
    texts = [words(60, i) for i in range(40)]
    texts += [changed(text, 1, i) for i, text in enumerate(texts[:20])]
    texts += [[*text, "please", "answer", "in", "one", "short", "sentence"] for text in texts[20:40]]
    found = list(near_copies(saved(tmp_path, of(texts)), 0.8, None, tmp_path))
    shares = {row: exact_share(texts[row], texts[row - 40]) for row in range(40, 80)}
    assert min(shares.values()) > 0.8
    assert all(row - earlier == 40 for row, earlier, _ in found)
    assert len(found) >= sum(chance(0.8, share) for share in shares.values()) - 3


def test_no_more_is_missed_than_the_chance_says(tmp_path: Path) -> None:
    texts = [words(100, i) for i in range(1000)]
    texts += [changed(text, 1 + i % 3, i) for i, text in enumerate(texts)]
    rows = of(texts)
    found = {row for row, _, _ in near_copies(saved(tmp_path, rows), 0.8, None, tmp_path)}
    chances = [chance(0.8, exact_share(texts[row], texts[row - 1000])) for row in range(1000, 2000)]
    assert 0.5 * 1000 < sum(chances) < 0.9 * 1000, "pairs on both sides of the wanted share"
    assert len(found) >= sum(chances) - 3 * math.sqrt(sum(c * (1 - c) for c in chances))
    assert found == set(greedy(rows, 0.8)), "what has enough equal values has at 0.8 always a whole band"


def test_texts_that_have_little_in_common_are_never_reported(tmp_path: Path) -> None:
    texts = [words(80, i) for i in range(1000)]
    texts += [[*text[:40], *words(40, 5000 + i)] for i, text in enumerate(texts)]
    assert exact_share(texts[0], texts[1000]) > 0.25
    assert list(near_copies(saved(tmp_path, of(texts)), 0.8, None, tmp_path)) == []


def test_the_estimate_is_the_exact_share_within_three_standard_errors(tmp_path: Path) -> None:
    texts = [words(150, i) for i in range(300)]
    texts += [changed(text, 1 + i % 4, i) for i, text in enumerate(texts)]
    found = list(near_copies(saved(tmp_path, of(texts)), 0.6, None, tmp_path))
    assert len(found) == 300
    off = []
    for row, earlier, estimate in found:
        share = exact_share(texts[row], texts[earlier])
        off.append((estimate - share) / math.sqrt(share * (1 - share) / PERMUTATIONS))
    assert max(map(abs, off)) <= 3
    assert abs(sum(off)) / len(off) < 0.2, "neither too high nor too low on average"


def test_the_first_is_kept_and_a_chain_does_not_fall_to_its_first_link(tmp_path: Path) -> None:
    text = words(200, 1)
    chain = [[f"other{i}" if i < 5 * step else word for i, word in enumerate(text)] for step in range(40)]
    rows = of(chain)
    found = list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path))
    copies = [row for row, _, _ in found]
    assert copies == greedy(rows, 0.8)
    assert 0 not in copies and 1 in copies and 5 < len(copies) < 35
    assert not {earlier for _, earlier, _ in found} & set(copies)


@pytest.mark.parametrize("share", [0.55, 0.8, 0.9])
def test_families_of_variants_are_resolved_as_by_comparing_each_with_each(tmp_path: Path, share: float) -> None:
    seeds = noise(40)
    rows = np.concatenate([seeds, *(altered(seeds, values, values) for values in range(1, 30))])
    rows = rows[np.random.default_rng(3).permutation(len(rows))]
    found = list(near_copies(saved(tmp_path, rows), share, None, tmp_path))
    bands, width = bands_of(share)
    assert share * PERMUTATIONS > bands * (width - 1), "nobody near enough has a value apart in every band"
    assert [row for row, _, _ in found] == greedy(rows, share)
    assert len(found) > 150
    kept = np.delete(np.arange(len(rows)), [row for row, _, _ in found])
    for row, earlier, estimate in found:
        assert earlier in kept and earlier < row
        assert estimate == (rows[row] == rows[earlier]).mean() >= share


def test_of_several_kept_rows_the_nearest_is_named_and_of_equals_the_first(tmp_path: Path) -> None:
    seed = noise(1)[0]
    rows = np.stack([seed] * 4)
    rows[0, :10] += 1  # 54 of 64 equal to the last
    rows[1, 20:28] += 1  # 56, and 46 to the first: kept
    rows[2, 40:48] += 1  # 56, and 48 and 46: kept
    assert list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path)) == [(3, 1, 56 / 64)]


def test_training_rows_near_held_out_ones_are_found_on_both_sides_of_them(tmp_path: Path) -> None:
    held = noise(3)
    rows = np.stack([held[0], held[0], held[1], held[1], held[1], held[2], noise(1, seed=2)[0]])
    held_out = np.array([False, True, True, True, False, False, False])
    parts = saved(tmp_path, rows, parts=3)
    assert list(near_copies(parts, 0.8, None, tmp_path, against=held_out)) == [(0, 1, 1.0), (4, 2, 1.0)]
    most = np.array([True, False, True, True, True, True, True])
    assert list(near_copies(parts, 0.8, most, tmp_path, against=held_out)) == [(4, 2, 1.0)]
    nobody = np.zeros(7, dtype=bool)
    assert list(near_copies(parts, 0.8, None, tmp_path, against=nobody)) == []


def test_training_rows_are_compared_with_every_held_out_row(tmp_path: Path) -> None:
    held, others = noise(50), noise(300, seed=2)
    rows = np.concatenate([others[:100], *(altered(held, values, values) for values in range(0, 20, 2)), others[100:]])
    rows = rows[np.random.default_rng(4).permutation(len(rows))]
    held_out = np.random.default_rng(5).random(len(rows)) < 0.3
    equal = (rows[:, None] == rows[held_out][None]).mean(axis=2).max(axis=1)
    expected = {row: equal[row] for row in np.flatnonzero((equal >= 0.8) & ~held_out)}
    found = {row: share for row, _, share in near_copies(saved(tmp_path, rows), 0.8, None, tmp_path, against=held_out)}
    assert len(expected) > 150 and found == expected


def test_a_template_that_many_rows_share_makes_no_near_copies_of_them(tmp_path: Path) -> None:
    template, held = words(60, 1), np.arange(230) < 30
    texts = [[*template, *words(20, 100 + i)] for i in range(220)]
    texts += [[*texts[i][:-1], "otherwise"] for i in range(10)]  # 16 of 17 own runs: the same but for its last word
    parts = saved(tmp_path, of(texts), parts=7)
    everybody = np.ones(230, dtype=bool)
    plain = list(near_copies(parts, 0.5, None, tmp_path, against=held))
    assert len(plain) > 150, "56 of 96 runs are those of the template"
    common = common_values(parts, everybody, 20)
    found = list(near_copies(parts, 0.5, None, tmp_path, against=held, common=common))
    assert [(row, other) for row, other, _ in found] == [(220 + i, i) for i in range(10)]


@pytest.mark.parametrize("own", [12, 24, 48])
def test_the_share_without_a_template_is_that_of_the_other_runs(tmp_path: Path, own: int) -> None:
    rows = noise(400)
    rows[:, own:] = noise(1, seed=2)[:, own:] & np.uint32(0xFF)  # small: the smallest of both texts, and common
    rows[200:, : own * 3 // 4] = rows[:200, : own * 3 // 4]
    parts = saved(tmp_path, rows)
    common = common_values(parts, np.ones(400, dtype=bool), 20)
    assert [len(values) for values in common] == [0] * own + [1] * (PERMUTATIONS - own)
    assert list(near_copies(parts, 0.75, None, tmp_path, common=common)) == [(200 + i, i, 0.75) for i in range(200)]
    assert list(near_copies(parts, 0.76, None, tmp_path, common=common)) == []


def test_what_only_one_of_two_rows_has_beside_the_template_counts_as_well(tmp_path: Path) -> None:
    own, rows = noise(200) >> np.uint32(1), np.repeat(noise(1, seed=2) | np.uint32(1 << 31), 400, axis=0)
    rows[:200, :12] = own[:, :12]
    rows[200:, 4:16] = own[:, 4:16]  # 8 places of 16 that are not the template's
    parts = saved(tmp_path, rows)
    common = common_values(parts, np.ones(400, dtype=bool), 20)
    assert list(near_copies(parts, 0.5, None, tmp_path, common=common)) == [(200 + i, i, 0.5) for i in range(200)]
    assert list(near_copies(parts, 0.51, None, tmp_path, common=common)) == []


def test_rows_that_share_a_template_only_are_not_even_compared(tmp_path: Path, compared: list[int]) -> None:
    rows = noise(2000)
    rows[:, 24:] = 7
    rows[1000:1100] = rows[:100]
    parts, held = saved(tmp_path, rows), np.arange(2000) < 1000
    common = common_values(parts, np.ones(2000, dtype=bool), 20)
    found = list(near_copies(parts, 0.5, None, tmp_path, against=held, common=common))
    assert found == [(1000 + i, i, 1.0) for i in range(100)] and compared == [1] * 100


def test_values_are_common_from_so_many_eligible_rows_on(tmp_path: Path) -> None:
    rows = noise(60)
    rows[:20, 3], rows[20:39, 3], rows[40:, 9] = 7, 8, 9
    parts = saved(tmp_path, rows, parts=5)
    assert [values.tolist() for values in common_values(parts, np.arange(60) != 50, 20)] == [
        [7] if place == 3 else [] for place in range(PERMUTATIONS)
    ]
    assert common_values(parts, np.ones(60, dtype=bool), 20)[9].tolist() == [9]
    assert all(len(values) == 0 for values in common_values(parts, np.arange(60) < 19, 20))


def test_rows_that_take_no_part_are_neither_found_nor_found_near(tmp_path: Path) -> None:
    rows = np.stack([noise(1)[0]] * 5)
    eligible = np.array([False, True, False, True, True])
    parts = saved(tmp_path, rows)
    assert list(near_copies(parts, 0.8, eligible, tmp_path)) == [(3, 1, 1.0), (4, 1, 1.0)]
    assert eligible.tolist() == [False, True, False, True, True], "the caller's array stays as it was"


def test_how_the_rows_are_cut_into_parts_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = noise(60)
    rows = np.concatenate([seeds, altered(seeds, 6, 1), altered(seeds, 12, 2)])
    whole = list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path))
    assert len(whole) > 60
    in_many = saved(tmp_path, rows, parts=180)
    in_many.insert(90, rows[:0])
    assert list(near_copies(in_many, 0.8, None, tmp_path)) == whole
    monkeypatch.setattr(near, "_BLOCK", 7)
    assert list(near_copies(saved(tmp_path, rows, parts=11), 0.8, None, tmp_path)) == whole
    assert len(list(near_copies(saved(tmp_path, [rows[0]] * 50), 0.8, None, tmp_path))) == 49


def test_five_thousand_equal_rows_are_one_comparison_each(tmp_path: Path, compared: list[int]) -> None:
    rows = np.stack([signature(" ".join(words(60, 1)))] * 5000)
    found = list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path))
    assert found == [(row, 0, 1.0) for row in range(1, 5000)]
    assert compared == [1] * 4999
    held_out = np.arange(5000) == 4000
    found = list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path, against=held_out))
    assert found == [(row, 4000, 1.0) for row in range(5000) if row != 4000]
    assert compared == [1] * 4999 * 2


def test_boilerplate_that_is_no_copy_costs_a_bounded_number_of_comparisons(tmp_path: Path, compared: list[int]) -> None:
    rows = noise(1000)
    rows[:, :4] = 7
    rows = np.concatenate([rows, altered(rows[-1:], 10, 1), rows[:1]])
    found = list(near_copies(saved(tmp_path, rows), 0.8, None, tmp_path))
    assert [(row, earlier) for row, earlier, _ in found] == [(1000, 999), (1001, 0)], "the old one by another band"
    assert max(compared) <= BUCKET + 1 and sum(compared) > 900 * BUCKET


def test_memory_grows_by_less_than_thirty_bytes_per_row(tmp_path: Path) -> None:
    rows = 200_000
    parts = []
    for i in range(20):
        block = noise(rows // 20, seed=i)
        block[1::100] = block[::100]
        parts += saved(tmp_path / str(i), block)
    tracemalloc.start()
    try:
        found = sum(1 for _ in near_copies(parts, 0.8, None, tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == rows // 100
    assert 8 * rows < peak < 30 * rows


def test_what_is_written_lies_in_the_scratch_folder_and_nothing_is_left_there(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    parts = saved(tmp_path, np.stack([noise(1)[0]] * 3))
    with pytest.raises(FileNotFoundError, match="scratch"):
        next(near_copies(parts, 0.8, None, scratch))
    scratch.mkdir()
    found = near_copies(parts, 0.8, None, scratch)
    next(found)
    assert not list(scratch.iterdir())


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    list(near_copies(saved(tmp_path, noise(100), parts=3), 0.8, None, tmp_path, tick=lambda *now: told.append(now)))
    assert len({total for _, total in told}) == 1
    done = [done for done, _ in told]
    assert done == sorted(set(done)) and done[-1] == told[0][1] and len(done) > 16


def test_no_rows_and_a_share_of_zero_find_nothing(tmp_path: Path) -> None:
    same = saved(tmp_path, np.stack([noise(1)[0]] * 3))
    assert list(near_copies([], 0.8, None, tmp_path)) == []
    assert list(near_copies(same, 0, None, tmp_path)) == []
    assert len(list(near_copies(same, 1, None, tmp_path))) == 2


@pytest.mark.parametrize("wrong", [np.zeros((3, 8), np.uint32), np.zeros(64, np.uint32), np.zeros((3, 64), np.uint64)])
def test_a_part_of_another_version_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(DataError, match=rf"NEAR-001 .*{wrong.dtype} of shape"):
        list(near_copies([noise(2), wrong], 0.8, None, tmp_path))


def test_more_rows_than_the_buckets_can_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_ROWS", 8)
    assert list(near_copies(saved(tmp_path, noise(8)), 0.8, None, tmp_path)) == []
    with pytest.raises(DataError, match="NEAR-002 9 rows"):
        list(near_copies(saved(tmp_path, noise(9)), 0.8, None, tmp_path))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_the_bands_bring_nineteen_in_twenty_pairs_together_and_are_the_widest_that_do(share: float) -> None:
    bands, width = bands_of(share)
    assert bands * width == PERMUTATIONS
    assert chance_to_meet(share) >= FOUND
    assert width == PERMUTATIONS or 1 - (1 - share ** (2 * width)) ** (bands // 2) < FOUND


@pytest.mark.parametrize("share, true", [(0.8, 0.8), (0.8, 0.9), (0.8, 0.7), (0.5, 0.55), (0.9, 0.9)])
def test_the_chances_are_those_of_a_simulation(share: float, true: float) -> None:
    bands, width = bands_of(share)
    equal = np.random.default_rng(1).random((40_000, bands, width)) < true
    meets = equal.all(axis=2).any(axis=1)
    enough = equal.mean(axis=(1, 2)) >= share - 1e-9
    for told, simulated in ((chance_to_meet(share, true), meets), (chance(share, true), meets & enough)):
        assert abs(told - simulated.mean()) < 4 * math.sqrt(told * (1 - told) / 40_000) + 1e-9


def test_the_chance_is_that_of_all_patterns_of_eight_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "PERMUTATIONS", 8)
    monkeypatch.setattr(near, "FOUND", 0.6)
    assert bands_of(0.5) == (4, 2)
    told = 0.0
    for pattern in itertools.product([False, True], repeat=8):
        if sum(pattern) >= 4 and any(pattern[i] and pattern[i + 1] for i in (0, 2, 4, 6)):
            told += 0.6 ** sum(pattern) * 0.4 ** (8 - sum(pattern))
    assert chance(0.5, 0.6) == pytest.approx(told, abs=1e-12)
    assert told < 0.98 * sum(math.comb(8, k) * 0.6**k * 0.4 ** (8 - k) for k in range(4, 9))


def test_the_chance_is_even_at_the_wanted_share_and_rises_to_certainty() -> None:
    assert chance(0.8) == chance(0.8, 0.8)
    assert 0.4 < chance(0.8) < 0.6
    assert chance(0.8, 0.3) < 1e-6 and chance(0.8, 0.7) < 0.05 and chance(0.8, 0.9) > 0.98 and chance(0.8, 1) == 1
