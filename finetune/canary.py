"""Is what a server answers the tuned model, or its base? `canary(run_dir, url)` asks it the prompts of the merge.

What its answers say about it, and how sure that is: `votes.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from finetune.asking import Answer, Endpoint, address, chat, complete, is_loopback, kind_of, models
from finetune.errors import GateError, ServerError
from finetune.rundir import RunDir
from finetune.votes import Prompt, Side, Verdict, judge, recorded, vote

Say = Callable[[str], None]

PATIENCE_SECONDS = 600.0
"""How long one answer may take: a processor without a server's arithmetic is slow."""
UNLISTED = (404, 405, 500, 501)
"""HTTP's numbers for an address that a server does not have; transformers serve fails to list without a hub's cache."""
KEY = "FINETUNE_API_KEY"
"""Environment variable with the server's key."""


def canary(run_dir: RunDir, typed: str, say: Say, *, model: str = "") -> Verdict:
    """Says what a server serves. Raises GateError (SRV-012, exit code 4) when it is not the tuned model.

    Raises ServerError when it cannot be asked, RunError when the run has no recorded answers or none that differ.
    """
    prompts = recorded(run_dir)
    server, key = _reached(typed, say, len(prompts), model)
    ask = _asker(server, prompts, key, say)
    verdict = judge([vote(prompt, ask(server, prompt)) for prompt in prompts])
    say(f"{server.model or server.url}: {verdict.side}; {verdict.sentence()}")
    if verdict.side != "tuned":
        raise GateError(
            "SRV-012", f"the server's model is {_called(verdict.side)}", _reason(verdict.side), _fix(run_dir)
        )
    return verdict


def isolation(
    run_dir: RunDir, typed: str, say: Say, *, model: str = "", base_model: str = ""
) -> tuple[Verdict, Verdict]:
    """Verdicts of base and tuned model of one server, asked in turns; each prompt asks the base before and after.

    Raises GateError (SRV-013, exit code 4) when the base does not answer as base, the tuned one not as tuned, or an
    answer of the base changes once the tuned model has been asked. Raises as `canary` otherwise.
    """
    prompts = recorded(run_dir)
    tuned, base, key = _pair(typed, say, len(prompts), model, base_model)
    ask = _asker(base, prompts, key, say)
    before, between, after = [], [], []
    for prompt in prompts:
        before.append(ask(base, prompt))
        between.append(ask(tuned, prompt))
        after.append(ask(base, prompt))
    first, second = (judge([vote(p, a) for p, a in zip(prompts, said, strict=True)]) for said in (before, after))
    other = judge([vote(prompt, said) for prompt, said in zip(prompts, between, strict=True)])
    moved = sum(one.text != two.text for one, two in zip(before, after, strict=True))
    say(f"{base.model}: {first.side}, {first.sentence()}")
    say(f"{tuned.model}: {other.side}, {other.sentence()}")
    say(f"{base.model} again, after {tuned.model}: {second.side}, {moved} of {len(prompts)} answers are others")
    wrong = [f"{base.model} answers as {_called(side)}" for side in {first.side, second.side} if side != "base"]
    wrong += [f"{tuned.model} answers as {_called(other.side)}"] * (other.side != "tuned")
    wrong += [f"{moved} answers of {base.model} changed after {tuned.model} was asked"] * (moved > 0)
    if wrong:
        why = "one of its models reaches into the other, or the adapter is not applied"
        raise GateError("SRV-013", "; ".join(wrong), why, "one server per model, each with merged weights (export/hf)")
    return first, other


# --- whom to ask ----------------------------------------------------------------------------------------------------


def _asker(server: Endpoint, prompts: list[Prompt], key: str, say: Say) -> Callable[[Endpoint, Prompt], Answer]:
    """What asks one prompt: the rendered text, or the conversation where the server takes no texts."""

    def by_text(endpoint: Endpoint, prompt: Prompt) -> Answer:
        return complete(endpoint, prompt.text, max_tokens=prompt.length, api_key=key, timeout_s=PATIENCE_SECONDS)

    def by_chat(endpoint: Endpoint, prompt: Prompt) -> Answer:
        return chat(endpoint, prompt.messages, max_tokens=prompt.length, api_key=key, timeout_s=PATIENCE_SECONDS)

    try:
        complete(server, prompts[0].text, max_tokens=1, api_key=key, timeout_s=PATIENCE_SECONDS)
    except ServerError as error:
        if error.status not in (404, 405, 501):
            raise
        say("the server takes conversations only, and renders them with a template of its own")
        return by_chat
    return by_text


def _reached(typed: str, say: Say, count: int, model: str) -> tuple[Endpoint, str]:
    """The model that is asked, and the key."""
    url, key = _open(typed, say, count)
    try:
        listed = models(Endpoint(url, ""), api_key=key)
    except ServerError as error:
        if error.status not in UNLISTED:
            raise
        listed = []
    names = [entry["id"] for entry in listed]
    if not model and len(names) > 1:
        adapted = [entry["id"] for entry in listed if entry.get("parent")]
        if len(adapted) != 1:
            what = f"{url} has {len(names)} models: {', '.join(names[:8])}"
            raise ServerError("SRV-011", what, "one of them is to be asked", f"model={names[0]}")
        names = adapted
    return Endpoint(url, model or "".join(names[:1]), kind_of(listed)), key


def _pair(typed: str, say: Say, count: int, model: str, base_model: str) -> tuple[Endpoint, Endpoint, str]:
    """(tuned, base, key): as they were named, or an adapter and its base by what the server says of them."""
    url, key = _open(typed, say, 3 * count)
    listed = models(Endpoint(url, ""), api_key=key)
    names = [entry["id"] for entry in listed]
    adapted = [entry for entry in listed if "parent" in entry and entry["parent"] in names]
    if not model and len(adapted) == 1:
        model = adapted[0]["id"]
    if not base_model:
        base_model = next((entry["parent"] for entry in adapted if entry["id"] == model), "")
    if not model or not base_model or model == base_model:
        what = f"{url} does not say which of its models is the base of which: {', '.join(names[:8]) or 'it names none'}"
        raise ServerError("SRV-011", what, "", "model=NAME_OF_THE_TUNED base_model=NAME_OF_ITS_BASE")
    kind = kind_of(listed)
    return Endpoint(url, model, kind), Endpoint(url, base_model, kind), key


def _open(typed: str, say: Say, count: int) -> tuple[str, str]:
    """(address, key), after a line that says where prompts go if that is not this machine."""
    url = address(typed)
    key = os.environ[KEY] if KEY in os.environ else ""
    if not is_loopback(url):
        open_ = " without encryption" if url.startswith("http:") else ""
        say(f"{count} prompts, held-out rows of your data, go to {url}{open_}, because you typed it")
    return url, key


def _called(side: Side) -> str:
    return {"tuned": "the tuned one", "base": "the base", "neither": "neither of the two"}.get(side, "undecided")


def _reason(side: Side) -> str:
    if side == "base":
        return "the adapter is not applied, or the base's weights were loaded"
    if side == "neither":
        return "other weights, another chat template, or a format that is too coarse"
    return "too few of the recorded prompts tell base and tuned model apart"


def _fix(run_dir: RunDir) -> str:
    return f"python -m finetune serve run={run_dir.path}, which serves the export, and ask that one"
