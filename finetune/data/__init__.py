"""Files -> rows -> chat messages -> tokens with a loss mask, and a ledger line for every row that came in."""

from finetune.data.prepare import Splits, load_splits, prepare

__all__ = ["Splits", "load_splits", "prepare"]
