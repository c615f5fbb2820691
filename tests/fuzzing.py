"""What all fuzz tests and scripts/fuzz.py share: a parser, inputs that break it, and a guard that sees what it did.

Inputs are drawn from a `random.Random`: hypothesis gives one whose draws it knows, shrinks and repeats, scripts/fuzz.py
a plain one that is many times faster. So both run the same properties on the same kinds of input.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError

Files = dict[str, bytes]
"""Path below a folder -> bytes: one input."""

SECONDS = 5.0
"""Processor time of one input, at most."""
INPUT, SCRATCH = "in", "tmp"
"""Below the folder of a fuzzed parser: its files, and where it may make temporary ones."""
ERROR_ID = re.compile(r"[A-Z]{2,5}-\d{3}")


@dataclass(frozen=True, kw_only=True)
class Parser:
    """One parser that a stranger's bytes reach."""

    name: str
    parse: Callable[[Path], object]
    """Reads the files in a folder as the program does."""
    seeds: Callable[[], list[Files]]
    """Inputs that are as they should be."""
    shaped: Callable[[random.Random], Files]
    """An input whose form is right and whose content is not, or nearly so."""
    examples: list[tuple[Files, str]] = field(default_factory=list)
    """What once went wrong, and the id it ends with now; empty where it is taken."""
    weight: float = 10
    """Its share of the inputs: high where one takes microseconds."""
    native: bool = False
    """Whether its bytes are parsed by a library in C++ or Rust."""


class Crash(AssertionError):
    """A parser did what it never may: another error than ours, too long, a file elsewhere, a program, a pickle."""


class TooLong(BaseException):
    """An input took more than SECONDS."""


class Forbidden(BaseException):
    """Something outside its folder would have been touched."""


def attempt(parser: Parser, folder: Path, files: Files) -> str:
    """The id of the error that an input ends with, empty when it is taken. Raises Crash when a property is broken."""
    place(folder / INPUT, files)
    with guarded(folder) as seen:
        try:
            parser.parse(folder / INPUT)
            code = ""
        except FinetuneError as error:
            sentence = error.sentence()
            found = ERROR_ID.match(sentence)
            if not found:
                raise Crash(f"{parser.name}: an error without an id: {sentence[:200]!r}") from error
            code = found[0]
        except TooLong:
            raise Crash(f"{parser.name}: longer than {SECONDS:g} s of processor time") from None
        except Forbidden as error:
            raise Crash(f"{parser.name}: {error}") from None
        except Exception as error:  # what must not escape
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno}"
            raise Crash(f"{parser.name}: {what}") from error
    if seen:
        raise Crash(f"{parser.name}: {seen[0]}")
    if sorted(beside := os.listdir(folder)) != sorted([INPUT, SCRATCH]):  # noqa: PTH208
        raise Crash(f"{parser.name}: files beside its own folder: {beside}")
    return code


def place(folder: Path, files: Files) -> None:
    """Makes a folder hold exactly these files."""
    for place in (str(folder), str(folder.parent / SCRATCH)):
        os.makedirs(place, exist_ok=True)  # noqa: PTH103  # plain calls: this runs for every input
        with os.scandir(place) as entries:
            for entry in entries:
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)  # noqa: PTH108
    for name, data in files.items():
        path = f"{folder}/{name}"
        if "/" in name:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(data)


# --- the guard ------------------------------------------------------------------------------------------------------

_allowed: list[str] = []
"""Where files may be written now; empty while nothing is watched."""
_seen: list[str] = []
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "shutil.rmtree": 1, "os.mkfifo": 1, "os.mknod": 1,
}  # fmt: skip
_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open", "ctypes.dlopen",
}  # fmt: skip


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event == "open":
        path, mode, flags = args
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags and flags & _WRITES)
        if writes and not isinstance(path, int):
            _check(event, path)
    elif event in _PATHS:
        count = _PATHS[event]
        for path, base in zip(args[:count], args[-count:], strict=True):
            if not isinstance(path, int):
                beside = isinstance(base, int) and base >= 0 and event != "os.truncate"  # relative to a folder
                _check(event, f"{Path(f'/proc/self/fd/{base}').readlink()}/{os.fsdecode(path)}" if beside else path)
    elif event in _NEVER:
        _refuse(f"{event} {args!r:.200}")


def _check(event: str, path: Any) -> None:
    where = os.path.realpath(os.path.dirname(os.fsdecode(path)) or ".")  # noqa: PTH120  # bytes and texts alike
    where = os.path.join(where, os.path.basename(os.fsdecode(path)))  # noqa: PTH118, PTH119
    if where != os.devnull and not where.startswith(tuple(_allowed)):
        _refuse(f"{event} of {where}, outside its folder")


def _refuse(what: str) -> None:
    _seen.append(what)
    raise Forbidden(what)


@functools.cache
def _watch() -> None:
    sys.addaudithook(_audit)  # cannot be taken away again; it is idle while `_allowed` is empty


@functools.lru_cache
def _own(folder: Path) -> list[str]:
    return [f"{os.path.realpath(folder)}/{name}" for name in (INPUT, SCRATCH)]


def _too_long(*_: object) -> None:
    raise TooLong


@contextmanager
def guarded(folder: Path) -> Iterator[list[str]]:
    """A block in which nothing outside `folder`'s own two may be written, no program started, nothing unpickled.

    Gives what was tried. TooLong ends the block after SECONDS of processor time (wall time depends on the neighbours).
    """
    _watch()
    _seen.clear()
    before = signal.signal(signal.SIGPROF, _too_long)
    tempfile.tempdir, without = str(folder / SCRATCH), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    _allowed[:] = _own(folder)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield _seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _allowed.clear()
        tempfile.tempdir, sys.dont_write_bytecode = None, without
        signal.signal(signal.SIGPROF, before)


# --- inputs: bytes --------------------------------------------------------------------------------------------------

MAGIC = (
    b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8, b"\r\n", b"\n\n",
    b"{",
    b"[", b"}", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"../", b"\x1b[31m", b"\xef\xbb\xbf", b"\xc3\x28",
    b"1e999",
    b"NaN", b"-0", b"9" * 400, b"null", b"true", b"__class__", b"${oc.env:HOME}", b"!!python/object/apply:os.system",
    b"&a", b"*a", b"{{", b"{%", b"%}", b"\xed\xa0\x80", b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"ARROW1",
)  # fmt: skip
"""Bytes that parsers trip over."""


def mutated(seeds: list[Files], draw: random.Random) -> Files:
    """A seed with some bytes flipped, cut, doubled, put in from elsewhere, or with another number where a length is."""
    files = dict(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        name = draw.choice(sorted(files))
        files[name] = _changed(files[name], draw)
    return files


def _changed(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    how = draw.randrange(8)
    if how == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + draw.choice(MAGIC) + data[at:]
    if how == 3:
        magic = draw.choice(MAGIC)
        return data[:at] + magic + data[at + len(magic) :]
    if how == 4:
        return data[:at] + data[min(len(data), at + draw.randrange(1, 20)) :]
    if how == 5:
        end = min(len(data), at + draw.randrange(1, 60))
        return data[:at] + data[at:end] * draw.choice((2, 3, 50)) + data[end:]
    if how == 6:  # a number of another size, where lengths and offsets are
        value, size = (
            draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data))),
            draw.choice((4, 8)),
        )
        spot = draw.choice((0, at, max(0, len(data) - 8), at - at % 4))
        return data[:spot] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[spot + size :]
    other = draw.randrange(len(data) + 1)
    piece = data[other : other + draw.randrange(1, 40)]
    return data[:at] + piece + data[at + len(piece) :]


# --- inputs: values -------------------------------------------------------------------------------------------------

DEEP, LONG = "@deep:", "@digits:"
"""Texts in a value that `dumped` replaces by what json.dumps cannot write: nested lists, a number of many digits."""
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    "a", "0", "-1", "1e999", "\x00", "\ud800", "\u2028", "\x1b]0;x\x07", "é" * 40, "x" * 300, "x" * 5000, "..",
    "../../x",
    "/etc/passwd", "https://u:p@h", "${oc.env:HOME}", "${seed}", "{0.__class__}", "{x!r:>99}", "__class__", "None",
    [], {},
    [[]], [None], [0], ["a"], {"": None}, {"a": 1}, {"a": {"a": {}}}, [1, "a", None, {}], {"__class__": []}, [["a",
    "b"]],
    f"{DEEP}200", f"{DEEP}980", f"{DEEP}3000", f"{DEEP}100000", f"{LONG}30", f"{LONG}400", f"{LONG}5000",
    [f"{DEEP}980"], {"a": f"{LONG}400"},
)  # fmt: skip
"""Values that a schema's author did not think of."""


def dumped(value: Any, **how: Any) -> bytes:
    """A value as JSON, NaN and half characters too, with DEEP and LONG as what they stand for."""
    text = json.dumps(value, **how)
    if DEEP in text:
        text = re.sub(rf'"{DEEP}(\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)
        text = text.replace(DEEP, "")
    if LONG in text:
        text = re.sub(rf'"{LONG}(\d+)"', lambda m: "9" * int(m[1]), text)
    return text.encode("utf-8", "surrogatepass")


def strange(draw: random.Random, depth: int = 2) -> Any:
    """A value of any type, nested or not."""
    if depth == 0 or draw.randrange(4):
        return copy.deepcopy(draw.choice(STRANGE))
    if draw.randrange(2):
        return [strange(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {
        str(draw.choice(("a", "name", "", "0", "\x00"))): strange(draw, depth - 1) for _ in range(draw.randrange(3))
    }


def poked(value: Any, draw: random.Random, times: int = 0) -> Any:
    """A deep copy of a JSON value in which one to three places hold another value, are gone, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return strange(draw)
        parent, key = draw.choice(places)
        how = draw.randrange(10)
        if how < 6:
            parent[key] = strange(draw)
        elif how == 6:
            del parent[key]
        elif how == 7 and isinstance(parent, dict):
            parent[str(draw.choice(STRANGE))] = parent.pop(key)
        elif how == 8 and isinstance(parent, list):
            parent.insert(0, copy.deepcopy(parent[key]))
        else:
            _, other = draw.choice(places)
            parent[key] = other if isinstance(other, str) else [parent[key]]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


# --- hypothesis -----------------------------------------------------------------------------------------------------


def hunt(parser: Parser, folder: Path, examples: int, *, shaped: bool) -> None:
    """Tries so many inputs that hypothesis draws, the parser's own examples first. Raises Crash with a small one."""
    from hypothesis import HealthCheck, Phase, example, given, note, settings
    from hypothesis import strategies as st

    seeds = parser.seeds()
    for seed in seeds:
        place(folder / INPUT, seed)
        parser.parse(folder / INPUT)  # a seed that is refused would test nothing; what it imports is not watched

    def one(draw: random.Random | Files) -> None:
        drawn = parser.shaped if shaped else functools.partial(mutated, seeds)
        files = draw if isinstance(draw, dict) else drawn(draw)
        note(f"{files!r:.2000}")
        attempt(parser, folder, files)

    for files, _ in parser.examples if shaped else []:
        one = example(draw=files)(one)
    quiet = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(draw=st.randoms(use_true_random=False, note_method_calls=False))(one))()
