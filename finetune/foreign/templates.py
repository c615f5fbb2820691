"""Chat templates of a folder, looked at before anything is rendered: `vet(folder, seen, pin)`.

A template is a program that a stranger wrote and that every row goes through. Once per template: it is read
(`syntax.py`), then five conversations are rendered in a process of its own (`template_child.py`) with limits on time,
memory and output. What that does not show is how it behaves on words it waits for, so nothing is rendered here without
the limits of `rendering.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from finetune.errors import WeightsError
from finetune.foreign.configs import read_settings
from finetune.foreign.kinds import TEMPLATES
from finetune.foreign.rendering import AS_PUBLISHED
from finetune.foreign.syntax import syntax_problems

SECONDS, MEBIBYTES, CHARACTERS = 10, 512, 1_000_000
"""What a template may take for all five conversations, and write for one."""

START_SECONDS = 120
"""How long a busy machine may take to import what renders."""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""Names that templates read; transformers gives them the tokenizer's own."""

HOLDERS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Settings files with a key `chat_template`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The chat template that a folder's tokenizer uses."""

    sha256: str
    """Hash of its text; empty where a folder has none."""
    known_as: str = ""
    """File in TRL's collection of published templates with the same text, or empty."""
    difference: str = ""
    """How it differs from those that its family was published with, in a sentence; empty where it is one of them."""


def vet(folder: Path, seen: Path | None = None, pin: str = "") -> str:
    """The hash of a folder's chat template (empty without one), after all its templates were read and tried out.

    `seen` is a folder in which the hashes of templates that passed are kept, so that each is tried once. Raises
    WeightsError: FRN-004 it has what no template needs, FRN-005 it takes too long or too much, FRN-006 it is not the
    one whose hash `pin` is.
    """
    found = texts_of(folder)
    for place, text in found.items():
        if problems := syntax_problems(text):
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            why = "; ".join(problems[:3]) + more
            raise WeightsError("FRN-004", f"{folder / place}: this chat template is refused", why, AS_PUBLISHED)
    main = main_text(found)
    sha256 = digest(main) if main else ""
    if pin and sha256 != pin:
        what = f"{folder}: the chat template has the sha256 {sha256 or '(there is none)'}"
        raise WeightsError(
            "FRN-006", what, f"model.chat_template_sha256={pin}", "the folder as it was, or the new hash"
        )
    new = {place: text for place, text in found.items() if not _was_seen(seen, text)}
    if new:
        for place, error in zip(new, try_out(list(new.values())), strict=True):
            if error:
                raise WeightsError("FRN-005", f"{folder / place}: this chat template is refused", error, AS_PUBLISHED)
        for text in new.values():
            _note(seen, text)
    return sha256


def texts_of(folder: Path) -> dict[str, str]:
    """Place -> text of every chat template in a folder; of several under one key, each has its name behind a colon."""
    found: dict[str, str] = {}
    for path in [folder / "chat_template.jinja", *sorted((folder / TEMPLATES).glob("*.jinja"))]:
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
    for name in HOLDERS:
        if not (folder / name).is_file():
            continue
        settings = read_settings(folder / name)
        value = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(value, str):
            found[name] = value
        elif isinstance(value, dict):
            found |= {f"{name}:{key}": str(text) for key, text in value.items()}
        elif isinstance(value, list):
            for entry in filter(lambda each: isinstance(each, dict), value):
                found[f"{name}:{entry.get('name')}"] = str(entry.get("template"))
    return found


def main_text(found: dict[str, str]) -> str:
    """The template that transformers uses of those: the file's own, else that of the tokenizer's settings."""
    for place in ("chat_template.jinja", HOLDERS[0], f"{HOLDERS[0]}:default"):
        if place in found:
            return found[place]
    return ""


def digest(text: str) -> str:
    """Hex sha256 of a template."""
    return hashlib.sha256(text.encode()).hexdigest()


def try_out(templates: list[str]) -> list[str]:
    """For each template why it is refused, or an empty text, after five conversations in a process with limits."""
    job = {"templates": templates, "tokens": TOKENS, "seconds": SECONDS}
    job |= {"mebibytes": MEBIBYTES, "characters": CHARACTERS}
    words = [sys.executable, "-P", str(Path(__file__).with_name("template_child.py"))]
    slow = f"it does not render five short conversations in {SECONDS} s of processor time"
    try:
        done = subprocess.run(
            words, input=json.dumps(job).encode(), capture_output=True, timeout=START_SECONDS + 10 * SECONDS
        )
    except subprocess.TimeoutExpired:
        return [slow] if len(templates) == 1 else _one_by_one(templates)
    if done.returncode == 0:
        return [str(each["error"]) for each in json.loads(done.stdout)]
    if len(templates) > 1:
        return _one_by_one(templates)
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return [slow]
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
    return [f"it ended the process that rendered it: {lines[-1][:200]}"]


def _one_by_one(templates: list[str]) -> list[str]:
    return [error for template in templates for error in try_out([template])]


def about(folder: Path, published: tuple[str, ...] = ()) -> Template:
    """What is known of a folder's chat template. `published` names those of its family in TRL's collection."""
    text = main_text(texts_of(folder))
    if not text:
        return Template(sha256="")
    known = _collection()
    names = [name for name, other in known.items() if other.strip() == text.strip()]
    mine = [name for name in published if name in known]
    difference = ""
    if mine and not set(names) & set(mine):
        nearest = max(mine, key=lambda name: _likeness(known[name], text))
        lines = list(difflib.unified_diff(known[nearest].splitlines(), text.splitlines(), lineterm="", n=0))
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        place = next((line.split(" ")[2] for line in lines if line.startswith("@@")), "")
        difference = (
            f"the chat template is none that this family was published with: {len(changed)} lines differ from "
            f"{nearest}, first at line {place.lstrip('+').partition(',')[0]}"
        )
    return Template(sha256=digest(text), known_as=names[0] if names else "", difference=difference)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.splitlines(), other.splitlines()).ratio()


def _collection() -> dict[str, str]:
    """File -> text of the published templates that TRL has, without importing it."""
    spec = find_spec("trl")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [path for place in places for path in sorted((Path(place) / "chat_templates").glob("*.jinja"))]
    return {path.name: path.read_text(encoding="utf-8") for path in files if not path.stem.endswith("_training")}


def _was_seen(seen: Path | None, text: str) -> bool:
    return seen is not None and (seen / digest(text)).is_file()


def _note(seen: Path | None, text: str) -> None:
    """Keeps that a template passed: an empty file with its hash as its name, which is written whole or not at all."""
    if seen is not None:
        seen.mkdir(parents=True, exist_ok=True)
        (seen / digest(text)).touch()
