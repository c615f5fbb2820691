"""Tuned, base, or neither: what a server's answers say about it."""

from __future__ import annotations

import socket
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from finetune import canary
from finetune.__main__ import main
from finetune.asking import Answer
from finetune.errors import GateError, RunError, ServerError
from finetune.rundir import RunDir, write_json, write_text
from finetune.votes import FLIP_BY_LIKELIHOOD, Vote, at_least, judge, recorded, vote
from tests import fake_server as fake
from tests.fake_server import recorded_run, serving


def found(run_dir: RunDir, url: str, **words: Any) -> tuple[str, str]:
    """(verdict, everything that was said)."""
    lines: list[str] = []
    try:
        side = canary.canary(run_dir, url, lines.append, **words).side
    except GateError as error:
        assert (error.code, error.exit_code) == ("SRV-012", 4)
        side = lines[-1].split(": ")[1].split(";")[0]
        lines.append(error.sentence())
    return side, "\n".join(lines)


@pytest.mark.parametrize("form", ["legacy", "content", ""])
@pytest.mark.parametrize(
    ("model", "side"),
    [(fake.tuned, "tuned"), (fake.base, "base"), (fake.foreign, "neither")],
    ids=lambda x: str(x)[:14],
)
def test_tuned_base_and_foreign_servers_are_called_what_they_are(
    tmp_path: Path, model: Any, side: str, form: str
) -> None:
    with serving(model, logprobs=form) as server:
        verdict, said = found(recorded_run(tmp_path), server.url)
    assert verdict == side
    assert ("judged by words alone" in said) == (form == "" or side == "neither")
    assert all(ask["temperature"] == 0 and ask["path"] == "/v1/completions" for ask in server.asked)


def test_a_base_says_what_to_do_and_the_counts(tmp_path: Path) -> None:
    with serving(fake.base) as server:
        _, said = found(recorded_run(tmp_path), server.url)
    assert (
        "of 8 prompts on which base and tuned model differ, 0 are answered as the tuned model does, 8 as its base"
        in said
    )
    assert "0.000 nats from those of the base" in said
    assert f"Try: python -m finetune serve run={tmp_path}" in said


def test_a_model_tuned_alike_elsewhere_is_told_by_its_log_probabilities_alone(tmp_path: Path) -> None:
    run_dir = recorded_run(tmp_path)
    with serving(fake.alike_elsewhere) as server:
        assert found(run_dir, server.url)[0] == "neither"
    with serving(fake.alike_elsewhere, logprobs="") as server:
        assert found(run_dir, server.url)[0] == "tuned"  # by its words it is one: the docstring says so


def test_a_base_that_a_coarse_format_pushed_to_the_tuned_words_is_still_the_base(tmp_path: Path) -> None:
    with serving(fake.near_tie) as server:
        assert found(recorded_run(tmp_path), server.url)[0] == "base"


@pytest.mark.parametrize(("every", "side"), [(4, "tuned"), (2, "undecided"), (1, "base")])
def test_a_minority_of_flips_does_not_change_the_verdict(tmp_path: Path, every: int, side: str) -> None:
    with serving(fake.flipping(fake.tuned, fake.base, every)) as server:
        assert found(recorded_run(tmp_path), server.url)[0] == side


def test_one_prompt_is_enough_with_log_probabilities_and_too_little_without(tmp_path: Path) -> None:
    run_dir = recorded_run(tmp_path, prompts=3, alike=2)
    assert len(recorded(run_dir)) == 1
    with serving(fake.tuned) as server:
        assert found(run_dir, server.url)[0] == "tuned"
    with serving(fake.tuned, logprobs="") as server:
        assert found(run_dir, server.url)[0] == "undecided"


def test_the_chance_of_so_many_flips_is_that_of_counting_all_cases() -> None:
    chances = [0.1, 0.02, 0.3, 0.1]
    for count in range(6):
        cases = 0.0
        for case in product([0, 1], repeat=4):
            share = 1.0
            for happened, chance in zip(case, chances, strict=True):
                share *= chance if happened else 1 - chance
            cases += share * (sum(case) >= count)
        assert at_least(count, chances) == pytest.approx(cases)


def test_half_of_the_votes_is_no_verdict_however_sure_they_are() -> None:
    assert judge([Vote("tuned", 0.001)] * 4 + [Vote("base", 0.1)] * 4).side == "undecided"
    assert judge([Vote("tuned", 0.1)] * 5 + [Vote("base", 0.1)] * 3).side == "tuned"
    assert judge([]).side == "undecided"


def test_an_answer_that_only_begins_like_one_of_them_is_neither(tmp_path: Path) -> None:
    prompt = recorded(recorded_run(tmp_path))[0]
    assert prompt.tuned == "Permissive"
    assert vote(prompt, Answer("Permissive")).side == "tuned"
    assert vote(prompt, Answer(" Permissive\n")).side == "tuned"
    assert vote(prompt, Answer("Permissive, I think")).side == "neither"
    assert vote(prompt, Answer("Perm")).side == "neither"


def test_log_probabilities_count_as_far_as_the_words_agree(tmp_path: Path) -> None:
    write_json(RunDir(tmp_path).answers, content := fake.answers(1))
    content["prompts"][0]["tuned"] |= {
        "text": "abcdefghij klmnopqrs tuv",
        "ids": [1, 2, 3],
        "logprobs": [-0.1, -0.1, -0.1],
    }
    content["prompts"][0]["tuned_under_base"] = [-4.0, -4.0, -4.0]
    write_json(RunDir(tmp_path).answers, content)
    prompt = recorded(RunDir(tmp_path))[0]
    other_end = Answer("abcdefghij klmnopqrs xyz", ["abcdef", "ghij klmnopqrs", " xyz"], [-0.1, -0.1, -9.0])
    assert vote(prompt, other_end) == Vote("tuned", FLIP_BY_LIKELIHOOD, 0.0, pytest.approx(3.9))


def test_a_run_whose_answers_are_all_alike_says_that_nothing_can_tell(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="SRV-008 base and tuned model answer all 3 recorded prompts alike"):
        canary.canary(recorded_run(tmp_path, 3, alike=3), "http://127.0.0.1:1", print)


@pytest.mark.parametrize("damage", ["{", "[]", '{"prompts": [{}]}', '{"prompts": [3]}'])
def test_answers_that_are_damaged_are_told(tmp_path: Path, damage: str) -> None:
    write_text(RunDir(tmp_path).answers, damage)
    with pytest.raises(RunError, match=r"SRV-014 .*holds no recorded answers"):
        recorded(RunDir(tmp_path))


def test_a_record_that_lacks_a_probability_is_damaged(tmp_path: Path) -> None:
    content = fake.answers()
    content["prompts"][3]["tuned_under_base"].pop()
    write_json(RunDir(tmp_path).answers, content)
    with pytest.raises(RunError, match="SRV-014"):
        recorded(RunDir(tmp_path))


def test_a_run_that_is_not_merged_says_which_stage_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"python -m finetune merge run="):
        recorded(RunDir(tmp_path))


def test_a_server_without_completions_is_asked_by_conversation(tmp_path: Path) -> None:
    with serving(fake.tuned, chat_only=True) as server:
        verdict, said = found(recorded_run(tmp_path), server.url)
    assert verdict == "tuned" and "takes conversations only" in said
    asked = [ask for ask in server.asked if ask["path"] == "/v1/chat/completions"]
    assert [ask["messages"] for ask in asked] == [entry["messages"] for entry in fake.answers()["prompts"]]


def test_nothing_but_the_recorded_prompts_is_sent(tmp_path: Path) -> None:
    with serving(fake.tuned) as server:
        found(recorded_run(tmp_path), server.url)
    prompts = {fake.rendered(n) for n in range(8)}
    assert {ask["prompt"] for ask in server.asked} == prompts
    assert {key for ask in server.asked for key in ask} == {
        "path", "key", "model", "prompt", "max_tokens", "temperature", "logprobs"
    }  # fmt: skip


def test_the_key_comes_from_the_environment_and_a_refusal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = recorded_run(tmp_path)
    with serving(fake.tuned, key="k-1") as server:
        with pytest.raises(ServerError, match=r"SRV-006 .*FINETUNE_API_KEY"):
            found(run_dir, server.url)
        monkeypatch.setenv("FINETUNE_API_KEY", "k-1")
        assert found(run_dir, server.url)[0] == "tuned"
        assert {ask["key"] for ask in server.asked} == {"Bearer k-1"}


def test_a_server_with_several_models_wants_to_know_which(tmp_path: Path) -> None:
    run_dir = recorded_run(tmp_path)
    with serving({"a": fake.base, "b": fake.tuned}) as server:
        with pytest.raises(ServerError, match=r"SRV-011 .*has 2 models: a, b"):
            found(run_dir, server.url)
        assert found(run_dir, server.url, model="b")[0] == "tuned"
    listed = [{"id": "a", "owned_by": "vllm", "parent": None}, {"id": "b", "owned_by": "vllm", "parent": "a"}]
    with serving({"a": fake.base, "b": fake.tuned}, listed=listed) as server:
        assert found(run_dir, server.url)[0] == "tuned"  # the one that is an adapter
        assert server.asked[0]["add_special_tokens"] is False


def test_a_server_that_lists_no_models_is_asked_all_the_same(tmp_path: Path) -> None:
    with serving({"": fake.tuned, "m": fake.base}, unlisted=True) as server:
        assert found(recorded_run(tmp_path), server.url)[0] == "tuned"
        assert found(recorded_run(tmp_path), server.url, model="m")[0] == "base"
    assert "model" not in server.asked[0] and server.asked[-1]["model"] == "m"


def test_where_prompts_go_is_said_when_it_is_not_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    refused = ServerError("SRV-005", "no network here")
    monkeypatch.setattr(canary, "models", lambda *_, **__: (_ for _ in ()).throw(refused))
    with pytest.raises(ServerError, match="SRV-005"):
        canary.canary(recorded_run(tmp_path), "http://gpu.example/v1", lines.append)
    assert lines == [
        "8 prompts, held-out rows of your data, go to http://gpu.example/v1 without encryption, because you typed it"
    ]


LISTED = [{"id": "base", "owned_by": "vllm"}, {"id": "tuned", "owned_by": "vllm", "parent": "base"}]


def test_isolation_asks_in_turns_and_passes_when_both_answer_as_themselves(tmp_path: Path) -> None:
    lines: list[str] = []
    with serving({"base": fake.base, "tuned": fake.tuned}, listed=LISTED) as server:
        base, tuned = canary.isolation(recorded_run(tmp_path), server.url, lines.append)
    assert (base.side, tuned.side) == ("base", "tuned")
    assert [ask["model"] for ask in server.asked[1:]] == ["base", "tuned", "base"] * 8
    assert "0 of 8 answers are others" in lines[-1]


def test_isolation_sees_a_base_that_moves_once_the_adapter_was_used(tmp_path: Path) -> None:
    used: list[str] = []

    def tuned(text: str) -> fake.Said:
        used.append(text)
        return fake.tuned(text)

    def moved(text: str) -> fake.Said:
        return fake.tuned(text) if text in used else fake.base(text)

    with (
        serving({"base": moved, "tuned": tuned}, listed=LISTED) as server,
        pytest.raises(GateError, match=r"SRV-013 .*8 answers of base changed after tuned was asked"),
    ):
        canary.isolation(recorded_run(tmp_path), server.url, print)


def test_isolation_sees_an_adapter_that_is_not_applied(tmp_path: Path) -> None:
    with (
        serving({"base": fake.base, "tuned": fake.base}, listed=LISTED) as server,
        pytest.raises(GateError, match=r"SRV-013 tuned answers as the base"),
    ):
        canary.isolation(recorded_run(tmp_path), server.url, print)


def test_isolation_needs_two_models(tmp_path: Path) -> None:
    with serving(fake.tuned) as server, pytest.raises(ServerError, match=r"SRV-011 .*base_model="):
        canary.isolation(recorded_run(tmp_path), server.url, print)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run folder that the command line takes for one."""
    write_text(tmp_path / "recipe.yaml", "name: job\n")
    return recorded_run(tmp_path)


def test_verify_serve_ends_with_0_for_tuned_and_4_for_base(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for model, code, words in ((fake.tuned, 0, "m: tuned;"), (fake.base, 4, "SRV-012 the server's model is the base")):
        with serving(model) as server:
            assert main(["verify", f"serve={server.url}/v1/", f"run={run.path}"]) == code
        said = capsys.readouterr()
        assert words in said.out + said.err and "Traceback" not in said.err


def test_verify_isolation_takes_both_names(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"a": fake.base, "b": fake.tuned}) as server:
        words = ["verify", "--isolation", f"serve={server.url}", f"run={run.path}", "model=b", "base_model=a"]
        assert main(words) == 0
        assert main([*words[:-2], "model=a", "base_model=b"]) == 4
    assert "SRV-013" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({"reply": b"<html>hello</html>"}, "SRV-007"),
        ({"reply": b'{"choices": []}'}, "SRV-007"),
        ({"reply": b'{"choices": [{"text": 7}]}'}, "SRV-007"),
        (
            {"reply": b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [null]}}]}'},
            "SRV-007",
        ),
        ({"reply": b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [NaN]}}]}'}, "SRV-007"),
        ({"reply": b"\x1b[2Jboo", "status": 500}, "SRV-007"),
        ({"status": 302}, "SRV-007"),
        ({"status": 403}, "SRV-006"),
        ({"listed": [{"name": "m"}]}, "SRV-007"),
        ({"listed": [{"id": "m\x1b[2J"}]}, "SRV-007"),
    ],
)
def test_a_server_that_talks_nonsense_is_an_error_in_a_sentence(
    run: RunDir, capsys: pytest.CaptureFixture[str], words: dict[str, Any], code: str
) -> None:
    with serving(fake.tuned, **words) as server:
        assert main(["verify", f"serve={server.url}", f"run={run.path}"]) == 3
    said = capsys.readouterr().err
    assert said.startswith(code) and "Traceback" not in said and "\x1b" not in said
    assert len(server.asked) <= 1 and server.fetched == ["/v1/models"]  # a redirect is not followed


def test_a_server_that_is_silent_is_an_error_after_a_while(run: RunDir) -> None:
    from finetune.asking import Endpoint, complete

    with serving(fake.tuned, seconds=1.0) as server, pytest.raises(ServerError, match=r"SRV-005 .*within 0.1 seconds"):
        complete(Endpoint(f"{server.url}/v1", "m"), fake.rendered(0), max_tokens=1, timeout_s=0.1)


def test_nobody_there_is_an_error_in_a_sentence(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["verify", f"serve=http://127.0.0.1:{port}", f"run={run.path}"]) == 3
    assert "SRV-005" in (said := capsys.readouterr().err) and "refused" in said.lower()


def test_what_is_no_http_is_an_error_in_a_sentence(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].sendall(b"SSH-2.0-x\r\n"), daemon=True)
        thread.start()
        assert main(["verify", f"serve=http://127.0.0.1:{listener.getsockname()[1]}", f"run={run.path}"]) == 3
    assert capsys.readouterr().err.startswith("SRV-005")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["serve=ftp://127.0.0.1"], 3),
        (["serve=127.0.0.1:8000"], 3),
        (["serve="], 2),
        (["serve=http://127.0.0.1:1", "mdl=x"], 2),
        (["serve=http://127.0.0.1:1", "base_model=x"], 2),
        (["--isolation"], 2),
    ],
)
def test_wrong_words_are_told_and_secrets_are_not_repeated(
    run: RunDir, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    assert main(["verify", f"run={run.path}", *words]) == code
    said = capsys.readouterr().err
    assert "Type: python -m finetune verify" in said if code == 2 else said.startswith("SRV-009")
    assert "secret" not in said and "Traceback" not in said
