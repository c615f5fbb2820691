"""A GGUF file in a smaller type: `python -m finetune.export.quantise_child SOURCE TARGET TYPE`, by package llama_cpp.

In a process of its own because the library speaks to the terminal and may end the process.
"""

from __future__ import annotations

import sys


def main(source: str, target: str, kind: str) -> int:
    """Writes `target`; returns what the library returns, zero when all is well."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
