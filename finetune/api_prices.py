"""What an API takes for a million tokens: as typed, or as the package genai-prices has it. No network.

That package (optional, extra [prices]) carries a snapshot of published prices; the prices are as old as its release.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from importlib import metadata
from typing import Any

from finetune.errors import FinetuneError
from finetune.rates import Tco

PACKAGE = "genai-prices"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiPrice:
    """Prices of a million tokens, and where they were read."""

    input: float
    """Of input."""
    output: float
    """Of output."""
    cached: float
    """Of input that comes from the API's cache; that of other input where it has none."""
    source: str
    """Where from, with the date."""


def quoted(settings: Tco) -> ApiPrice:
    """The prices that the settings state, or those of `api_model`.

    Raises FinetuneError: TCO-004 when the package is missing, TCO-005 when it does not know the model or its price.
    """
    if not settings.api_model:
        return ApiPrice(
            input=settings.api_input, output=settings.api_output, cached=settings.api_cached, source=settings.api_source
        )
    try:
        from genai_prices.data_snapshot import DataSnapshot
    except ImportError:
        what = f"tco.api_model={settings.api_model}: the package {PACKAGE} is not installed"
        way = "pip install 'finetune[prices]', or tco.api_input=, tco.api_output= and tco.api_source= instead"
        raise FinetuneError("TCO-004", what, "prices come from its bundled snapshot", way) from None
    from genai_prices.data import providers

    provider, _, model = settings.api_model.partition(":")
    today, bundled = datetime.now(tz=UTC), DataSnapshot(providers=providers, from_auto_update=False)
    try:
        if not model:
            raise LookupError("it is not of the form provider:model")
        _, found = bundled.find_provider_model(model, None, provider, None)
        prices = found.get_prices(today)
        read, written = _base(prices.input_mtok), _base(prices.output_mtok)
        if read is None or written is None:
            raise LookupError("it has no price for input and output")
    except LookupError as error:
        what = f"tco.api_model={settings.api_model} is not known to {PACKAGE} {metadata.version(PACKAGE)}"
        way = "another provider:model, or tco.api_input= and tco.api_output= with tco.api_source="
        raise FinetuneError("TCO-005", what, str(error), way) from None
    cached = _base(prices.cache_read_mtok)
    snapshot = f"the snapshot of {PACKAGE} {metadata.version(PACKAGE)}, as old as that release"
    source = f"{settings.api_model} in {snapshot}; valid on {today.date()}"
    return ApiPrice(input=read, output=written, cached=read if cached is None else cached, source=source)


def _base(price: Any) -> float | None:
    """The price of short prompts: where a price has steps by length, the first."""
    if price is None:
        return None
    return float(price if isinstance(price, Decimal) else price.base)
