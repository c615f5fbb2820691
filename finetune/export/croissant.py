"""The rows of a run as Croissant 1.1 with its RAI vocabulary (MLCommons, JSON-LD): `croissant(name, run_dir, ...)`.

Files by name, bytes and sha256, columns by type, splits by number of rows, cleaning by what was asked for and counted.
Neither a word of a row nor a folder of the machine stands in it. What nobody has said is left out, also where the
specification wants it: the address of the user's own rows, who made them. The tests check it with mlcroissant.
Source: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html, and croissant-rai-spec.html beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from finetune import __version__, events, record
from finetune.data.card import card_folder
from finetune.data.files import sources
from finetune.recipe import Recipe
from finetune.rundir import RunDir, sha256_file

Node = dict[str, Any]

_TERMS = (
    "annotation arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty fileSet "
    "format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated "
    "replace samplingRate separator source subField transform"
)
CONTEXT: Node = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "wd": "http://www.wikidata.org/entity/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
} | {name: f"cr:{name}" for name in _TERMS.split()}
"""What the words of the file mean: mlcroissant's own list, with annotations and Wikidata's terms."""
MEDIA = {
    ".jsonl": "application/jsonlines", ".ndjson": "application/jsonlines", ".json": "application/json",
    ".csv": "text/csv", ".tsv": "text/tab-separated-values", ".txt": "text/plain", ".md": "text/markdown",
    ".parquet": "application/x-parquet", ".arrow": "application/vnd.apache.arrow.stream",
    ".gz": "application/gzip", ".zst": "application/zstd",
}  # fmt: skip
"""Suffix -> media type, as mlcroissant calls it where it reads such files."""
SPLITS = {"train": "cr:TrainingSplit", "heldout": "cr:TestSplit"}
COLUMNS = {
    "row": ("sc:Text", False, "Name of the row, as in ledger.jsonl."),
    "group": ("sc:Text", False, "Rows of one group stand on one side of the split."),
    "input_ids": ("sc:Integer", True, "Tokens of the base's tokenizer."),
    "labels": ("sc:Integer", True, "The same tokens where they are trained, else -100."),
    "prompt_length": ("sc:Integer", False, "Tokens before the answer."),
    "messages": ("", True, "The conversation; empty for plain text and for tokens."),
    "answer": ("sc:Text", False, "Content of the last message."),
    "choices": ("sc:Text", True, "All possible answers; empty where answers are free."),
}
"""Column of a split -> type of its values, whether it is a list of them, what it holds. `messages` has parts."""
PARTS = ("role", "content")
"""Texts of a message."""
NUMBER_OF_RECORDS = "wd:Q4049983"
"""The term that the specification counts records by."""


def croissant(name: str, run_dir: RunDir, recipe: Recipe, facts: Node, inputs: dict[str, str]) -> Node:
    """croissant.json: what the data stage read and left. `inputs`: path -> sha256 of all that the run read."""
    report, counts = facts["data"], facts["rows"]
    source, asked = report["source"], report["address"]["settings"]
    title = source["title"] if "title" in source else "rows of the user's own"
    splits = ", ".join(f"{count:,} {split}" for split, count in counts["splits"].items())
    files = [*_prepared(run_dir), *_read(recipe, source, inputs)]
    ends = [event for event in events.events(run_dir) if event["what"] == "finished"]
    told = {
        "url": next((where for file in files if (where := file["contentUrl"]).startswith("pkg:")), ""),
        "datePublished": next((event["when"] for event in reversed(ends) if event["stage"] == "data"), ""),
        "creditText": source["attribution"],
        "citeAs": source["attribution"],
        "inLanguage": recipe.data.languages,
        "rai:dataPreprocessingProtocol": list(_steps(asked, not recipe.data.card, counts["dropped"])),
        "rai:personalSensitiveInformation": _personal(asked["privacy"], report["found"]),
        "rai:dataLimitations": [
            *([source["note"]] if "note" in source else []),
            *(f"Not found by the checks: {limit}." for limit in report["not_detected"]),
        ],
        "rai:dataUseCases": [f"Fine-tuning of {name} (train).", "Its comparison with its base (heldout)."],
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": f"{name}: {title}",
        "description": f"{title}, prepared by finetune {__version__}: {counts['read']:,} rows read, {splits}.",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "license": _licence(recipe.licence.of_rows or source["licence"]),
        "version": f"1.0.0+{report['content_sha256'][:16]}",
        **{key: value for key, value in told.items() if value},
        "distribution": files,
        "recordSet": [_splits(), *(_rows(split, report["splits"][split]) for split in SPLITS)],
    }


def _prepared(run_dir: RunDir) -> Iterator[Node]:
    """The files that the data stage left; their addresses are those of the run's folder, seen from export/."""
    names = sorted(path.name for path in run_dir.data.iterdir() if path.is_file())
    for name, sha256 in record.hashes(run_dir.data, names).items():
        file = _file(f"prepared/{name}", name, sha256, f"{(run_dir.data / name).stat().st_size} B")
        yield file | {"contentUrl": f"../{run_dir.data.name}/{name}", "description": "Prepared; not in the export."}


def _read(recipe: Recipe, source: Node, inputs: dict[str, str]) -> Iterator[Node]:
    """The files that the rows came from, as the ledger names them, or the package that held them, as the card does."""
    own = {s.name: s.path.absolute() for s in sources([*recipe.data.train_files, *recipe.data.heldout_files])}
    for name, sha256 in source["files"].items():
        package = re.fullmatch(r"([\w.-]+) (\d\S*)", name)
        if package and Path(name).suffix not in MEDIA:
            project, version = package.groups()
            where = {"contentUrl": f"pkg:pypi/{project}@{version}", "encodingFormat": "application/zip"}
            yield _file(f"read/{project}-{version}", name, sha256) | where
            continue
        path = own[name] if name in own else card_folder() / name
        now = inputs[str(path)] if str(path) in inputs else sha256_file(path) if path.is_file() else ""
        size = f"{path.stat().st_size} B" if now == sha256 else ""  # of other bytes it would say nothing
        file = _file(f"read/{quote(name)}", name, sha256, size)
        yield file | {"contentUrl": quote(name), "description": "Read by the data stage; not passed on."}


def _file(identity: str, name: str, sha256: str, size: str = "") -> Node:
    suffix = Path(name).suffix.lower()
    media = MEDIA[suffix] if suffix in MEDIA else "application/octet-stream"
    file = {"@type": "cr:FileObject", "@id": identity, "name": name, "sha256": sha256, "encodingFormat": media}
    return file | ({"contentSize": size} if size else {})


def _splits() -> Node:
    fields = [_field("splits/name", "sc:Text"), _field("splits/url", ["sc:URL", "cr:Split"])]
    data = [{"splits/name": name, "splits/url": url} for name, url in SPLITS.items()]
    told: Node = {"dataType": "cr:Split", "key": {"@id": "splits/name"}, "field": fields, "data": data}
    return {"@type": "cr:RecordSet", "@id": "splits", "name": "splits"} | told


def _rows(split: str, counts: Node) -> Node:
    """The record set of a split: its columns, and how many rows it has."""
    fields = []
    for column, (kind, many, meaning) in COLUMNS.items():
        source = {"fileObject": {"@id": f"prepared/{split}.arrow"}, "extract": {"column": column}}
        field = _field(f"{split}/{column}", kind) | {"description": meaning}
        field |= {"isArray": True, "arrayShape": "-1"} if many else {}
        inner = [(part, source | {"transform": {"jsonPath": part}}) for part in PARTS]
        parts = [_field(f"{split}/{column}/{part}", "sc:Text") | {"source": where} for part, where in inner]
        fields.append(field | ({"source": source} if kind else {"subField": parts}))
    tokens = f"{counts['tokens']:,} tokens, {counts['trainable_tokens']:,} of them trained"
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"{counts['rows']:,} rows in {counts['groups']:,} groups, {tokens}.",
        "key": {"@id": f"{split}/row"},
        "annotation": [_field(f"{split}/count", NUMBER_OF_RECORDS) | {"value": counts["rows"]}],
        "field": fields,
    }


def _field(identity: str, kind: str | list[str]) -> Node:
    field: Node = {"@type": "cr:Field", "@id": identity, "name": identity.rpartition("/")[2]}
    return field | ({"dataType": kind} if kind else {})


def _licence(said: str) -> str:
    """The page of a licence that SPDX knows, else what was said of it."""
    try:
        known = canonicalize_license_expression(said)
    except InvalidLicenseExpression:
        return said
    return said if " " in known else f"https://spdx.org/licenses/{known}.html"


def _steps(asked: Node, own: bool, dropped: dict[str, int]) -> Iterator[str]:
    """What was done to rows, by the settings that the prepared set depends on, and how many were left out and why."""
    if own:  # rows of a card are not compared with each other
        yield f"Rows with the words of an earlier one: {asked['duplicates']}."
    if own and asked["near_duplicates"] != "off":
        yield f"Rows that share {asked['near_share']:.0%} of their five-word runs: {asked['near_duplicates']}."
    yield f"Training rows that ask what is held out: {asked['leakage']}."
    yield f"Personal data and secrets: {asked['privacy']}."
    yield f"Answers that repeat themselves, are cut off, refuse or are no text: {asked['quality']}."
    yield f"Rows of more than {asked['max_length']:,} tokens: {asked['too_long'].replace('auto', 'error')}."
    yield f"Left out: {', '.join(f'{code} {count:,}' for code, count in dropped.items()) or 'none'}."


def _personal(policy: str, found: dict[str, int]) -> str:
    """What was asked of personal data, and how much of which kind was found."""
    if policy == "off":
        return "Not looked for."
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.items() if " " not in kind)  # others are of quality
    then = {"report": "left as it is", "redact": "replaced by its kind", "drop": "its rows left out"}[policy]
    counted = f"{kinds}; {then}" if kinds else "none"
    return f"Looked for by patterns, check digits and words before a number. Found: {counted}."
