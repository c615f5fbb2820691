"""An OpenAI-compatible server in a thread, whose models say what a test wants, and recorded answers to go with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from finetune.rundir import RunDir, write_json

Said = list[tuple[str, float]]
"""Tokens with their log-probabilities."""
Model = Callable[[str], Said]
"""What a model says to a rendered prompt."""

TUNED: list[Said] = [
    [("Perm", -0.05), ("issive", -0.01), ("", -0.02)],
    [("Copy", -0.10), ("left", -0.01), ("", -0.01)],
    [("Prop", -0.20), ("rietary", -0.02), ("", -0.01)],
    [("Public", -0.30), (" Domain", -0.05), ("", -0.03)],
]
UNDER_BASE = [[-4.0, -2.0, -3.0], [-5.0, -0.5, -2.5], [-3.5, -1.0, -2.0], [-6.0, -0.9, -1.5]]
"""What the base gives to the tuned model's tokens."""
BASE: Said = [("The", -0.40), (" licence", -0.70), (" is", -0.20), (" a", -0.90)]


def answers(prompts: int = 8, alike: int = 0) -> dict[str, Any]:
    """A merged/answers.json; to the first `alike` prompts base and tuned model say the same."""
    entries = []
    for number in range(prompts):
        tuned, under = TUNED[number % 4], UNDER_BASE[number % 4]
        base = tuned if number < alike else BASE
        text = rendered(number)
        entry = {"messages": [{"role": "user", "content": f"text {number}"}], "text": text, "ids": [1, number]}
        entries.append(entry | {"base": _side(base), "tuned": _side(tuned), "tuned_under_base": list(under)})
    return {"schema": 1, "precision": "fp32", "max_new_tokens": 4, "prompts": entries}


def recorded_run(folder: Path, prompts: int = 8, alike: int = 0) -> RunDir:
    """A run folder whose merge has left its answers."""
    run_dir = RunDir(folder)
    write_json(run_dir.answers, answers(prompts, alike))
    return run_dir


def rendered(number: int) -> str:
    """A prompt as the template writes it."""
    return f"<user>text {number}<assistant>"


def _number(text: str) -> int:
    return int("".join(c for c in text if c.isdigit()))


def _side(said: Said) -> dict[str, Any]:
    ids = [abs(hash(token)) % 1000 for token, _ in said]
    return {"ids": ids, "text": "".join(t for t, _ in said), "logprobs": [p for _, p in said]}


def tuned(text: str) -> Said:
    """The tuned model."""
    return TUNED[_number(text) % 4]


def base(text: str) -> Said:
    """Its base."""
    return BASE


def foreign(text: str) -> Said:
    """Another model."""
    return [("Sure", -0.1), ("!", -0.2), (" That", -0.3)]


def alike_elsewhere(text: str) -> Said:
    """A model that was tuned on the same rows elsewhere: the same words, other probabilities."""
    return [(token, p - 1.5) for token, p in tuned(text)]


def flipping(model: Model, other: Model, every: int) -> Model:
    """A model that says the other one's words to every so many-th prompt, with log-probabilities of its own."""
    return lambda text: other(text) if _number(text) % every == 0 else model(text)


def near_tie(text: str) -> Said:
    """A base in a coarse format: the tuned model's words, with what the base thinks of them."""
    number = _number(text) % 4
    return [(token, p + 0.1) for (token, _), p in zip(TUNED[number], UNDER_BASE[number], strict=True)]


@dataclass
class Fake:
    """What the server does, and what it was asked."""

    models: dict[str, Model]
    listed: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    logprobs: str = "legacy"
    """legacy, content (llama.cpp's and chat's form) or an empty text for none."""
    chat_only: bool = False
    written: Callable[[Any], list[int]] | None = None
    """What token ids a conversation has; None where it has no address to ask that at."""
    unlisted: bool = False
    reply: bytes | None = None
    """What is replied to any question, in place of an answer."""
    status: int = 200
    seconds: float = 0.0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)


@contextmanager
def serving(models: dict[str, Model] | Model, **words: Any) -> Iterator[Fake]:
    """A server at `fake.url` for the time of the block."""
    fake = Fake(models if isinstance(models, dict) else {"m": models}, **words)
    fake.listed = fake.listed or [{"id": name, "object": "model"} for name in fake.models]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.fetched.append(self.path)
            if fake.unlisted:
                return self.send(500, b"Internal Server Error")
            self.answer({"object": "list", "data": fake.listed} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            time.sleep(fake.seconds)
            if fake.written and self.path == "/apply-template":
                return self.answer({"prompt": json.dumps(body["messages"])})
            if fake.written and self.path == "/tokenize":
                chat = body["messages"] if "messages" in body else json.loads(body["content"])
                return self.answer({"tokens": fake.written(chat)})
            chat = self.path == "/v1/chat/completions"
            if not chat and (self.path != "/v1/completions" or fake.chat_only):
                return self.answer(None)
            if fake.reply is not None or fake.status != 200:
                return self.send(fake.status, fake.reply or b"{}")
            prompt = body["messages"][-1]["content"] if chat else body["prompt"]
            said = fake.models[body["model"] if "model" in body else ""](prompt)[: body["max_tokens"]]
            self.answer({"choices": [_choice(said, chat, fake.logprobs)]})

        def answer(self, value: Any) -> None:
            if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                return self.send(401, b'{"error": "no"}')
            self.send(200 if value is not None else 404, json.dumps(value or {}).encode())

        def send(self, status: int, words: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if 300 <= status < 400:
                self.send_header("Location", f"{fake.url}/v1/elsewhere")
            self.send_header("Content-Length", str(len(words)))
            self.end_headers()
            self.wfile.write(words)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Nothing: whoever asked did not wait for the answer."""

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _choice(said: Said, chat: bool, form: str) -> dict[str, Any]:
    text = "".join(token for token, _ in said)
    given: Any = None
    if form == "content" or (form and chat):
        given = {"content": [{"token": t, "logprob": p, "top_logprobs": [{"token": t, "logprob": p}]} for t, p in said]}
    elif form:
        given = {"tokens": [t for t, _ in said], "token_logprobs": [p for _, p in said], "top_logprobs": None}
    words = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": 0, "finish_reason": "stop", "logprobs": given, **words}
