"""`python -m tests.preparing ROWS BASE CACHE [ROWS_OF_A_BLOCK]` prints the folder that it prepares rows in.

It does so by two processes, in slices of one block for each, so that there are several.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from finetune.data import files, mapping
from finetune.data.prepare import prepared
from finetune.recipe import Data, Recipe


def recipe(cache: Path, path: Path, **settings: Any) -> Recipe:
    usual = {"max_length": 512, "privacy": "off", "quality": "off", "near_duplicates": "off", "workers": 2}
    data = Data(train_files=[str(path)], **{**usual, **settings})
    return Recipe(name="test", cache_dir=str(cache), data=data)


def main(words: list[str]) -> int:
    rows, base, cache, *block = words
    files.BLOCK_ROWS = int(block[0]) if block else files.BLOCK_ROWS
    mapping.PER_PROCESS = 1
    print(prepared(recipe(Path(cache), Path(rows)), Path(base)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
