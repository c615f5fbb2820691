"""What a setting may never contain: secrets, classes to load, resolvers. Checked before anything is used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

SECRET_WORDS = frozenset({"token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey"})
SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("auth", "header")})
SECRET_VALUE = re.compile(
    r"""\b(hf|api_org)_[A-Za-z0-9]{8,}      # Hugging Face
    | \b(AKIA|ASIA)[0-9A-Z]{12,}            # AWS
    | \bsk-[A-Za-z0-9_-]{16,}               # OpenAI and others
    | \bgh[pousr]_[A-Za-z0-9]{16,}          # GitHub
    | \bglpat-[A-Za-z0-9_-]{12,}            # GitLab
    | \beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.  # JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | ://[^/@\s]+@                          # user and password in a URL
    """,
    re.VERBOSE,
)
PLAIN_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
CLASS_KEYS = frozenset({"_target_", "_partial_", "_args_", "_convert_", "_recursive_"})
MAX_YAML_BYTES = 200_000
MAX_YAML_DEPTH = 40
"""Lists and mappings inside each other, at most: readers of YAML call themselves for each."""


_OPENS = ("BlockSequenceStartToken", "BlockMappingStartToken", "FlowSequenceStartToken", "FlowMappingStartToken")
_CLOSES = ("BlockEndToken", "FlowSequenceEndToken", "FlowMappingEndToken")


def is_secret(key: str, value: str) -> bool:
    """Whether a setting looks like a password or an access token, by a whole word of its key or by its value.

    Whole words: `evaluate.max_new_tokens` is no secret. Below `config.` only values count: a published config.json has
    `eos_token_id` and the like.
    """
    words = [w for w in re.split(r"[^a-z0-9]+", key.lower()) if w]
    published = "config." in key
    named = not SECRET_WORDS.isdisjoint(words) or not SECRET_PAIRS.isdisjoint(pairwise(words))
    return (named and not published) or SECRET_VALUE.search(value) is not None


def secret_problem(key: str) -> str:
    """The sentence about a secret; its value is not repeated."""
    return (
        f"CFG-006 {key} looks like a secret (value not shown): settings are written into the run folder in clear text. "
        "Put it into the environment (e.g. HF_TOKEN) and leave it out here."
    )


def has_resolver(text: str) -> bool:
    """Whether a text has an interpolation other than a plain reference such as `${train.lr}`."""
    return "${" in PLAIN_REFERENCE.sub("", text)


def forbidden(tree: Any) -> dict[str, str]:
    """Dotted key -> a sentence, for everything in a plain tree of settings that may not be there, at any depth."""
    found: dict[str, str] = {}
    for key, value in leaves(tree):
        if not CLASS_KEYS.isdisjoint(key.split(".")):
            found[key] = f"CFG-005 {key}: settings never name classes to load. Remove the key."
        elif is_secret(key, str(value)):
            found[key] = secret_problem(key)
        elif isinstance(value, str) and has_resolver(value):
            found[key] = f"CFG-007 {key}: only plain references such as ${{train.lr}} are allowed. Write the value out."
    return found


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts and lists. An empty dict or list is a leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree:
        for value in tree:
            yield from leaves(value, prefix)
    else:
        yield prefix, tree


def yaml_problem(path: Path) -> str:
    """What is wrong with a YAML file as a text, or ""."""
    return yaml_tree(path)[1]


def yaml_tree(path: Path) -> tuple[Any, str]:
    """(what a YAML file says, "") or (None, what is wrong with it). Nothing is expanded: aliases grow without limit."""
    found: list[Any] = [None]
    problem = _yaml_problem(path, found)
    return (None if problem else found[0]), problem


def _yaml_problem(path: Path, found: list[Any]) -> str:
    import json

    import yaml

    if path.stat().st_size > MAX_YAML_BYTES:
        return f"CFG-008 {path} is larger than {MAX_YAML_BYTES} bytes, which no settings file is. Is it the right file?"
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text):
            name = type(token).__name__
            depth += name in _OPENS
            depth -= name in _CLOSES
            if depth > MAX_YAML_DEPTH:
                return f"CFG-008 {path} is nested more than {MAX_YAML_DEPTH} deep, which no settings are. Flatten it."
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                line = token.start_mark.line + 1
                return (
                    f"CFG-008 {path}:{line}: YAML anchors and aliases are not allowed in settings. Write the value out."
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode | None):
            return f"CFG-008 {path} holds no settings. Write one key: value a line."
        found[0] = yaml.SafeLoader("").construct_document(node) if node else None
        json.dumps(found[0], ensure_ascii=False, skipkeys=True, default=str).encode()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return f"CFG-008 {path}:{line}: not valid YAML: {error.problem}. Mend this line."
    except UnicodeError:
        return f"CFG-008 {path}: not a UTF-8 text. Save it as UTF-8."
    except Exception as error:  # a date, number or tag that is none raises whatever makes it
        why = " ".join(str(error).split())[:100]
        return f"CFG-008 {path} holds something that is no value: {why or type(error).__name__}. Write it as a text."
    return ""
