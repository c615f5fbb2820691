"""One payload for each single control on strangers' bytes: without that control, and it alone, the payload passes."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from finetune.bundle.pack import _into_folder
from finetune.bundle.verify import BundleError, verify
from finetune.errors import WeightsError
from finetune.foreign import check_folder, configs, headers, kinds, needed, rendering, syntax, templates
from finetune.foreign.gguf import GgufError, check_gguf
from finetune.source import base_folder
from tests import toy
from tests.job import ready


def refused(folder: Path) -> str:
    """The sentence with which a folder is refused; empty where it is let in."""
    try:
        check_folder(folder, WeightsError)
    except WeightsError as error:
        return str(error)
    return ""


# --- files ----------------------------------------------------------------------------------------------------------

BEGINNINGS = {
    "a zip archive": b"PK\x03\x04",
    "HDF5": b"\x89HDF",
    "a NumPy array": b"\x93NUMPY",
    "a program": b"\x7fELF",
    "a program, as a script": b"#!/bin/sh",
    "gzip": b"\x1f\x8b",
    **{f"a pickle of protocol {number}": b"\x80" + bytes([number]) for number in (2, 3, 4, 5)},
}


@pytest.mark.parametrize("what", BEGINNINGS)
def test_a_text_that_begins_as_something_else_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(BEGINNINGS[what] + b"x" * 20)
    assert refused(tmp_path).startswith("FRN-007") and what.split(" of")[0].split(",")[0] in refused(tmp_path)


PICKLES = (
    *("bin", "pt", "pth", "pkl", "pickle", "ckpt", "h5", "hdf5", "keras", "joblib", "npy", "npz"),
    *("distcp", "metadata", "dill", "msgpack", "mar", "nemo"),
)
PROGRAMS = ["py", "pyc", "pyd", "so", "dll", "dylib", "exe", "sh", "ipynb", "js", "wasm", "jar", "whl"]


@pytest.mark.parametrize("suffix", PICKLES)
def test_each_kind_that_may_hold_a_pickle_is_called_one(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.{suffix.upper()}").write_bytes(b"x")
    assert "pickles can run code" in refused(tmp_path) and len(PICKLES) == len(kinds.PICKLES)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_each_kind_of_code_is_called_code(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"LICENSE.{suffix}").write_bytes(b"x")  # a paper by the rest of its name
    assert "code of a model's publisher is never run" in refused(tmp_path) and len(PROGRAMS) == len(kinds.CODE)


def test_the_metadata_of_a_distributed_checkpoint_is_called_a_pickle(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    assert "pickles can run code" in refused(tmp_path)


def test_the_folder_of_templates_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / kinds.TEMPLATES).mkdir()
    (tmp_path / kinds.TEMPLATES / "x.bin").write_bytes(b"x")
    assert refused(tmp_path).startswith("FRN-001") and "x.bin" in refused(tmp_path)


def test_a_base_is_looked_at_and_its_template_compared_with_the_pin_where_it_is_asked_for(tmp_path: Path) -> None:
    recipe = ready(tmp_path, model__chat_template_sha256="0" * 64)
    with pytest.raises(WeightsError, match="FRN-006"):
        base_folder(recipe)
    (tmp_path / "base" / "x.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="FRN-001"):
        base_folder(recipe)


# --- keys -----------------------------------------------------------------------------------------------------------

KEYS = (
    *("auto_map", "trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"),
    *("custom_pipelines", "custom_generate", "kernel_config"),
)
NAMED = (
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"),
    *("_attn_implementation_autoset", "attention_implementation"),
)


@pytest.mark.parametrize("key", [*KEYS, *NAMED])
def test_each_key_that_would_load_code_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"deep": [{key: "org/repo"}]}))
    assert refused(tmp_path).startswith("FRN-003") and f"deep.{key}" in refused(tmp_path)
    assert (len(KEYS), len(NAMED)) == (len(configs.CODE_KEYS), len(configs.NAMED_CODE))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '["architectures"]', ""])
def test_settings_that_cannot_be_read_name_no_class(tmp_path: Path, text: str) -> None:
    assert list(needed.needed_code(tmp_path)) == []
    (tmp_path / "config.json").write_text(text)
    assert list(needed.needed_code(tmp_path)) == []


def test_settings_larger_than_any_are_not_searched_but_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert refused(tmp_path) == ""
    monkeypatch.setattr(configs, "SETTINGS_LIMIT", 7)
    assert "larger than 7 bytes" in refused(tmp_path)


# --- headers --------------------------------------------------------------------------------------------------------


def told(tmp_path: Path, header: Any, data: bytes = b"") -> str:
    """Why a safetensors file with this header is refused; empty where it is believed."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    try:
        headers.read_header(tmp_path / "x.safetensors")
    except headers.HeaderError as error:
        return str(error)
    return ""


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> dict[str, Any]:
    """A tensor's part of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a" * 5000: entry()}, b"w", "a key has 5,000 characters"),
        ({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, b"", "no shape that a tensor can have"),
        ({"a": entry(shape=[1] * 17)}, b"w", "no shape that a tensor can have"),
        ({"a": entry(shape=[-1, -1])}, b"w", "no shape that a tensor can have"),
        ({"a": entry(shape=[True])}, b"w", "no shape that a tensor can have"),
        ({"a": entry(offsets=[0, 1, 2])}, b"w", "no place in the file"),
        ({"a": entry(offsets=[0, 1.0])}, b"w", "no place in the file"),
        ({"a": entry(offsets=[1, 0])}, b"w", "no place in the file"),
        ({"a": entry(run="x")}, b"w", "not exactly dtype, shape and data_offsets"),
        ({"a": entry(dtype="U9")}, b"w", "the type U9, which is none"),
        ({"a": entry(), "b": entry(offsets=[2, 3])}, b"www", "begins at byte 2"),
        ({"a": entry()}, b"ww", "its header describes"),
        (b'["a"]', b"", "no JSON object"),
    ],
)
def test_each_bound_of_a_header_is_kept(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    assert told(tmp_path, {"a": entry()}, b"w") == ""
    assert why in told(tmp_path, header, data)


def test_a_header_that_says_it_is_longer_than_the_file_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((99).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(headers.HeaderError, match="99 bytes is longer than the file"):
        headers.read_header(tmp_path / "x.safetensors")


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "HEADER_LIMIT", 20)
    assert "of at most 20" in told(tmp_path, {"a": entry()}, b"w")


def index(tmp_path: Path, table: Any) -> str:
    """Why an index file is refused; empty where it is believed."""
    (tmp_path / "x.json").write_text(json.dumps(table))
    try:
        headers.read_index(tmp_path / "x.json")
    except headers.HeaderError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [".", "..", "", "a/b.safetensors", "a\\b.safetensors", "a\0.safetensors", 3])
def test_each_name_that_is_none_is_refused_in_an_index(tmp_path: Path, name: Any) -> None:
    assert index(tmp_path, {"weight_map": {"a": "b.safetensors"}}) == ""
    assert "no name of a file in its folder" in index(tmp_path, {"weight_map": {"a": name}})


def test_an_index_names_weights_has_some_and_is_not_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no safetensors file" in index(tmp_path, {"weight_map": {"a": "b.bin"}})
    for table in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        assert "no weight_map" in index(tmp_path, table)
    monkeypatch.setattr(headers, "INDEX_LIMIT", 10)
    assert "larger than 10 bytes" in index(tmp_path, {"weight_map": {"a": "b.safetensors"}})


# --- GGUF -----------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    """A text as GGUF has it."""
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's part of a header."""
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return text(key) + struct.pack("<I", kind) + value


def gguf(tmp_path: Path, pairs: list[bytes], tensors: list[bytes], data: bytes = b"\0" * 64) -> str:
    """Why a GGUF file is refused; empty where it is believed."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])
    (tmp_path / "x.gguf").write_bytes(head + b"\0" * (-len(head) % 32) + data)
    try:
        check_gguf(tmp_path / "x.gguf")
    except GgufError as error:
        return str(error)
    return ""


NUMBER = pair(b"n", 4, struct.pack("<I", 1))


@pytest.mark.parametrize(
    ("pairs", "tensors", "why"),
    [
        ([NUMBER, NUMBER], [tensor()], "the key n twice"),
        ([], [tensor(), tensor()], "two tensors of one name"),
        ([], [tensor(offset=8)], "would begin at byte"),
        ([], [tensor(offset=2**40)], "would begin at byte"),
        ([], [tensor(kind=257)], "of type 257"),
        ([], [tensor(shape=(2**40,))], "more than the file can hold"),
        ([], [tensor(shape=(1,) * 5)], "has 5 dimensions"),
        ([], [tensor(name=b"w" * 257)], "257 bytes of a text, of at most 256"),
        ([pair(b"n", 13, b"")], [tensor()], "n is of type 13"),
        ([pair(b"n", 9, struct.pack("<IQ", 9, 0))], [tensor()], "an array of type 9"),
        ([pair(b"n", 9, struct.pack("<IQ", 0, 5_000_000))], [tensor()], "5,000,000 items of n, of at most"),
        ([pair(b"n", 9, struct.pack("<IQ", 12, 3_000_000))], [tensor()], "ends before it is complete"),
        ([pair(b"n", 8, struct.pack("<Q", 2**30))], [tensor()], "bytes of a text, of at most"),
        ([pair(b"general.alignment", 4, struct.pack("<I", 24))], [tensor()], "its alignment is 24"),
        ([pair(b"general.alignment", 10, struct.pack("<Q", 32))], [tensor()], "its alignment is 0"),
    ],
)
def test_each_bound_of_a_gguf_header_is_kept(
    tmp_path: Path, pairs: list[bytes], tensors: list[bytes], why: str
) -> None:
    assert gguf(tmp_path, [NUMBER], [tensor()]) == ""
    assert why in gguf(tmp_path, pairs, tensors)


def test_a_gguf_header_is_not_read_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.foreign.gguf.HEADER", 60)
    assert "ends before it is complete, or never" in gguf(tmp_path, [NUMBER], [tensor()])
    monkeypatch.setattr("finetune.foreign.gguf.HEADER", 2**20)
    assert gguf(tmp_path, [NUMBER], [tensor()]) == ""


# --- chat templates -------------------------------------------------------------------------------------------------

METHODS = ["format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "encode", "translate", "mro"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_that_makes_much_of_little_is_refused(method: str) -> None:
    assert syntax.syntax_problems("{{ x.strip() }}") == []
    assert syntax.syntax_problems(f"{{{{ x.{method}(9) }}}}") == [f"line 1: .{method} is not allowed"]
    assert len(METHODS) == len(syntax.METHODS)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ x._private }}", "._private is not allowed"),
        ("{{ __name }}", "the name __name is not allowed"),
        ("{{ x['__class__'] }}", "the word '__class__' is not allowed"),
        ("{{ x['a' ~ 'b'] }}", "a key that is put together"),
        ("{{ x['a' + 'b'] }}", "a key that is put together"),
        ("{{ range(100001) }}", "the number 100001 is larger"),
        ("{{ x.format(1) }}", ".format is only allowed"),
        ("{{ '{:>9}'.format(1) }}", ".format is only allowed"),
        ("{{ 'a' * 9 }}", "mul is not allowed"),
        ("{{ 2 ** 9 }}", "pow is not allowed"),
        ("{{ x|attr('a') }}", "the filter attr is not allowed"),
        ("{{ x|sort(attribute='a' ~ 'b') }}", "the filter sort takes plain words only"),
        ("{{ x|map('attr', 'a') }}", "map takes the name of a filter"),
        ("{{ x|map(y) }}", "map takes the name of a filter"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply"),
        ("x" * 1_000_001, "of at most 1,000,000"),
        ("{% if %}", "no Jinja template"),
    ],
)
def test_each_rule_of_the_syntax_is_kept(source: str, why: str) -> None:
    assert any(why in problem for problem in syntax.syntax_problems(source)), syntax.syntax_problems(source)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(UnicodeEncodeError):
        rendering.rendered(toy.tokenizer(), [{"role": "user", "content": "\ud800"}])


LIMITS = """
import resource, runpy
runpy.run_path(CHILD)["main"]()
for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"):
    print(resource.getrlimit(getattr(resource, name)))
"""


def test_the_process_of_a_trial_has_its_limits_and_cannot_take_them_back() -> None:
    job = {"templates": [toy.CHATML], "tokens": {}, "seconds": 30, "mebibytes": 512, "characters": 1000}
    code = LIMITS.replace("CHILD", repr(str(Path(templates.__file__).with_name("template_child.py"))))
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True)
    told, memory, seconds, size = done.stdout.splitlines()
    assert json.loads(told)[0]["error"] == "it writes more than 1,000 characters of a short conversation"
    for pair, most in ((memory, 2**40), (seconds, 300), (size, 0)):
        soft, hard = map(int, pair.strip("()").split(", "))
        assert soft == hard and 0 <= soft <= most, done.stdout


# --- bundles --------------------------------------------------------------------------------------------------------


def header(name: str, **facts: Any) -> bytes:
    """A member of a tar file, without its bytes."""
    member = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.PAX_FORMAT if "pax_headers" in facts else tarfile.GNU_FORMAT)


TARS = {
    "a map of holes that has no numbers": header("x", pax_headers={"GNU.sparse.map": "x"}),
    "a size that no number of the system holds": header("x", type=b"L", size=2**80),
    "a size that no memory holds": header("x", type=b"L", size=2**62),
    "a size below nothing": header("x", size=-512),
    "a name for a name, without an end": (header("x", type=b"L", size=1) + b"x" + bytes(511)) * 2000,
    "no header": b"x" * 512,
}


@pytest.mark.parametrize("data", TARS.values(), ids=TARS.keys())
def test_a_tar_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data + bytes(1024))
    with pytest.raises(BundleError, match=r"BND-001 .* is no tar file"):
        verify(tmp_path / "x.tar")


def test_a_file_of_a_tar_file_that_is_mostly_holes_is_not_read(tmp_path: Path) -> None:
    holes = header("x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**20)}, size=1)
    manifest = json.dumps({"files": {}}).encode()
    data = holes + bytes(512) + header("bundle.json", size=len(manifest)) + manifest.ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(data + bytes(1024))
    with pytest.raises(BundleError, match="x is no file"):
        verify(tmp_path / "x.tar")


def test_a_bundle_that_is_not_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"BND-001 .* is not here"):
        verify(tmp_path / "x.tar")


def test_a_size_and_a_name_other_than_the_manifest_has_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    facts = {"bytes": 2, "sha256": hashlib.sha256(b"x").hexdigest()}
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {"x": facts}}))
    with pytest.raises(BundleError, match=r"x has other bytes \(1 bytes, packed were 2\)"):
        verify(tmp_path)
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {"\ud800": facts}}))  # half a character
    with pytest.raises(BundleError, match=r"BND-002(?s:.*) is missing"):
        verify(tmp_path)


def test_no_file_of_a_bundle_is_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("x")
    with pytest.raises(FileExistsError):  # as where a file system takes `licence` for `LICENCE`
        _into_folder(tmp_path, "LICENSE", tmp_path / "LICENSE", lambda count: None)
