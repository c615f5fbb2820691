"""The program that tries chat templates out, with limits on its time, memory and output. It imports nothing of ours.

Started by `templates.py` as a file. Standard input: a JSON object with `templates` (texts) and limits. Standard
output: a JSON list with, for each, `characters` (of the longest rendering), `refused` (renderings that the template
itself turns down) and `error`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

USER, ASSISTANT = "user", "assistant"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CHATS: tuple[tuple[list[dict[str, str]], list[Any] | None], ...] = (
    (_chat((USER, "What does this clause mean?")), None),
    (_chat(("system", "Answer in one word."), (USER, "Is water wet?"), (ASSISTANT, "Yes.")), None),
    (_chat((USER, "Look up quorum."), (ASSISTANT, "A number."), (USER, "And quota?")), [TOOL]),
    (_chat((USER, "Grüße, 你好 {{ twice }} <b>&amp;</b>"), (ASSISTANT, "")), None),
    (_chat(*(((USER, "word " * 200), (ASSISTANT, "word " * 50)) * 20)), None),
)
"""Five conversations: short, with a system message, with a tool, with symbols, long."""


def main() -> None:
    """Reads the job, confines itself, renders, says how it went."""
    job = json.load(sys.stdin)
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template  # what training and serving render with

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    room = pages * resource.getpagesize() + job["mebibytes"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + job["seconds"] + 1, used + job["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print(json.dumps([_try(template, job, render_jinja_template, jinja2) for template in job["templates"]]))


def _try(template: str, job: dict[str, Any], render: Any, jinja2: Any) -> dict[str, Any]:
    longest = refused = 0
    for chat, tools in CHATS:
        for prompt in (False, True):
            try:
                (text,), _ = render(
                    [chat], tools=tools, chat_template=template, add_generation_prompt=prompt, **job["tokens"]
                )
            except jinja2.exceptions.SecurityError as error:
                return {"characters": longest, "refused": refused, "error": f"it reaches too far: {error}"}
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
                refused += 1  # a template may want other roles, or no tools
                continue
            except RecursionError:
                return {"characters": longest, "refused": refused, "error": "it calls itself without an end"}
            except (MemoryError, OverflowError):
                what = f"it needs more than {job['mebibytes']} MiB"
                return {"characters": longest, "refused": refused, "error": what}
            longest = max(longest, len(text))
            if longest > job["characters"]:
                what = f"it writes more than {job['characters']:,} characters of a short conversation"
                return {"characters": longest, "refused": refused, "error": what}
    return {"characters": longest, "refused": refused, "error": ""}


if __name__ == "__main__":
    main()
