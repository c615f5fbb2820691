"""Which files a folder of weights may have: `file_problems(folder)`. Everything that is not on the list is refused.

Only names and first bytes are looked at, so this takes milliseconds for a folder of any size. What lies in folders
below is left alone, because nothing reads it; `additional_chat_templates/` is the exception, of us as of transformers.
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


def file_problems(folder: Path) -> Iterator[Problem]:
    """What may not be in a folder: an entry for pickles, code, other kinds, links that lead out, and lying names."""
    files = sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")])
    files = [path for path in files if not path.is_dir() or path.is_symlink()]
    pickles = [path.name for path in files if path.suffix.lower() in PICKLES or path.name == ".metadata"]
    if pickles:
        why = "pickles can run code when they are opened, and are never read"
        yield "FRN-001", pickles, why, "another folder, with safetensors alone"
    code = [path.name for path in files if path.suffix.lower() in CODE]
    if code:
        why = "code of a model's publisher is never run here, so it has no place beside the weights"
        yield "FRN-001", code, why, "a copy of the folder without these files"
    known = {*pickles, *code}
    other = [path.name for path in files if path.name not in known and not _is_known(path)]
    if other:
        why = f"such files are not read here; those that are end in {', '.join(sorted(READ))}"
        yield "FRN-001", other, why, "a copy of the folder without these files"
    if out := [path.name for path in files if _leads_out(path, folder)]:
        yield "FRN-002", out, "a link that leads out of the folder, or no file at all", "a folder with the files in it"
    if lying := [f"{path.name} is {what}" for path in files if (what := _other_content(path))]:
        yield "FRN-007", lying, "the name says otherwise", "the files as they were published"


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in READ | BESIDE or path.name in HIDDEN or PAPERS.fullmatch(path.name) is not None


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether what a name stands for is no file, or lies elsewhere. The hub's own cache links to its blobs: allowed."""
    real, homes = path.resolve(), [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    return not real.is_file() or not any(real.is_relative_to(home) for home in homes)


def _other_content(path: Path) -> str:
    """What a file is by its first bytes where its name says otherwise, or an empty text."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix in BESIDE:
        return ""
    with path.open("rb") as handle:
        first = handle.read(16)
    if suffix == ".safetensors":  # a length of 8 bytes, which may be any, then JSON: `headers.py` reads it all
        first = b"" if first[8:9] in (b"{", b"") else first
    return next((what for magic, what in MAGIC.items() if first.startswith(magic)), "")
