"""What a setting may never contain: secrets, classes to load, resolvers. `redact` takes secrets out of a text."""

from __future__ import annotations

import os
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
    | \b[rs]k_(live|test)_[A-Za-z0-9]{16,}  # Stripe
    | \bgh[pousr]_[A-Za-z0-9]{16,}          # GitHub
    | \bgithub_pat_[A-Za-z0-9_]{20,}
    | \bglpat-[A-Za-z0-9_-]{12,}            # GitLab
    | \bxox[a-z]-[A-Za-z0-9-]{10,}          # Slack
    | \bAIza[A-Za-z0-9_-]{30,}              # Google
    | \bnpm_[A-Za-z0-9]{30,} | \bpypi-[A-Za-z0-9_-]{16,} | \bnvapi-[A-Za-z0-9_-]{16,}
    | \beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(\.[A-Za-z0-9_-]*)?  # JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY(.{0,9999}?-----END\ [A-Z ]*PRIVATE\ KEY-----|-----[A-Za-z0-9+/=\s\\]*)?
    | (?<=://)[^/@\s"'<>]+(?=@)             # user and password in a URL
    """,
    re.VERBOSE | re.DOTALL,
)
"""Values that give themselves away. Patterns of `data.credentials` are for rows, where a false alarm costs a row."""

ASSIGNED = re.compile(
    r"(?<![A-Za-z0-9_.-])([A-Za-z_][A-Za-z0-9_.-]{0,99})([\"']?\s{0,9}[=:]\s{0,9})([\"']?)([^\s\"',;)\]}]{6,})"
)
"""A name, = or :, and a value, within a text."""

HIDDEN = "[hidden]"
SHORTEST = 8
"""Characters of a variable's value that is looked for in texts, at least."""

PLAIN_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
CLASS_KEYS = frozenset({"_target_", "_partial_", "_args_", "_convert_", "_recursive_"})
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines"})
"""Keys of a published config.json that would load code; `foreign.configs` has them all, for files."""
MAX_YAML_BYTES = 200_000
MAX_DEPTH = 32
"""Levels of nested mappings and lists, at most."""
MAX_WORD = 100_000
"""Characters of a word of the command line, at most."""


def is_secret(key: str, value: str) -> bool:
    """Whether a setting looks like a password or an access token, by a whole word of its key or by its value.

    Whole words: `evaluate.max_new_tokens` is no secret. Below `config.` only values count: a published config.json has
    `eos_token_id` and the like. A value that assigns one (`export API_KEY=...`) is one.
    """
    if SECRET_VALUE.search(value):
        return True
    named = is_secret_name(key) and "config." not in key
    assigned = [found for found in ASSIGNED.finditer(value) if found[2].strip() == "="]
    return named or any(is_secret_name(found[1]) and not found[4].startswith("$") for found in assigned)


def is_secret_name(name: str) -> bool:
    """Whether a name is that of a secret, by a whole word of it: HF_TOKEN, api_key, db.password."""
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w]
    return not SECRET_WORDS.isdisjoint(words) or not SECRET_PAIRS.isdisjoint(pairwise(words))


def word_problems(words: list[str]) -> list[str]:
    """A sentence for every word of the command line that looks like a secret, whatever verb or option it is for."""
    found = []
    for word in words:
        key, _, value = word.partition("=")
        if SECRET_VALUE.search(word) or (value and is_secret(key, value)):
            name = key.lstrip("+~-") if value and not SECRET_VALUE.search(key) else "a word of the command line"
            found.append(secret_problem(name))
    return found


def redact(text: str) -> str:
    """The text without what looks like a secret.

    Hidden are values of known forms, values of this process' variables with the name of a secret, and what such a name
    is given (`password=...`).
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    text = SECRET_VALUE.sub(HIDDEN, text)
    return ASSIGNED.sub(_without_value, text)


def redacted(value: Any) -> Any:
    """The same for every text in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _without_value(found: re.Match[str]) -> str:
    name, sign, quote, value = found.groups()
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w]
    plain = words[-1:] == ["token"] and len(words) == 1  # "token: <|im_end|>" is said of text, too
    hide = is_secret_name(name) and not plain and value != HIDDEN and not value.startswith(("$", "["))
    return f"{name}{sign}{quote}{HIDDEN}" if hide else found[0]


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
        elif not CODE_KEYS.isdisjoint(key.split(".")):
            found[key] = f"CFG-005 {key}: settings never load code of a model's publisher. Remove the key."
        elif is_secret(key, str(value)):
            found[key] = secret_problem(key)
        elif isinstance(value, str) and has_resolver(value):
            found[key] = f"CFG-007 {key}: only plain references such as ${{train.lr}} are allowed. Write the value out."
    return found


def depth(text: str) -> int:
    """How deeply brackets are nested in a word."""
    deepest = now = 0
    for character in text:
        now += (character in "[{(") - (character in "]})")
        deepest = max(deepest, now)
    return deepest


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

    opening = (
        *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
        *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
    )
    closing = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
    if path.stat().st_size > MAX_YAML_BYTES:
        return f"CFG-008 {path} is larger than {MAX_YAML_BYTES} bytes, which no settings file is. Is it the right file?"
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text):
            depth += isinstance(token, opening) - isinstance(token, closing)
            if depth > MAX_DEPTH:
                return f"CFG-008 {path}:{token.start_mark.line + 1}: nested more than {MAX_DEPTH} deep. Write it flat."
            if isinstance(token, yaml.TagToken):
                line = token.start_mark.line + 1
                return f"CFG-008 {path}:{line}: YAML tags are not allowed in settings. Write the value as it is."
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
