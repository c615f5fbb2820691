"""Tokens with their labels, and what a base folder says about them: its tokenizer, its stop tokens, its embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

IGNORED = -100
"""Label of a token that is not trained, as torch's cross entropy has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One tokenised row."""

    input_ids: list[int]
    """All of it, as the chat template writes it."""
    labels: list[int]
    """The same, with IGNORED where nothing is learnt: everything but the assistant's words and end-of-turn."""
    truncated: bool = False
    """Whether its end was cut off."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one; 1 where that is the first, which nothing can predict."""
        return max(1, next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels)))

    @property
    def trainable(self) -> int:
        """Tokens that are trained."""
        return len(self.labels) - self.labels.count(IGNORED)


def cut(tokens: Tokens, length: int) -> Tokens:
    """The first `length` tokens."""
    if len(tokens.input_ids) <= length:
        return tokens
    return Tokens(input_ids=tokens.input_ids[:length], labels=tokens.labels[:length], truncated=True)


def windows(tokens: Tokens, length: int) -> list[Tokens]:
    """Plain text in pieces of at most `length` tokens, none lost."""
    starts = range(0, len(tokens.input_ids), length)
    return [Tokens(input_ids=tokens.input_ids[s : s + length], labels=tokens.labels[s : s + length]) for s in starts]


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


def vocabulary_rows(folder: Path) -> int:
    """Rows of the embedding by the base's config.json; 0 where it does not say."""
    path = folder / "config.json"
    if not path.is_file():
        return 0
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return int(text["vocab_size"]) if "vocab_size" in text else 0


def pieces(tokenizer: Any, tokens: Tokens) -> list[tuple[str, bool]]:
    """The row as text in runs of (text, whether it is trained)."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in runs]


def marked(tokenizer: Any, tokens: Tokens) -> str:
    """The conversation as text with ⟦ ⟧ around what is trained."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in pieces(tokenizer, tokens))
