"""Rows of a card's package: what each kind of file says, as named fields. The wheel's bytes were checked before."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import html
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.card import Card
from finetune.data.excerpt import plain_body
from finetune.data.rows import Row
from finetune.errors import DataError

_CATCH_ALL = re.compile(
    r"(other-|proprietary-license|commercial-license|public-domain|unknown|generic-|warranty-disclaimer|free-unknown|us-govt)"
)
_IN_PAGE_LINK = re.compile(r"\[([^\]]*)\]\(#[^)]*\)")
_SAME_STEM = {"lgpl": "gpl", "agpl": "gpl", "gfdl": "gpl", "microsoft": "ms"}


def read_package(card: Card, wheel: Path) -> tuple[list[Row], dict[str, int]]:
    """The rows of `card` in `wheel`, and what was passed over because it is no row (reason -> count).

    Raises DataError DATA-009 when a file of the card is missing or has no rows.
    """
    from finetune.fetch import open_wheel

    with open_wheel(wheel) as archive:
        members = [n for n in archive.namelist() if any(fnmatch.fnmatchcase(n, pattern) for pattern in card.members)]
        missing = [p for p in card.members if not fnmatch.filter(members, p)]
        if missing:
            raise DataError("DATA-009", f"{wheel.name} has no file {missing[0]}", f"card {card.name} names it")
        rows: list[Row] = []
        passed_over: dict[str, int] = {}
        if card.reader == "licence_rules":
            rows, passed_over = _licence_rules(archive, members)
        else:
            for member in members:
                rows += list(_records(card.reader, member, archive.read(member).decode("utf-8")))
            if card.reader == "factbook" and "section" in card.keep:
                every, rows = rows, [row for row in rows if row.fields["section"] in card.keep["section"]]
                passed_over["other sections"] = len(every) - len(rows)
    if not rows:
        raise DataError("DATA-009", f"{wheel.name} has no rows for card {card.name}")
    return rows, passed_over


def _records(reader: str, member: str, text: str) -> Iterator[Row]:
    if reader == "jsonl":
        # not splitlines(): U+2028 and its kin are legal inside a JSON text
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(member, number, line, json.loads(line))
    elif reader == "json":
        for number, value in enumerate(json.loads(text), 1):
            yield _record(member, number, json.dumps(value, sort_keys=True), value)
    elif reader == "csv":
        for number, value in enumerate(csv.DictReader(io.StringIO(text)), 2):
            yield _record(member, number, json.dumps(value, sort_keys=True), value)
    elif reader == "factbook":
        yield from _factbook(member, json.loads(text))


def _record(member: str, number: int, raw: str, value: dict[str, Any]) -> Row:
    fields = {key: _IN_PAGE_LINK.sub(r"\1", item) for key, item in value.items() if isinstance(item, str)}
    sha256 = hashlib.sha256(raw.encode()).hexdigest()
    return Row(file=member, line=number, id=f"{Path(member).stem}:{number}", sha256=sha256, fields=fields)


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


def _licence_rules(archive: zipfile.ZipFile, members: list[str]) -> tuple[list[Row], dict[str, int]]:
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
