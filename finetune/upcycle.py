"""A small real Mixture-of-Experts model out of a small dense one, by sparse upcycling.

Every MLP of the dense model is copied into each expert of a Mixtral-architecture block; the router is random and its
top-k weights are renormalised, so the new model computes what the dense one did. (Komatsuzaki et al. 2022,
arXiv:2212.05055.) The experts are equal and the router is untrained until the model is tuned: the model is a means to
run everything on real weights where no large model fits, not a better model than its dense parent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import WeightsError
from finetune.foreign.gguf import GgufError, check_gguf

SHARD_SIZE = "160MB"
"""Small on purpose: layers straddle shards, as they do in large checkpoints."""

ROUTER_SEED = 0
ROUTER_STD = 0.02


def upcycle(gguf_file: Path, target: Path, num_experts: int, top_k: int) -> None:
    """Writes a Mixtral-architecture checkpoint (bf16 safetensors, several shards) and its tokenizer into `target`.

    `gguf_file` is a llama-architecture GGUF with a byte-level BPE ("gpt2") tokenizer. Raises ValueError otherwise, and
    WeightsError (WGT-009) when its header cannot be believed.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    try:
        check_gguf(gguf_file)
    except GgufError as error:
        what = f"{gguf_file} is damaged, or no GGUF file"
        raise WeightsError("WGT-009", what, str(error), "fetch the file again") from None
    tokenizer = tokenizer_from_gguf(gguf_file)
    dense = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    moe = upcycle_model(dense, num_experts, top_k)
    moe.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(moe.config, name, getattr(tokenizer, name))
    moe.to(torch.bfloat16).save_pretrained(target, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(target)


def upcycle_model(dense: Any, num_experts: int, top_k: int) -> Any:
    """The Mixtral-architecture model that computes what the llama-architecture `dense` does, in its dtype."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    c = dense.config
    if c.model_type != "llama":
        raise ValueError(f"upcycling starts from a llama-architecture model, not {c.model_type!r}")
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.hidden_size // c.num_attention_heads,
        hidden_act=c.hidden_act,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        tie_word_embeddings=c.tie_word_embeddings,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        output_router_logits=False,
    )
    with torch.device("meta"):
        moe = MixtralForCausalLM(config)
    moe = moe.to_empty(device="cpu").to(dense.dtype)
    moe.tie_weights()
    generator = torch.Generator().manual_seed(ROUTER_SEED)
    source = dense.state_dict()
    copied = set()
    with torch.no_grad():
        for name, tensor in moe.state_dict().items():
            if name.endswith("mlp.gate.weight"):
                tensor.normal_(0.0, ROUTER_STD, generator=generator)
            elif name.endswith("mlp.experts.gate_up_proj"):
                layer = name.removesuffix("experts.gate_up_proj")
                gate, up = source[layer + "gate_proj.weight"], source[layer + "up_proj.weight"]
                tensor.copy_(torch.cat([gate, up]).expand(num_experts, -1, -1))
                copied |= {layer + "gate_proj.weight", layer + "up_proj.weight"}
            elif name.endswith("mlp.experts.down_proj"):
                layer = name.removesuffix("experts.down_proj")
                tensor.copy_(source[layer + "down_proj.weight"].expand(num_experts, -1, -1))
                copied.add(layer + "down_proj.weight")
            else:
                tensor.copy_(source[name])
                copied.add(name)
    if left := set(source) - copied:
        raise ValueError(f"tensors of the dense model without a place in the new one: {sorted(left)[:5]}")
    _restore_rotary_buffers(moe, dense)
    return moe.eval()


def _restore_rotary_buffers(moe: Any, dense: Any) -> None:
    """`to_empty` leaves non-persistent buffers empty; both models rotate alike, so the dense one's are copied."""
    values = dict(dense.named_buffers())
    for name, buffer in moe.named_buffers():
        buffer.copy_(values[name])


def tokenizer_from_gguf(gguf_file: Path) -> Any:
    """The byte-level BPE tokenizer stored in a GGUF file, with its special tokens and chat template.

    Built from the file's own tokens and merges: transformers' converter treats it as a Llama tokenizer (byte
    fallback, wrong end-of-sequence token) in 5.17.0.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    if value("ggml.model") != "gpt2":
        raise ValueError(f"{gguf_file.name}: tokenizer model {value('ggml.model')!r}, expected 'gpt2' (byte-level BPE)")
    tokens: list[str] = value("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in value("ggml.merges")]
    control_type = 3  # LLAMA_TOKEN_TYPE_CONTROL in llama.cpp
    special = [t for t, kind in zip(tokens, value("ggml.token_type"), strict=True) if kind == control_type]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    end = tokens[value("ggml.eos_token_id")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=end,
        pad_token=end,
        unk_token=tokens[value("ggml.unknown_token_id")],
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = value("chat_template")
    return tokenizer
