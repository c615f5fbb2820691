"""What runs llama.cpp's converter, in a process of its own: `python -m finetune.export.converter_child FOLDER PRE ...`.

The converter refuses a tokenizer whose hash it does not know. Where we know how that one cuts text (PRE is not empty),
its model class, registered anew by the converter's own `register`, answers with that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(folder: str, pre: str, words: list[str]) -> None:
    """Runs the converter in `folder` with `words`; the last of them is the folder of the model."""
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    import convert_hf_to_gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    name = get_model_architecture(ModelBase.load_hparams(Path(words[-1]), False), ModelType.TEXT)
    kind = get_model_class(name)
    ModelBase.register(name)(with_answer(kind, pre))
    if kind.supports_mtp_export:  # a draft head is not tuned, and a folder that transformers wrote has none
        words = ["--no-nextn", *words]
    sys.argv = ["convert_hf_to_gguf.py", *words]
    convert_hf_to_gguf.main()


def with_answer(kind: Any, pre: str) -> Any:
    """The converter's class of a model, with an answer for a tokenizer that it does not know, if there is one.

    A folder without tokenizer.model has no SentencePiece tokenizer; that needs no package to find out.
    """

    class Answering(kind):
        """That class."""

        model_arch = kind.model_arch  # asked of every class itself

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            """The name of the tokenizer's first step."""
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                if not pre:
                    raise
                return pre

        def _set_vocab_sentencepiece(self, *words: Any, **named: Any) -> None:
            if not (self.dir_model / "tokenizer.model").is_file():
                raise FileNotFoundError(self.dir_model / "tokenizer.model")
            super()._set_vocab_sentencepiece(*words, **named)

    return Answering


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
