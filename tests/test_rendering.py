"""Whatever renders a conversation does it within the limits of a row, and ends with a sentence beyond them."""

from __future__ import annotations

import ast
import io
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
from rich.console import Console

import finetune
from finetune import chat
from finetune.errors import DataError, WeightsError
from finetune.evaluate import drift, score
from finetune.export import chats
from finetune.export.ollama import MARKS, shape_of
from finetune.foreign import rendering, templates
from finetune.merge import prove
from tests import toy

PACKAGE = Path(finetune.__file__).parent
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DEEP = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
LARGE = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
HUGE = "{% set n = range(100001) %}"

pytestmark = pytest.mark.timeout(300, method="thread")  # the other method takes the alarm that the limit needs


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "ROW_SECONDS", 0.3)
    monkeypatch.setattr(rendering, "ROW_MEBIBYTES", 256)


def waiting(word: str, harm: str = LONG) -> Any:
    """A tokenizer whose template is harmless until a message has a word in it."""
    return toy.tokenizer(toy.CHATML + "{% for m in messages %}{% if '" + word + "' in m.content %}" + harm + _ENDS)


_ENDS = "{% endif %}{% endfor %}"


def says(*contents: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def row(question: str) -> dict[str, Any]:
    """A prepared row, made with a template that does no harm."""
    return toy.row(toy.tokenizer(), 1, question, "yes", ["yes", "no"])


def harness(tok: Any, question: str) -> Any:
    """A prompt as lm-evaluation-harness has it written."""
    from finetune.evaluate.harness import Taker

    return Taker(toy.model(), tok, 1, use_cache=True).apply_chat_template(says(question))


PLACES: dict[str, Callable[[Any, str], Any]] = {
    "one conversation": lambda tok, word: rendering.rendered(tok, says(word)),
    "evaluation: a choice": lambda tok, word: score._rendered(tok, says(word, "yes")),
    "evaluation: what is refused": drift._tokens,
    "evaluation: a benchmark": harness,
    "the proof of a merge": lambda tok, word: prove.prompt_of(row(word), tok),
    "export: the tokenizer": lambda tok, word: chats._ids(tok, says(word)),
    "chat": lambda tok, word: chat.reply(toy.adapted(), tok, says(word), longest=1),
}


def test_the_template_that_waits_passes_its_trial() -> None:
    assert templates.try_out([waiting("swordfish").chat_template]) == [""]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_template_that_waits_for_a_word_is_stopped_wherever_it_renders(place: Callable[[Any, str], Any]) -> None:
    tok = waiting("swordfish")
    assert place(tok, "is this a licence")
    with pytest.raises(WeightsError, match=r"^FRN-009 the chat template was stopped .*more than 0\.3 s\. Try: "):
        place(tok, "swordfish")
    assert place(tok, "is this a licence"), "the limits stayed behind"


def test_the_words_of_a_modelfile_are_written_within_the_limits() -> None:
    assert shape_of(toy.tokenizer())
    with pytest.raises(WeightsError, match="FRN-009"):
        shape_of(waiting(MARKS["assistant"]))


@pytest.mark.parametrize(
    ("harm", "told"), [(LARGE, "more than 256 MiB"), (DEEP, "calls itself without an end"), (HUGE, "Range")]
)
def test_memory_depth_and_ranges_are_limited_too(harm: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "ROW_SECONDS", 60)  # on a busy machine time would come first
    with pytest.raises(WeightsError, match=f"FRN-009 .*{told}"):
        rendering.rendered(waiting("swordfish", harm), says("swordfish"))


def test_a_text_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "LONGEST", 100)
    assert len(rendering.rendered(toy.tokenizer(), says("yes"))) < 100
    with pytest.raises(WeightsError, match=r"FRN-009 .*of at most 100"):
        rendering.rendered(toy.tokenizer(), says("yes " * 50))


def test_what_the_template_itself_says_comes_through() -> None:
    tok = toy.tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        rendering.rendered(tok, says("yes"))


def test_the_limits_are_taken_back() -> None:
    before = (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS))
    with rendering.limited():
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        assert resource.getrlimit(resource.RLIMIT_AS) != before[1]
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_of_memory_that_was_there_is_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    before, lower = resource.getrlimit(resource.RLIMIT_AS), 2**42
    resource.setrlimit(resource.RLIMIT_AS, (lower, before[1]))
    try:
        with rendering.limited():
            assert resource.getrlimit(resource.RLIMIT_AS)[0] < lower
        monkeypatch.setattr(rendering, "ROW_MEBIBYTES", 2**24)
        with rendering.limited():
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == lower
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_an_alarm_of_somebody_else_is_left_alone() -> None:
    def other(*_: object) -> None: ...

    before = signal.signal(signal.SIGALRM, other)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with rendering.limited():
            assert signal.getsignal(signal.SIGALRM) is other
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_renders_too() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(rendering.rendered, toy.tokenizer(), says("yes")).result()


def test_a_conversation_on_the_terminal_goes_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 8)
    typed = iter(["swordfish", "yes"])

    def ask() -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    out = io.StringIO()
    left = chat.talk(toy.adapted(), waiting("swordfish"), ask, Console(file=out, width=400))
    assert "FRN-009" in out.getvalue() and "/reset begins a new conversation" in out.getvalue()
    assert [m["content"] for m in left if m["role"] == "user"] == ["yes"]


def test_rows_keep_an_error_of_their_own() -> None:
    from finetune.data.encoder import tokenize

    with pytest.raises(DataError, match=r"TPL-003 rows\.jsonl:2.*took more than 0\.3 s"):
        tokenize(waiting("swordfish"), {2}, says("swordfish", "no"), "rows.jsonl:2")


def test_nobody_renders_past_the_limits() -> None:
    known = {
        ("foreign/rendering.py", "tokenizer.apply_chat_template"),
        ("evaluate/harness.py", "super().apply_chat_template"),  # within `limited`, above
        ("data/encoder.py", "render_jinja_template"),  # within `bounded`, in `encode`
    }
    found, files = set(), sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.rpartition(".")[2] in ("apply_chat_template", "render_jinja_template"):
                found.add((path.relative_to(PACKAGE).as_posix(), called))
    assert found == known
