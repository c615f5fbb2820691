"""A Modelfile for Ollama beside a GGUF file, with the model's own chat template in Ollama's words where it has any.

Ollama reads templates in the language of Go. Ours is made from what the chat template writes around known contents, and
counts only if it then writes five fixed conversations as the chat template does, to the letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.export.chats import ASSISTANT, CHATS, SYSTEM, USER
from finetune.foreign.rendering import rendered

MARKS = {SYSTEM: "sYsTeMmArK", USER: "uSeRmArK", ASSISTANT: "aSsIsTaNtMaRk"}
"""Contents that no template writes by itself."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a chat template writes around contents that it leaves as they are."""

    begin: str
    """Before everything else."""
    default: str
    """After that, where the first message is not the system's: its message of its own."""
    around: dict[str, tuple[str, str]]
    """Role -> what stands before and after its content."""
    prompt: str
    """At the end, where an answer is to follow."""

    def text(self, chat: Sequence[dict[str, str]]) -> str:
        """A conversation as this shape writes it, with room for an answer."""
        middle = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in chat)
        return self.begin + ("" if chat[0]["role"] == SYSTEM else self.default) + middle + self.prompt

    def template(self) -> str:
        """The same in Ollama's words."""
        pieces = [_literal(self.begin)]
        if self.default:
            pieces += [f'{{{{ if ne (index .Messages 0).Role "{SYSTEM}" }}}}', _literal(self.default), "{{ end }}"]
        pieces.append("{{ range .Messages }}")
        for number, (role, (before, after)) in enumerate(self.around.items()):
            word = "else if" if number else "if"
            pieces += [
                f'{{{{ {word} eq .Role "{role}" }}}}',
                _literal(before),
                "{{ .Content }}",
                _literal(after),
            ]
        return "".join([*pieces, "{{ end }}{{ end }}", _literal(self.prompt)])


def modelfile(tokenizer: Any, gguf: str, stops: Sequence[str], sampling: dict[str, float]) -> str:
    """The text of a Modelfile; empty where the chat template cannot be written in Ollama's words.

    `gguf` is the path of the weights, relative to the Modelfile's folder; `stops` are the texts of stop tokens;
    `sampling` is what the model's settings for generation say, e.g. its temperature.
    """
    shape = shape_of(tokenizer)
    if shape is None:
        return ""
    first = tokenizer.bos_token
    if first and shape.begin.startswith(first) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        shape = replace(shape, begin=shape.begin.removeprefix(first))  # llama.cpp puts this token there itself
    lines = [f"FROM {gguf}", f'TEMPLATE """{shape.template()}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    lines += [f"PARAMETER {key} {value}" for key, value in ({"temperature": 0, "repeat_penalty": 1} | sampling).items()]
    return "\n".join(lines) + "\n"


def shape_of(tokenizer: Any) -> Shape | None:
    """The shape of a chat template, if it has one and that writes all five conversations as the template does."""
    from jinja2.exceptions import TemplateError

    def written(chat: Sequence[dict[str, str]], prompt: bool = True) -> str:
        return rendered(tokenizer, list(chat), prompt)

    def marked(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": MARKS[role]} for role in roles]

    try:
        whole = written(marked(SYSTEM, USER, ASSISTANT, USER), False)
        open_ = written(marked(SYSTEM, USER, ASSISTANT, USER))
        alone = written(marked(USER), False)
        before_system, after_system = whole.split(MARKS[SYSTEM])
        between = after_system.split(MARKS[USER])
        to_user, from_user, end_user = between[0], between[1], between[2]
        to_assistant, back_to_user = from_user.split(MARKS[ASSISTANT])
        before_alone, after_alone = alone.split(MARKS[USER])
        end_assistant = written(marked(USER, ASSISTANT), False).split(MARKS[ASSISTANT])[1]
    except (ValueError, IndexError, TemplateError):
        return None
    user_before = back_to_user.removeprefix(end_assistant)
    framed = back_to_user.startswith(end_assistant) and to_assistant.startswith(end_user) and after_alone == end_user
    alike = open_.startswith(whole) and to_user.endswith(user_before) and before_alone.endswith(user_before)
    if not (framed and alike):
        return None
    around = {
        SYSTEM: ("", to_user.removesuffix(user_before)),
        USER: (user_before, end_user),
        ASSISTANT: (to_assistant.removeprefix(end_user), end_assistant),
    }
    lead = before_alone.removesuffix(user_before)
    begin = _common_start(before_system, lead) if lead else ""
    around[SYSTEM] = (before_system.removeprefix(begin), around[SYSTEM][1])
    shape = Shape(begin, lead.removeprefix(begin), around, open_.removeprefix(whole))
    writable = '"""' not in shape.template()
    return shape if writable and all(shape.text(chat) == _try(written, chat) for chat in CHATS) else None


def _try(written: Any, chat: Sequence[dict[str, str]]) -> str | None:
    from jinja2.exceptions import TemplateError

    try:
        return str(written(chat))
    except TemplateError:
        return None


def _common_start(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _literal(text: str) -> str:
    """A text as it stands between the braces of a template."""
    return text.replace("{{", '{{ "{{" }}')
