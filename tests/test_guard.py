"""Each name, form and key that a setting may not have, one at a time: without its entry, the payload passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import guard
from finetune.errors import FinetuneError, RecipeError

NAMES = (
    *("token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey"),
    *("api_key", "access_key", "private_key", "auth_header"),
)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_of_a_secret_is_one(name: str) -> None:
    assert guard.is_secret_name(f"my.{name.upper()}.x")
    assert len(NAMES) == len(guard.SECRET_WORDS) + len(guard.SECRET_PAIRS)
    assert guard.redact(f"my_{name}=hunter2hunter") == f"my_{name}=[hidden]"
    assert not guard.is_secret_name(f"my{name}x")


FORMS = (
    *("hf_abcdefgh1", "api_org_abcdefgh1", "AKIAABCDEFGHIJKL", "ASIAABCDEFGHIJKL", "sk-abcdefghijklmnop"),
    *("sk_live_abcdefghijklmnop", "rk_test_abcdefghijklmnop", "github_pat_abcdefghijklmnopqrst"),
    *(f"gh{letter}_abcdefghijklmnop" for letter in "pousr"),
    *("glpat-abcdefghijkl", "xoxa-abcdefghij", "xoxp-abcdefghij", "pypi-abcdefghijklmnop"),
    *("AIza" + "b" * 30, "npm_" + "a" * 30),
    *("nvapi-abcdefghijklmnop", "eyJabcdefghij.abcdefghij.x", "-----BEGIN PRIVATE KEY-----x-----END PRIVATE KEY-----"),
)


@pytest.mark.parametrize("value", FORMS)
def test_each_form_of_a_secret_is_hidden(value: str) -> None:
    assert guard.redact(f"it is {value} here") == "it is [hidden] here"
    assert guard.is_secret("note", value)


@pytest.mark.parametrize("line", ["\n", "\\n"])
def test_a_private_key_that_was_cut_is_hidden_as_far_as_it_goes(line: str) -> None:
    cut = line.join(["-----BEGIN RSA PRIVATE KEY-----", "MIIEvQIBADANBgkqhkiG9w0BAQEFAAS/", "CBKcwggSjAgEAAoIBAQ+"])
    assert guard.redact(f"it is {cut}") == "it is [hidden]"
    assert guard.is_secret("note", "-----BEGIN PRIVATE KEY")


def test_a_key_of_a_word_that_is_a_secret_is_not_repeated() -> None:
    for word in ("hf_abcdefgh1=x", "hf_abcdefgh1"):
        (told,) = guard.word_problems([word])
        assert told.startswith("CFG-006 a word of the command line") and "abcdefgh1" not in told


def test_a_variable_of_eight_characters_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "pw-eight")
    assert guard.redact("with pw-eight") == "with [hidden]"


def test_an_error_hides_secrets_whoever_prints_it() -> None:
    made = FinetuneError("RUN-001", "at hf_abcdefgh1", "for hf_abcdefgh2", "not hf_abcdefgh3")
    assert str(made) == "RUN-001 at [hidden]: for [hidden]. Try: not [hidden]"
    assert RecipeError(["CFG-003 hf_abcdefgh1: no"]).problems == ["CFG-003 [hidden]: no"]


def test_the_password_of_an_address_is_hidden_and_the_address_stays() -> None:
    assert guard.redact("see https://ann:pw@example.org/x") == "see https://[hidden]@example.org/x"


def test_secrets_are_hidden_at_any_depth() -> None:
    value = {"a": [{"b": "hf_abcdefgh1"}, ("hf_abcdefgh1", 3)], "c": None}
    assert guard.redacted(value) == {"a": [{"b": "[hidden]"}, ["[hidden]", 3]], "c": None}


@pytest.mark.parametrize("key", ["_target_", "_partial_", "_args_", "_convert_", "_recursive_"])
def test_each_key_that_names_a_class_is_refused(key: str) -> None:
    found = guard.forbidden({"a": [{"b": {key: 1}}]})
    assert list(found) == [f"a.b.{key}"] and found[f"a.b.{key}"].startswith("CFG-005")


@pytest.mark.parametrize("key", sorted(guard.CODE_KEYS))
def test_each_key_of_a_publishers_code_is_refused_in_settings(key: str) -> None:
    assert guard.forbidden({"model": {"config": {key: "x"}}})[f"model.config.{key}"].startswith("CFG-005")
    assert {"auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines"} == guard.CODE_KEYS


@pytest.mark.parametrize("bracket", "[{(")
def test_each_bracket_of_a_word_is_counted(bracket: str) -> None:
    assert guard.depth(f"name={bracket * 33}") == 33 > guard.MAX_DEPTH


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: " + "[" * 33 + "]" * 33, "nested more than 32 deep"),
        ("a: " + "{a: " * 33 + "}" * 33, "nested more than 32 deep"),
        ("a:\n " + "- " * 33 + "x", "nested more than 32 deep"),
        ("".join(" " * level + "a:\n" for level in range(33)), "nested more than 32 deep"),
        ("a: [", "x.yaml:1: not valid YAML"),
        ("a: *x", "anchors and aliases"),
        ('a: "\\ud800"', "not a UTF-8 text"),
        ("a: !!python/name:os.system x", "tags are not allowed"),
        ("a: &x 1", "anchors and aliases"),
        ("- a", "holds no settings"),
        ("# " + "x" * 200_000, "larger than 200000 bytes"),
    ],
)
def test_each_rule_of_a_settings_file_is_kept(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    tree, told = guard.yaml_tree(tmp_path / "x.yaml")
    assert why in told and tree is None
    (tmp_path / "x.yaml").write_text("a: [1]")
    assert guard.yaml_problem(tmp_path / "x.yaml") == ""
