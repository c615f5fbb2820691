"""Greedy answers of an OpenAI-compatible server: `complete(endpoint, text)`, `chat(endpoint, messages)`.

`chat_ids(endpoint, messages)` is what it makes of a conversation before it answers.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import ServerError

TOP = 5
"""How many of the likeliest tokens are asked for at every position."""
MAX_REPLY_BYTES = 32 * 2**20
"""A longer reply is no answer to a question of ours."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model on a server that is asked."""

    url: str
    """Address up to /v1, without a slash at its end."""
    model: str
    """Name of the model to send; empty where the server has one only and wants none."""
    kind: str = ""
    """vllm, llama.cpp or transformers where it is known: they differ in what they take."""
    process: int = 0
    """Process id of the server where this program started it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to one prompt."""

    text: str
    """The words."""
    tokens: list[str] = field(default_factory=list)
    """The same in tokens, as the server writes them; empty where it gives none."""
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithm of the probability of every token."""
    finish_reason: str = ""
    """stop or length, as the server says."""
    top: list[dict[str, float]] = field(default_factory=list)
    """Per position the likeliest tokens with their log-probabilities."""


def complete(
    endpoint: Endpoint,
    prompt_text: str,
    *,
    max_tokens: int,
    logprobs: bool = True,
    api_key: str = "",
    timeout_s: float = 120.0,
) -> Answer:
    """The greedy continuation of a text, by /v1/completions. The text is taken as it is: no token is put before it.

    Raises ServerError: SRV-005 nobody answers, SRV-006 the key is refused, SRV-007 the reply is none.
    """
    body: dict[str, Any] = {"prompt": prompt_text, "max_tokens": max_tokens, "temperature": 0}
    if logprobs and endpoint.kind != "transformers":  # it has none, and warns
        body["logprobs"] = TOP
    if endpoint.kind == "vllm":
        body["add_special_tokens"] = False
    if endpoint.kind == "llama.cpp":
        body["prompt"] = _tokens(endpoint, prompt_text, api_key, timeout_s)
    choice = _ask(endpoint, "completions", body, api_key, timeout_s)
    return _answer(endpoint, choice, choice["text"] if "text" in choice else None)


def chat(
    endpoint: Endpoint,
    messages: list[dict[str, Any]],
    *,
    max_tokens: int,
    logprobs: bool = True,
    api_key: str = "",
    timeout_s: float = 120.0,
) -> Answer:
    """The greedy answer to a conversation, by /v1/chat/completions: the server renders it. Raises as `complete`."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    if logprobs and endpoint.kind != "transformers":
        body |= {"logprobs": True, "top_logprobs": TOP}
    choice = _ask(endpoint, "chat/completions", body, api_key, timeout_s)
    message = choice["message"] if "message" in choice else None
    return _answer(endpoint, choice, message["content"] if isinstance(message, dict) and "content" in message else None)


def chat_ids(endpoint: Endpoint, messages: list[dict[str, Any]], *, timeout_s: float = 120.0) -> list[int]:
    """The token ids that vLLM or llama.cpp makes of a conversation and the beginning of an answer.

    Raises as `complete`; with `status` 404, 405 or 501 where a server cannot be asked this.
    """
    root = endpoint.url.removesuffix("/v1")
    body: dict[str, Any] = {"model": endpoint.model, "messages": messages}
    if endpoint.kind == "llama.cpp":  # in two steps, the second as it does it itself before it answers
        written = _send(f"{root}/apply-template", {"messages": messages}, "", timeout_s)
        prompt = written["prompt"] if isinstance(written, dict) and "prompt" in written else None
        body = {"content": prompt, "add_special": True, "parse_special": True}
    reply = _send(f"{root}/tokenize", body, "", timeout_s)
    ids = reply["tokens"] if isinstance(reply, dict) and "tokens" in reply else None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise _no_answer(f"{root}/tokenize", reply)
    return ids


def models(endpoint: Endpoint, *, api_key: str = "", timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """What the server says of its models: `id`, and perhaps `owned_by` and `parent`. Raises as `complete`."""
    reply = _send(f"{endpoint.url}/models", None, api_key, timeout_s)
    listed = reply["data"] if isinstance(reply, dict) and "data" in reply else None
    if not isinstance(listed, list) or not all(isinstance(m, dict) and _is_name(m.get("id")) for m in listed):
        raise _no_answer(f"{endpoint.url}/models", reply)
    return listed


def kind_of(listed: list[dict[str, Any]]) -> str:
    """vllm, llama.cpp or an empty text, by what a server says about its models."""
    owners = {str(m["owned_by"]).lower() for m in listed if "owned_by" in m}
    return "vllm" if "vllm" in owners else "llama.cpp" if "llamacpp" in owners else ""


def address(typed: str) -> str:
    """The address up to /v1 of what somebody typed. Raises ServerError (SRV-009) when it is no address of a server."""
    words = typed.strip().rstrip("/")
    try:
        parts = urlsplit(words)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment
        _ = parts.port
    except ValueError:
        wrong, parts = True, urlsplit("")
    if parts.username or parts.password:
        what = "the address holds a name or password (not shown)"
        raise ServerError("SRV-009", what, "keys come from the environment", "FINETUNE_API_KEY, and serve=http://HOST")
    if wrong:
        raise ServerError("SRV-009", f"serve={typed} is no address of a server", "", "serve=http://127.0.0.1:8000/v1")
    return words if parts.path.endswith("/v1") else f"{words}/v1"


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine alone."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(endpoint: Endpoint, path: str, body: dict[str, Any], api_key: str, timeout_s: float) -> dict[str, Any]:
    """The first choice of a reply."""
    url = f"{endpoint.url}/{path}"
    reply = _send(url, body | ({"model": endpoint.model} if endpoint.model else {}), api_key, timeout_s)
    choices = reply["choices"] if isinstance(reply, dict) and "choices" in reply else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _no_answer(url, reply)
    return choices[0]


def _answer(endpoint: Endpoint, choice: dict[str, Any], text: Any) -> Answer:
    """The answer in a choice. Two forms of log-probabilities are in use; a server that gives none is taken as it is."""
    reason = choice["finish_reason"] if "finish_reason" in choice else ""
    given = choice["logprobs"] if "logprobs" in choice else None
    try:
        if not isinstance(text, str):
            raise TypeError("no text")
        tokens, logprobs, top = _likelihoods(given)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise _no_answer(endpoint.url, choice) from None
    return Answer(text, tokens, logprobs, str(reason or ""), top)


def _likelihoods(given: Any) -> tuple[list[str], list[float], list[dict[str, float]]]:
    if not given:
        return [], [], []
    if given.get("content"):
        tokens = [entry["token"] for entry in given["content"]]
        logprobs = [entry["logprob"] for entry in given["content"]]
        top = [{t["token"]: t["logprob"] for t in entry.get("top_logprobs") or ()} for entry in given["content"]]
    elif given.get("tokens") and given.get("token_logprobs"):
        tokens, logprobs = given["tokens"], given["token_logprobs"]
        top = [dict(entry or {}) for entry in given.get("top_logprobs") or [{}] * len(tokens)]
    else:
        return [], [], []
    if not all(isinstance(token, str) for token in tokens) or not len(tokens) == len(logprobs) == len(top):
        raise TypeError("tokens and their probabilities do not fit")
    return tokens, [_number(x) for x in logprobs], [{t: _number(x) for t, x in entry.items()} for entry in top]


def _is_name(value: Any) -> bool:
    """Whether it is the name of a model, without what could steer a terminal."""
    return isinstance(value, str) and 0 < len(value) < 1000 and value.isprintable()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number")
    return float(value)


def _tokens(endpoint: Endpoint, text: str, api_key: str, timeout_s: float) -> list[int] | str:
    """The token ids of a text by llama.cpp's own /tokenize, which alone can be told to put nothing before it."""
    body = {"content": text, "add_special": False, "parse_special": True}
    try:
        reply = _send(f"{endpoint.url.removesuffix('/v1')}/tokenize", body, api_key, timeout_s)
        ids = reply["tokens"]
        return ids if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) else text
    except (ServerError, TypeError, KeyError):  # behind a gateway that has the OpenAI addresses only
        return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Prompts and keys go to the address that was typed, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        """Nothing: a redirect is an error."""


def _send(url: str, body: dict[str, Any] | None, api_key: str, timeout_s: float) -> Any:
    """The JSON value that a server replies with."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as reply:
            text = reply.read(MAX_REPLY_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error.code, _rest(error)) from None
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise _silence(url, error, timeout_s) from None
    except http.client.HTTPException as error:  # a reply that is not HTTP
        raise _silence(url, error, timeout_s) from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _no_answer(url, text.decode("utf-8", "replace")) from None


def _rest(error: urllib.error.HTTPError) -> bytes:
    """What a server says beside a refusal, as far as it can be read."""
    try:
        return error.read(2000)
    except (OSError, ValueError, http.client.HTTPException):
        return b""


def _refusal(url: str, status: int, said: bytes) -> ServerError:
    if status in (401, 403):
        fix = "export FINETUNE_API_KEY=..., the key of that server"
        return ServerError("SRV-006", f"{url} refuses us (HTTP {status})", "it wants a key, or another one", fix)
    words = _short(said.decode("utf-8", "replace"))
    if 300 <= status < 400:
        what, why = f"{url} sends us elsewhere (HTTP {status})", "prompts go to the address that was typed, only"
        return ServerError("SRV-007", what, why, "serve= with the address it names")
    return ServerError("SRV-007", f"{url} answers with HTTP {status}", words, "the log of that server", status)


def _silence(url: str, error: BaseException, timeout_s: float) -> ServerError:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        why = f"no answer within {timeout_s:g} seconds"
    else:
        why = _short(str(getattr(reason, "strerror", None) or reason)) or type(error).__name__
    return ServerError("SRV-005", f"{url} cannot be asked", why, "whether the server runs, and its address")


def _no_answer(url: str, reply: Any) -> ServerError:
    said = reply if isinstance(reply, str) else json.dumps(reply)
    what = f"{url} does not answer as an OpenAI-compatible server"
    return ServerError("SRV-007", what, f"it says {_short(said) or 'nothing'}", "the address of one, up to /v1")


def _short(text: str) -> str:
    """The beginning of what a server said, without what could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:400]).split())[:160]
