"""What several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: Any) -> Path:
    """A folder with a byte-level tokenizer and a ChatML template."""
    from tests.test_data import CHATML, make_tokenizer

    folder: Path = tmp_path_factory.mktemp("base")
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder
