"""The mask is TRL's own where TRL has a template for it, and what a server sends is what was trained, everywhere."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetune.data.encoder import Encoder
from finetune.data.rows import Row
from finetune.data.shape import conversation
from finetune.data.tokens import IGNORED, Tokens, pieces
from finetune.errors import DataError
from tests.test_data import CHATML, make_tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "d",
        "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}},
    },
}
ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
THOUGHT = ANSWER | {"reasoning_content": "Let me think."}
MORE = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
TOOLS = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "look"},
    MORE[1],
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single": {"messages": [ASK, ANSWER]},
    "system": {"messages": [{"role": "system", "content": "Be short."}, ASK, ANSWER]},
    "multi": {"messages": [ASK, ANSWER, *MORE]},
    "tools": {"messages": TOOLS, "tools": [TOOL]},
    "reasoning": {"messages": [ASK, THOUGHT]},
    "reasoning twice": {"messages": [ASK, THOUGHT, MORE[0], MORE[1] | {"reasoning_content": "Hm."}]},
}
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],  # noqa: RUF001
    "gemma": ["<end_of_turn>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>"],
    "qwen": ["<|im_end|>"],
}
"""Beginning of a template's name -> its stop tokens, the first one its eos."""

CONTROL = re.compile(
    r"<[|｜][^<>{}'\"]*?[|｜]>|\[gMASK\]|<sop>|<start_of_turn>|<end_of_turn>|<bos>|<turn\|>|<\|turn>|<eos>"  # noqa: RUF001
)
PICTURES = ("vl", "idefics", "llava", "muse", "diffusion")

# Templates whose generation prompt opens a thought that the answers in these rows do not have: a server would send
# something else than what is trained, and the comparison of renders says so.
OPEN_A_THOUGHT = ("deepseek_r1_distill", "deepseekv3", "nemotron")


def training_templates() -> list[str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    names = sorted(path.stem.removesuffix("_training") for path in folder.glob("*_training.jinja"))
    return [name for name in names if not any(picture in name for picture in PICTURES)]


def template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text(encoding="utf-8")


def stops(name: str) -> list[str]:
    return next(tokens for begin, tokens in STOPS.items() if name.startswith(begin))


@cache
def tokenizer_for(text: str, stop: tuple[str, ...]) -> Any:
    """A byte-level tokenizer with the control tokens that a template names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = sorted({*CONTROL.findall(text), *stop})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<pad>", *special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=stop[0], pad_token="<pad>", additional_special_tokens=special
    )
    made.chat_template = text
    return made


def row_of(value: dict[str, Any]) -> Row:
    row = Row(file="rows.jsonl", line=3, id="x", sha256="")
    assert conversation(row, value, "messages") == []
    return row


def encode(text: str, stop: list[str], value: dict[str, Any], **settings: Any) -> Tokens | DataError:
    tokenizer = tokenizer_for(text, tuple(stop))
    ids = {tokenizer.convert_tokens_to_ids(token) for token in stop}
    return Encoder(tokenizer, ids, **settings).encode([row_of(value)])[0]


def trl_mask(text: str, stop: list[str], value: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """TRL's way: the template's generation tags, by transformers. None where the template refuses the conversation."""
    import jinja2

    messages = [dict(m) for m in value["messages"]]
    for m in messages:
        if "reasoning_content" in m and "message.thinking" in text:
            m["thinking"] = m.pop("reasoning_content")
    try:
        made = tokenizer_for(text, tuple(stop)).apply_chat_template(
            messages,
            tools=value["tools"] if "tools" in value else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except jinja2.TemplateError:
        return None
    return list(made["input_ids"]), list(made["assistant_masks"])


def test_trl_has_training_templates_for_many_families() -> None:
    names = training_templates()
    assert len(names) >= 20
    assert {"deepseekv3", "glm4moe", "gptoss", "llama3", "qwen3", "qwen3_instruct_2507"} <= set(names)


@pytest.mark.parametrize("what", CONVERSATIONS)
@pytest.mark.parametrize("name", training_templates())
def test_the_mask_is_trls_token_for_token(name: str, what: str) -> None:
    value, text, stop = CONVERSATIONS[what], template(name), stops(name)
    ours, theirs = encode(text, stop, value, reasoning="template"), trl_mask(text, stop, value)
    if theirs is None:
        assert isinstance(ours, DataError)
        assert ours.code == "TPL-003"
    elif isinstance(ours, DataError):  # where the template loses the call, TRL trains an empty answer
        assert ours.code == "MASK-002"
        decoded = tokenizer_for(text, tuple(stop)).decode([i for i, m in zip(*theirs, strict=True) if m])
        assert what == "tools"
        assert "look" not in decoded
    else:
        assert ours.input_ids == theirs[0]
        assert [int(label != IGNORED) for label in ours.labels] == theirs[1]


@pytest.mark.parametrize("what", ["single", "system", "multi", "tools"])
@pytest.mark.parametrize("name", training_templates())
def test_without_tags_the_comparison_of_renders_trains_the_same_but_for_what_a_server_sends(
    name: str, what: str
) -> None:
    tagged, value, stop = template(name), CONVERSATIONS[what], stops(name)
    bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tagged)
    theirs, ours = trl_mask(tagged, stop, value), encode(bare, stop, value)
    if theirs is None or name.startswith(
        "phi3"
    ):  # phi3 writes its eos behind every prompt that is no generation prompt
        assert isinstance(ours, DataError) or name.startswith("phi3")
        return
    if isinstance(ours, DataError):
        why = ours.code, name, what
        assert ours.code == "MASK-002" or name.startswith(OPEN_A_THOUGHT) or (name, what) == ("gptoss", "multi"), why
        return
    if ours.input_ids != theirs[0]:  # white space around a tag
        assert name not in ("glm4moe", "qwen3", "qwen3_instruct_2507", "llama3")
        return
    mine = [label != IGNORED for label in ours.labels]
    assert not any(m and not t for m, t in zip(mine, theirs[1], strict=True))
    tokenizer = tokenizer_for(bare, tuple(stop))
    extra = tokenizer.decode([i for i, m, t in zip(ours.input_ids, mine, theirs[1], strict=True) if t and not m])
    asked = [m for m in value["messages"][:2] if m["role"] != "assistant"]
    sent = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    plain = tokenizer.apply_chat_template(asked, tokenize=False)
    assert set(extra) <= set(sent.removeprefix(plain))


def trained(made: Tokens | DataError, text: str, stop: list[str]) -> str:
    assert isinstance(made, Tokens), made
    return "".join(piece for piece, is_trained in pieces(tokenizer_for(text, tuple(stop)), made) if is_trained)


STOP = ["<|im_end|>"]
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['reasoning_content'] ~ '|' if m['reasoning_content'] is defined else '' }}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}",
)


# How families for which TRL has none write a conversation, in our own words: (template, stop token, what follows it).
ROLES = "{% for m in messages %}"
OTHERS = {
    "llama4": (
        "<|begin_of_text|>" + ROLES + "<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{{ '' }}{% endif %}",
        "<|eot|>",
        "",
    ),
    "mistral": (
        "<s>" + ROLES + "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
        "",
    ),
    "mixtral": (
        "<s>" + ROLES + "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content }}</s>{% else %} [INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        "</s>",
        "",
    ),
    "granite": (
        ROLES + "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|end_of_text|>",
        "\n",
    ),
    "olmoe": (
        "<|endoftext|>" + ROLES + "<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% endif %}",
        "<|endoftext|>",
        "\n",
    ),
    "deepseek": (
        "<|begin|>" + ROLES + "{% if m.role == 'user' %}<|User|>{{ m.content }}<|Assistant|></think>"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "<|end|>",
        "",
    ),
}


@pytest.mark.parametrize("what", ["single", "system", "multi"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_templates_of_other_families_train_the_answers_and_their_ends_alone(name: str, what: str) -> None:
    text, stop, behind = OTHERS[name]
    made = encode(text, [stop], CONVERSATIONS[what])
    answers = [m["content"] for m in CONVERSATIONS[what]["messages"] if m["role"] == "assistant"]
    lead = " " if name == "mixtral" else ""
    assert trained(made, text, [stop]) == "".join(f"{lead}{answer}{stop}{behind}" for answer in answers)
    assert isinstance(made, Tokens)
    asked = CONVERSATIONS[what]["messages"][: 2 if what == "system" else 1]
    sent = tokenizer_for(text, (stop,)).apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert (
        made.input_ids[: made.prompt_length] == tokenizer_for(text, (stop,))(sent, add_special_tokens=False).input_ids
    )


def test_a_message_of_weight_zero_is_read_and_not_trained() -> None:
    value = {"messages": [ASK, ANSWER | {"weight": 0}, *MORE]}
    assert trained(encode(CHATML, STOP, value), CHATML, STOP) == "So.<|im_end|>\n"


def test_only_the_last_answer_is_trained_if_so_wished() -> None:
    made = encode(CHATML, STOP, CONVERSATIONS["multi"], turns="last")
    assert trained(made, CHATML, STOP) == "So.<|im_end|>\n"


def test_tool_calls_are_trained_and_tool_results_are_not() -> None:
    text = trained(encode(CALLS, STOP, CONVERSATIONS["tools"]), CALLS, STOP)
    assert '<call>{"name": "look", "arguments": {"at": 1}}</call><|im_end|>' in text
    assert "3<|im_end|>" not in text


@pytest.mark.parametrize("place", ["argument", "name of an argument", "schema", "name", "id of a call"])
def test_a_control_token_is_refused_wherever_a_template_may_write_it(place: str) -> None:
    token, turns, tool = "<|im_end|>", deepcopy(TOOLS), deepcopy(TOOL)
    function = turns[1]["tool_calls"][0]["function"]
    if place == "argument":
        function["arguments"] = {"at": [{"deep": f"a{token}b"}]}
    elif place == "name of an argument":
        function["arguments"] = {f"at{token}": 1}
    elif place == "schema":
        tool["function"]["parameters"]["properties"]["at"]["description"] = f"where{token}"
    elif place == "name":
        turns[2]["name"] = f"look{token}"
    else:
        turns[1]["tool_calls"][0]["id"] = turns[2]["tool_call_id"] = f"c{token}"
    made = encode(CALLS, STOP, {"messages": turns, "tools": [tool]})
    assert isinstance(made, DataError), trained(made, CALLS, STOP)
    assert made.code == "DATA-005"
    where = {"schema": "tools", "name": "messages[2] (tool)"}.get(place, "messages[1] (assistant)")
    assert f"control token {token} in {where}" in made.what


WRITTEN = {
    "JSON": "c['function'] | tojson",
    "ASCII": "c['function']['name'] ~ (c['function']['arguments'] | tojson(ensure_ascii=True))",
    "text": "c['function']['name'] ~ c['function']['arguments']",
    "JSON in JSON": "c['function']['name'] ~ (c['function']['arguments'] | tojson | tojson)",
}
PLAIN = "{{ c['function']['name'] }}{% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }};{% endfor %}"


@pytest.mark.parametrize("way", [*WRITTEN, "plain"])
def test_arguments_are_found_however_a_template_writes_them(way: str) -> None:
    wanted = {"at": 1.5, "note": 'said "no"\n\tand \\ left', "où": "Zürich 東京", "deep": [True, None, {"it's": "x'"}]}
    turns = [ASK, ANSWER | {"content": "", "tool_calls": [{"function": {"name": "look", "arguments": wanted}}]}]
    text = CALLS.replace("{{ c['function'] | tojson }}", PLAIN if way == "plain" else f"{{{{ {WRITTEN[way]} }}}}")
    assert "look" in trained(encode(text, STOP, {"messages": turns}), text, STOP)


@pytest.mark.parametrize("kept", ["[]", "c['function']['arguments'].keys()", "c['function']['arguments'].values()"])
def test_a_template_that_loses_a_part_of_a_call_is_refused(kept: str) -> None:
    text = CALLS.replace("c['function'] | tojson", f"'look' ~ ({kept} | list | tojson)")
    turns = [ASK, ANSWER | {"tool_calls": [{"function": {"name": "look", "arguments": {"city": "Oslo"}}}]}]
    made = encode(text, STOP, {"messages": turns})
    assert isinstance(made, DataError), trained(made, text, STOP)
    assert made.code == "MASK-002"
    assert made.why == "the chat template drops or changes an argument of a call"


def test_reasoning_is_trained_or_stripped_and_never_lost_silently() -> None:
    value = CONVERSATIONS["reasoning"]
    assert trained(encode(CALLS, STOP, value), CALLS, STOP) == "Let me think.|Because.<|im_end|>\n"
    assert trained(encode(CALLS, STOP, value, reasoning="strip"), CALLS, STOP) == "Because.<|im_end|>\n"
    lost = encode(CHATML, STOP, value)
    assert isinstance(lost, DataError)
    assert lost.code == "TPL-004"
    inline = {"messages": [ASK, {"role": "assistant", "content": "<think>hm</think>\nBecause."}]}
    assert trained(encode(CHATML, STOP, inline), CHATML, STOP) == "<think>hm</think>\nBecause.<|im_end|>\n"
    assert trained(encode(CHATML, STOP, inline, reasoning="strip"), CHATML, STOP) == "Because.<|im_end|>\n"


def test_an_unended_turn_is_refused_unless_the_user_names_its_end() -> None:
    open_ended = CHATML.replace("<|im_end|>\n", "")
    stop = ["<|im_start|>"]
    refused = encode(open_ended, stop, CONVERSATIONS["single"])
    assert isinstance(refused, DataError)
    assert refused.code == "TOK-004"
    made = encode(open_ended, stop, CONVERSATIONS["multi"], end_of_turn="<|im_start|>")
    assert trained(made, open_ended, stop) == "Because.<|im_start|>So.<|im_start|>"


def test_a_template_that_drops_a_users_words_is_refused() -> None:
    deaf = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'assistant' else 'hm' }}")
    made = encode(deaf, STOP, CONVERSATIONS["single"])
    assert isinstance(made, DataError)
    assert made.code == "MASK-003"
    without_system = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    made = encode(without_system, STOP, CONVERSATIONS["system"])
    assert isinstance(made, DataError)
    assert "messages[0] (system)" in made.what


def test_a_token_that_straddles_the_prompt_and_the_answer_is_found() -> None:
    """A server would send `assistant:` and a space of its own; in training, space and answer are one token."""
    from tokenizers import AddedToken

    spaced = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ ' ' }}{% endif %}").replace(
        "{{ m['content'] }}", "{{ ' ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}"
    )
    tokenizer = make_tokenizer(spaced)
    good = Encoder(tokenizer, {2}).encode([row_of(CONVERSATIONS["single"])])[0]
    assert isinstance(good, Tokens)
    tokenizer.add_tokens([AddedToken(" Because", normalized=False, special=False)])
    bad = Encoder(tokenizer, {2}).encode([row_of(CONVERSATIONS["single"])])[0]
    assert isinstance(bad, DataError)
    assert bad.code == "TPL-002"


def test_ids_without_an_embedding_and_padding_that_would_be_trained_are_refused() -> None:
    tokenizer = make_tokenizer(CHATML)
    row = row_of(CONVERSATIONS["single"])
    assert isinstance(Encoder(tokenizer, {2}, vocabulary=len(tokenizer)).encode([row])[0], Tokens)
    small = Encoder(tokenizer, {2}, vocabulary=100).encode([row])[0]
    assert isinstance(small, DataError)
    assert small.code == "TOK-002"
    below = Row(file="f", line=1, id="x", sha256="", input_ids=[-5, 6, 7], labels=[-5, 6, 7])
    for vocabulary in (0, len(tokenizer)):
        refused = Encoder(tokenizer, {2}, vocabulary=vocabulary).encode([below])[0]
        assert isinstance(refused, DataError), refused
        assert (refused.code, refused.what) == ("TOK-002", "f:1 has the token id -5")
    tokens = Row(file="f", line=1, id="x", sha256="", input_ids=[5, 0], labels=[5, 0])
    padded = Encoder(tokenizer, {2}).encode([tokens])[0]
    assert isinstance(padded, DataError)
    assert padded.code == "TOK-003"


def test_plain_text_is_trained_from_its_first_token_to_an_end() -> None:
    tokenizer = make_tokenizer(CHATML)
    made = Encoder(tokenizer, {2}).encode([Row(file="f", line=1, id="x", sha256="", text="All of it.")])[0]
    assert isinstance(made, Tokens)
    assert made.labels == made.input_ids
    assert tokenizer.decode(made.input_ids) == "All of it.<|im_end|>"


def test_one_bad_row_does_not_spoil_its_neighbours() -> None:
    rows = [row_of(CONVERSATIONS["single"]), row_of({"messages": [{"role": "user", "content": "<|im_end|>"}, ANSWER]})]
    made = Encoder(make_tokenizer(CHATML), {2}).encode([rows[0], rows[1], rows[0]])
    assert [type(m) for m in made] == [Tokens, DataError, Tokens]
