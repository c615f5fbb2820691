"""What strangers wrote, looked at before a library opens any of it. `check_folder(folder, WeightsError)`.

Kinds of files come first (`kinds.py`), then keys that would load code (`configs.py`), then whether a model whose code
is ignored can do without it (`needed.py`). Headers of weights have limits of their own (`headers.py`, `gguf.py`), and a
chat template is a program that is read and tried out (`templates.py`) and rendered within limits (`rendering.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.foreign.configs import code_keys
from finetune.foreign.kinds import IGNORE, NEVER, file_problems
from finetune.foreign.needed import needed_code

SHOWN = 5
"""So many of a folder's files or keys are named in an error."""


def check_folder(folder: Path, kind: Callable[[str, str, str, str], FinetuneError], code: str = NEVER) -> None:
    """Nothing, or an error of `kind` about what may not be in a folder of weights or of an adapter.

    `code` is what Python files and keys that would load code mean: `refuse` and `ignore` as `model.code` has them, or
    `never`, where no setting lets them in. FRN-001 a file that is no data (a pickle, code) or of an unknown kind;
    FRN-002 a link out of the folder; FRN-003 settings that would load code; FRN-007 a file whose bytes are not what its
    name says; FRN-008 code is to be ignored, and the model needs it.
    """
    needed = needed_code(folder) if code == IGNORE else ()
    for number, found, why, fix in (*file_problems(folder, code), *code_keys(folder, code), *needed):
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise kind(number, f"{folder}: {', '.join(found[:SHOWN])}{more}", why, fix)
