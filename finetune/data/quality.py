"""What a text looks like, without a model that must be fetched: its language, and the marks of text gone wrong."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

FLAGS = {
    "repetition": "one line, or one run of five words, stands three times or more and makes up most of the text",
    "symbols": "of 20 characters or more, spaces not counted, fewer than 40 % are letters",
    "mojibake": "letters read in a wrong encoding, or the sign that replaces what could not be read",
    "markup": "HTML tags or entities outside code in back quotes",
    "capitals": "of 20 letters or more, most stand in words of capitals only",
    "refusal": "an answer that begins by declining",
    "cut": "more than 200 characters that end within a sentence, a word or a block of code",
}
"""Flag -> when a text has it. Scripts without spaces have no runs of words; Thai, Lao and Khmer are never `cut`."""

_READ = 600  # characters of which the language is told
_RUN = 5
_PART = "[\u0080-\u00bf" + bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "]"
_MOJIBAKE = re.compile(rf"\ufffd|(?<![A-ZÀ-Þ])[ÃÂ]{_PART}|[ÐÑ]{_PART}[ÐÑ]{_PART}|â€|ï»¿|ðŸ")
_FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_TAG = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|body|br|button|center|code|div|em|font|footer|form|h[1-6]|head|header|hr|html|i|img"
    r"|input|li|link|meta|nav|ol|p|pre|script|section|small|span|strong|style|sub|sup|svg|table|tbody|td|th|thead|tr|u|ul)"
    r"(?:\s[^<>]{0,200})?/?>|&(?:nbsp|amp|lt|gt|quot|apos|[lr][sd]quo|[mn]dash|hellip|#[0-9]{2,5}|#x[0-9a-f]{2,4});",
    re.IGNORECASE,
)
_NOT = r"(?:(?:i|we) (?:can't|can ?not|won't|could not|must decline)|(?:i am|i'm|we are|we're) (?:unable|not able))"
_REFUSAL = re.compile(
    r"(?:oh|well|hello|hi)?[,.! ]*(?:as an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|(?:(?:i am|i'm) (?:\w+ )?(?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e)[,.:;! ]*(?:(?:but|that) )?"
    rf"{_NOT}|(?:unfortunately,? )?{_NOT} (?:\w+ ){{0,3}}?(?:help|assist|provide|fulfil|comply|answer|create|generate"
    r"|write|offer|discuss|share|engage|continue|support|respond|give you|do that)"
    r"|i (?:don't|do not) feel comfortable)",
    re.IGNORECASE,
)
_OPEN = re.compile(r"[^\W_]|[,;(\[{\u2013\u2014&/-]")
_LISTED = re.compile(r"\s*(?:[-*•·>|#]|[0-9a-z]{1,3}[.)] )")
_UNSTOPPED = re.compile("[\u0e00-\u0eff\u1780-\u17ff]")


def language(text: str) -> str:
    """ISO 639-1 code of the language that the first 600 characters are most likely in; "" for fewer than 20 letters.

    The same text gives the same code in every process. Also "" for what the model takes for no language at all. A text
    in two languages gets one of them, and near relatives (no and da, hr and bs) are mixed up where the text is short.
    """
    text = text[:_READ]
    if sum(map(str.isalpha, text)) < 20:
        return ""
    code: str = _identifier().classify(text)[0]
    return code if len(code) == 2 else ""


def flags(text: str) -> list[str]:
    """Names of FLAGS that the text has, in their order."""
    words = text.split()
    visible = sum(map(len, words))
    found = [
        ("repetition", _repeats(text, words)),
        ("symbols", _is_symbols(words, visible)),
        ("mojibake", not text.isascii() and bool(_MOJIBAKE.search(text))),
        ("markup", _has_markup(text)),
        ("capitals", _is_capitals(words, visible)),
        ("refusal", _is_refusal(text)),
        ("cut", _is_cut(text)),
    ]
    return [name for name, has in found if has]


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """The model that lies in the package py3langid, with the languages that have a code of two letters."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    made = LanguageIdentifier.from_model_file(MODEL_FILE)
    made.set_languages([code for code in made.labels if len(code) == 2 or code == "zxx"])
    return made


def _repeats(text: str, words: list[str]) -> bool:
    if "\n" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        line, times = Counter(lines).most_common(1)[0] if lines else ("", 0)
        if times > 2 and 2 * times * len(line) > sum(map(len, lines)):
            return True
    # where one run makes up half of the words, the other half and its five are all the words there are
    if len(words) < 3 * _RUN or 2 * len(set(words)) > len(words) + 2 * _RUN:
        return False
    times_of: Counter[tuple[str, ...]] = Counter()
    free: dict[tuple[str, ...], int] = {}
    for i, run in enumerate(zip(*(words[k:] for k in range(_RUN)), strict=False)):
        if run not in free or free[run] <= i:  # a run does not overlap itself
            times_of[run] += 1
            free[run] = i + _RUN
    times = times_of.most_common(1)[0][1]
    return times > 2 and 2 * times * _RUN > len(words)


def _is_symbols(words: list[str], visible: int) -> bool:
    if visible < 20 or sum(map(len, filter(str.isalpha, words))) >= 0.4 * visible:
        return False
    return sum(map(_is_letter, "".join(words))) < 0.4 * visible


def _is_letter(character: str) -> bool:
    """Also a vowel sign of an Indic script, which is a mark."""
    return character.isalpha() or "\u0900" <= character <= "\u0dff"


def _has_markup(text: str) -> bool:
    if "<" not in text and "&" not in text:
        return False
    return bool(_TAG.search(_FENCED.sub(" ", text) if "`" in text else text))


def _is_capitals(words: list[str], visible: int) -> bool:
    if visible < 20 or 2 * sum(map(len, filter(str.isupper, words))) <= visible:
        return False
    upper, lower = (sum(map(test, "".join(words))) for test in (str.isupper, str.islower))
    return upper + lower >= 20 and upper > lower


def _is_refusal(text: str) -> bool:
    return bool(_REFUSAL.match(text[:300].replace("\u2019", "'").lstrip(' \t\r\n"*_')))


def _is_cut(text: str) -> bool:
    text = text.rstrip()
    if len(text) <= 200:
        return False
    if text.count("```") % 2:
        return True
    if not _OPEN.match(text[-1]) or _UNSTOPPED.match(text[-1]):
        return False
    last = text[text.rfind("\n") + 1 :]
    word = last[last.rfind(" ") + 1 :]
    # headings, list items, rows of a table, names, addresses and code end without a stop
    return len(last) > 60 and not _LISTED.match(last) and not re.search(r"[/=<>_@\\\d]", word)
