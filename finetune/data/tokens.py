"""A conversation -> token ids and a loss mask, for any chat template: what is trained is found by rendering twice."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

IGNORED = -100
"""Label of a token that is not trained, as torch's cross entropy has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One tokenised conversation."""

    input_ids: list[int]
    """The whole conversation as the chat template writes it."""
    labels: list[int]
    """The same, with IGNORED where nothing is learnt: everything but the assistant's words and end-of-turn."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORED)

    @property
    def trainable(self) -> int:
        """Tokens that are trained."""
        return sum(label != IGNORED for label in self.labels)


def tokenize(tokenizer: Any, stop: set[int], messages: list[dict[str, str]], where: str) -> Tokens:
    """The conversation as tokens, every assistant turn trained up to and with its end-of-turn token.

    A turn's span is the difference between the template's text up to the turn with the generation prompt, which is
    what a server will send, and its text including the turn. Raises DataError naming the row `where`: TPL-002 when
    the one is no beginning of the other in tokens, TPL-003 when the template refuses the conversation, TOK-004 when
    a turn ends without a stop token, MASK-002 when the span is not the answer, DATA-005 for control tokens in a text.
    """
    control = _control_tokens(tokenizer)
    for message in messages:
        found = control.search(message["content"]) if control else None
        if found:
            why = "inside a text it would end or fake a turn"
            raise DataError("DATA-005", f"{where} has the control token {found[0]} in a {message['role']} message", why)
    whole = _render(tokenizer, messages, False, where)
    labels = [IGNORED] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], True, where)
        upto = whole if i == len(messages) - 1 else _render(tokenizer, messages[: i + 1], False, where)
        _check_prefix(tokenizer, before, whole, where, i)
        _check_prefix(tokenizer, upto, whole, where, i)
        end = max((k + 1 for k in range(len(before), len(upto)) if upto[k] in stop), default=0)
        if not end:
            last = tokenizer.convert_ids_to_tokens(upto[-1])
            names = ", ".join(sorted(tokenizer.convert_ids_to_tokens(sorted(stop))))
            why = f"the template ends it with {last!r}; stop tokens: {names}. A model trained on this would never stop"
            raise DataError(
                "TOK-004", f"{where} messages[{i}] has no end-of-turn token", why, "mend eos_token of the tokenizer"
            )
        if _bare(message["content"]) not in _bare(tokenizer.decode(whole[len(before) : end])):
            why = "the chat template drops or changes part of it"
            raise DataError(
                "MASK-002", f"{where} messages[{i}] is not what would be trained", why, "look at chat_template.jinja"
            )
        labels[len(before) : end] = whole[len(before) : end]
    return Tokens(input_ids=whole, labels=labels)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a local folder. Raises DataError TPL-001 when it has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        why = "without it nobody knows how the model writes a conversation"
        raise DataError(
            "TPL-001", f"the tokenizer in {folder} has no chat template", why, "put its chat_template.jinja there"
        )
    return tokenizer


def stop_tokens(tokenizer: Any, folder: Path) -> set[int]:
    """Ids at which a server stops: the tokenizer's eos and those of generation_config.json."""
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    if path.is_file():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        stop |= set(eos) if isinstance(eos, list) else {eos} if eos is not None else set()
    return stop


def marked(tokenizer: Any, tokens: Tokens) -> str:
    """The conversation as text with ⟦ ⟧ around what is trained."""
    out, inside = [], False
    run: list[int] = []
    for token, label in zip([*tokens.input_ids, None], [*tokens.labels, None], strict=True):
        trained = label is not None and label != IGNORED
        if run and (trained != inside or token is None):
            text = tokenizer.decode(run)
            out.append(f"⟦{text}⟧" if inside else text)
            run = []
        inside = trained
        if token is not None:
            run.append(token)
    return "".join(out)


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool, where: str) -> list[int]:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(
            "TPL-003", f"{where}: the chat template refuses this conversation", f"{error} (roles: {roles})"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _check_prefix(tokenizer: Any, prefix: list[int], whole: list[int], where: str, i: int) -> None:
    if whole[: len(prefix)] == prefix:
        return
    k = next((k for k, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(whole))
    asked, trained = (tokenizer.decode(ids[max(0, k - 4) : k + 4]) for ids in (prefix, whole))
    raise DataError(
        "TPL-002",
        f"{where}: the prompt of messages[{i}] is no beginning of the conversation",
        f"token {k} differs: a server would send ...{asked!r}, training would see ...{trained!r}",
        "remove white space around the answer, or make one row of each answer of a longer conversation",
    )


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the text of any special token."""
    special = {str(t) for t in tokenizer.all_special_tokens}
    special |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True) if t)) if special else None


def _bare(text: str) -> str:
    """Without white space: decoders differ in how they space punctuation."""
    return "".join(text.split())
