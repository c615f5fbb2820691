"""Planted secrets and words of rows, in words, settings, the environment and errors: where they turn up, and do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune import events, failures, guard
from finetune.__main__ import main
from finetune.data.rows import SHOW_ROWS, quoted
from finetune.errors import DataError, FinetuneError, RecipeError
from finetune.fetch.child import FetchError
from finetune.rundir import RunDir

VALUES = {
    "Hugging Face": "hf_CanaryCanaryCanary1",
    "AWS": "AKIACANARYCANARY1234",
    "OpenAI": "sk-canarycanarycanary12",
    "GitHub": "ghp_canarycanarycanary12",
    "GitHub, fine-grained": "github_pat_canarycanarycanary12",
    "GitLab": "glpat-canarycanary12",
    "Slack": "xoxb-canary-canary-1",
    "Stripe": "sk_live_canarycanarycanary",
    "Google": "AIzaCanaryCanaryCanaryCanaryCanary12345",
    "npm": "npm_" + "canary" * 6,
    "NVIDIA": "nvapi-canarycanarycanary",
    "a web token": "eyJcanarycanary.eyJcanarycanary.canarycanary",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----",
    "a password in an address": "https://user:canary@example.org/x",
}
"""Kind -> a value that gives itself away. No value here is anybody's."""


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize(
    "words",
    [
        ["recipe=legal_quickstart", "model.note={}"],
        ["recipe=legal_quickstart", "{}"],
        ["{}"],
        ["data", "preview", "run={}"],
        ["verify", "serve={}", "run=x"],
        ["recipe=legal_quickstart", "--config-dir={}"],
        ["recipe=legal_quickstart", "--run-file", "{}"],
        ["-m", "recipe=legal_quickstart", "name=a,{}"],
        ["data", "index", "file={}"],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_a_secret_among_the_words_is_refused_and_not_repeated(
    words: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{}", value) for word in words]) == 2
    said = "".join(capsys.readouterr())
    assert "CFG-006" in said and "environment" in said and "canary" not in said.lower()


@pytest.mark.parametrize("word", ["hf_token=abcdef", "+password=letmein", "--api-key=abc", "my.aws.secret_key=abc"])
def test_a_word_whose_name_is_that_of_a_secret_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=legal_quickstart", word]) == 2
    said = "".join(capsys.readouterr())
    assert "CFG-006" in said and word.partition("=")[2] not in said


@pytest.mark.parametrize(
    "text",
    [
        "name: x\npurpose: VALUE\n",
        "launch:\n  setup: ['export DB_PASSWORD=VALUE']\n",
        "model:\n  config: {deep: [{er: VALUE}]}\n",
    ],
)
def test_a_secret_in_a_settings_file_is_refused_and_not_repeated(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe").mkdir()
    value = "canarycanary1" if "PASSWORD" in text else VALUES["Hugging Face"]
    (tmp_path / "recipe" / "own.yaml").write_text("# @package _global_\n" + text.replace("VALUE", value))
    assert main(["check", "recipe=own", f"--config-dir={tmp_path}"]) == 2
    said = "".join(capsys.readouterr())
    assert "CFG-006" in said and "canary" not in said.lower()


@pytest.mark.parametrize(
    "word",
    [
        "evaluate.max_new_tokens=9",
        "++model.config.eos_token_id=3",
        "data.columns={token: prompt}",
        "launch.setup=[export TOKENIZERS_PARALLELISM=false]",
        "name=tokens_of_law",
        "data.end_of_turn=<|im_end|>",
    ],
)
def test_words_that_only_look_like_secrets_are_no_secrets(word: str) -> None:
    assert guard.word_problems([word]) == []


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_an_error_says_no_secret_whoever_raised_it(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        FinetuneError("RUN-001", f"cannot open {value}", value, value),
        RecipeError([f"CFG-003 {value}: no"]),
        FetchError("FET-003", "the index cannot be reached", f"HTTPSConnectionPool: {value} refused"),
        ValueError(f"unexpected {value}"),
        OSError(13, "Permission denied", value),
    ]
    for error in made:
        try:
            raise error
        except Exception as caught:
            failures.explain(caught, RunDir(tmp_path))
    said = "".join(capsys.readouterr()) + (tmp_path / "error.log").read_text()
    assert "[hidden]" in said and "canary" not in said.lower()


def test_values_of_secret_variables_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPANY_DB_PASSWORD", "correct-horse-battery")
    monkeypatch.setenv("HARMLESS", "correct-horse-meadow")
    text = guard.redact("login correct-horse-battery failed in correct-horse-meadow")
    assert text == "login [hidden] failed in correct-horse-meadow"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("password=hunter2hunter", "password=[hidden]"),
        ('{"api_key": "abcdefgh"}', '{"api_key": "[hidden]"}'),
        ("AWS_SECRET_ACCESS_KEY: abcdefgh", "AWS_SECRET_ACCESS_KEY: [hidden]"),
        (
            "max_tokens=1000000 tokens: 4096000 token: <|im_end|>",
            "max_tokens=1000000 tokens: 4096000 token: <|im_end|>",
        ),
        ("no token is left behind, none", "no token is left behind, none"),
    ],
)
def test_what_a_secret_name_is_given_is_hidden_and_nothing_else(text: str, plain: str) -> None:
    assert guard.redact(text) == plain


def test_events_hold_no_secret(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    events.note(run_dir, "allowed", changes=[VALUES["AWS"]], why={"x": VALUES["Slack"]})
    assert events.breaks(run_dir, events.head(run_dir)) == []
    assert "canary" not in run_dir.events.read_text().lower()


# --- rows -----------------------------------------------------------------------------------------------------------

WORDS = "zanzibar-4711"
GOOD = {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}
FAULTS = [
    json.dumps({"messages": [{"role": "user", "content": WORDS}]}),
    json.dumps({"messages": [{"role": "wizard", "content": WORDS}, {"role": "assistant", "content": ""}]}),
    json.dumps({"messages": WORDS}),
    json.dumps([WORDS]),
    json.dumps({"messages": [{"role": "user", "content": WORDS + "<|im_end|>"}, GOOD["messages"][1]]}),
    '{"messages": "' + WORDS,
    WORDS,
    json.dumps({"text": WORDS, "messages": 1}),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_what_is_wrong_with_a_row_is_said_without_its_words(
    tmp_path: Path, fault: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_data import make_tokenizer
    from tests.test_data import prepared as prepare_rows
    from tests.toy import CHATML

    monkeypatch.delenv(SHOW_ROWS, raising=False)
    text = f"{json.dumps(GOOD)}\n{fault}\n" if kind == "jsonl" else f"[{json.dumps(GOOD)}, {fault}] {WORDS}"
    path = tmp_path / f"rows.{kind}"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, make_tokenizer(CHATML), train_files=[str(path)])
    told = [str(caught.value), *(p.read_text() for p in tmp_path.rglob("ledger.jsonl"))]
    assert caught.value.code.startswith("DATA-") and not any(WORDS in each for each in told)


def test_words_of_rows_are_named_by_length_and_hash_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHOW_ROWS, raising=False)
    assert WORDS not in quoted(WORDS) and "13 characters, sha256" in quoted(WORDS)
    monkeypatch.setenv(SHOW_ROWS, "1")
    assert quoted(WORDS) == repr(WORDS)


def test_the_option_sets_what_the_processes_of_a_job_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SHOW_ROWS, "0")
    assert main(["recipes", "--show-rows"]) == 0
    assert os.environ[SHOW_ROWS] == "1"


def test_what_a_template_says_of_a_row_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.data.encoder import tokenize
    from tests.toy import CHATML, tokenizer

    monkeypatch.delenv(SHOW_ROWS, raising=False)
    fixed = "{{ raise_exception('roles must alternate') }}"
    echo = "{{ raise_exception('cannot say ' + messages[0].content) }}"
    chat = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "no"}]
    with pytest.raises(DataError, match=r"TPL-003 .*roles must alternate"):
        tokenize(tokenizer(CHATML + fixed), {2}, chat, "rows.jsonl:1")
    with pytest.raises(DataError, match=r"TPL-003 .*sha256") as caught:
        tokenize(tokenizer(CHATML + echo), {2}, chat, "rows.jsonl:1")
    assert WORDS not in str(caught.value)
    monkeypatch.setenv(SHOW_ROWS, "1")
    with pytest.raises(DataError, match=WORDS):
        tokenize(tokenizer(CHATML + echo), {2}, chat, "rows.jsonl:1")


HOLD_ROWS = {
    *("data/train.arrow", "data/heldout.arrow", "data/mask.txt"),
    *("scores.json", "report.html", "merged/answers.json"),
}
"""Files of a run folder that hold words of rows, and are meant to: the rows, three of them with their mask, samples."""


@pytest.mark.slow
def test_a_whole_job_writes_and_prints_no_secret_and_words_of_rows_only_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planted = {
        "HF_TOKEN": "hf_CanaryEnvironment1234",
        "AWS_SECRET_ACCESS_KEY": "canaryAwsSecret9876",
        "MY_DB_PASSWORD": "canaryDbPassword77",
        "HTTPS_PROXY": "http://canaryuser:canarypass@127.0.0.1:9",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SHOW_ROWS, raising=False)
    rows = [
        {"messages": [{"role": "user", "content": f"Is {WORDS}-{i} valid?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    mine = ["data=files", f"data.train_files=[{tmp_path / 'rows.jsonl'}]", "data.heldout_fraction=0.2"]
    assert main(["recipe=legal_quickstart", "scale=rehearsal", *places, *mine]) == 0
    said = "".join(capfd.readouterr())
    assert "[6/6] report" in said and WORDS not in said and "canary" not in said.lower()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "rows.jsonl"]
    assert len(files) > 40
    with_secrets = [path for path in files if any(value.encode() in path.read_bytes() for value in planted.values())]
    assert with_secrets == []
    run_dir = tmp_path / "runs" / "legal_quickstart" / "0001"
    with_words = [path for path in files if WORDS.encode() in path.read_bytes()]
    assert {str(p.relative_to(run_dir)) for p in with_words if p.is_relative_to(run_dir)} == HOLD_ROWS
    assert {p.parent.parent.name for p in with_words if not p.is_relative_to(run_dir)} == {"prepared"}
