"""Settings of `evaluate`: what base and tuned are asked, and the gates that the answers must pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Evaluate:
    """Base against tuned, on the same held-out rows."""

    rows: int = 0
    """Held-out rows to use; 0 means all."""
    batch_size: int = 8
    """Rows per forward pass."""
    samples: int = 10
    """Rows shown side by side in the report: question, base, tuned, expected."""
    max_new_tokens: int = 48
    """Longest answer generated for a sample, in tokens."""
    confidence: float = 0.95
    """Level of the intervals."""
    min_gain: float = -1.0
    """Gate: accuracy gain of tuned over base that the run must reach, as a fraction; -1 means no gate."""
