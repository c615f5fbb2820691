"""How often Python looks for garbage."""

import gc

import pytest

from finetune import collecting
from finetune.__main__ import main
from finetune.base import load_base
from tests.tiny_models import checkpoint


@pytest.fixture(autouse=True)
def usual():
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_of_a_command_line_imports_are_not_looked_through_until_a_model_is_loaded(usual, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["finetune", "--version"])
    assert main() == 0
    assert gc.get_threshold()[0] == collecting.IMPORTS > usual[0]
    imported, before = [[] for _ in range(1000)], gc.get_freeze_count()
    load_base(checkpoint("mixtral"), load_in_4bit=False, precision="bf16")
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() >= before + len(imported)


def test_in_the_process_of_somebody_else_nothing_changes(usual, capsys):
    before = gc.get_freeze_count()
    assert main(["--version"]) == 0
    collecting.as_usual()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() <= before
