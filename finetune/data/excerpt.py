"""The part of a long document that goes into the prompt, as words, chosen by rule and without looking at the answer."""

from __future__ import annotations

import re
from functools import lru_cache

_SUBJECT = re.compile(
    r"(re)?distribut\w*|deriv\w+|modif\w*|source|sublicens\w*|reverse|decompil\w*|sell|sale|rent|lease|commercial\w*"
    r"|cop(y|ies|ying)|transfer\w*|publish\w*|fee|charge",
    re.IGNORECASE,
)
_FORCE = re.compile(
    r"may|must|shall|not|provided|permitted|permission|granted?|conditions?|restrict\w*|allow\w*|prohibit\w*|authori[sz]ed",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.;:])\s+")
_HEADING = re.compile(
    r"^\W*(copyright|\(c\)|©|all rights reserved|version \d|licen[cs]e version|last (updated|revised))", re.I
)
_SHORTEST_SENTENCE = 6


def excerpts(text: str, words: int, how: str, most: int = 1) -> list[str]:
    """Up to `most` parts of `text` of at most `words` words (0: all of it), the most telling first, none overlapping.

    `head` gives the first words. `operative` gives whole sentences in their order, chosen by the density of words for
    what may be done with a work (copy, modify, sell ...), which count two, and of words of permission and duty (may,
    must, provided ...), which count one. Parts after the first are at least three quarters full.
    """
    if words == 0 or len(text.split()) <= words:
        return [text]
    if how == "head":
        return [" ".join(text.split()[:words])]
    sentences = split_sentences(text)
    left = sorted(range(len(sentences)), key=lambda i: (-_density(sentences[i]), i))
    parts: list[str] = []
    while left and len(parts) < most:
        kept: set[int] = set()
        total = 0
        for i in left:
            size = len(sentences[i].split())
            if not kept or total + size <= words:
                kept.add(i)
                total += size
        if parts and total < 0.75 * words:
            break
        parts.append(" ".join(" ".join(sentences[i] for i in sorted(kept)).split()[:words]))
        left = [i for i in left if i not in kept]
    return parts


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`. Very short ones (numbers of clauses, abbreviations) are joined to the next."""
    out: list[str] = []
    pending = ""
    for piece in _SENTENCE_END.split(text):
        pending = f"{pending} {piece}".strip()
        if len(pending.split()) >= _SHORTEST_SENTENCE:
            out.append(pending)
            pending = ""
    return [*out, pending] if pending else out


def plain_body(text: str, names: list[str]) -> str:
    """A licence text without title, copyright lines, addresses and comment marks; its own names become `this licence`.

    Without that the name in the heading answers the question; what must be read is what the text allows.
    """
    lines = (re.sub(r"^\s*([*#;%|!>]|//|--|\.\\\")+\s?", "", line) for line in text.splitlines())
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(lines))]
    start = next((i for i, p in enumerate(paragraphs) if not _is_heading(p)), 0)
    body = " ".join(paragraphs[start:])
    body = re.sub(r"(https?://|www\.)\S+", "", body)
    body = re.sub(r"[=*#_\-~/|]{3,}", " ", body)
    for name in sorted({n for n in names if len(n) > 2}, key=lambda n: (-len(n), n)):
        body = re.sub(rf"(?<!\w)(this )?{re.escape(name)}(?!\w)", "this licence", body, flags=re.IGNORECASE)
    return " ".join(body.split())


def _is_heading(paragraph: str) -> bool:
    words = len(paragraph.split())
    return words < 12 or (words < 40 and _HEADING.match(paragraph) is not None)


def _density(sentence: str) -> float:
    words = sentence.split()
    return sum(map(_weight, words)) / (len(words) + 4)  # + 4: a sentence of three words is not the most telling one


@lru_cache(maxsize=50_000)
def _weight(word: str) -> int:
    bare = word.strip("\"'().,;:*“”")
    return 2 * bool(_SUBJECT.fullmatch(bare)) + bool(_FORCE.fullmatch(bare))
