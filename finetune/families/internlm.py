"""InternLM: a dense neighbour that is trained as a Llama model, once its folder is in Llama's layout.

transformers 5.17 has no class for it, and Python code that comes with weights is never run here. The networks are
Llama's. The first ones have biases on q, k, v and o; the second keep q, k and v in one matrix, `wqkv`, group by group;
the third have Llama's tensors under Llama's names, and say `qkv_bias` and `bias` for its `attention_bias` and
`mlp_bias`. There is no `Family` here: a folder in Llama's layout says `llama` in its config.json and is one of that
family, and one as published is refused with what to do.
"""

NEEDS_CONVERSION: dict[str, str] = {
    "internlm": (
        "a copy in Llama's layout as model.source: safetensors, and in config.json model_type=llama and "
        "attention_bias with the value of bias"
    ),
    "internlm2": "a folder made by tools/convert2llama.py of github.com/InternLM/InternLM as model.source",
    "internlm3": (
        "a copy as model.source whose config.json says model_type=llama, has attention_bias and mlp_bias with the "
        "values of qkv_bias and bias, and no auto_map, and whose tokenizer needs no code"
    ),
}
"""Model type in a published config.json -> what to give instead."""
