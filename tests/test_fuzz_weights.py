"""Whatever bytes stand in a model's or an adapter's folder, they end with a sentence or are read; nothing is run."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from finetune import permits, terms, whole
from finetune.base import read_config
from finetune.data.encoder import Encoder
from finetune.data.rows import Row
from finetune.data.tokens import stop_tokens, vocabulary_rows
from finetune.errors import WeightsError
from finetune.families import FAMILIES
from finetune.foreign.gguf import GgufError, check_gguf
from finetune.layouts import read_adapter
from finetune.layouts.plain import Weight
from finetune.recipe import Model, Recipe
from finetune.shards import _block, quantisation_of, weights_of
from tests.fuzzing import Files, Parser, attempt, dumped, hunt, poked

# --- safetensors and their index ------------------------------------------------------------------------------------

SHAPES = {"a.weight": ("F32", [2, 3]), "b.weight": ("F8_E4M3", [4, 4]), "b.weight_scale_inv": ("F32", [1, 1])}
PACKED = {"x_blocks": ("U8", [1, 2, 1, 4]), "x_scales": ("U8", [1, 2, 1]), "d": ("I8", [2, 4]), "d_scale": ("F32", [])}
SIZES = {"F32": 4, "BF16": 2}


def header_of(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """A right header: offsets follow one another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype] if dtype in SIZES else 1
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header


def safetensors(header: Any, length: int | None = None, size: int | None = None) -> bytes:
    """A file of that header, with another length or other size of data where given."""
    text = dumped(header)
    if size is None:
        ends = (
            [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"] if isinstance(header, dict) else []
        )
        size = max(ends, default=0)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


INDEX = {"metadata": {"total_size": 44}, "weight_map": dict.fromkeys(SHAPES, "one.safetensors")}


def weight_seeds() -> list[Files]:
    index = {"model.safetensors.index.json": dumped(INDEX), "one.safetensors": safetensors(header_of(SHAPES))}
    return [{"model.safetensors": safetensors(header_of(t))} for t in (SHAPES, PACKED)] + [index]


def shaped_weights(draw: random.Random) -> Files:
    """A header or an index with another value somewhere; mostly lengths fit."""
    tensors = draw.choice((SHAPES, PACKED))
    size = max(v["data_offsets"][1] for k, v in header_of(tensors).items() if k != "__metadata__")
    if draw.randrange(3) == 0:
        index = dumped(poked(INDEX, draw))
        return {"model.safetensors.index.json": index, "one.safetensors": safetensors(header_of(SHAPES))}
    length = draw.choice((None, None, None, None, 0, 7, 2**31, 100_000_000, 2**63))
    return {
        "model.safetensors": safetensors(poked(header_of(tensors), draw), length, draw.choice((size, size, 0, 999)))
    }


def use_weights(folder: Path) -> None:
    """As loading and merging read headers, pairs of weights and scales, and one weight."""
    for weight in weights_of(folder, {}).values():
        _ = weight.bytes, weight.is_quantised
        weight.read(None)


# --- config.json ----------------------------------------------------------------------------------------------------

SETTINGS = {"model_type": "mixtral", **FAMILIES["mixtral"].tiny, "eos_token_id": [1, 2]}
CONFIGS: list[dict[str, Any]] = [
    SETTINGS,
    SETTINGS | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "vocab_size": 64}, "auto_map": {"x": "y.z"}},
]


def use_config(folder: Path) -> None:
    """As data, plan and loading read a base's settings."""
    vocabulary_rows(folder)
    stop_tokens(Tokens(), folder)
    _, config = read_config(folder)
    _block(quantisation_of(config.to_dict()))


class Tokens:
    """A tokenizer as far as stop tokens go."""

    eos_token_id = 2


# --- adapters -------------------------------------------------------------------------------------------------------

WEIGHTS = {"model.q_proj.weight": Weight((4, 6)), "model.experts.gate_up_proj": Weight((2, 6, 4))}
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj"], "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
    "lora_dropout": 0.0,     "peft_version": "0.21.2",
    "init_lora_weights": True, "use_rslora": False, "modules_to_save": None, "use_dora": False,
}  # fmt: skip
PAIRS = {
    "base_model.model.model.q_proj.lora_A.weight": ("F32", [2, 6]),
    "base_model.model.model.q_proj.lora_B.weight": ("F32", [4, 2]),
    "base_model.model.model.experts.lora_A.weight": ("F32", [4, 4]),
    "base_model.model.model.experts.lora_B.weight": ("F32", [6, 4]),
}


def adapter(settings: bytes, weights: bytes) -> Files:
    return {"adapter_config.json": settings, "adapter_model.safetensors": weights}


def shaped_adapter(draw: random.Random) -> Files:
    """An adapter whose settings or tensors are others."""
    settings, header = dict(ADAPTER), header_of(PAIRS)
    how = draw.randrange(4)
    if how < 2:
        key = draw.choice(
            ("rank_pattern", "alpha_pattern", "lora_B_layout", "auto_mapping", "unsloth_fused_expert_lora", "x")
        )
        value = draw.choice(
            ({"q_proj": 2}, {"(": 1}, {"(a+)+$": 2}, {"q_proj": "x"}, "grouped_by_expert", [], 1, {"a": {}})
        )
        settings = poked(settings | {key: value} if how else settings, draw)
    elif how == 2:
        header = poked(header, draw)
    else:
        names = list(PAIRS)
        moved = {
            draw.choice(names): ("F32", draw.choice(([2, 6], [6, 2], [0, 0], [2], [2, 3, 1], []))),
            "x": ("F32", [1]),
        }
        header = header_of(PAIRS | {k: v for k, v in moved.items() if k != "x" or draw.randrange(2)})
    return adapter(dumped(settings), safetensors(header, None, 160))


# --- trained weights of a tuned folder ------------------------------------------------------------------------------


def tuned(listed: Any, index: Any) -> Files:
    return {
        "tuned.json": dumped(listed),
        "model.safetensors.index.json": dumped(index),
        "one.safetensors": safetensors(header_of(SHAPES)),
    }


TUNED = {"tensors": list(SHAPES)}

# --- chat templates -------------------------------------------------------------------------------------------------

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{%- for m in messages -%}{%- if m.role == 'user' -%}<|im_start|>user\n{{ m.content | trim }}<|im_end|>\n"
    "{%- else -%}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}",
)
PIECES = (
    "{{ messages }}", "{{ x.y.z }}", "{{ messages[9] }}", "{{ ''.__class__ }}", "{{ messages.append(1) }}",
    "{{ 1/0 }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}", "{{ self }}", "{% set x = x + 1 %}",
    "{{ 'a' * -1 }}",
    "{% raw %}", "{% endraw %}", "{% import 'os' as o %}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ raise_exception('n') }}",
    "{{ strftime_now('%Y') }}", "{{ messages | tojson(indent=-1) }}", "{{ 'a' % 3 }}", "{{ '%d' % 'a' }}",
    "{{ '{0.x}'.format(1) }}",
    "{% for a in messages recursive %}{{ loop(a) }}{% endfor %}", "{{ [] | first }}", "{{ none | length }}",
    "{{ 5 | join }}",
    "{% macro m(a) %}{{ m(a) }}{% endmacro %}{{ m(1) }}", "{% block b %}{{ self.b() }}{% endblock %}",
    "{{ m.role.upper() }}",
    "{% call x() %}{% endcall %}", "{% generation %}", "{% endgeneration %}", "{% break %}",
    "{{ " + "(" * 200 + "1" + ")" * 200 + " }}",
    "{{ namespace(a=1).a.b }}", "{{ dict(a=1)[[]] }}", "{{ {[]: 1} }}", "{{ messages | sort }}",
    "{{ messages | groupby('role') }}",
    "{{ 9 ** 99 }}", "{{ 'x' | int(base=99) }}", "{% if %}", "\x00", "{{ m.content.encode() }}",
    "{{ \"\\ud800\" }}", "{#",
)  # fmt: skip


@cache
def tokenizer() -> Any:
    from tests.test_data import CHATML, make_tokenizer

    return make_tokenizer(CHATML)


def shaped_template(draw: random.Random) -> Files:
    """A template with pieces put in where they mean something."""
    text = draw.choice(TEMPLATES)
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.choice([i for i in range(len(text) + 1) if text[i : i + 2] in ("{%", "{{", "")])
        text = text[:at] + draw.choice(PIECES) + text[at:]
    return {"chat_template.jinja": text.encode("utf-8", "surrogatepass")}


ASKED = Row(
    file="r",
    line=1,
    id="r",
    sha256="",
    messages=[{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}],
)


def use_template(folder: Path) -> None:
    """As rows are tokenised with it."""
    made = tokenizer()
    made.chat_template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    for found in Encoder(made, {made.eos_token_id}).encode([ASKED]):
        if isinstance(found, Exception):
            raise found


# --- licence texts --------------------------------------------------------------------------------------------------


def use_licence(folder: Path) -> None:
    """As the texts beside a base's weights are recognised."""
    text = permits.licence_text(folder)
    terms.verdicts(Recipe(name="x", model=Model(family="mixtral", licence="mit")), text=text, accepted=(), rows="")


def licence_seeds() -> list[Files]:
    texts = Path(terms.__file__).parent / "licence_texts"
    return [{"LICENSE": path.read_bytes()} for path in texts.glob("*.txt")] + [
        {"LICENSE": b"MIT License\n\nPermission is"}
    ]


@cache
def small_gguf() -> bytes:
    """A GGUF file with a text, lists and a tensor, as the gguf library writes it."""
    import numpy as np
    from gguf import GGUFWriter

    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
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


def counted_gguf(draw: random.Random) -> Files:
    """One of its counts, lengths, types or offsets, or what is taken for one, is another number."""
    good = small_gguf()
    at, size = draw.randrange(4, len(good) - 8), draw.choice((4, 8))
    number = draw.choice((0, 1, 2, 9, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)) % 2 ** (8 * size)
    return {"x.gguf": good[:at] + number.to_bytes(size, "little") + good[at + size :]}


def use_gguf(folder: Path) -> None:
    """What stands before the gguf library: a phrase, which `upcycle` puts into a sentence."""
    try:
        check_gguf(folder / "x.gguf")
    except GgufError as error:
        raise WeightsError("WGT-009", str(error)) from None


PARSERS = [
    Parser(
        name="safetensors, index files",
        weight=24,
        examples=[
            (
                {
                    "model.safetensors": safetensors(
                        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, None, 4
                    )
                },
                "WGT-003",
            ),
            ({"model.safetensors.index.json": b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}'}, "WGT-003"),
            ({"model.safetensors.index.json": b'{"weight_map": ' + b"[" * 9000 + b"]" * 9000 + b"}"}, "WGT-003"),
        ],
        parse=use_weights,
        seeds=weight_seeds,
        shaped=shaped_weights,
        native=True,
    ),
    Parser(
        name="GGUF headers",
        weight=16,
        examples=[({"x.gguf": b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16}, "WGT-009")],
        parse=use_gguf,
        seeds=lambda: [{"x.gguf": small_gguf()}],
        shaped=counted_gguf,
    ),
    Parser(
        name="config.json of a model",
        weight=2,
        examples=[
            ({"config.json": b"[]"}, "WGT-002"),
            ({"generation_config.json": b'{"eos_token_id": [[1]]}'}, "WGT-002"),
            ({"config.json": b'{"model_type": "mixtral", "num_local_experts": "8"}'}, "WGT-002"),
        ],
        parse=use_config,
        seeds=lambda: [
            {"config.json": dumped(c), "generation_config.json": dumped({"eos_token_id": 2})} for c in CONFIGS[:2]
        ],
        shaped=lambda draw: {
            "config.json": dumped(poked(draw.choice(CONFIGS), draw)),
            "generation_config.json": dumped(poked({"eos_token_id": [1, 2]}, draw)),
        },
    ),
    Parser(
        name="adapters",
        weight=16,
        examples=[(adapter(b"[" * 9000 + b"]" * 9000, b""), "ADP-015")],
        parse=lambda folder: read_adapter(folder, WEIGHTS),
        seeds=lambda: [adapter(dumped(ADAPTER), safetensors(header_of(PAIRS)))],
        shaped=shaped_adapter,
        native=True,
    ),
    Parser(
        name="trained weights",
        weight=18,
        examples=[
            (tuned({"tensors": [[]]}, INDEX), "ADP-018"),
            (tuned(TUNED, {"weight_map": dict.fromkeys(SHAPES, "../one.safetensors")}), "ADP-018"),
        ],
        parse=whole.read,
        seeds=lambda: [tuned(TUNED, INDEX)],
        shaped=lambda draw: tuned(poked(TUNED, draw), INDEX if draw.randrange(2) else poked(INDEX, draw)),
        native=True,
    ),
    Parser(
        name="chat templates",
        weight=1.5,
        examples=[
            ({"chat_template.jinja": b"{{ 1/0 }}"}, "TPL-003"),
            ({"chat_template.jinja": b"{% macro m(a) %}{{ m(a) }}{% endmacro %}{{ m(1) }}"}, "TPL-003"),
            ({"chat_template.jinja": b"{{ '\\ud800' }}"}, "TPL-003"),
            ({"chat_template.jinja": b"{# nothing #}"}, "TPL-003"),
            ({"chat_template.jinja": b"{{ cycler.__init__.__globals__.os.system('touch canary') }}"}, "TPL-003"),
        ],
        parse=use_template,
        seeds=lambda: [{"chat_template.jinja": text.encode()} for text in TEMPLATES],
        shaped=shaped_template,
    ),
    Parser(
        name="licence texts",
        weight=0.5,
        parse=use_licence,
        seeds=licence_seeds,
        shaped=lambda draw: {
            "LICENSE": draw.choice((b"Licen", b"a ", b"(c) ", b"\n", b"MIT ", b"\xff")) * draw.choice((1, 40_000))
        },
    ),
]
EXAMPLES = 40


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
@pytest.mark.parametrize("shaped", [False, True], ids=["bytes", "values"])
def test_strange_folders_end_with_a_sentence_or_are_read(parser: Parser, shaped: bool, tmp_path: Path) -> None:
    hunt(parser, tmp_path, EXAMPLES, shaped=shaped)


@pytest.mark.parametrize(
    ("parser", "files", "code"), [(parser, *example) for parser in PARSERS for example in parser.examples]
)
def test_what_once_went_wrong_ends_with_its_sentence(parser: Parser, files: Files, code: str, tmp_path: Path) -> None:
    assert attempt(parser, tmp_path, files) == code
