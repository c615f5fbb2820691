"""Five fixed conversations: exports and their servers must write them as training does, and stop where it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import GateError
from finetune.foreign.rendering import rendered

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CHATS = (
    _chat((USER, "What does this clause mean?")),
    _chat((SYSTEM, "Answer in one word."), (USER, "Is water wet?")),
    _chat((USER, "Name a colour."), (ASSISTANT, "Blue."), (USER, "Another one, please.")),
    _chat(
        (SYSTEM, "You are terse."),
        (USER, "1 + 1 = ?\n\nShow your work."),
        (ASSISTANT, "  2\n"),
        (USER, 'He said "no" {{ twice }} — 3.14 €?'),
    ),
    _chat((USER, "Grüße, 你好 🙂\t<b>&amp;</b>"), (ASSISTANT, "Hello! Ünïcödé works."), (USER, "Go on\\n")),
)
"""Conversations of one and more turns, with and without a system message, with spaces, quotes, braces and symbols."""


def check_tokenizer(trained: Path, exported: Path) -> dict[str, Any]:
    """What was compared. Raises GateError (exit code 4): EXP-020 other token ids, EXP-021 an answer would not end.

    `trained` is the folder that training read its tokenizer from.
    """
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in (trained, exported))
    if before.chat_template is None and after.chat_template is None:
        return {"chats": 0, "note": "the tokenizer has no chat template"}
    compared = 0
    for chat in CHATS:
        ids = [_ids(tokenizer, chat) for tokenizer in (before, after)]
        if ids[0] != ids[1]:
            what = f"{exported} writes a chat in {len(ids[1] or ())} tokens, training in {len(ids[0] or ())}"
            why = f"the first that differ begin with {chat[0]['content'][:30]!r}"
            raise GateError("EXP-020", what, why, "merge again: the tokenizer's files are those of the base")
        compared += ids[0] is not None
    ends = end_of_turn(after)
    stops = stop_tokens(exported, after)
    if ends is not None and ends not in stops:
        what = f"{after.convert_ids_to_tokens(ends)!r} ends an answer by the chat template, and is no stop token"
        why = f"generation_config.json has eos_token_id={sorted(stops)}"
        raise GateError("EXP-021", what, why, f"add {ends} to eos_token_id there, in the base's folder")
    text = None if ends is None else after.convert_ids_to_tokens(ends)
    return {"chats": compared, "end_of_turn": text, "stop_tokens": sorted(stops)}


def check_served(tokenizer: Any, client: str, served: Callable[[list[dict[str, str]]], list[int]]) -> int:
    """How many conversations a client writes in the tokens of training. Raises GateError EXP-020 at another one.

    `served` gives the client's token ids of a conversation; one whose roles the template refuses is left out.
    """
    compared = 0
    for number, chat in enumerate(CHATS, 1):
        wanted = _ids(tokenizer, chat)
        if wanted is None:
            continue
        got = served(chat)
        if got != wanted:
            what = f"{client} writes chat {number} of {len(CHATS)} in {len(got)} tokens, training in {len(wanted)}"
            why = f"it begins with {chat[0]['content'][:30]!r}; nothing is exported, adapter and merged weights stay"
            raise GateError("EXP-020", what, why, "leave this format out of export.formats, and report this")
        compared += 1
    return compared


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the special token that the chat template writes after an answer; None where there is no such token."""
    answer = "Answer."
    chat = [*CHATS[0], {"role": ASSISTANT, "content": answer}]
    ids = _ids(tokenizer, chat, prompt=False)
    if ids is None:
        return None
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    for place in range(len(ids), 0, -1):
        if answer in tokenizer.decode(ids[place - 1 :]):
            return next((token for token in ids[place - 1 :] if token in special), None)
    return None


def stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """Ids at which transformers and servers end an answer: by generation_config.json, else the tokenizer's own."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = values.get("eos_token_id", tokenizer.eos_token_id)
    return set(found if isinstance(found, list) else [found]) - {None}


def _ids(tokenizer: Any, chat: list[dict[str, str]], prompt: bool = True) -> list[int] | None:
    """Token ids of a conversation; None where the template refuses its roles."""
    from jinja2.exceptions import TemplateError

    try:
        text = rendered(tokenizer, chat, prompt)
    except TemplateError:
        return None
    return list(tokenizer(text, add_special_tokens=False).input_ids)
