"""Personal data and secrets in a text, by rules alone: patterns, check digits and words that stand before a number.

Nothing is loaded, asked or printed, and a finding does not hold the value. A bare run of digits passes a one-digit
check in 10 % of cases, so an id of digits counts only in the punctuation of its country or close behind a word that
names it (BSN, PESEL, tax): an order number is no id. Known misses: names and street addresses, words behind the
number, digits that are not ASCII, zero-width characters inside a value, ids in small letters, unquoted passwords
without a digit, quoted ones with a space.
"""

from __future__ import annotations

import importlib
import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from finetune.data.credentials import CREDENTIALS, LABEL, Finding, secrets


@dataclass(frozen=True, slots=True)
class _Id:
    kind: str
    says: str
    module: str  # of python-stdnum
    alone: tuple[str, ...] = ()  # forms that are found anywhere; 9 is any digit
    near: tuple[str, ...] = ()  # forms that are found only behind one of the words
    words: str = "$^"


_12, _DATED, _NORWAY = ("9" * 12,), ("999999-9999", "99999999-9999"), "f[øo]dselsnummer|fnr|personnummer"
_9, _10, _11, _THREES = "9" * 9, "9" * 10, "9" * 11, ("9" * 9, "999 999 999", "999-999-999")
_CARDS = ("9999 9999 9999 9999", "9999-9999-9999-9999", "9999 999999 99999", "9999-999999-99999", "9999 999999 9999")
_CALL = (
    r"(?:tele)?phones?|tel|mobile|cell(?:phone)?|t[ée]l[ée]phone|tel[eé]fono|telefon[eo]?|fax|telefax|call(?:ed|ing)?"
    r"|dial|ring|sms|whatsapp|handy|m[oó]vil|mobil|portable|celular|numéro"
)
_IDS = (
    _Id("phone", "number that a country can have, with + or close behind a word such as tel or call", "", words=_CALL),
    _Id("card", "payment card: issuer's prefix, length, Luhn digit", "luhn", (*_CARDS, "9" * 14, "9" * 15, "9" * 16)),
    _Id("iban", "bank account: form of its country, mod 97", "iban"),
    _Id("ssn", "US social security number: ranges in use, with dashes", "us.ssn", ("999-99-9999",)),
    _Id("nhs", "UK NHS number: mod 11", "gb.nhs", (), (_10, "999 999 9999", "999-999-9999"), "nhs"),
    _Id("nir", "French NIR, 15 digits: mod 97", "fr.nir", ("9 99 99 99 999 999 99",), ("9" * 15,), r"nir|s[ée]cu\w*"),
    _Id("steuer_id", "German tax id: mod 11,10", "de.idnr", (), (_11, "99 999 999 999"), r"steuer\w*|id-?nr|tax|tin"),
    _Id("bsn", "Dutch service number: mod 11", "nl.bsn", ("9999.99.999",), (_9,), r"bsn|burgerservice\w*|sofi\w*"),
    _Id("dni", "Spanish DNI: mod 23 letter", "es.dni"),
    _Id("nie", "Spanish NIE of foreigners: mod 23 letter", "es.nie"),
    _Id("codice_fiscale", "Italian tax code: date and check letter", "it.codicefiscale"),
    _Id("pesel", "Polish PESEL: date and check digit", "pl.pesel", (), (_11,), "pesel"),
    _Id("cpf", "Brazilian CPF: two check digits", "br.cpf", ("999.999.999-99",), (_11, _9 + "-99"), "cpf|cadastro"),
    _Id("aadhaar", "Indian: Verhoeff digit", "in_.aadhaar", ("9999 9999 9999", "9999-9999-9999"), _12, "aadhaa?r"),
    _Id("belgian_nn", "Belgian number: mod 97", "be.nn", ("99.99.99-999.99",), (_11,), r"rijksreg\w*|niss|insz|nn"),
    _Id("personnummer", "Swedish number: date and Luhn digit", "se.personnummer", _DATED, (_10, *_12), "personnummer"),
    _Id("fodselsnummer", "Norwegian number: date, two digits", "no.fodselsnummer", ("999999 99999",), (_11,), _NORWAY),
    _Id("hetu", "Finnish personal code: date, mod 31", "fi.hetu", ("999999-9999",)),
    _Id("ahv", "Swiss AHV number: prefix and EAN digit", "ch.ssn", ("999.9999.9999.99",), ("9" * 13,), r"ahv\w*|n?avs"),
    _Id("sin", "Canadian social insurance number: Luhn digit", "ca.sin", (), _THREES, "sin|social insurance|nas"),
    _Id("rrn", "South Korean resident number: date, mod 11", "kr.rrn", ("999999-9999999",)),
    _Id("ric", "Chinese resident number: place, date, mod 11", "cn.ric", ("9" * 18,)),
    _Id("curp", "Mexican CURP: date, state, check digit", "mx.curp"),
)  # fmt: skip

KINDS = {
    **CREDENTIALS,
    "email": "address with a domain that has a dot",
    "ip": "public IPv4 or IPv6 address: not private, not for documentation, first number of two digits or more",
    **{id.kind: id.says for id in _IDS},
}
"""Kind of finding -> what is checked."""

_MODULES = {id.kind: id.module for id in _IDS}
_NEAR = 40  # characters before a number in which its word must stand
_RUN = re.compile(r"[0-9][0-9 .\-/()\u00a0\u202f]{5,}[0-9]")
_SHAPE = {ord(c): "9" for c in "012345678"} | {0xA0: " ", 0x202F: " "}
_STOP = re.compile(r"[.)/](?= )|(?<= )\(")
_WORDS = {id.kind: re.compile(rf"\b(?:{id.words})\b", re.IGNORECASE) for id in _IDS}
_FORMS: dict[str, list[tuple[str, _Id]]] = {}
for _form, _id in sorted(((f, id) for id in _IDS for f in (*id.alone, *id.near)), key=lambda form: -len(form[0])):
    _FORMS.setdefault(_form.split(" ")[0], []).append((_form, _id))
_ISSUERS = re.compile(r"(?=.{16}$)(?:4|5[1-5]|2[2-7]|35|62|65|6011|64[4-9])|3[47].{13}$|3[068].{12}$")

_NATIONAL = (
    (r"0", "GB DE FR NL BE CH AT SE FI AU IT IN"),
    (r"(?:1[ .-]?)?[2-9][0-9]{2}\)?[ .-]{0,2}[0-9]{3}[ .-]?[0-9]{4}(?![0-9])", "US"),
    (r"[0-9]{3}(?:[ -]?[0-9]{3}){2}(?![0-9])|[69][0-9]{2}(?: [0-9]{2}){3}", "ES PL PT"),
    (r"3[0-9]{2}[ .-]?[0-9]{3}[ .-]?[0-9]{3,4}(?![0-9])", "IT"),
    (r"[6-9][0-9]{4} ?[0-9]{5}(?![0-9])", "IN"),
    (r"[1-9][0-9]\)? ?9?[0-9]{4}[ -]?[0-9]{4}(?![0-9])", "BR"),
)
# how a number begins in its national form, and where: dates and prices are not worth asking the library
_STARTS = [(re.compile(rf"\(?(?:{form})"), regions.split()) for form, regions in _NATIONAL]

_MIXED = re.compile(r"[0-9][0-9](?:-?[A-Z]|[-+][0-9]{3}| ?[A-Z0-9]{4})")
_LETTERED = re.compile(
    r"(?<![A-Za-z0-9])(?:(?P<dni>[0-9]{8}-?[A-Z])|(?P<nie>[XYZ]-?[0-9]{7}-?[A-Z])|(?P<ric>[0-9]{17}X)"
    r"|(?P<hetu>[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-Y])|(?P<curp>[A-Z]{4}[0-9]{6}[HMX][A-Z]{5}[0-9A-Z][0-9])"
    r"|(?P<codice_fiscale>[A-Z]{6}[0-9L-V]{2}[A-T][0-9L-V]{2}[A-Z][0-9L-V]{3}[A-Z])"
    r"|(?P<iban>[A-Z]{2}[0-9]{2}(?:[ \u00a0]?[A-Z0-9]){11,30}))(?![A-Za-z0-9])"
)
_LOCAL = re.compile(r"[\w.+%'-]{1,64}")
_DOMAIN = re.compile(r"(?:\w(?:[\w-]{0,61}\w)?\.){1,8}(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24})(?![\w-])")
_IPV4 = re.compile(r"[0-9][0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])")
_VERSION = re.compile(r"\b(?:versions?|release|build|firmware|driver|section|v)\W{0,3}$", re.IGNORECASE)


def find(text: str) -> list[Finding]:
    """Personal data and secrets, in order, not overlapping: of two that do a secret wins, else the longer one."""
    numbers = _numbers(text) if re.search("[0-9]", text) else ()
    found = _settled([*secrets(text), *_emails(text), *numbers])
    return _named(text, found) if _RUN.search(text) else found


def redact(text: str, findings: list[Finding]) -> str:
    """The text with every finding replaced by its kind, as `[EMAIL]`. `find` finds no more in it, if none touch."""
    return _replaced(text, findings, lambda finding: f"[{finding.kind.upper()}]")


def _replaced(text: str, findings: list[Finding], by: Callable[[Finding], str]) -> str:
    parts, shown = [], 0
    for finding in sorted(findings, key=lambda f: f.start):
        parts += [text[shown : finding.start], by(finding)]
        shown = finding.end
    return "".join([*parts, text[shown:]])


def _settled(found: list[Finding]) -> list[Finding]:
    kept: list[Finding] = []
    for one in sorted(found, key=lambda f: (f.kind not in CREDENTIALS, f.start - f.end, f.start)):
        i = bisect_left(kept, one.start, key=lambda f: f.start)
        if (i == 0 or kept[i - 1].end <= one.start) and (i == len(kept) or one.end <= kept[i].start):
            kept.insert(i, one)
    return kept


def _emails(text: str) -> Iterator[Finding]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1, at + 256)
        local = _LOCAL.match(text[max(0, at - 64) : at][::-1]) if domain else None
        name = local[0][::-1].lstrip(".-'%+") if local else ""
        if domain and name and name != "git":  # git@host:path is how a repository is fetched
            yield Finding("email", at - len(name), domain.end())
        at = text.find("@", at + 1)


def _numbers(text: str) -> Iterator[Finding]:
    """What its own form tells: addresses of machines, ids with letters, phones with +, ids in their punctuation."""
    for match in [*_IPV4.finditer(text), *(_IPV6.finditer(text) if ":" in text else ())]:
        before = text[max(0, match.start() - 16) : match.start()]
        inside = before[-1:].isalnum() or before[-1:] in tuple("._-:")
        if not inside and _is_public(match[0]) and not _VERSION.search(before):
            yield Finding("ip", *match.span())
    if _MIXED.search(text):
        for match in _LETTERED.finditer(text):
            kind = match.lastgroup or ""
            number = match[0]
            while kind == "iban" and " " in number and not _valid(kind, number):
                number = number.rpartition(" ")[0]  # capitals behind it are no part of it
            if _valid(kind, number):
                yield Finding(kind, match.start(), match.start() + len(number))
    at = text.find("+")
    while at >= 0:
        likely = text[at + 1 : at + 2].isdecimal() and not (at and text[at - 1].isalnum())
        length = _phone_length(text[at : at + 32], "ZZ") if likely else 0
        if length:
            yield Finding("phone", at, at + length)
        at = text.find("+", at + 1)
    shown = 0
    for start, end, form, id in _forms(text):
        if start >= shown and form in id.alone and _valid(id.kind, text[start:end]):
            yield Finding(id.kind, start, end)
            shown = end


def _forms(text: str) -> Iterator[tuple[int, int, str, _Id]]:
    """Runs of digits that look like an id: start, end, form. A run may hold more than one."""
    for run in _RUN.finditer(text):
        start, stop = run.span()
        shape = _STOP.sub(" ", run[0].translate(_SHAPE))
        at = 0
        while at >= 0:
            blank = shape.find(" ", at)
            head = shape[at : blank if blank >= 0 else len(shape)]
            if head in _FORMS and (at or not (start and text[start - 1].isalnum())):
                for form, id in _FORMS[head]:
                    end = at + len(form)
                    whole = shape[end : end + 1] == " " or (end == len(shape) and not text[stop : stop + 1].isalnum())
                    if whole and shape.startswith(form, at):
                        yield start + at, start + end, form, id
            at = blank + 1 if blank >= 0 else -1


def _named(text: str, found: list[Finding]) -> list[Finding]:
    """Adds numbers behind a word that names them. What is found, or is a label already, ends the reach of a word."""
    labels = [Finding(m[1].lower(), *m.span()) for m in LABEL.finditer(text) if m[1].lower() in KINDS]
    for candidates in (_named_ids, _named_phones):
        marks = _settled([*found, *labels])
        hidden = _replaced(text, marks, lambda mark: "\0" * (mark.end - mark.start))
        found = _settled([*found, *candidates(hidden, marks)])
    return found


def _is_named(text: str, marks: list[Finding], kind: str, start: int) -> bool:
    i = bisect_right(marks, start, key=lambda f: f.end)
    reach = marks[i - 1].end if i else 0
    if i and marks[i - 1].kind == kind and start - reach <= 8:  # one of a list of them
        return True
    return bool(_WORDS[kind].search(text, max(reach, start - _NEAR), start))


def _named_ids(text: str, marks: list[Finding]) -> Iterator[Finding]:
    shown = 0
    for start, end, _, id in _forms(text):
        if start >= shown and _is_named(text, marks, id.kind, start) and _valid(id.kind, text[start:end]):
            insort(marks, Finding(id.kind, start, end), key=lambda f: f.end)
            yield Finding(id.kind, start, end)
            shown = end


def _named_phones(text: str, marks: list[Finding]) -> Iterator[Finding]:
    for run in _RUN.finditer(text):
        at, stop = run.span()
        if at and text[at - 1].isalnum():
            continue
        at -= text[at - 1 : at] == "("
        while at < stop:
            number = text[at : min(stop, at + 32)]
            regions = [region for form, regions in _STARTS if form.match(number) for region in regions]
            named = bool(regions) and _is_named(text, marks, "phone", at)
            length = max(_phone_length(number, region) for region in regions) if named else 0
            if not length:
                break
            insort(marks, Finding("phone", at, at + length), key=lambda f: f.end)
            yield Finding("phone", at, at + length)
            at += length
            while at < stop and text[at] in " ./-\u00a0":
                at += 1


def _phone_length(text: str, region: str) -> int:
    """Characters at the beginning of the text that are a phone number of the region (ZZ: of the one it names), or 0."""
    import phonenumbers

    match = re.match(r"\+?[0-9(][0-9 .\-/()\u00a0\u202f]{5,22}[0-9](?![0-9])", text)
    whole = match[0] if match else ""
    for number in dict.fromkeys([whole.partition(" / ")[0], whole]):
        while sum(map(str.isdecimal, number)) > 6:
            with suppress(phonenumbers.NumberParseException):
                if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                    return len(number)
            number = re.sub(r"[^0-9]*[0-9]+$", "", number)
    return 0


def _is_public(address: str) -> bool:
    with suppress(ValueError):
        ip = ip_address(address)
        return ip.is_global and not ip.is_multicast and (ip.version == 6 or address[1] != ".")
    return False


def _valid(kind: str, number: str) -> bool:
    number = re.sub("[^0-9]" if kind == "card" else "[\u00a0\u202f]", "", number)
    likely = kind != "card" or bool(_ISSUERS.match(number))
    return likely and bool(importlib.import_module(f"stdnum.{_MODULES[kind]}").is_valid(number))
