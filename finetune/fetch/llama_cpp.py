"""llama.cpp's converter to GGUF files: Python in the sources of llama-cpp-python, pinned by hash, kept in the cache."""

from __future__ import annotations

from pathlib import Path

from finetune.fetch.package import SOURCES, fetch_package, find_package, unpack

NAME, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER = f"{NAME} {VERSION}"
"""What the note of its fetch calls it."""
SIZE_MB, LICENCE = 76.6, "MIT"
BELOW, KEEP = "vendor/llama.cpp", ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")


def has_converter(cache: Path) -> bool:
    """Whether the converter's package is in the cache."""
    return find_package(NAME, VERSION, SHA256, cache=cache, form=SOURCES) is not None


def converter_sources(cache: Path) -> Path:
    """The file of the converter's package in the cache. Raises FetchError FET-001 when it is not there."""
    return fetch_package(
        NAME, VERSION, SHA256, cache=cache, network=False, size_mb=SIZE_MB, licence=LICENCE, form=SOURCES
    )


def fetch_converter(cache: Path, *, network: bool) -> Path:
    """The folder of the converter's scripts, fetched on first use where `network` is true. Raises FetchError."""
    sources = fetch_package(
        NAME, VERSION, SHA256, cache=cache, network=network, size_mb=SIZE_MB, licence=LICENCE, form=SOURCES
    )
    return unpack(sources, BELOW, KEEP, cache=cache)
