"""Is what a server answers the tuned model, or its base? `canary(run_dir, url)` asks it the prompts of the merge.

When a run was merged, base and tuned model answered held-out prompts greedily, and the answers were kept with the
logarithm of every token's probability (`merged/answers.json`). The server is asked the same prompts at temperature 0.

A prompt votes where the two recorded answers part: for the one that the server's answer follows beyond that place
(`BEYOND` characters), or for neither. Where the server gives log-probabilities they have a say, on the tokens that both
have in common: an answer of the right words, but on average more than `FAR` nats per token from what was recorded with
them, votes for neither; and the tuned model's words with log-probabilities nearer to those that the base gave them vote
for the base. So a base that a coarse format pushed over a near-tie is still the base, and a model that was tuned alike
elsewhere is not ours.

Formats of 16 bits and fewer flip near-ties, hence the majority, and a test. Suppose the server were not what most votes
say: then every such vote is a flip. A flip is assumed to happen to a prompt with a probability of at most `FLIP`, and
of at most `FLIP_BY_LIKELIHOOD` where log-probabilities agree with the vote and base and tuned model are `APART` nats
apart in them. The verdict stands when it has more than half of the votes and so many flips would have a probability of
at most `DOUBT` (the votes as independent draws, their sum by exact convolution). Otherwise it is undecided.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.asking import Answer, Endpoint, address, chat, complete, is_loopback, kind_of, models
from finetune.errors import GateError, RunError, ServerError
from finetune.rundir import RunDir, read_json

Side = Literal["tuned", "base", "neither", "undecided"]
Say = Callable[[str], None]

BEYOND = 16
"""Characters after the place where the recorded answers part, in which an answer must follow one of them."""
FAR = 0.7
"""Nats per token from which an answer is another model's: twice or half as likely, on average."""
APART = 0.5
"""Nats per token between base and tuned model from which log-probabilities tell them apart on their own."""
FLIP = 0.1
"""Highest probability, by assumption, that rounding makes a model answer a prompt with the other one's words."""
FLIP_BY_LIKELIHOOD = 0.02
"""The same with the other one's log-probabilities, too."""
DOUBT = 0.02
"""Highest probability of a wrong verdict, under these assumptions."""
PATIENCE_SECONDS = 600.0
"""How long one answer may take: a processor without a server's arithmetic is slow."""
UNLISTED = (404, 405, 500, 501)
"""HTTP's numbers for an address that a server does not have; transformers serve fails to list without a hub's cache."""
KEY = "FINETUNE_API_KEY"
"""Environment variable with the server's key."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A recorded prompt to which base and tuned model answer differently."""

    messages: list[dict[str, Any]]
    """The conversation."""
    text: str
    """The same as the chat template renders it."""
    base: str
    """The base's answer."""
    base_logprobs: list[float]
    """Of its tokens."""
    tuned: str
    """The tuned model's answer."""
    tuned_logprobs: list[float]
    """Of its tokens."""
    tuned_under_base: list[float]
    """What the base gives to the tuned model's tokens."""
    length: int
    """Tokens until both have parted for good: what the server is asked for."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one answer of a server says about it."""

    side: Side
    """tuned, base or neither."""
    flip: float
    """Probability, by assumption, that it is a flip."""
    from_tuned: float | None = None
    """Mean distance in nats of its log-probabilities from the tuned model's, on the same tokens."""
    from_base: float | None = None
    """The same from the base's."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all votes say together."""

    side: Side
    """The verdict."""
    votes: list[Vote]
    """One per prompt."""
    doubt: float
    """Probability of so many votes by flips alone."""

    def sentence(self) -> str:
        """The counts, for a person."""
        count = {side: sum(vote.side == side for vote in self.votes) for side in ("tuned", "base", "neither")}
        text = (
            f"of {len(self.votes)} prompts on which base and tuned model differ, {count['tuned']} are answered as the "
            f"tuned model does, {count['base']} as its base, {count['neither']} as neither"
        )
        if self.side != "undecided":
            text += f" (by rounding alone: probability {self.doubt:.1g} or less)"
        for name, known in (
            ("the tuned model", [v.from_tuned for v in self.votes if v.from_tuned is not None]),
            ("the base", [v.from_base for v in self.votes if v.from_base is not None]),
        ):
            if known:
                text += f"; log-probabilities {sum(known) / len(known):.3f} nats from those of {name}"
        if not any(vote.from_tuned is not None or vote.from_base is not None for vote in self.votes):
            text += "; judged by words alone: no log-probabilities were given for them"
        return text


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


# --- what was recorded ----------------------------------------------------------------------------------------------


def recorded(run_dir: RunDir) -> list[Prompt]:
    """The prompts that tell base and tuned model apart. Raises RunError: SRV-008 there are none, SRV-014 damaged."""
    path = run_dir.require(run_dir.answers, "merge")
    try:
        content = read_json(path)
        prompts = [_prompt(entry) for entry in content["prompts"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        again = f"python -m finetune merge run={run_dir.path}"
        raise RunError("SRV-014", f"{path} holds no recorded answers", "it was changed or cut", again) from None
    telling = [prompt for prompt in prompts if prompt.base != prompt.tuned]
    if not telling:
        what = f"base and tuned model answer all {len(prompts)} recorded prompts alike"
        fix = "more prompts (export.parity_prompts=64) or more training, in a new run"
        raise RunError("SRV-008", what, "so no answer of a server can tell which of them it is", fix)
    return telling


def _prompt(entry: dict[str, Any]) -> Prompt:
    base, tuned = entry["base"], entry["tuned"]
    lengths = [len(side["ids"]) for side in (base, tuned)]
    prompt = Prompt(
        messages=[dict(message) for message in entry["messages"]],
        text=str(entry["text"]),
        base=str(base["text"]).strip(),
        base_logprobs=[float(x) for x in base["logprobs"]],
        tuned=str(tuned["text"]).strip(),
        tuned_logprobs=[float(x) for x in tuned["logprobs"]],
        tuned_under_base=[float(x) for x in entry["tuned_under_base"]],
        length=max(lengths),
    )
    fits = len(prompt.base_logprobs) == lengths[0]
    if not fits or not len(prompt.tuned_logprobs) == len(prompt.tuned_under_base) == lengths[1]:
        raise ValueError("a token without its probability")
    return prompt


# --- what an answer says --------------------------------------------------------------------------------------------


def vote(prompt: Prompt, answer: Answer) -> Vote:
    """Whose answer it is: by its words where the recorded ones part, and by its log-probabilities."""
    said = answer.text.strip()
    end = _parting(prompt.base, prompt.tuned) + BEYOND
    side: Side = "neither"
    for name, words in (("tuned", prompt.tuned), ("base", prompt.base)):
        if said[:end] == words[:end]:
            side = "tuned" if name == "tuned" else "base"
    count = _alike(answer, prompt.tuned if side == "tuned" else prompt.base)
    if side == "neither" or not count:
        return Vote(side, FLIP)
    given = answer.logprobs[:count]
    if side == "base":
        distance = _distance(given, prompt.base_logprobs)
        return Vote("neither" if distance > FAR else "base", FLIP, None, distance)
    from_tuned = _distance(given, prompt.tuned_logprobs)
    from_base = _distance(given, prompt.tuned_under_base)
    if min(from_tuned, from_base) > FAR:
        return Vote("neither", FLIP, from_tuned, from_base)
    apart = _distance(prompt.tuned_logprobs[:count], prompt.tuned_under_base)
    flip = FLIP_BY_LIKELIHOOD if apart >= APART else FLIP
    return Vote("tuned" if from_tuned <= from_base else "base", flip, from_tuned, from_base)


def _alike(answer: Answer, words: str) -> int:
    """How many of an answer's first tokens with a log-probability say the same as the recorded words."""
    said = answer.text.strip()
    if said == words:
        return len(answer.logprobs)
    alike = _parting(said, words)
    length = len(answer.text.lstrip()) - len(answer.text)  # what was stripped does not count
    for count, token in enumerate(answer.tokens):
        length += len(token)
        if length > alike:
            return count
    return len(answer.tokens)


def judge(votes: list[Vote]) -> Verdict:
    """The verdict that has more than half of the votes, if flips alone would hardly give it as many."""
    for side in ("tuned", "base", "neither"):
        own = [vote for vote in votes if vote.side == side]
        if 2 * len(own) > len(votes):
            flips = [vote.flip for vote in own] + [FLIP] * (len(votes) - len(own))
            doubt = at_least(len(own), flips)
            named: Side = "tuned" if side == "tuned" else "base" if side == "base" else "neither"
            return Verdict(named if doubt <= DOUBT + 1e-9 else "undecided", votes, doubt)
    return Verdict("undecided", votes, 1.0)


def at_least(count: int, probabilities: list[float]) -> float:
    """The probability that at least `count` of independent events happen."""
    exactly = [1.0]
    for p in probabilities:
        exactly = [a * (1 - p) + b * p for a, b in zip([*exactly, 0.0], [0.0, *exactly], strict=True)]
    return sum(exactly[count:])


def _parting(one: str, other: str) -> int:
    """The first place at which two texts differ."""
    alike = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(alike, min(len(one), len(other)))


def _distance(one: list[float], other: list[float]) -> float:
    """Mean distance of the numbers at the same places; a far one counts as 10 nats at most."""
    pairs = list(zip(one, other, strict=False))
    return sum(min(abs(a - b), 10.0) for a, b in pairs) / len(pairs) if pairs else 0.0


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
