"""Tokens with their labels, and what a base folder says about them: its tokenizer, its stop tokens, its embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, WeightsError

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
        """Tokens that are trained; never the first, which nothing can predict."""
        behind = self.labels[1:]
        return len(behind) - behind.count(IGNORED)


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
    eos = _settings(folder / "generation_config.json").get("eos_token_id")
    given = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in given):
        raise _unusable(folder / "generation_config.json", "eos_token_id is no token id and no list of them")
    return stop | set(given)


def vocabulary_rows(folder: Path) -> int:
    """Rows of the embedding by the base's config.json; 0 where it does not say."""
    config = _settings(folder / "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    rows = text["vocab_size"] if "vocab_size" in text else 0
    if type(rows) is not int or rows < 0:
        raise _unusable(folder / "config.json", "vocab_size is no number of rows")
    return rows


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file of a base; none where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(path, str(error).splitlines()[0]) from None
    if not isinstance(found, dict):
        raise _unusable(path, "it holds no settings")
    return found


def _unusable(path: Path, why: str) -> WeightsError:
    return WeightsError("WGT-002", f"{path} cannot be used", why, "fetch the folder again")


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
