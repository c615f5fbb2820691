"""The formulas of total cost of ownership, one function each. Every input is the caller's; nothing is looked up."""

from __future__ import annotations

import math

from finetune.api_prices import ApiPrice
from finetune.rates import Tco

HOURS_PER_MONTH = 730.0


def annuity(capital: float, interest: float, years: float) -> float:
    """What is paid per month, as a twelfth of equal yearly payments that pay off `capital` with `interest`."""
    if interest == 0:
        return capital / years / 12
    return float(capital * interest / (1 - (1 + interest) ** -years) / 12)


def node_months(node: Tco) -> dict[str, float]:
    """Part -> what an owned node costs per month."""
    hardware = annuity(node.capex * (1 - node.residual), node.interest, node.years)
    upkeep = node.capex * node.maintenance / 12
    return {
        "hardware": hardware,
        "power": node.node_kw * node.load * node.pue * node.kwh_price * HOURS_PER_MONTH,
        "maintenance": upkeep,
        "staff": node.staff * node.staff_per_year / 12,
        "space": node.space_per_month,
        "redundancy": node.redundancy * (hardware + upkeep + node.space_per_month),
    }


def node_hour(node: Tco) -> float:
    """Price of a node per hour: rented as stated, or owned as a month of it over 730 hours."""
    return node.node_per_hour or sum(node_months(node).values()) / HOURS_PER_MONTH


def per_million(node_per_hour: float, tokens_per_second: float, utilisation: float) -> float:
    """Price of a million tokens. Infinite for a node that makes none."""
    made = tokens_per_second * 3600 * utilisation
    return node_per_hour / made * 1e6 if made else math.inf


def tokens_needed(node_per_hour: float, price_per_million: float, utilisation: float) -> float:
    """Tokens per second at full load that a price per million needs: the inverse of `per_million`."""
    return node_per_hour / price_per_million * 1e6 / 3600 / utilisation


def blend(api: ApiPrice, input_per_output: float, cache_share: float) -> float:
    """An API's price of a million tokens, input and output mixed; `cache_share` of the input comes from its cache."""
    return with_input(api, input_per_output, cache_share) / (input_per_output + 1)


def with_input(api: ApiPrice, input_per_output: float, cache_share: float) -> float:
    """An API's price of a million output tokens together with the input tokens that they answer."""
    read = api.input * (1 - cache_share) + api.cached * cache_share
    return input_per_output * read + api.output


def gpu_hours(flops: float, peak_tflops: float, utilisation: float) -> float:
    """Hours of one device for so many operations."""
    return flops / (peak_tflops * 1e12 * utilisation * 3600)


def even_tokens(per_month: float, price_per_million: float) -> float:
    """Tokens a month from which a fixed cost per month is less than an API's price. Infinite where that is nothing."""
    return per_month / price_per_million * 1e6 if price_per_million else math.inf


def capacity(tokens_per_second: float, utilisation: float = 1.0) -> float:
    """Tokens a month of one node."""
    return tokens_per_second * 3600 * HOURS_PER_MONTH * utilisation
