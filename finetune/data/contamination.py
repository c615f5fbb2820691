"""Which items of an evaluation set a training text contains, found by hashes alone: no text of the set is kept.

Words are compared without case, punctuation and width; digits count. Looked for are
- exact: a whole question, or a whole answer of 8 words or more. Questions of 4 to 7 words are found only so;
- ngram: the share of its runs of 13 words that occur;
- run: its longest run of words that occurs, from 8 words;
- code: its longest run of code tokens that occurs, from 13; names, numbers, signs and strings are tokens.

A run of 8 to 12 words may be a turn of phrase that anybody uses: look at such hits before rows are dropped for them.

The hashes are no secret. Who guesses a short item can ask them whether he is right, and who knows eight words of a long
one can try words for the ninth, and so on to its end. Guard the index of a private set as the set itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.items import RUN, Item, code_tokens, weight, words
from finetune.errors import DataError
from finetune.rundir import atomic_file

FORMAT = 1
"""Raised whenever the same items would give other hashes or another file."""

LONG, SHORT, CODE = 13, 4, 13
"""Words of an n-gram and of the shortest item; tokens of a run of code."""

HOW = ("exact", "code", "ngram", "run")
"""Kinds of hits, the strongest first."""

_ENTRY = np.dtype([("text", "<u4"), ("place", "<u4")])
_TEXT = np.dtype([("item", "<u4"), ("length", "<u4"), ("kept", "<u4"), ("whole", "<u8")])
"""An indexed question or answer: of which item, how many words, how many entries, and the hash of all of it."""
_ANCHOR = 1 << 31  # in a place: the whole text is compared from here, but no run is made of it


@dataclass(frozen=True, slots=True)
class Hit:
    """An item that was found in a text."""

    item: str
    """Its id."""
    how: str
    """One of HOW."""
    length: int
    """Words of it that were found; for `code` tokens."""
    share: float
    """Share of the question or answer that was found: of its words or tokens; for `ngram` of its 13-word runs."""


def build(items: Iterable[Item], name: str, kind: str) -> Index:
    """The index of `items`: of their words, or (`kind` is `code`) of their code. A set may have one of each.

    Phrases of 8 words (13 tokens) in more than `max(5, 1 %)` of the texts are the wording of the benchmark: their words
    take no part in runs; a text of nothing else is still found whole. Texts that are equal are one, with the first id.
    Raises DataError DATA-020 when nothing can be looked for.
    """
    assert kind in ("text", "code")
    ids: list[str] = []
    unseen, texts = 0, dict[int, tuple[int, list[str]]]()
    for item in items:
        found = _texts(item, kind)
        for tokens in found:
            texts.setdefault(_whole(tokens), (len(ids), tokens))
        ids.append(item.id)
        unseen += not found
    if not texts:
        why = f"no item has {f'{CODE} tokens of code' if kind == 'code' else f'{SHORT} words'}"
        raise DataError("DATA-020", f"nothing of {name} can be looked for", why, "kind=text, or another file")
    size, most = CODE if kind == "code" else RUN, max(5, len(texts) // 100)
    runs = [_runs(_hashes(tokens), size) for _, tokens in texts.values()]
    seen, counts = np.unique(np.concatenate([np.unique(run) for run in runs]), return_counts=True)
    keys, entries, about = [], [], []
    for number, ((whole, (owner, tokens)), run) in enumerate(zip(texts.items(), runs, strict=True)):
        times = counts[np.searchsorted(seen, run)]
        place = _own(times > most, size)
        keys.append(run[place])
        if not len(run):  # the last four words, as questions end with what is special
            place, keys[-1] = np.array([len(tokens) - SHORT | _ANCHOR]), _runs(_hashes(tokens[-SHORT:]), SHORT)
        elif not len(place):
            place, keys[-1] = np.array([times.argmin() | _ANCHOR]), run[[times.argmin()]]
        entries.append(np.empty(len(place), _ENTRY))
        entries[-1]["text"], entries[-1]["place"] = number, place
        about.append((owner, len(tokens), len(place), whole))
    key, entry = np.concatenate(keys), np.concatenate(entries)
    order = np.lexsort((entry["place"], entry["text"], key))
    facts = {"format": FORMAT, "name": name, "kind": kind, "unseen": unseen, "most": most, "ids": ids}
    return Index(facts | {"common": int(np.sum(counts > most))}, key[order], entry[order], np.array(about, _TEXT))


def load(path: Path) -> Index:
    """The index in `path`. Raises DataError DATA-020 for a file that is missing, damaged or no index of this format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            arrays = file["keys"], file["entries"], file["texts"]
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, and {FORMAT} can be read")
        if facts.pop("sha256") != _sha256(*arrays):
            raise ValueError("its hashes are not those that were written")
        if not _fits(facts, *arrays):
            raise ValueError("its parts are not those of one index")
        return Index(facts, *arrays)
    except Exception as error:  # a damaged archive raises a dozen kinds
        why = " ".join(str(error).split())[:200] or type(error).__name__
        fix = f"python -m finetune data index file=ITEMS.jsonl out={path}"
        raise DataError("DATA-020", f"{path} is no index of an evaluation set", why, fix) from None


def _fits(facts: dict[str, Any], keys: np.ndarray, entries: np.ndarray, texts: np.ndarray) -> bool:
    """Whether facts and arrays can be of one index: whoever makes a false one gives it the right hash, too."""
    words, numbers = [facts["name"], *facts["ids"]], [facts[name] for name in ("unseen", "most", "common")]
    if not all(type(word) is str for word in words) or not all(type(number) is int for number in numbers):
        return False
    types = (np.dtype("<u8"), _ENTRY, _TEXT)
    if facts["kind"] not in ("text", "code") or (keys.dtype, entries.dtype, texts.dtype) != types:
        return False
    if any(array.ndim != 1 or not len(array) for array in (keys, entries, texts)) or len(keys) != len(entries):
        return False
    if entries["text"].max() >= len(texts) or texts["item"].max() >= len(facts["ids"]) or (keys[1:] < keys[:-1]).any():
        return False
    size = np.where(entries["place"] >= _ANCHOR, 1, CODE if facts["kind"] == "code" else RUN)
    ends = (entries["place"] % _ANCHOR).astype(np.int64) + size
    return bool((ends <= texts["length"][entries["text"]]).all())


class Index:
    """The hashes of an evaluation set's runs of words, and where they stand in which item. From `build` or `load`."""

    def __init__(self, facts: dict[str, Any], keys: np.ndarray, entries: np.ndarray, texts: np.ndarray) -> None:
        self.name, self.kind, self.ids = str(facts["name"]), str(facts["kind"]), list(facts["ids"])
        self._facts, self._keys, self._entries, self._texts = facts, keys, entries, texts
        # 8 to 16 bytes a key: one look into it tells of nearly every run of a row that it is unknown.
        bits = max(10, (8 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[(keys >> self._shift).view(np.int64)] = True
        sizes = {CODE if self.kind == "code" else RUN if n >= RUN else SHORT for n in texts["length"].tolist()}
        self.needs = {(self.kind, size) for size in sizes}
        """What must be hashed of a row: its words or its code, in runs of which size."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.ids)

    def save(self, path: Path) -> None:
        """Writes the index to `path` in one step, as .npz without pickles. Equal items give equal bytes."""
        arrays = self._keys, self._entries, self._texts
        facts = json.dumps(self._facts | {"sha256": _sha256(*arrays)})
        about = np.frombuffer(facts.encode(), np.uint8)
        with atomic_file(path) as partial, partial.open("wb") as handle:
            np.savez(handle, allow_pickle=False, facts=about, keys=arrays[0], entries=arrays[1], texts=arrays[2])

    def limits(self) -> list[str]:
        """What is not detected, for the report."""
        facts, code = self._facts, self.kind == "code"
        told = ["an item in other words (paraphrase) or in another language (translation)"]
        if code:
            told.append("code with renamed variables, or with statements in another order or style")
        told.append(
            f"an item that shares runs below {f'{CODE} tokens' if code else f'{RUN} words'} with a training row"
        )
        told.append("what the base model saw before this training")
        if facts["common"]:
            often = f"{facts['common']:,} phrases in more than {facts['most']:,} of its texts"
            told.append(f"{often}: they are taken for the wording of the benchmark")
        if facts["unseen"]:
            least = f"{CODE} tokens of code" if code else f"{SHORT} words"
            told.append(f"{facts['unseen']:,} of its {len(self):,} items: they have fewer than {least}")
        return [f"{self.name}: {limit}" for limit in told]

    def hits(self, text: str) -> list[Hit]:
        """The items that `text` contains, in their order. Of each `exact` alone, or else all kinds that were found."""
        return [hit for _, hit in Indexes([self]).hits(text)]

    def _hits(self, tokens: list[str], hashes: np.ndarray, starts: list[int]) -> list[Hit]:
        """The hits among `hashes`, in which the runs of the first need begin at `starts[0]`, and so on."""
        maybe = self._seen[(hashes >> self._shift).view(np.int64)].nonzero()[0]
        first = self._keys.searchsorted(hashes[maybe], "left")
        each = self._keys.searchsorted(hashes[maybe], "right") - first
        if not each.any():
            return []
        found = self._entries[np.repeat(first - np.cumsum(each) + each, each) + np.arange(each.sum())]
        where = np.repeat(maybe, each)
        at = where - np.array(starts)[np.searchsorted(starts, where, "right") - 1]
        text, anchor, place = found["text"], found["place"] >> 31, (found["place"] % _ANCHOR).astype(np.int64)
        order = np.lexsort((at, at - place, text))
        lines: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for t, a, shift, p in zip(*(part[order].tolist() for part in (text, anchor, at - place, place)), strict=True):
            lines[t][a, shift].append(p)
        best: dict[tuple[int, str], Hit] = {}
        for t, line in lines.items():
            item = int(self._texts["item"][t])
            for how, length, share in self._judge(tokens, t, line):
                if (item, how) not in best or best[item, how].length < length:
                    best[item, how] = Hit(self.ids[item], how, length, share)
        ranked = sorted(best, key=lambda found: (found[0], HOW.index(found[1])))
        return [best[item, how] for item, how in ranked if how == "exact" or (item, "exact") not in best]

    def _judge(self, tokens: list[str], text: int, lines: dict[tuple[int, int], list[int]]) -> Iterator[Any]:
        """(how, length, share) of one text; `lines` are its places in the row by how much later they are there."""
        _, length, kept, whole = self._texts[text].tolist()
        size, how = (CODE, "code") if self.kind == "code" else (RUN, "run")
        longest, grams = 0, set[int]()
        for (anchor, shift), places in lines.items():
            same = len(places) == kept and 0 <= shift <= len(tokens) - length
            if same and _whole(tokens[shift : shift + length]) == whole:
                yield "exact" if how == "run" else "code", length, 1.0
                return
            for first, count in () if anchor else _steps(places):
                run = count + size - 1
                if weight(tokens[first + shift : first + shift + run]) >= size:
                    longest = max(longest, run)
                    grams |= set(range(first, first + run - LONG + 1))
        if grams and how == "run":
            yield "ngram", len({gram + i for gram in grams for i in range(LONG)}), len(grams) / (length - LONG + 1)
        if longest:
            yield how, longest, longest / length


class Indexes:
    """Several indexes that are asked at once: the words of a text are read and hashed once for all of them."""

    def __init__(self, indexes: list[Index]) -> None:
        self.indexes = indexes
        self._needs = sorted({need for index in indexes for need in index.needs})
        self._kinds = {kind for kind, _ in self._needs}

    def hits(self, text: str) -> list[tuple[str, Hit]]:
        """(name of the index, hit) for every item of every index that `text` contains; see `Index.hits`."""
        tokens = {kind: words(text) if kind == "text" else code_tokens(text) for kind in self._kinds}
        values = {kind: _hashes(found) for kind, found in tokens.items()}
        hashes = [_runs(values[kind], size) for kind, size in self._needs]
        starts, joined = list(accumulate(map(len, hashes[:-1]), initial=0)), np.concatenate(hashes)
        return [(i.name, hit) for i in self.indexes for hit in i._hits(tokens[i.kind], joined, starts)]


def _texts(item: Item, kind: str) -> list[list[str]]:
    """What of an item is looked for."""
    if kind == "code":
        return [tokens for text in (item.text, item.answer) if len(tokens := code_tokens(text)) >= CODE]
    question, answer = words(item.text), words(item.answer)
    if weight(question) < SHORT:
        question, answer = question + answer, []
    return [tokens for tokens, least in ((question, SHORT), (answer, RUN)) if weight(tokens) >= least]


def _own(common: np.ndarray, size: int) -> np.ndarray:
    """Places of the runs of which no word stands in a common run."""
    if not common.any():
        return np.arange(len(common))
    inside = np.convolve(common, np.ones(size)) > 0.5
    return np.flatnonzero(np.convolve(inside, np.ones(size), "valid") < 0.5)


def _steps(places: list[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of each stretch of `places` that go up by one."""
    for _, stretch in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        found = list(stretch)
        yield found[0][1], len(found)


@lru_cache(maxsize=1 << 17)
def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"finetune evaluation").digest()


def _whole(tokens: list[str]) -> int:
    return int.from_bytes(_hash.__wrapped__("\0".join(tokens)), "little")


def _hashes(tokens: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(_hash, tokens)), "<u8")


def _sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest()


def _runs(values: np.ndarray, size: int) -> np.ndarray:
    """Hash of each run of `size` values: put together of runs of 1, 2, 4 ... values that follow one another."""
    part, width, made, done = values, 1, values, 0
    while True:
        if size & width:
            made, done = (_joined(made, part, done) if done else part), done + width
        if done == size:
            return made
        part, width = _joined(part, part, width), 2 * width


def _joined(first: np.ndarray, second: np.ndarray, distance: int) -> np.ndarray:
    """Hash of each of `first` with the one of `second` that lies `distance` behind it. Neither follows from it."""
    second = second[distance:]
    made = first[: len(second)] * np.uint64(0x9E3779B97F4A7C15) + second[: len(first)]
    return (made ^ (made >> np.uint64(32))) * np.uint64(0xD1342543DE82EF95)
