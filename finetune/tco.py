"""What a million tokens of the tuned model cost on your own node, against an API: `tco(recipe)`. Arithmetic only.

The formulas are in `tco_formulas`; every input that they get is the user's, quoted or assumed, and says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from finetune import check, sizes
from finetune.api_prices import ApiPrice, quoted
from finetune.errors import RecipeError
from finetune.figure import Figure, assumed, computed, given
from finetune.plan import plan
from finetune.rates import Tco
from finetune.recipe import Recipe
from finetune.tco_formulas import (
    HOURS_PER_MONTH,
    blend,
    capacity,
    even_tokens,
    node_hour,
    node_months,
    per_million,
    tokens_needed,
    with_input,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One line of the sensitivity table."""

    latency: str
    """At which latency the node is asked."""
    utilisation: float
    """Share of the time at full load."""
    node_per_hour: float
    """Price of the node."""
    per_million: float
    """Price of a million tokens, without training."""
    cheaper: float
    """The API's price over it: above 1 the own node is cheaper. Infinite where it costs nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reckoning:
    """Total cost of ownership. `as_json` gives it as plain values."""

    recipe: str
    """Name of the recipe."""
    currency: str
    """Currency of all prices."""
    inputs: tuple[Figure, ...]
    """What went in, each with its source."""
    node: tuple[Figure, ...]
    """The node per month, by part, and per hour."""
    tokens: tuple[Figure, ...]
    """A million tokens: serving, training, together."""
    api: tuple[Figure, ...]
    """The same from an API, in the ways that are compared."""
    even: tuple[Figure, ...]
    """From how many tokens a month the own node is cheaper, and how many it can make."""
    sensitivity: tuple[Cell, ...]
    """Latency x utilisation x price of the node."""
    golden: tuple[tuple[str, str], ...]
    """(claim, under which assumptions it holds)."""
    verdict: str
    """In a sentence."""

    def figure(self, name: str) -> Figure:
        """The figure of this name. Raises KeyError when there is none."""
        for figure in (*self.inputs, *self.node, *self.tokens, *self.api, *self.even):
            if figure.name == name:
                return figure
        raise KeyError(name)

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; infinity becomes None."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        for cell in plain["sensitivity"]:
            cell["cheaper"] = cell["cheaper"] if math.isfinite(cell["cheaper"]) else None
        return plain


def tco(recipe: Recipe) -> Reckoning:
    """Training and serving per million tokens against an API, with everything that it rests on.

    Raises RecipeError with every problem of the recipe, and what `api_prices.quoted` raises.
    """
    if found := [*check.problems(recipe), *problems(recipe.tco)]:
        raise RecipeError(found)
    node, money, api = recipe.tco, recipe.costs.currency, quoted(recipe.tco)
    training = plan(recipe).figure("price with these").value
    hour, per = node_hour(node), f"{money} per million"
    like = blend(api, node.input_per_output, node.cache_share)
    pair = with_input(api, node.input_per_output, node.cache_share)
    fair = like if node.counts == "all" else pair
    tokens = _tokens(node, hour, training, money)
    own, serving = (next(f.value for f in tokens if f.name == name) for name in ("own price", "serving"))

    def times(price: float) -> str:
        return f"{price / own:.2f} x the own price" if own else "the own price is nothing"

    even = _even(node, hour, training, fair, money)
    return Reckoning(
        recipe=recipe.name,
        currency=money,
        inputs=_inputs(recipe, api),
        node=_node(recipe),
        tokens=tokens,
        api=(
            given("API, output alone", api.output, per, f"{times(api.output)}; like with unlike unless input is free"),
            computed("API, blend", like, per, f"{node.input_per_output:g} input to 1 output: {times(like)}"),
            computed("API, output with its input", pair, per, f"per output token: {times(pair)}"),
        ),
        even=even,
        sensitivity=_sensitivity(node, fair),
        golden=_golden(hour, node, api, like, serving, money),
        verdict=_verdict(node, own, fair, {f.name: f.value for f in even}, money),
    )


def _tokens(node: Tco, hour: float, training: float, money: str) -> tuple[Figure, ...]:
    per = f"{money} per million"
    serving = per_million(hour, node.tokens_per_second, node.utilisation)
    once = training * node.trainings + node.other_costs
    spread = once / (node.tokens_per_month * node.months / 1e6)
    busy = f"{hour:,.2f} / ({node.tokens_per_second:,.0f} x 3600 x {node.utilisation:.0%})"
    return (
        computed("serving", serving, per, busy),
        assumed("one training", training, money, "plan: training, evaluation and merge, at costs.utilisation"),
        computed("paid once", once, money, f"{node.trainings:g} trainings, and {node.other_costs:,.0f} for the rest"),
        computed("training", spread, per, f"over {node.months:g} months of {node.tokens_per_month:,.3g} tokens"),
        computed("own price", serving + spread, per, "serving and training"),
    )


def _even(node: Tco, hour: float, training: float, fair: float, money: str) -> tuple[Figure, ...]:
    """The same by the month: nodes cost what they cost, however many tokens they make."""
    once = (training * node.trainings + node.other_costs) / node.months
    month = hour * HOURS_PER_MONTH
    nodes = math.ceil(node.tokens_per_month / capacity(node.tokens_per_second, node.utilisation))
    most, even = capacity(node.tokens_per_second), even_tokens(month + once, fair)
    volume = f"{node.tokens_per_month:,.3g} tokens"
    if not math.isfinite(even):
        how = "never: the API costs nothing"
    else:
        how = f"fixed per month / {fair:,.2f} per million; {even / most:.0%} of what one node can make"
        how += "" if even <= most else ", so never"
    used = node.tokens_per_month / (nodes * most)
    return (
        computed("fixed per month", month + once, money, "one node, and what is paid once over its months"),
        computed("break-even", even if math.isfinite(even) else 0.0, "tokens/month", how),
        computed("capacity", most, "tokens/month", "one node at full load all the time"),
        computed("nodes", nodes, "", f"for {volume} a month at {node.utilisation:.0%}"),
        computed(
            "price at your volume",
            (nodes * month + once) / node.tokens_per_month * 1e6,
            f"{money} per million",
            f"{volume} a month (tco.tokens_per_month) keep {nodes} of them {used:.0%} busy",
        ),
    )


def _sensitivity(node: Tco, fair: float) -> tuple[Cell, ...]:
    speeds = {f"{node.tokens_per_second:,.0f} tok/s in all": node.tokens_per_second} | node.speeds
    cells = []
    for latency, speed in speeds.items():
        for share, price in itertools.product(node.utilisations, node.node_prices):
            cost = per_million(price, speed, share)
            times = fair / cost if cost else math.inf
            cells.append(Cell(latency=latency, utilisation=share, node_per_hour=price, per_million=cost, cheaper=times))
    return tuple(cells)


HOW = {
    "hardware": "annuity of price less residual value",
    "power": "kW x load x PUE x 730 h x price of a kWh",
    "maintenance": "share of the price / 12",
    "staff": "share of a person / 12",
    "space": "rent",
    "redundancy": "spare nodes: hardware, maintenance and space",
}
"""Part of an owned node -> its arithmetic."""


def problems(node: Tco) -> list[str]:
    """A sentence for every setting of `plan tco` that `check` does not know to be wrong."""
    found = []
    for key, values in (("utilisations", node.utilisations), ("speeds", [*node.speeds.values()])):
        most = 1.0 if key == "utilisations" else math.inf
        if not all(0 < value <= most for value in values):
            found.append(
                f"TCO-001 tco.{key} must be above 0{' and at most 1' if most == 1 else ''}. Change the others."
            )
    if any(price < 0 for price in node.node_prices):
        found.append("TCO-001 tco.node_prices must not be below 0. Change the others.")
    for key in ("tokens_source", "node_source", *(() if node.api_model else ("api_source",))):
        if not getattr(node, key).strip():
            found.append(
                f"TCO-002 tco.{key} is empty: a price without source and date is worth nothing. Say where from."
            )
    if not node.node_per_hour and not sum(node_months(node).values()):
        found.append("TCO-003 the node costs nothing. Set tco.node_per_hour, or tco.capex and what follows it.")
    return found


def _inputs(recipe: Recipe, api: ApiPrice) -> tuple[Figure, ...]:
    node, money = recipe.tco, recipe.costs.currency
    which = "input and output" if node.counts == "all" else "output alone"

    return (
        _stated("tokens per second", node.tokens_per_second, "1/s", f"{node.tokens_source}; {which}"),
        _stated(
            "utilisation", node.utilisation, "", "assumed: share of a month's hours at full load (tco.utilisation)"
        ),
        _stated("API input", api.input, f"{money} per million", api.source),
        _stated("API cached input", api.cached, f"{money} per million", api.source),
        _stated("API output", api.output, f"{money} per million", api.source),
        _stated("input per output", node.input_per_output, "tokens", "assumed: tco.input_per_output"),
        _stated("cache share", node.cache_share, "", "assumed: tco.cache_share"),
    )


def _node(recipe: Recipe) -> tuple[Figure, ...]:
    node, money = recipe.tco, recipe.costs.currency
    hour = node_hour(node)
    price: tuple[Figure, ...]
    if node.node_per_hour:
        price = (_stated("node per hour", hour, money, node.node_source),)
    else:
        parts = node_months(node)
        price = (
            _stated("price of a node", node.capex, money, node.node_source),
            *(computed(f"node, {name}", value, f"{money}/month", HOW[name]) for name, value in parts.items()),
            computed("node per hour", hour, money, "sum of the parts / 730 h"),
        )
    weights, room = sizes.merged_gib(recipe.model), node.gpus * recipe.costs.device_gib
    fit = "fits" if weights < room else "does not fit"
    half = "fits" if weights / 2 < room else "does not fit"
    of = f"{node.gpus} x {recipe.costs.device_gib:g} GiB"
    how = f"bf16 {fit} into {of}, fp8 ({weights / 2:,.0f} GiB) {half}; caches apart"
    return (
        *price,
        computed("GPU per hour", hour / node.gpus, money, f"/ {node.gpus} GPUs"),
        computed("weights to serve", weights, "GiB", how),
    )


def _stated(name: str, value: float, unit: str, how: str) -> Figure:
    """A figure that somebody stated, or that its own source calls assumed."""
    guess, _, rest = how.partition("assumed: ")
    return given(name, value, unit, how) if guess or not rest else assumed(name, value, unit, rest)


def _golden(
    hour: float, node: Tco, api: ApiPrice, like: float, serving: float, money: str
) -> tuple[tuple[str, str], ...]:
    """Two claims that are often made, and what they take, at these prices."""
    needs = ", ".join(
        f"{tokens_needed(hour, 1.80, share):,.0f} tok/s at {share:.0%}"
        for share in sorted(node.utilisations, reverse=True)
    )
    ratio = api.output / 1.80
    return (
        (
            f"1.80 {money} per million tokens",
            f"at {hour:,.2f} {money} per node-hour it takes {needs}; here {node.tokens_per_second:,.0f} tok/s at "
            f"{node.utilisation:.0%} give {serving:,.2f}",
        ),
        (
            f"{ratio:,.1f} times cheaper than {api.output:g} {money}",
            f"holds for 1.80 against the price of output tokens alone; against the blend of {node.input_per_output:g} "
            f"input to 1 output ({like:,.2f}) 1.80 is {like / 1.80:,.1f} times cheaper, and the {serving:,.2f} of here "
            f"{like / serving:,.1f} times",
        ),
    )


def _verdict(node: Tco, own: float, fair: float, month: dict[str, float], money: str) -> str:
    against = "the blend" if node.counts == "all" else "output with its input"

    def beside(price: float) -> str:
        if not fair or not price:
            return "nothing to compare"
        return f"{fair / price:.1f} times cheaper" if price < fair else f"{price / fair:.1f} times dearer"

    volume = month["price at your volume"]
    said = (
        f"{own:,.2f} {money} per million tokens of your own at {node.utilisation:.0%} load against {fair:,.2f} of the "
    )
    said += f"API ({against}): {beside(own)}. At your {node.tokens_per_month:,.3g} tokens a month it is {volume:,.2f}: "
    said += f"{beside(volume)}. "
    if not month["break-even"] or month["break-even"] > month["capacity"]:
        return f"{said}One node never breaks even. Privacy may be worth the difference."
    return f"{said}One node breaks even from {month['break-even']:,.3g} tokens a month on."
