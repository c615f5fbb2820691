"""`datasets` reads, maps and keeps the parts of prepared rows; neither its processes nor its files get out of hand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import multiprocess
import pytest

from finetune.data import credentials, files, mapping, output, quality
from finetune.data.files import blocks, sources
from finetune.data.mapping import mapped
from finetune.data.part import Job, Maker, Work, of_card, part_schema
from finetune.data.prepare import prepared
from finetune.data.rows import Row
from finetune.data.verdicts import TRAIN, Facts
from finetune.errors import DataError
from tests import preparing
from tests.test_data import jsonl, qa
from tests.test_store import finished_slices, killed_after_a_slice, start
from tests.warm import ROOT

ROWS, BLOCK = 650, 100
"""Seven blocks: more than the parent does alone."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return jsonl(path, *(qa(f"question {i}", f"answer {i}", group=i % 50) for i in range(ROWS)))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows."""
    monkeypatch.setattr(files, "BLOCK_ROWS", BLOCK)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one block for each process."""
    monkeypatch.setattr(mapping, "PER_PROCESS", 1)


def jobs(path: Path, most: int | None = None) -> Iterator[Job]:
    """The first `most` blocks of a file (None: all)."""
    (source,) = sources([str(path)])
    for block in islice(blocks(source), most):
        yield Job(block=block, format="messages", side="", prefix="")


def work(base: Path, **settings: Any) -> Work:
    return Work(data=preparing.recipe(base, base, **settings).data, base=base, cut="error", near=False)


def parts_of(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir(exist_ok=True)
    return folder


def counted(monkeypatch: pytest.MonkeyPatch, until: int = 10**9) -> list[int]:
    """First lines of the blocks that this process makes parts of; KeyboardInterrupt behind so many of them."""
    made: list[int] = []
    real = Maker.make

    def make(self: Maker, job: Job) -> Any:
        if len(made) == until:
            raise KeyboardInterrupt
        made.append(job.block.lines[0])
        return real(self, job)

    monkeypatch.setattr(Maker, "make", make)
    return made


# --- reading ---------------------------------------------------------------------------------------------------------


def test_datasets_hands_on_the_bytes_of_every_line_with_its_number(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = [b'{"a": 1e999}', b"\xff\xfe{", '{"a": "b\u2028c"}'.encode(), b"", b'{"a": "2020-01-01"}', b"\x00"]
    path.write_bytes(b"\n".join(odd))
    read = mapping._read(jobs(path), tmp_path / "reading", "key")
    assert read["file"] == ["rows.jsonl"]
    assert read["lines"][0] == [1, 2, 3, 5, 6]
    assert [raw.rstrip(b"\n") for raw in read["records"][0]] == [line for line in odd if line]


def test_cells_that_are_no_utf8_arrive_as_they_were(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\nwhy?,\xe9t\xe9\n")
    (row,) = mapped(work(base, on_bad_row="drop"), jobs(path), parts_of(tmp_path), "key", 1).to_list()
    assert (row["file"], row["line"], row["code"]) == ("rows.csv", 2, "DATA-021")
    path.write_bytes(b"prompt,compl\xe9tion\nwhy?,so\n")
    with pytest.raises(DataError, match=r"DATA-006 rows\.csv cannot be read: its header is not UTF-8"):
        next(jobs(path))


def test_rows_of_a_card_arrive_as_they_were(tmp_path: Path, base: Path) -> None:
    row = Row(file="f", line=7, id="r7", sha256="x", fields={"text": "t\ud800"}, group="g", label="l", place=3)
    row.messages, row.choices = qa("why?", "so")["messages"], ["so", "no"]
    block = of_card([row])
    seen: list[Row] = []
    maker = Maker(work(base))
    maker.cleaner.clean = lambda row, fact: seen.append(row)  # type: ignore[method-assign]
    maker.make(Job(block=block, format="", side="", prefix=""))
    assert seen == [row]


def test_what_is_wrong_with_a_file_is_said_as_its_reader_says_it(
    tmp_path: Path, base: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    good = ", ".join(json.dumps(qa(f"q{i}", "a")) for i in range(550))
    path.write_text(f"[{good},\n {{")
    *rows, last = mapped(work(base), jobs(path), parts_of(tmp_path), "key", 2).to_list()
    assert [row["code"] for row in rows] == [""] * 550
    assert (last["line"], last["code"]) == (2, "DATA-006")

    def unplugged(found: Any) -> Iterator[tuple[int, bytes]]:
        yield from ((number, json.dumps(qa(f"q{number}", "a")).encode()) for number in range(1, 551))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_begun", unplugged)
    with pytest.raises(DataError, match=r"DATA-006 rows\.json cannot be read behind line 550: Input/output error"):
        mapped(work(base), jobs(path), parts_of(tmp_path), "other", 2)


# --- mapping ---------------------------------------------------------------------------------------------------------


def test_a_part_has_the_columns_that_datasets_is_told(tmp_path: Path, base: Path, rows: Path) -> None:
    for near in (False, True):
        settings = Work(data=work(base).data, base=base, cut="error", near=near)
        made = Maker(settings).make(next(jobs(rows)))
        assert made.schema.equals(part_schema(near=near))
        assert datasets.Features.from_arrow_schema(made.schema).arrow_schema.equals(made.schema)


def test_a_record_batch_is_a_block_however_many_processes_there_are(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = []
    for workers, most in ((1, 16), (2, 1), (3, 16)):
        monkeypatch.setattr(mapping, "PER_PROCESS", most)
        (tmp_path / str(workers)).mkdir()
        tables.append(mapped(work(base), jobs(rows), tmp_path / str(workers), "key", workers).with_format("arrow")[:])
    sizes = [[len(batch) for batch in table.to_batches()] for table in tables]
    assert sizes == [[100] * 6 + [50]] * 3
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def test_an_error_in_a_process_comes_out_as_it_was_raised(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(self: Maker, job: Job) -> None:
        raise DataError("DATA-999", f"line {job.block.lines[0]}", f"not in {parent}" * (os.getpid() != parent), "x")

    parent = os.getpid()
    monkeypatch.setattr(Maker, "make", make)
    with pytest.raises(DataError) as caught:
        mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)
    assert caught.value.sentence() in (f"DATA-999 line {n}: not in {parent}. Try: x" for n in (1, 301, 401))


def test_a_process_that_is_killed_is_a_sentence(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Maker, "make", lambda self, job: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"DATA-030 a process that prepared rows was killed.*data\.workers=1"):
        mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)


def test_an_end_that_is_asked_for_while_processes_work_comes_out_as_itself(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def make(self: Maker, job: Job) -> None:
        if job.block.lines[0] == 1:
            os.kill(parent, signal.SIGALRM)
        time.sleep(60)

    parent = os.getpid()
    monkeypatch.setattr(Maker, "make", make)
    before = signal.signal(signal.SIGALRM, asked)
    try:
        with pytest.raises(KeyboardInterrupt):
            mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not children(os.getpid())


def test_the_environment_stays_as_it_was(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    environment, values = os.environ, dict(os.environ)
    mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)
    assert os.environ is environment and dict(os.environ) == values
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    mapped(work(base), jobs(rows), parts_of(tmp_path), "other", 2)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_processes_find_what_they_need_in_memory(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telling = [f"Call +44 20 7946 0{i:03d}, key AKIA{i:016d}, password=hunter2{i}, said number {i}" for i in range(650)]
    path = jsonl(tmp_path / "rows.jsonl", *(qa(text, "A good answer to this.") for text in telling))
    real = Maker.make

    def make(self: Maker, job: Job) -> Any:
        had = {*sys.modules}
        made = real(self, job)
        with (tmp_path / f"{os.getpid()}.new").open("a") as handle:
            handle.write("\n".join({*sys.modules} - had))
        return made

    monkeypatch.setattr(Maker, "make", make)
    settings = work(base, privacy="report", quality="report", languages=["en"]).data
    for name in [name for name in sys.modules if name.startswith(("phonenumbers", "detect_secrets", "py3langid"))]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (credentials._patterns, credentials._plugin, quality._identifier):
        cached.cache_clear()
    mapped(Work(data=settings, base=base, cut="error", near=True), jobs(path), parts_of(tmp_path), "key", 2)
    told = [new.read_text() for new in tmp_path.glob("*.new")]
    assert told == ["", ""]


def test_a_temporary_folder_with_a_long_name_does_not_stop_it(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(multiprocess.process.current_process()._config, "tempdir", raising=False)  # found earlier
    assert len(mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)) == ROWS
    assert tempfile.gettempdir() == str(long)


def children(pid: int) -> list[int]:
    """Forks of a process, those of theirs too."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if Path(f"/proc/{child}/cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes():
                found += [child, *children(child)]
    return found


def processes_of(process: Any, least: int) -> list[int]:
    """Processes that a preparation has started, when they are so many."""
    deadline = time.monotonic() + 60
    while len(found := children(process.pid)) < least and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def gone(pids: list[int]) -> bool:
    """Whether they end within five seconds."""
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path: Path, base: Path, rows: Path, number: signal.Signals) -> None:
    process = start(tmp_path, rows, base, str(BLOCK))
    found = processes_of(process, 3)
    assert len(found) >= 3, "two that map, and one that carries their answers"
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, ended = process.wait(60), gone(found)
    for pid in filter(alive, found):
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(60)
    assert code and ended
    tracebacks = said.count("Traceback")
    assert tracebacks == (number == signal.SIGINT), said  # the parent's own, which the command line turns into a word


# --- caching ---------------------------------------------------------------------------------------------------------


def test_a_slice_that_is_done_is_not_made_again(
    tmp_path: Path, base: Path, rows: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = preparing.recipe(tmp_path / "cache", rows, workers=1)
    with monkeypatch.context() as patch:
        made = counted(patch, until=2)
        with pytest.raises(KeyboardInterrupt):
            prepared(wanted, base)
    assert made == [1, 101]
    monkeypatch.setattr(mapping, "PER_PROCESS", 2)
    made = counted(monkeypatch)
    prepared(wanted, base)
    assert made == [201, 301, 401, 501, 601]


@pytest.mark.slow
def test_a_killed_run_uses_the_slices_that_were_done(tmp_path: Path, base: Path, rows: Path) -> None:
    cache = tmp_path / "cache"
    assert killed_after_a_slice(start(tmp_path, rows, base, str(BLOCK)), cache)
    done = finished_slices(cache)
    assert len(done) >= 3, "a note and the files of two processes"
    assert killed_after_a_slice(start(tmp_path, rows, base, str(BLOCK)), cache)
    more = finished_slices(cache)
    assert len(more) > len(done)
    assert {name: more[name] for name in done} == done, "neither written again nor touched"


@pytest.mark.parametrize("harm", ["cut", "bit", "gone", "note", "unnoted"])
def test_a_cache_file_that_is_not_as_it_was_written_is_made_again(
    tmp_path: Path, base: Path, rows: Path, small: None, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(tmp_path)
    before = mapped(work(base), jobs(rows), parts, "key", 1).to_list()
    harmed = parts / "000003.arrow"
    raw = harmed.read_bytes()
    if harm == "cut":
        harmed.write_bytes(raw[:-1000])
    elif harm == "bit":
        harmed.write_bytes(raw[:9000] + bytes([raw[9000] ^ 1]) + raw[9001:])
    elif harm == "gone":
        harmed.unlink()
    elif harm == "note":
        (parts / "000003.json").write_text('{"blocks": 1')
    else:
        (parts / "000003.json").unlink()
    made = counted(monkeypatch)
    assert mapped(work(base), jobs(rows), parts, "key", 1).to_list() == before
    assert made == [201]


def test_what_is_finished_by_some_processes_serves_another_number_of_them(
    tmp_path: Path, base: Path, rows: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2).to_list()
    for note in sorted(parts_of(tmp_path).glob("*.json"))[2:]:
        note.unlink()
    made = counted(monkeypatch)
    assert mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 1).to_list() == before
    assert made == [401, 501, 601]


def test_what_is_read_does_not_stay(tmp_path: Path, base: Path, rows: Path, small: None) -> None:
    mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)
    names = {path.name for path in parts_of(tmp_path).rglob("*")}
    assert names == {f"{n:06d}.json" for n in (1, 3, 5, 7)} | {"000007.arrow"} | {
        f"{n:06d}_{rank:05d}_of_00002.arrow" for n in (1, 3, 5) for rank in (0, 1)
    }


def test_nothing_is_written_outside_the_cache_folder(tmp_path: Path, base: Path, rows: Path) -> None:
    places = {name: tmp_path / name.lower() for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "TMPDIR", "CWD")}
    for place in places.values():
        place.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {name: str(place) for name, place in places.items()} | {"PYTHONPATH": str(ROOT)}
    words = ["-m", "tests.preparing", str(rows), str(base), str(tmp_path / "cache"), str(BLOCK)]
    done = subprocess.run([sys.executable, *words], env=environment, cwd=places["CWD"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [str(path) for place in places.values() for path in place.rglob("*")] == []
    assert all(re.fullmatch(r"prepared [\d,]+ rows, [\d,]+ rows/s", line) for line in done.stderr.splitlines())
    assert [path.name.partition("-")[0] for path in (tmp_path / "cache" / "prepared").iterdir()].count(".lock") == 1


def test_what_is_decided_over_all_rows_holds_few_bytes_of_each(tmp_path: Path, base: Path, rows: Path) -> None:
    some = mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 1)
    many = datasets.concatenate_datasets([some] * 200)
    tracemalloc.start()
    try:
        facts = Facts(many)
        facts.split[:] = TRAIN
        held = tracemalloc.get_traced_memory()[0] / len(facts)
        tracemalloc.reset_peak()
        output._write_split(facts, TRAIN, tmp_path / "train.arrow")
        beside = tracemalloc.get_traced_memory()[1] / len(facts) - held
    finally:
        tracemalloc.stop()
    assert output.dataset(tmp_path / "train.arrow").num_rows == len(many) == 200 * ROWS
    assert held < 12  # numbers of file and label, code, split, and the row that it resembles
    assert beside < 22


def test_no_function_is_hashed(tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = datasets.fingerprint.Hasher.hash
    noting = classmethod(lambda cls, value: (seen.append(value), real(value))[1])
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", noting)
    mapped(work(base), jobs(rows), parts_of(tmp_path), "key", 2)
    mapped(work(base), jobs(rows, 2), parts_of(tmp_path), "few", 2)
    assert seen
    assert [value for value in seen if callable(value) and not value.__module__.startswith("datasets.")] == []
