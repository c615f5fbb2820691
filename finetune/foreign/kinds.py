"""Which files a folder of weights may have: `file_problems(folder)`. Everything that is not on the list is refused.

Only names and first bytes are looked at, so this takes milliseconds for a folder of any size. A base's Python files may
lie there where the recipe says that they are ignored (`model.code`): text, as long as nobody imports them. What lies in
folders below is left alone, because nothing reads it; `additional_chat_templates/` is the exception, of us as of
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

READ = {".safetensors", ".json", ".txt", ".jinja", ".model", ".tiktoken"}
"""Kinds that we, or libraries for us, open: weights, settings, tokenizers, chat templates."""

BESIDE = {".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".yaml", ".yml", ".sig"}
"""Kinds that nobody opens, and that published folders have."""

PAPERS = re.compile(r"(LICEN[CS]E|NOTICE|README|USE_POLICY|COPYING|COPYRIGHT|AUTHORS|CITATION)[\w.-]*", re.IGNORECASE)
"""Papers, with any ending that is not on a list below."""

HIDDEN = {".gitattributes", ".gitignore", ".sha256.json"}

PICKLES = {
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".hdf5", ".keras", ".joblib", ".npy", ".npz"),
    *(".distcp", ".metadata", ".dill", ".msgpack", ".mar", ".nemo"),
}
"""Kinds that hold pickles, or may: opening one can run any program."""

CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".ipynb", ".js", ".wasm", ".jar", ".whl"}

PYTHON = ".py"
"""The one kind of code that may be ignored."""

NEVER, REFUSE, IGNORE = "never", "refuse", "ignore"
"""What code beside weights means: refused whatever a recipe says, refused, or ignored."""

WEIGHTS = ".safetensors"

TEMPLATES = "additional_chat_templates"

MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"\x7fELF": "a program",
    b"#!": "a program",
    b"\x1f\x8b": "gzip",
    **{b"\x80" + bytes([number]): "a pickle" for number in range(2, 6)},
}
"""How a file begins that is not text -> what it is."""

Problem = tuple[str, list[str], str, str]
"""Id, names, why, what to do."""


UNREAD = "model.code=ignore to train without it, unread and out of every copy"
"""What may be typed where code of a base is refused."""

_LINKED: dict[Path, Path] = {}


def let_link(folder: Path, home: Path) -> None:
    """Lets the weights of `folder` be links into `home` while this process lives. Only for a folder that it has made.

    Kept here and not in the folder, because whatever stands in a folder a stranger can write.
    """
    _LINKED[folder.resolve()] = home.resolve()


def stands_for(folder: Path) -> Path | None:
    """The folder into which the weights of this one may be links, if this process has made it so."""
    return _LINKED.get(folder.resolve())


def file_problems(folder: Path, code: str = NEVER) -> Iterator[Problem]:
    """What may not be in a folder: an entry for pickles, code, other kinds, links that lead out, and lying names."""
    files = files_of(folder)
    pickles = [path.name for path in files if path.suffix.lower() in PICKLES or path.name == ".metadata"]
    if pickles:
        why = "pickles can run code when they are opened, and are never read"
        yield "FRN-001", pickles, why, "another folder, with safetensors alone"
    programs = [path for path in files if path.suffix.lower() in CODE]
    if refused := [path for path in programs if code != IGNORE or not is_python(path)]:
        why = "code of a model's publisher is never run here, so it has no place beside the weights"
        fix = f"{UNREAD}, or " if code == REFUSE and all(map(is_python, refused)) else ""
        yield "FRN-001", [path.name for path in refused], why, f"{fix}a copy of the folder without these files"
    known = {*pickles, *(path.name for path in programs)}
    other = [path.name for path in files if path.name not in known and not _is_known(path)]
    if other:
        why = f"such files are not read here; those that are end in {', '.join(sorted(READ))}"
        yield "FRN-001", other, why, "a copy of the folder without these files"
    if out := [path.name for path in files if _leads_out(path, folder)]:
        yield "FRN-002", out, "a link that leads out of the folder, or no file at all", "a folder with the files in it"
    if lying := [f"{path.name} is {what}" for path in files if (what := _other_content(path))]:
        yield "FRN-007", lying, "the name says otherwise", "the files as they were published"


def files_of(folder: Path) -> list[Path]:
    """What is looked at of a folder: its files and links, and those of its folder of templates, sorted."""
    found = sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")])
    return [path for path in found if not path.is_dir() or path.is_symlink()]


def is_python(path: Path) -> bool:
    """Whether a file is code of the one kind that may be ignored, by its name."""
    return path.suffix.lower() == PYTHON


def is_wanted(path: Path) -> bool:
    """Whether a file is one that somebody reads, by its name: weights, settings, tokenizers, templates, papers."""
    suffix = path.suffix.lower()
    return suffix in READ or (PAPERS.fullmatch(path.name) is not None and suffix not in CODE)


def _is_known(path: Path) -> bool:
    return is_wanted(path) or path.suffix.lower() in BESIDE or path.name in HIDDEN


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether what a name stands for is no file, or lies elsewhere."""
    real, homes = path.resolve(), _homes(folder)
    if path.suffix == WEIGHTS and (home := stands_for(folder)):
        homes += _homes(home)
    return not real.is_file() or not any(real.is_relative_to(home) for home in homes)


def _homes(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it, or where the hub's own cache keeps what it links to."""
    found = [folder.resolve()]
    return [*found, found[0].parent.parent / "blobs"] if found[0].parent.name == "snapshots" else found


def _other_content(path: Path) -> str:
    """What a file is by its first bytes where its name says otherwise, or an empty text."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix in BESIDE:
        return ""
    with path.open("rb") as handle:
        first = handle.read(16)
    if suffix == WEIGHTS:  # a length of 8 bytes, which may be any, then JSON: `headers.py` reads it all
        first = b"" if first[8:9] in (b"{", b"") else first
    if is_python(path):  # a text that begins so is what its name says
        first = first.removeprefix(b"#!")
    return next((what for magic, what in MAGIC.items() if first.startswith(magic)), "")
