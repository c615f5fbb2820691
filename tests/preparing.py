"""`python -m tests.preparing ROWS BASE CACHE HOW` prints the folder that it prepares rows in, with two workers.

HOW they are started is `spawn`, as in the product, or `fork`, for many processes of one test: nothing is imported anew.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from finetune.data import pool
from finetune.data.prepare import prepared
from finetune.recipe import Data, Recipe


def recipe(cache: Path, path: Path, **settings: Any) -> Recipe:
    usual = {"max_length": 512, "privacy": "off", "quality": "off", "near_duplicates": "off", "workers": 2}
    data = Data(train_files=[str(path)], **{**usual, **settings})
    return Recipe(name="test", cache_dir=str(cache), data=data)


def main(words: list[str]) -> int:
    rows, base, cache, how = words
    pool.get_context = lambda _: multiprocessing.get_context(how)  # type: ignore[assignment]
    print(prepared(recipe(Path(cache), Path(rows)), Path(base)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
