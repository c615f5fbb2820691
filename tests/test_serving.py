"""Every export by its real client: a small real run in all formats, and every family that llama.cpp's converter knows.

Servers are found as `finetune.servers.found` finds them; `scripts/setup_serving.sh` installs them.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType

import finetune.tiny
from finetune import servers
from finetune.adapters import attach
from finetune.asking import Endpoint, complete, models
from finetune.base import load_base
from finetune.compose import read_recipe, recipe_yaml
from finetune.errors import ServerError
from finetune.export import export
from finetune.export.asked import EXACT, compared
from finetune.export.converter import converter
from finetune.export.per_expert import write_per_expert
from finetune.export.stock import stock_answers
from finetune.families import FAMILIES
from finetune.recipe import Adapter
from finetune.rundir import RunDir, read_json
from finetune.start_lines import foreign
from tests import serving_job

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

CONVERTED = {
    "llama4": {},
    "deepseek_v3": {},
    "mistral4": {},
    "gpt_oss": {},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "granitemoe": {},
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"mlp_only_layers": []},
}
"""Families whose tiny models llama.cpp loads, with what their config must say for it."""
ALL_FORMATS = ["hf", "peft", "peft_per_expert", "gguf", "ollama", "vllm"]
PROMPTS = ["What does this clause mean, and who pays?", "The 3 parties agree: nothing is owed.", "Hello world, how are"]
LIMIT = 0.01
"""Largest distance of log-probabilities in nats, token by token, at f32 with a cache in fp16."""


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Servers and what llama.cpp's converter needs, also when this file is run alone on a bare machine."""
    serving_job.servers()


@pytest.fixture(scope="module")
def llama_cpp():
    return servers.choose("llama.cpp")


@pytest.fixture(scope="module")
def finished():
    """A run that was trained and merged until its answers differ from its base's."""
    return serving_job.finished()


@pytest.fixture(scope="module")
def tokenizer(finished):
    """A tokenizer that llama.cpp knows."""
    return transformers.AutoTokenizer.from_pretrained(finished.merged)


@pytest.fixture(scope="module")
def tool(finished, tmp_path_factory):
    """llama.cpp's converter."""
    return converter(read_recipe(finished.recipe), tmp_path_factory.mktemp("logs") / "converter.log")


@pytest.fixture(scope="module")
def everything(finished, tmp_path_factory, llama_cpp):
    """That run with an export in every format; a client that answers otherwise raises."""
    return exported(finished, tmp_path_factory.mktemp("everything") / "run", ALL_FORMATS, ["f16", "q8_0"])


def exported(finished, path, formats, types):
    run_dir = RunDir(path)
    shutil.copytree(finished.path, run_dir.path, copy_function=link)
    recipe = read_recipe(run_dir.recipe)
    recipe.export.formats, recipe.export.gguf = formats, types
    recipe.export.gguf_adapter = "peft_per_expert" in formats
    run_dir.recipe.unlink()
    run_dir.recipe.write_text(recipe_yaml(recipe))
    export(run_dir)
    return run_dir


def test_every_format_of_a_real_run_answers_in_its_own_client_as_the_adapter_does(everything):
    run_dir = everything
    told = {entry["format"]: entry for entry in read_json(run_dir.export / "clients.json")["clients"]}
    names = ["hf", "peft", "peft_per_expert as GGUF", "gguf f16", "gguf q8_0"]
    assert all(told[name]["asked"] for name in names)
    for name in ("hf", "peft", "peft_per_expert as GGUF", "gguf f16"):
        assert told[name]["same_first"] >= 0.95 and told[name]["mean_gap"] < 0.05
        assert told[name]["like_base"] == 0.0
    servers_asked = [entry for entry in told.values() if entry["asked"] and entry["client"] in ("llama.cpp", "vllm")]
    assert len(servers_asked) >= 3 and all(entry["chats"] == 5 for entry in servers_asked)
    assert told["vllm"]["asked"] == any(server.name == "vllm" for server in servers.found())
    assert told["ollama"]["asked"] is False and "peft_per_expert" in told
    readme = (run_dir.export / "README.md").read_text()
    assert "| gguf f16 | llama.cpp " in readme and "ollama was not asked" in readme
    assert (run_dir.export / "ollama" / "Modelfile").read_text().startswith("FROM ../gguf/")


def test_a_file_in_fewer_bits_is_made_by_llama_cpps_quantiser_and_answers(finished, tmp_path, llama_cpp):
    run_dir = exported(finished, tmp_path / "run", ["gguf"], ["q4_k_m"])
    (told,) = read_json(run_dir.export / "clients.json")["clients"]
    assert told["format"] == "gguf q4_k_m" and told["asked"] and told["chats"] == 5
    (small,), merged = (run_dir.export / "gguf").glob("*.gguf"), run_dir.merged.glob("*.safetensors")
    assert small.stat().st_size < 0.6 * sum(path.stat().st_size for path in merged)
    content = GGUFReader(small)
    assert content.get_field("general.file_type").contents() == LlamaFileType.MOSTLY_Q4_K_M
    assert GGMLQuantizationType.Q4_K in {tensor.tensor_type for tensor in content.tensors}


def test_the_start_line_of_the_export_starts_vllm_and_it_answers_as_the_adapter_does(everything, tmp_path, tokenizer):
    if not any(server.name == "vllm" for server in servers.found()):
        pytest.skip("no vLLM here: bash scripts/setup_serving.sh makes a Python that has it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen = foreign() | {"PYTHON": servers.choose("vllm").program, "PORT": str(port)}
    words = ["sh", str(everything.export / "vllm" / "start.sh")]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(
            words, env=seen, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    try:
        endpoint = ready(child, f"http://127.0.0.1:{port}/v1", tmp_path / "log")
        answers = read_json(everything.answers)
        prompt = next(prompt for prompt in answers["prompts"] if prompt["tuned"]["ids"] != prompt["base"]["ids"])
        answer = complete(endpoint, prompt["text"], max_tokens=answers["max_new_tokens"], timeout_s=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    figures = compared(answers | {"prompts": [prompt]}, [answer], tokenizer)
    assert figures.within(EXACT) and figures.tokens > 0 and figures.like_base == 0.0


def ready(child, url, log, wait_s=900):
    """The only model at an address, once the server lists it."""
    until = time.monotonic() + wait_s
    while True:
        assert child.poll() is None, servers.said(log)
        assert time.monotonic() < until, servers.said(log)
        try:
            (model,) = models(Endpoint(url, ""), timeout_s=5)
            return Endpoint(url, model["id"], "vllm")
        except (ServerError, OSError):
            time.sleep(1)


def link(source, target):
    Path(target).hardlink_to(source)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """(family key, what its config must say) -> a tiny model of it with a tokenizer that llama.cpp knows."""

    def make(key, more):
        folder = tmp_path_factory.mktemp("tiny") / key
        family = replace(FAMILIES[key], tiny=FAMILIES[key].tiny | more | {"vocab_size": 49152})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune.tiny, "train_tokenizer", lambda _: tokenizer)
            patch.setattr(finetune.tiny, "SHARD_SIZE", "1MB")
            patch.setattr(finetune.tiny, "PAD", tokenizer.pad_token)
            finetune.tiny.write_tiny(family, folder, 0)
        return folder

    return make


def apart(llama_cpp, folder, gguf, log, adapter=None, peft=None):
    """Distances of log-probabilities between transformers and llama.cpp, token by token up to where they part."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [{"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids} for text in PROMPTS]
    told = stock_answers(folder, {"precision": "fp32", "max_new_tokens": 6, "prompts": prompts}, peft)
    with servers.started(llama_cpp, gguf, adapter=adapter, log=log, context=256) as at:
        got = [complete(at, prompt["text"], max_tokens=6) for prompt in prompts]
    found = []
    for one, other in zip(told, got, strict=True):
        for a, b, x, y in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
            found.append(abs(x - y))  # also where they part: a tie is near, and another model is not
            if a != b:
                break
    return found


@pytest.mark.parametrize("key", CONVERTED)
def test_a_tiny_model_of_a_family_has_the_same_log_probabilities_in_llama_cpp(key, tiny, tool, llama_cpp, tmp_path):
    folder = tiny(key, CONVERTED[key])
    tool.model(folder, tmp_path / "m.gguf", "f32", FAMILIES[key])
    gaps = apart(llama_cpp, folder, tmp_path / "m.gguf", tmp_path / "log")
    assert len(gaps) >= 12
    assert max(gaps) <= LIMIT


ADAPTED = [key for key in CONVERTED if not FAMILIES[key].no_gguf_adapter]


@pytest.mark.parametrize("key", ADAPTED)
def test_llama_cpp_adds_an_adapter_per_expert_to_the_base_as_stock_peft_does(key, tiny, tool, llama_cpp, tmp_path):
    folder = tiny(key, CONVERTED[key])
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    settings = Adapter(targets="experts", rank=8, alpha=16.0, expert_rank=4, expert_alpha=4.0, load_in_4bit=False)
    torch.manual_seed(5)
    model = attach(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "peft")
    write_per_expert(folder, tmp_path / "peft", tmp_path / "out")
    tool.model(folder, tmp_path / "m.gguf", "f32", FAMILIES[key])
    tool.adapter(folder, tmp_path / "out", tmp_path / "a.gguf", FAMILIES[key])
    words = {"adapter": tmp_path / "a.gguf", "peft": tmp_path / "peft"}
    gaps = apart(llama_cpp, folder, tmp_path / "m.gguf", tmp_path / "log", **words)
    assert max(gaps) <= LIMIT
    assert max(apart(llama_cpp, folder, tmp_path / "m.gguf", tmp_path / "log", peft=tmp_path / "peft")) > 5 * LIMIT


def test_without_the_fields_that_are_added_the_converter_writes_another_router(tiny, tool, tmp_path):
    family = FAMILIES["deepseek_v3"]
    folder = tiny("deepseek_v3", {})
    config = json.loads((folder / "config.json").read_text())
    config.pop("scoring_func", None)
    (folder / "config.json").write_text(json.dumps(config))
    tool.model(folder, tmp_path / "right.gguf", "f32", family)
    tool.model(folder, tmp_path / "wrong.gguf", "f32", replace(family, converter_config=lambda _: {}))
    assert [score(tmp_path / f"{name}.gguf") for name in ("right", "wrong")] == [2, None]


def score(gguf):
    """How the router scores, as llama.cpp counts it: 1 softmax, 2 sigmoid; None where it is left to llama.cpp."""
    field = GGUFReader(gguf).get_field("deepseek2.expert_gating_func")
    return None if field is None else int(field.contents())


def test_a_rehearsals_own_tokenizer_is_converted_under_the_name_of_what_it_does(tool, tmp_path, llama_cpp):
    folder = tmp_path / "tiny"
    finetune.tiny.write_tiny(FAMILIES["mixtral"], folder, 0)
    tool.model(folder, tmp_path / "m.gguf", "f32", FAMILIES["mixtral"])
    assert max(apart(llama_cpp, folder, tmp_path / "m.gguf", tmp_path / "log")) <= LIMIT


def test_what_the_converter_refuses_is_an_error_with_its_words(tool, tmp_path):
    from finetune.errors import WeightsError

    folder = tmp_path / "tiny"
    finetune.tiny.write_tiny(FAMILIES["deepseek_v4"], folder, 0)
    with pytest.raises(WeightsError, match=r"EXP-010 llama.cpp's converter made no m.gguf: \w+: .* see "):
        tool.model(folder, tmp_path / "m.gguf", "f32", FAMILIES["deepseek_v4"])
    assert not (tmp_path / "m.gguf").exists() and not list(tmp_path.glob(".partial-*"))
