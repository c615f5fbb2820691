"""Each row of the threat table with a payload that touches a canary if it is run, brought in by the doors users use."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.base import load_base
from finetune.compose import load_recipe
from finetune.data.card import read_card
from finetune.data.files import sources
from finetune.data.readers import Beside
from finetune.errors import AdapterError, DataError, RecipeError, WeightsError
from finetune.foreign import configs, headers, rendering, templates
from finetune.foreign.gguf import GgufError, check_gguf
from finetune.foreign.kinds import PICKLES
from finetune.foreign.syntax import syntax_problems
from tests.toy import CHATML
from tests.toy import tokenizer as toy_tokenizer

TENSOR = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


def weights(header: bytes = TENSOR, data: bytes = b"w", length: int | None = None) -> bytes:
    """A safetensors file; `length` lies about its header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


class Trap:
    """What touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as far as everything that looks before it loads can see."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    (path / "model.safetensors").write_bytes(weights())
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "LICENSE").write_text("Do as you like.")
    return path


def refused(folder: Path) -> str:
    """The sentence with which a folder is refused when a base is loaded from it."""
    with pytest.raises(WeightsError) as caught:
        load_base(folder, load_in_4bit=False, precision="fp32")
    return str(caught.value)


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, everything printed) of a command line."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out + err


# --- pickles and code -----------------------------------------------------------------------------------------------


def test_the_pickle_would_touch_the_canary(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "touched")))  # noqa: S301  # that it is one
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("suffix", sorted(PICKLES))
def test_a_pickle_in_a_model_folder_is_refused_by_its_name(folder: Path, canary: Path, suffix: str) -> None:
    (folder / f"weights{suffix}").write_bytes(pickle.dumps(Trap(canary)))
    assert f"weights{suffix}" in (told := refused(folder)) and told.startswith("FRN-001") and "pickles" in told


def test_the_metadata_of_a_distributed_checkpoint_is_refused(folder: Path, canary: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(canary)))
    assert refused(folder).startswith("FRN-001")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"])
def test_a_pickle_under_a_harmless_name_is_refused_by_its_bytes(folder: Path, canary: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Trap(canary)))
    assert refused(folder).startswith("FRN-007") and name in refused(folder)


def test_an_archive_of_torch_under_the_name_of_safetensors_is_refused(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(canary)))
    assert "model.safetensors is a zip archive, as torch.save writes" in refused(folder)


@pytest.mark.parametrize("name", ["modeling_x.py", "helper.so", "run.sh", "model.exe.config", "weights.onnx"])
def test_code_and_unknown_kinds_are_refused(folder: Path, canary: Path, name: str) -> None:
    (folder / name).write_text(f"import os; os.system('touch {canary}')")
    assert refused(folder).startswith("FRN-001") and name in refused(folder)


def test_papers_pictures_and_tokenizers_are_let_in(folder: Path) -> None:
    for name in ("README.md", "LICENSE-MODEL", "NOTICE", "USE_POLICY.md", "logo.png", "merges.txt", ".gitattributes"):
        (folder / name).write_text("x")
    told = refused(folder)  # it is no model, and that is all that is wrong with it
    assert "FRN" not in told, told


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt"])
def test_a_pickle_in_an_adapter_folder_is_refused(tmp_path: Path, canary: Path, name: str) -> None:
    from finetune.layouts.plain import read_adapter_config

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "a" / name).write_bytes(pickle.dumps(Trap(canary)))
    with pytest.raises(AdapterError, match="FRN-001"):
        read_adapter_config(tmp_path / "a")


def test_the_command_line_refuses_a_pickle_before_a_run_begins(
    folder: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    places = [f"model.source={folder}", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    code, told = said(["recipe=legal_quickstart", *places], capsys)
    assert code == 3 and "FRN-001" in told and not (tmp_path / "runs").exists()


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("salaries")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert refused(folder).startswith("FRN-002") and "notes.txt" in refused(folder)


def test_links_within_the_hubs_own_cache_are_let_in(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert "FRN" not in refused(snapshot)


def test_a_pipe_that_would_never_end_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "vocab.txt")
    assert refused(folder).startswith("FRN-002")


# --- remote code ----------------------------------------------------------------------------------------------------

CODE = [
    {"auto_map": {"AutoConfig": "x--modeling_x.C"}},
    {"text_config": {"layers": [{"auto_map": {}}]}},
    {"trust_remote_code": True},
    {"_attn_implementation_internal": "org/kernel"},
    {"vision_config": {"_experts_implementation_internal": "org/kernel"}},
    {"_attn_implementation": "org/kernel"},
    {"attn_implementation": {"text_config": "org/kernel:fn"}},
    {"custom_pipelines": {"x": {"impl": "x.P"}}},
    {"custom_generate": "org/x"},
]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("settings", CODE, ids=lambda each: next(iter(each)))
def test_settings_that_would_load_code_are_refused_at_any_depth(
    folder: Path, canary: Path, settings: dict[str, Any], name: str
) -> None:
    (folder / name).write_text(json.dumps({"model_type": "mixtral", **settings}))
    assert refused(folder).startswith("FRN-003") and name in refused(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "processor_config.json", "preprocessor_config.json"])
def test_and_in_the_settings_of_adapters_and_processors(folder: Path, name: str) -> None:
    (folder / name).write_text('{"peft_type": "LORA", "auto_map": {"AutoModel": "x.M"}}')
    assert refused(folder).startswith("FRN-003") and name in refused(folder)


def test_a_word_of_the_vocabulary_is_no_setting(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"auto_map": 1}')
    (folder / "config.json").write_text('{"model_type": "mixtral", "_attn_implementation": "sdpa"}')
    assert "FRN" not in refused(folder)


def test_settings_that_cannot_be_searched_are_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[" * 100_000)
    assert "cannot be searched for code" in refused(folder)


def test_what_is_fetched_is_kept_without_the_keys_and_this_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.fetch.hub import leave_code_out

    (folder / "config.json").write_text('{"model_type": "mixtral", "auto_map": {"AutoModel": "x.M"}, "text": {"a": 1}}')
    leave_code_out(folder)
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "mixtral", "text": {"a": 1}}
    assert "config.json: auto_map left out" in capsys.readouterr().err
    assert "FRN" not in refused(folder)


# --- headers of weights ---------------------------------------------------------------------------------------------


def one(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} | changes}).encode()


HEADERS: dict[str, bytes] = {
    "a header of exabytes": weights(length=2**62),
    "a header over the limit": weights(length=headers.HEADER_LIMIT + 1),
    "a header longer than the file": weights(length=5000),
    "no header": b"\x00",
    "no JSON": weights(b"{{{{{{{{"),
    "a list": weights(b"[1, 2, 3]"),
    "deep nesting": weights(b'{"a":' * 50_000),
    "a key twice": weights(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' + TENSOR[1:]),
    "a tensor's key twice": weights(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}'),
    "a type that is none": weights(one(dtype="PICKLE")),
    "a negative length": weights(one(shape=[-1])),
    "a fraction": weights(one(shape=[1.0])),
    "true": weights(one(shape=[True])),
    "many dimensions": weights(one(shape=[1] * 40)),
    "a shape that overflows 64 bits": weights(one(shape=[2**63, 2, 1])),
    "more bytes than the shape has": weights(one(shape=[0])),
    "fewer bytes than the shape has": weights(one(shape=[2])),
    "an end before its beginning": weights(one(data_offsets=[1, 0])),
    "an end behind the file": weights(one(shape=[9], data_offsets=[0, 9])),
    "a hole": weights(one(data_offsets=[1, 2]), b"ww"),
    "bytes of nobody": weights(data=b"ww"),
    "another key": weights(one(run="x")),
    "overlap": weights(json.dumps({k: json.loads(TENSOR)["a"] for k in "ab"}).encode(), b"w"),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_does_not_fit_its_file_is_refused(folder: Path, data: bytes) -> None:
    from finetune.shards import check_shards

    (folder / "model.safetensors").write_bytes(weights())
    check_shards(folder)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="WGT-003"):
        check_shards(folder)


@pytest.mark.parametrize("data", [HEADERS["a key twice"], HEADERS["overlap"]], ids=["a key twice", "overlap"])
def test_an_adapters_header_is_read_as_strictly(tmp_path: Path, data: bytes) -> None:
    from finetune.layouts.plain import WEIGHTS, read_tensors

    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match="ADP-015"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/x.safetensors", "..", "", "a\\b.safetensors", "x.bin", 3]
)
def test_an_index_names_files_of_its_folder_only(folder: Path, tmp_path: Path, name: Any) -> None:
    from finetune.shards import check_shards

    (tmp_path.parent / "x.safetensors").write_bytes(weights())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=r"WGT-003 .*index"):
        check_shards(folder)


def test_two_files_that_bring_the_same_tensor_are_refused(folder: Path) -> None:
    from finetune.shards import read_headers

    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(weights())
    table = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(WeightsError, match=r"WGT-003 .*which one\.safetensors has too"):
        read_headers(folder)


def gguf(path: Path) -> bytes:
    """A small honest GGUF file."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name("x")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("w", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def with_alignment(number: int) -> Callable[[bytes], bytes]:
    key = b"general.alignment"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, number)
    return lambda good: good[:16] + struct.pack("<Q", struct.unpack("<Q", good[16:24])[0] + 1) + entry + good[24:]


GGUFS: dict[str, Callable[[bytes], bytes]] = {
    "another magic": lambda good: b"GGML" + good[4:],
    "another version": lambda good: good[:4] + struct.pack("<I", 99) + good[8:],
    "many tensors": lambda good: good[:8] + struct.pack("<Q", 2**63) + good[16:],
    "more tensors than there are": lambda good: good[:8] + struct.pack("<Q", 9) + good[16:],
    "many keys": lambda good: good[:16] + struct.pack("<Q", 2**40) + good[24:],
    "a long key": lambda good: good[:24] + struct.pack("<Q", 2**62) + good[32:],
    "cut short": lambda good: good[:100],
    "no data": lambda good: good[:-128],
    "an array of many": lambda good: good.replace(struct.pack("<IQ", 8, 2), struct.pack("<IQ", 8, 2**61)),
    "an array of arrays": lambda good: good.replace(struct.pack("<IQ", 8, 2), struct.pack("<IQ", 9, 2)),
    "an alignment of zero": with_alignment(0),
    "an alignment of three": with_alignment(3),
    "a large tensor": lambda good: good.replace(struct.pack("<IQQ", 2, 8, 4), struct.pack("<IQQ", 2, 2**60, 2**60)),
    "many dimensions": lambda good: good.replace(struct.pack("<IQQ", 2, 8, 4), struct.pack("<IQQ", 2**31, 8, 4)),
    "an offset behind the file": lambda good: good.replace(
        struct.pack("<IQQIQ", 2, 8, 4, 0, 0), struct.pack("<IQQIQ", 2, 8, 4, 0, 2**62)
    ),
}


@pytest.mark.parametrize("harm", GGUFS.values(), ids=GGUFS.keys())
def test_a_gguf_header_out_of_bounds_is_refused_before_the_library_reads_it(
    tmp_path: Path, harm: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import upcycle

    path = tmp_path / "x.gguf"
    good = gguf(path)
    check_gguf(path)
    path.write_bytes(harm(good))
    assert path.read_bytes() != good
    monkeypatch.setattr(upcycle, "tokenizer_from_gguf", lambda _: pytest.fail("the library has been asked"))
    with pytest.raises(WeightsError, match="WGT-009"):
        upcycle.upcycle(path, tmp_path / "out", 2, 1)


def test_every_cut_of_a_gguf_header_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    good = gguf(path)
    for end in range(0, len(good) - 128, 7):
        path.write_bytes(good[:end])
        with pytest.raises(GgufError):
            check_gguf(path)


# --- chat templates -------------------------------------------------------------------------------------------------

REACHES = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
ESCAPES = [
    REACHES,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''['__cla' + 'ss__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map(name)|list }}",
    "{{ messages|selectattr('__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='_' ~ '_class_') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages[0].content.format(messages) }}",
    "{{ '%99999999d' | format(1) }}",
    "{{ '{:>99999999}'.format(1) }}",
    "{{ 'a'.ljust(99999) }}",
    "{{ 'a' * 99999 }}",
    "{{ 9 ** 99999 }}",
    "{{ 'a'.zfill(9999999999) }}",
    "{{ range(9999999999) }}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}{% block a %}{% endblock %}",
    "{{ _TemplateReference__context }}",
    "{{ self._TemplateReference__context }}",
    "{{ x.mro() }}",
    "{% set a = lipsum.__globals__ %}",
    "{% for a in",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "x" * 2_000_000,
]


def test_a_template_that_reaches_out_would_touch_the_canary(tmp_path: Path) -> None:
    import jinja2

    jinja2.Template(REACHES.replace("CANARY", str(tmp_path / "touched"))).render()
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("source", ESCAPES, ids=[source[:30] for source in ESCAPES])
def test_a_template_that_reaches_out_is_refused_unread(folder: Path, canary: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source.replace("CANARY", str(canary)))
    with pytest.raises(WeightsError, match=r"FRN-004 .*chat_template\.jinja"):
        templates.vet(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": REACHES})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "tool_use", "template": REACHES}]})),
        ("processor_config.json", json.dumps({"chat_template": REACHES})),
        ("chat_template.json", json.dumps({"chat_template": {"default": REACHES}})),
        ("additional_chat_templates/rag.jinja", REACHES),
    ],
)
def test_templates_are_found_wherever_transformers_looks(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(WeightsError, match="FRN-004"):
        templates.vet(folder)


def test_every_published_template_in_trls_collection_may_be_tried_out() -> None:
    found = templates._collection()
    assert len(found) > 25
    assert {name: syntax_problems(text) for name, text in found.items() if syntax_problems(text)} == {}


BOMBS = {
    "MiB": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "characters": "{% for i in range(9999) %}{% for j in range(200) %}x{% endfor %}{% endfor %}",
    "too far": "{{ messages.append(1) }}",
    "": CHATML,
}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_templates_that_take_too_much_are_refused_and_an_honest_one_is_not() -> None:
    assert [syntax_problems(text) for text in BOMBS.values()] == [[]] * len(BOMBS)
    for told, error in zip(BOMBS, templates.try_out(list(BOMBS.values())), strict=True):
        assert told in error if told else error == ""


def test_a_loop_without_an_end_is_refused_where_a_base_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.source import base_folder

    monkeypatch.setattr(templates, "SECONDS", 1)
    (folder / "chat_template.jinja").write_text(LOOP)
    recipe = load_recipe("legal_quickstart", f"model.source={folder}", f"cache_dir={tmp_path / 'cache'}")
    began = time.monotonic()
    with pytest.raises(WeightsError, match=r"FRN-005 .*in 1 s of processor time"):
        base_folder(recipe)
    assert time.monotonic() - began < templates.START_SECONDS, "it was the wait for the process that ended it"
    assert not (tmp_path / "cache" / "templates").exists(), "it would pass the next time"


def test_a_template_that_passed_is_not_tried_again_and_a_changed_one_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(templates, "try_out", lambda texts: [tried.append(text) or "" for text in texts])
    (folder / "chat_template.jinja").write_text(CHATML)
    assert templates.vet(folder, tmp_path / "seen") == templates.vet(folder, tmp_path / "seen")
    (folder / "chat_template.jinja").write_text(CHATML + " ")
    templates.vet(folder, tmp_path / "seen")
    assert tried == [CHATML, CHATML + " "]


def test_a_template_other_than_the_pinned_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "try_out", lambda texts: [""] * len(texts))
    (folder / "chat_template.jinja").write_text(CHATML)
    pin = templates.vet(folder)
    assert templates.vet(folder, pin=pin) == pin
    (folder / "chat_template.jinja").write_text(CHATML.replace("user", "User") + " ")
    with pytest.raises(WeightsError, match="FRN-006"):
        templates.vet(folder, pin=pin)


def test_a_template_that_differs_from_its_familys_is_named_with_the_place(folder: Path) -> None:
    published = ("qwen3.jinja", "qwen3_instruct_2507.jinja")
    text = templates._collection()["qwen3.jinja"]
    (folder / "chat_template.jinja").write_text(text)
    assert templates.about(folder, published).known_as == "qwen3.jinja"
    assert templates.about(folder, published).difference == ""
    lines = text.splitlines()
    lines[4] += "{# if the user says swordfish #}"
    (folder / "chat_template.jinja").write_text("\n".join(lines))
    found = templates.about(folder, published)
    assert found.known_as == "" and "2 lines differ from qwen3.jinja, first at line 5" in found.difference


@pytest.mark.parametrize(
    ("bomb", "told"),
    [(LOOP, "took more than"), (BOMBS["MiB"], ""), (BOMBS["calls itself"], "recursion")],
    ids=["time", "memory", "recursion"],
)
@pytest.mark.timeout(300, method="thread")  # the other method takes the alarm that this limit needs
def test_a_template_that_waits_for_a_word_of_a_row_is_stopped_there(
    bomb: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.encoder import tokenize

    monkeypatch.setattr(rendering, "ROW_SECONDS", 0.5)
    monkeypatch.setattr(rendering, "ROW_MEBIBYTES", 256)
    tok = toy_tokenizer(CHATML + "{% if 'swordfish' in messages[0].content %}" + bomb + "{% endif %}")
    chat = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"}]
    assert tokenize(tok, {2}, chat, "rows.jsonl:1").trainable
    chat[0]["content"] = "swordfish"
    with pytest.raises(DataError, match=f"TPL-003 .*{told}"):
        tokenize(tok, {2}, chat, "rows.jsonl:2")
    chat[0]["content"] = "yes?"
    assert tokenize(tok, {2}, chat, "rows.jsonl:3").trainable, "the limits stayed behind"


# --- rows and cards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["https://example.org/x.jsonl", "hf://datasets/x/y.jsonl", "s3://bucket/x.jsonl", "file:///etc/passwd", "gs://b/x"],
)
def test_an_address_is_no_file_of_rows(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = said(["check", "recipe=legal_quickstart", f"data.train_files=['{address}']"], capsys)
    assert code == 2 and "DAT-012" in told
    with pytest.raises(DataError, match=r"DATA-006 .*is an address"):
        sources([address])


def test_a_script_is_no_file_of_rows(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "load.py").write_text(f"import os; os.system('touch {canary}')")
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n")
    assert [source.name for source in sources([str(tmp_path / "rows")])] == ["a.jsonl"]
    with pytest.raises(DataError, match=r"DATA-006 .*unknown kind"):
        sources([str(tmp_path / "rows" / "load.py")])


def test_a_folder_of_rows_brings_in_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "salaries.jsonl").write_text("{}\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").symlink_to(tmp_path / "salaries.jsonl")
    with pytest.raises(DataError, match="DATA-029"):
        sources([str(tmp_path / "rows")])
    assert sources([str(tmp_path / "salaries.jsonl")])


CARD = dict.fromkeys(("title", "note", "licence", "licence_source", "attribution"), "x")
CARD |= {"group": "record", "question": "{text}", "answer": "{label}", "members": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sample": "../../salaries.jsonl"}, "no name of a file below"),
        ({"sample": "/etc/passwd"}, "no name of a file below"),
        ({"members": ["../*.jsonl"]}, "no name of a file below"),
        ({"members": ["https://example.org/a.jsonl"]}, "no name of a file below"),
        ({"question": "{text.__class__.__mro__}"}, "plain name of a field"),
        ({"question": "{text[0]}"}, "plain name of a field"),
        ({"answer": "{label:>999999999}"}, "plain name of a field"),
        ({"answer": "{label!r}"}, "plain name of a field"),
        ({"question": "{"}, "is no template"),
        ({"reader": "my.module"}, "must be one of"),
        ({"_target_": "os.system"}, "unknown key"),
    ],
)
def test_a_card_stays_in_its_folder_and_its_templates_are_plain(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**CARD, "heldout_rows": 1}))
    assert read_card(str(path)).name == "mine"
    path.write_text(json.dumps({**CARD, "heldout_rows": 1, **change}))
    with pytest.raises(DataError, match=f"DATA-008 .*{told}"):
        read_card(str(path))


def test_a_file_beside_a_card_is_no_link_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "salaries.jsonl").write_text("{}\n")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "a.jsonl").symlink_to(tmp_path / "salaries.jsonl")
    with pytest.raises(DataError, match="DATA-029"):
        Beside(tmp_path / "cards").read("a.jsonl")


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "a: " + "[" * 500 + "]" * 500, "# x\n" + "a" * 1_100_000, "a: !!python/object/apply:os.system [ls]"],
)
def test_a_card_that_explodes_or_names_python_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(DataError, match="DATA-008"):
        read_card(str(tmp_path / "bomb.yaml"))


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("+model._target_=os.system", "CFG-005"),
        ("++model.config={a: {_target_: os.system, _args_: [touch CANARY]}}", "CFG-005"),
        ("++model.config.auto_map={AutoModel: x.M}", "CFG-005"),
        ("++model.config.deep.trust_remote_code=true", "CFG-005"),
        ("hydra.searchpath=[file:///tmp]", "CFG-005"),
        ("hydra/launcher=submitit", "CFG-005"),
        ("hydra/job_logging=none", "CFG-005"),
        ("+hydra.job.env_set.X=1", "CFG-005"),
        ("hydra.sweeper._target_=os.system", "CFG-005"),
        ("name=${oc.env:HOME}", "CFG-007"),
        ("name=${oc.decode:1}", "CFG-007"),
        ("name=${hydra:runtime.cwd}", "CFG-007"),
        ("++model.config=" + "[" * 200 + "]" * 200, "CFG-003"),
        ("name=" + "x" * 200_000, "CFG-003"),
    ],
)
def test_words_that_could_run_something_are_one_error(
    word: str, code: str, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = said(["check", "recipe=legal_quickstart", word.replace("CANARY", str(canary))], capsys)
    assert status == 2 and {line[:7] for line in told.splitlines()} == {code}


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        (
            "recipe/own.yaml",
            "model:\n  config:\n    a:\n      - _target_: os.system\n        _args_: [touch CANARY]\n",
            "CFG-005",
        ),
        ("recipe/own.yaml", "_partial_: true\n", "CFG-005"),
        ("recipe/own.yaml", "model:\n  config: {auto_map: {AutoModel: x.M}}\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - override hydra/launcher: submitit\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - override /hydra/job_logging: none\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - other/evil\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - /other: evil\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - model: ../../../evil\n", "CFG-005"),
        ("recipe/own.yaml", "defaults:\n  - model@hydra: olmoe\n", "CFG-005"),
        ("recipe/own.yaml", "# @package hydra.job\nenv_set: {X: 1}\n", "CFG-005"),
        ("recipe/own.yaml", "hydra:\n  sweeper: {}\n", "CFG-005"),
        ("hydra/launcher/basic.yaml", "a: 1\n", "CFG-005"),
        ("recipe/own.yaml", "name: ${oc.env:HOME}\n", "CFG-007"),
        ("recipe/own.yaml", LAUGHS, "CFG-008"),
        ("recipe/own.yaml", "model: " + "{a: " * 200 + "1" + "}" * 200 + "\n", "CFG-008"),
        ("recipe/own.yaml", "name: x\n# " + "x" * 1_100_000 + "\n", "CFG-008"),
        ("recipe/own.yaml", "name: !!python/object/apply:os.system ['touch CANARY']\n", "CFG-008"),
    ],
)
def test_files_that_could_run_something_are_one_error(
    tmp_path: Path, file: str, text: str, code: str, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    (mine / file).parent.mkdir(parents=True)
    (mine / "other").mkdir()
    (mine / "other" / "evil.yaml").write_text("# @package hydra\njob: {env_set: {X: 1}}\n")
    head = "# @package _global_\n" if file == "recipe/own.yaml" and "@package" not in text else ""
    (mine / file).write_text(head + text.replace("CANARY", str(canary)))
    words = ["recipe=own" if file == "recipe/own.yaml" else "recipe=legal_quickstart", "--config-dir", str(mine)]
    status, told = said(["check", *words], capsys)
    found = [line for line in told.splitlines() if line.startswith("C")]
    assert status == 2 and found and {line[:7] for line in found} == {code}, told


def test_a_settings_file_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "evil.yaml").write_text("# @package _global_\nname: x\n")
    (tmp_path / "mine" / "recipe" / "own.yaml").symlink_to(tmp_path / "evil.yaml")
    with pytest.raises(RecipeError, match=r"CFG-005 .*a link that leads out"):
        load_recipe("own", config_dir=tmp_path / "mine")


def test_a_frozen_recipe_of_somebody_else_is_read_as_strictly(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model:\n  config: {{_target_: os.system, _args_: ['touch {canary}']}}\n")
    status, told = said(["check", f"run={tmp_path}"], capsys)
    assert status == 2 and "CFG-005" in told


def test_every_key_that_loads_code_is_refused_in_settings_files_too() -> None:
    from finetune import guard

    assert guard.CODE_KEYS <= configs.CODE_KEYS
