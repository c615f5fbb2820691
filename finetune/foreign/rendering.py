"""Conversations as a chat template writes them, within limits: `rendered(tokenizer, messages)`.

A template is a stranger's program, and one that passed its trial (`templates.py`) may wait for a word. So everything
that renders, from the first row to a prompt typed in `chat`, does it here: `rendered` for one conversation, `write`
within `bounded()` for many.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import WeightsError

ROW_SECONDS, ROW_MEBIBYTES = 20, 1024
"""What a rendering of one row may take, and the memory that is there for it."""

LONGEST = 50_000_000
"""Characters that a template may write of one conversation. A record has 16 MiB at most."""

AS_PUBLISHED = "the template as the model's publisher has it, as chat_template.jinja"
"""What may be done about a template that is refused."""


def rendered(tokenizer: Any, messages: Sequence[Any], prompt: bool = True) -> str:
    """What the tokenizer's chat template writes of a conversation, and with `prompt` the beginning of an answer.

    Raises WeightsError (FRN-009) where it takes more than a row may take, and as Jinja does (TemplateError) where the
    template refuses the conversation.
    """
    with limited():
        return write(tokenizer, messages, prompt)


def write(tokenizer: Any, messages: Sequence[Any], prompt: bool, tools: Sequence[Any] = ()) -> str:
    """The same, for use within `bounded()`, which limits time and memory. Raises as the template and `accepted` do."""
    return accepted(
        tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt)
    )


def accepted(text: str) -> str:
    """The text itself. Raises TemplateLimit where it is too long, ValueError where it is none."""
    if len(text) > LONGEST:
        raise TemplateLimit(f"it writes {len(text):,} characters, of at most {LONGEST:,}")
    text.encode()  # half a surrogate pair is no character
    return text


@contextmanager
def limited() -> Iterator[None]:
    """Inside, one conversation is rendered within the limits of a row. Raises WeightsError (FRN-009) beyond them."""
    try:
        with bounded() as bounds:
            bounds.begin()
            yield
    except (TemplateLimit, MemoryError, RecursionError, OverflowError) as error:
        why = str(error)
        if isinstance(error, MemoryError):
            why = f"it needs more than {ROW_MEBIBYTES} MiB"
        elif isinstance(error, RecursionError):
            why = "it calls itself without an end"
        what = "the chat template was stopped while it wrote a conversation"
        raise WeightsError("FRN-009", what, why, AS_PUBLISHED) from None


class TemplateLimit(ValueError):
    """A rendering that took too long, or wrote too much."""


class Bounds:
    """Limits on the renderings of this thread, while `bounded()` is open."""

    def __init__(self, timed: bool) -> None:
        self._timed = timed

    def begin(self) -> None:
        """A row begins: its time starts anew."""
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, ROW_SECONDS)


@contextmanager
def bounded() -> Iterator[Bounds]:
    """Inside, this process may grow by ROW_MEBIBYTES (else MemoryError), and a row takes ROW_SECONDS (TemplateLimit).

    Time is only kept in the main thread and where nobody else uses SIGALRM; memory only on Linux. In Python code, which
    templates become, the signal is seen between two operations: one operation may take longer.
    """
    timed = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) in (
        signal.SIG_DFL,
        signal.SIG_IGN,
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before: Any = signal.signal(signal.SIGALRM, _too_long) if timed else None
    try:
        _room(limits)
        yield Bounds(timed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _room(limits: tuple[int, int]) -> None:
    sizes = Path("/proc/self/statm")
    if not sizes.is_file():
        return
    room = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + ROW_MEBIBYTES * 2**20
    soft, hard = limits
    if soft == resource.RLIM_INFINITY or room < soft:
        resource.setrlimit(resource.RLIMIT_AS, (room, hard))


def _too_long(*_: object) -> None:
    raise TemplateLimit(f"it took more than {ROW_SECONDS} s")
