"""Supervised fine-tuning of the adapter: `train(run_dir)` leaves adapter/ and train.json."""

from finetune.train.stage import train

__all__ = ["train"]
