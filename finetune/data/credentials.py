"""Keys, tokens and passwords in a text, by how they begin and what they look like.

Patterns are those of detect-secrets where it has them: nothing else of it is used, nothing is asked or printed, and a
finding does not hold the value.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One value that should not be trained on, without the value."""

    kind: str
    """One of KINDS."""
    start: int
    """Its first character in the text."""
    end: int
    """Past its last character."""


_TOKENS = {
    # kind: what it is, how it begins, the class in detect_secrets.plugins, a pattern for what that class lacks
    "aws_key": ("AWS access key", "AKIA ASIA ABIA ACCA A3T", "aws.AWSKey", ""),
    "github_token": ("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", "github_token.GitHubToken",
        r"github_pat_\w{60,}"),
    "gitlab_token": ("GitLab token", "glpat- gldt- glft- glsoat- glrt- GR1348941 glcbt- glimt- glptt- glagent- gloas-",
        "gitlab_token.GitLabToken", ""),
    "slack_token": ("Slack token or hook", "xox xapp- https://hooks.slack", "slack.Slack", r"x(?:app|ox.)-[\w-]{20,}"),
    "stripe_key": ("Stripe key", "sk_live_ rk_live_ sk_test_ rk_test_", "stripe.Stripe", r"[rs]k_test_\w{24,}"),
    "huggingface_token": ("Hugging Face token", "hf_", "", r"hf_[A-Za-z0-9]{34,}"),
    "openai_key": ("OpenAI key or alike", "sk-", "openai.OpenAI", r"sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{32,}"),
    "google_key": ("Google key or OAuth secret", "AIza GOCSPX-", "", r"AIza[\w-]{35}|GOCSPX-[\w-]{28}"),
    "twilio_key": ("Twilio account or key", "AC SK", "twilio.TwilioKey", ""),
    # the plugin for npm takes the rest of the line
    "npm_token": ("npm token", "npm_ _authToken=", "", r"npm_[A-Za-z0-9]{36}|_authToken=(?P<value>[\w-]{36,})"),
    "pypi_token": ("PyPI token", "pypi-AgE", "pypi_token.PypiToken", ""),
    "jwt": ("JSON web token whose parts decode", "eyJ", "jwt.JwtToken", ""),
}  # fmt: skip
_ANCHORS = [(anchor, kind) for kind, (_, anchors, _, _) in _TOKENS.items() for anchor in anchors.split()]

CREDENTIALS = {
    "private_key": "PEM block of a private key that has a body",
    "url_password": "user:password@ in a URL",
    **{kind: says for kind, (says, _, _, _) in _TOKENS.items()},
    "aws_secret": "40 characters assigned to a name with aws and key or secret",
    "password": "value of letters and digits assigned to a password, secret, key or token",
}
"""Kind of finding -> what is checked."""

_LONGEST = 4096  # characters of a token that are looked at: bounds the work on hostile text
LABEL = re.compile(r"\[([A-Z_]{2,20})\]")
_PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_BASE64 = re.compile(r"(?:\s|\\[nr])*(?:[A-Za-z0-9+/=]{20,}(?:\s|\\[nr])*)+")
_ASSIGN = r"[\"'\]]{0,2}(?:[ \t]{0,3}(?::=|=>|={1,3}|:)[ \t]{0,3}"
_AWS = re.compile(rf"(?i)aws[\w .-]{{0,30}}(?:key|secret)\w{{0,20}}{_ASSIGN})[\"']?([a-z0-9/+]{{40}})(?![\w/+=])")
_PASSWORD = re.compile(
    r"(?i)(?:passw(?:or)?d|passwort|passphrase|pwd|kennwort|contraseña|de passe|secret|key|token)(?:[_-]\w{1,20})?"
    rf"{_ASSIGN}| is )"
    r"(?:\"(?P<double>[^\"\s]{6,200})\"|'(?P<single>[^'\s]{6,200})'|(?P<bare>[^\s\"'`,;(){}\[\]<>]{6,200})(?![(\[]))"
)
_PASSWORD_WORDS = ("passw", "passphrase", "pwd", "kennwort", "contrase", "de passe", "secret", "key", "token")
_KEY_OF = re.compile(r"(?i)(?:api|access|auth|account|private|client|service|bearer|refresh|secret)[ _-]?$")
_DUMMY = re.compile(
    r"(?i)[\[<{$%*(]|(?:your|my|the|some|new|old|example|insert|enter)[-_]?\w*$|change|placeholder|redacted"
    r"|\w*(?:pass(?:word)?|secret|token|key)\d{0,3}$|[a-z_]\w*(?:\.[a-z_]\w*)+$|https?:"
)


def secrets(text: str) -> Iterator[Finding]:
    """Credentials in a text, in no order; they may overlap."""
    if "-----BEGIN" in text:
        yield from _private_keys(text)
    if "://" in text and "@" in text:
        (pattern,) = _plugin("basic_auth.BasicAuth").denylist
        matches = (match for match in pattern.finditer(text) if match[0][3] not in "<{")
        yield from (Finding("url_password", match.start() + 3, match.end(1)) for match in matches)
    lower = text.lower()
    if max(map(len, text.split()), default=0) >= 20:  # no token is shorter
        for anchor, kind in _ANCHORS:
            if anchor in text:
                yield from _tokens(text, kind, anchor)
        if "aws" in lower:
            yield from (Finding("aws_secret", *m.span(1)) for m in _AWS.finditer(text))
    for word in _PASSWORD_WORDS:
        if word in lower:
            yield from _passwords(text, lower if len(lower) == len(text) else text, word)


def _private_keys(text: str) -> Iterator[Finding]:
    for head in _PEM.finditer(text):
        tail = text.find("-----END", head.end(), head.end() + 8 * _LONGEST)
        body = _BASE64.match(text, head.end())
        end = text.find("-----", tail + 8) + 5 if tail >= 0 else body.end() if body else 0
        if end > head.end() + 40:
            yield Finding("private_key", head.start(), end)


def _tokens(text: str, kind: str, anchor: str) -> Iterator[Finding]:
    """Each value that begins with the anchor, to its last character, which some of the patterns stop short of."""
    patterns, valid = _patterns(kind)
    at = text.find(anchor)
    while at >= 0:
        end = at + len(anchor)
        inside = at > 0 and (text[at - 1].isalnum() or text[at - 1] in "_-")
        matches = [] if inside else [pattern.match(text, at, at + _LONGEST) for pattern in patterns]
        match = next((m for m in matches if m and valid(m[0])), None)
        if match and len(set(match[0][len(anchor) :])) > 5:
            end = match.end()
            while end < len(text) and (text[end].isalnum() or text[end] in "_-"):
                end += 1
            yield Finding(kind, match.start("value") if "value" in match.re.groupindex and match["value"] else at, end)
        at = text.find(anchor, end)


def load() -> None:
    """Loads the patterns of all kinds, each of which is else loaded by the first text that may have one."""
    for kind in _TOKENS:
        _patterns(kind)


@lru_cache
def _patterns(kind: str) -> tuple[list[re.Pattern[str]], Callable[[str], Any]]:
    """Patterns of a kind, and a check of what they match. For some kinds `analyze_string` gives the prefix only."""
    _, _, plugin, extra = _TOKENS[kind]
    patterns = [re.compile(extra, re.ASCII)] if extra else []
    if plugin:
        patterns = [*_plugin(plugin).denylist, *patterns]
    return patterns, _plugin(plugin).is_formally_valid if kind == "jwt" else bool


@lru_cache
def _plugin(name: str) -> Any:
    """A plugin of detect-secrets, of which we take the patterns: it reads, sends and logs nothing."""
    module, _, kind = name.partition(".")
    return vars(importlib.import_module(f"detect_secrets.plugins.{module}"))[f"{kind}Detector"]()


def _passwords(text: str, lower: str, word: str) -> Iterator[Finding]:
    at = lower.find(word)
    while at >= 0:
        match = None if LABEL.match(text, max(0, at - 1)) else _PASSWORD.match(text, at)
        if match and (word not in ("key", "token") or _KEY_OF.search(text, max(0, at - 8), at)):
            group = match.lastgroup or ""
            value = match[group].rstrip(".!?:") if group == "bare" else match[group]
            letters, digits = re.search("[A-Za-z]", value), re.search("[0-9]", value)
            mixed = group != "bare" and re.search("[a-z]", value) and re.search(r"[A-Z]|[^\w-]", value)
            if letters and (digits or mixed) and len(value) > 5 and len(set(value)) > 4 and not _DUMMY.match(value):
                yield Finding("password", match.start(group), match.start(group) + len(value))
        at = lower.find(word, at + 1)
