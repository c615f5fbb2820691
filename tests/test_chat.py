from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import finetune.chat as room
from finetune.errors import RunError, WeightsError
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from tests import toy


@pytest.fixture(scope="module")
def tok() -> Any:
    return toy.tokenizer()


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_NEW_TOKENS", 8)


def expected(model: Any, tok: Any, messages: list[dict[str, str]], new: int = 8) -> str:
    """The answer by the argmax of full forward passes, without cache, streaming or generate."""
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tok(text, add_special_tokens=False).input_ids
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + new and (ids[-1] != 2 or len(ids) == len(prompt)):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return "".join(
        c for c in tok.decode(ids[len(prompt) :], skip_special_tokens=True) if c.isprintable() or c in "\n\t"
    ).strip()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talk(model: Any, tok: Any, *typed: str | type[BaseException], bare: Any = None) -> tuple[list[dict[str, str]], str]:
    """The messages that are left and all that was printed."""
    lines: Iterator[Any] = iter(typed)

    def ask() -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    out = io.StringIO()
    return room.talk(model, tok, ask, Console(file=out, width=200), bare=bare), out.getvalue()


def test_turns_are_remembered_and_answered_by_the_tuned_model(tok: Any) -> None:
    model = toy.adapted()
    messages, printed = talk(model, tok, "is this a licence", "which licence")
    first = expected(model, tok, [user("is this a licence")])
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == first and first in printed
    assert messages[3]["content"] == expected(model, tok, messages[:3])
    assert first != expected(toy.model(), tok, [user("is this a licence")])


def test_base_shows_both_and_keeps_the_tuned_answer(tok: Any) -> None:
    model = toy.adapted()
    messages, printed = talk(model, tok, "/base", "is this a licence", "/base", "yes")
    base, tuned = (expected(m, tok, [user("is this a licence")]) for m in (toy.model(), model))
    assert f"base  {base}" in printed and f"tuned {tuned}" in printed
    assert messages[1]["content"] == tuned
    assert printed.count("base  ") == 1


def test_base_of_merged_weights_is_loaded_when_it_is_first_asked_for(tok: Any) -> None:
    merged, base, loaded = toy.adapted().merge_and_unload(), toy.model(), []

    def bare() -> Any:
        loaded.append(1)
        return base

    assert talk(merged, tok, "yes", bare=bare) and not loaded
    messages, printed = talk(merged, tok, "/base", "is this a licence", bare=bare)
    assert loaded and "loading the base" in printed
    said, tuned = (expected(m, tok, [user("is this a licence")]) for m in (base, merged))
    assert f"base  {said}" in printed and f"tuned {tuned}" in printed and said != tuned
    assert messages[1]["content"] == tuned


def test_reset_forgets_help_lists_and_an_unknown_word_says_so(tok: Any) -> None:
    messages, printed = talk(toy.adapted(), tok, "yes", "/reset", "/help", "/bsae", "", "no", "/quit", "never read")
    assert [m["content"] for m in messages if m["role"] == "user"] == ["no"]
    assert "/bsae is not a command." in printed and printed.count("/quit   leave") == 2


def test_a_prompt_may_begin_with_a_slash_behind_a_space(tok: Any) -> None:
    messages, _ = talk(toy.adapted(), tok, " /etc/licence")
    assert messages[0]["content"] == "/etc/licence"


@pytest.mark.parametrize("base_too", [False, True])
def test_ctrl_c_stops_the_answer_and_not_the_program(tok: Any, base_too: bool) -> None:
    model, calls = toy.adapted(), []
    whole = expected(toy.model() if base_too else model, tok, [user("is this a licence")])

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.get_base_model().lm_head.register_forward_hook(interrupt)
    messages, printed = talk(model, tok, *(["/base"] if base_too else []), "is this a licence", "yes")
    handle.remove()
    assert printed.count("[stopped]") == 1 and len(messages) == 4
    if base_too:  # the adapter works again after it was left out
        assert messages[1]["content"] == expected(model, tok, [user("is this a licence")])
    else:
        assert whole.startswith(messages[1]["content"]) and len(messages[1]["content"]) < len(whole)


def test_ctrl_c_at_the_prompt_says_how_to_leave(tok: Any) -> None:
    messages, printed = talk(toy.adapted(), tok, KeyboardInterrupt, "yes")
    assert "/quit or Ctrl-D leaves." in printed and len(messages) == 2


def test_a_conversation_that_is_too_long_is_said_and_not_kept(tok: Any) -> None:
    model = toy.adapted()
    model.get_base_model().config.max_position_embeddings = 40
    messages, printed = talk(model, tok, "yes", "no " * 60)
    assert "more than the model can read. /reset begins" in printed
    assert [m["content"] for m in messages if m["role"] == "user"] == ["yes"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert room._printable("a\x1b[2Jb\x07\tc\nd\u200bé") == "a[2Jb\tc\ndé"


def stand_ins(monkeypatch: pytest.MonkeyPatch, tok: Any, model: Any, opening: Any = ()) -> list[tuple[Any, bool]]:
    """Stand-ins for what loads a run; returns the list of (folder, whether in 4 bits) that they will have loaded."""
    loaded: list[tuple[Any, bool]] = []

    def load_base(folder: Any, *, load_in_4bit: bool, precision: str, double_quantisation: bool) -> Any:
        loaded.append((folder, load_in_4bit))
        family = SimpleNamespace(routing_table="")
        return SimpleNamespace(tokenizer=tok, family=family, arithmetic=contextlib.nullcontext, model=model)

    for name, what in {
        "whole": {"load_trained": lambda _base, _folder: model},
        "base": {"load_base": load_base},
        "compose": {"read_recipe": lambda _path: Recipe(name="toy")},
        "data": {"load_splits": lambda _run: SimpleNamespace(heldout=[{"messages": [*opening, user("a question")]}])},
        "source": {"base_folder": lambda _recipe: "the base"},
    }.items():
        monkeypatch.setitem(sys.modules, f"finetune.{name}", SimpleNamespace(**what))  # type: ignore[arg-type]
    return loaded


def run_chat(
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    tok: Any,
    stdin: str,
    model: Any,
    opening: Any = (),
    of: str = "adapter",
) -> list[tuple[Any, bool]]:
    """Talks through a pipe; returns (folder, whether in 4 bits) of what was loaded."""
    loaded = stand_ins(monkeypatch, tok, model, opening)
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    room.chat(RunDir(tmp_path), of)
    return loaded


def test_a_pipe_gets_one_line_per_prompt_and_nothing_else(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tok: Any
) -> None:
    model = toy.adapted()
    (tmp_path / "adapter").mkdir()
    run_chat(tmp_path, monkeypatch, tok, "is this a licence\n\n/base\n", model)
    answers = [expected(model, tok, [user(p)]).replace("\n", " ") for p in ("is this a licence", "/base")]
    assert capsys.readouterr().out == f"{answers[0]}\n\n{answers[1]}\n"


def test_the_system_message_of_the_rows_opens_every_conversation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tok: Any
) -> None:
    model, opening = toy.adapted(), {"role": "system", "content": "this is a licence"}
    (tmp_path / "adapter").mkdir()
    run_chat(tmp_path, monkeypatch, tok, "is this a licence\n", model, [opening])
    with_it = expected(model, tok, [opening, user("is this a licence")]).replace("\n", " ")
    assert capsys.readouterr().out == f"{with_it}\n"
    assert with_it != expected(model, tok, [user("is this a licence")]).replace("\n", " ")


def test_chat_without_an_adapter_says_which_stage_is_missing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    with pytest.raises(RunError, match=r"adapter is missing.*python -m finetune train run="):
        run_chat(tmp_path, monkeypatch, tok, "", None)


def test_of_merged_the_files_on_disk_answer_in_full_precision(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tok: Any
) -> None:
    (tmp_path / "merged").mkdir()
    merged = toy.adapted().merge_and_unload()
    loaded = run_chat(tmp_path, monkeypatch, tok, "is this a licence\n", merged, of="merged")
    assert loaded == [(tmp_path / "merged", False)]
    assert capsys.readouterr().out == expected(merged, tok, [user("is this a licence")]).replace("\n", " ") + "\n"


def test_of_merged_a_template_that_reaches_out_is_refused_before_anything_is_loaded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    with pytest.raises(WeightsError, match="FRN-004"):
        run_chat(tmp_path, monkeypatch, tok, "", None, of="merged")


def test_chat_of_merged_without_merged_weights_says_which_stage_is_missing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    with pytest.raises(RunError, match=r"merged is missing.*python -m finetune merge run="):
        run_chat(tmp_path, monkeypatch, tok, "", None, of="merged")


def test_questions_of_a_notebook_get_the_answers_of_base_and_tuned_within_the_given_length(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    model, opening = toy.adapted(), {"role": "system", "content": "this is a licence"}
    (tmp_path / "adapter").mkdir()
    loaded = stand_ins(monkeypatch, tok, model, [opening])
    said = room.answers(RunDir(tmp_path), ["is this a licence", "licence"], 8)
    asked = [[opening, user(question)] for question in ("is this a licence", "licence")]
    with model.disable_adapter():
        base = [expected(model, tok, messages) for messages in asked]
    tuned = [expected(model, tok, messages) for messages in asked]
    assert said == list(zip(("is this a licence", "licence"), base, tuned, strict=True))
    assert base != tuned and loaded == [("the base", True)]
    shorter = room.answers(RunDir(tmp_path), ["is this a licence"], 2)[0]
    assert tuned[0].startswith(shorter[2]) and len(shorter[2]) < len(tuned[0])
