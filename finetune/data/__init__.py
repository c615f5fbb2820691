"""Files -> rows -> chat messages -> tokens with a loss mask, and a ledger line for every row that came in."""

from finetune.data.packing import PackedBatch
from finetune.data.prepare import Splits, load_packed, load_splits, prepare, require_rows

__all__ = ["PackedBatch", "Splits", "load_packed", "load_splits", "prepare", "require_rows"]
