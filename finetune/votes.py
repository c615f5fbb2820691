"""Whose answers a server gives: `recorded(run_dir)` are the prompts, `vote(prompt, answer)` and `judge(votes)` decide.

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

from dataclasses import dataclass
from typing import Any, Literal

from finetune.asking import Answer
from finetune.errors import RunError
from finetune.rundir import RunDir, read_json

Side = Literal["tuned", "base", "neither", "undecided"]

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


def recorded(run_dir: RunDir) -> list[Prompt]:
    """The prompts that tell base and tuned model apart. Raises RunError: SRV-008 there are none, SRV-014 damaged."""
    path = run_dir.require(run_dir.answers, "merge")
    try:
        content = read_json(path)
        prompts = [_prompt(entry) for entry in content["prompts"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
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
