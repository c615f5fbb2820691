"""Total cost of ownership: figures worked out elsewhere, edges, and the command."""

from __future__ import annotations

import json
import math
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import tco_formulas as formulas
from finetune.__main__ import main
from finetune.api_prices import ApiPrice, quoted
from finetune.errors import FinetuneError, RecipeError
from finetune.rates import Tco
from finetune.tco import Reckoning, tco
from finetune.tco_plot import draw
from tests.job import good

OWNED = Tco(node_per_hour=0.0)  # 300,000 over 4 years at 8 %, 10.2 kW, 0.25 of 180,000 a year ...
LARGE = ApiPrice(input=3, output=15, cached=0.3, source="by hand")


def reckoned(**settings: Any) -> Reckoning:
    return tco(good(**{f"tco__{key}": value for key, value in settings.items()}))


@pytest.mark.parametrize(
    ("per_gpu", "per_node", "full", "sixty", "thirty"),
    [
        (1.30, 10.40, 1605, 2675, 5350),
        (2.00, 16.00, 2469, 4115, 8230),
        (2.50, 20.00, 3086, 5144, 10288),
        (4.00, 32.00, 4938, 8230, 16461),
    ],
)
def test_one_eighty_a_million_takes_the_tokens_that_were_worked_out(
    per_gpu: float, per_node: float, full: float, sixty: float, thirty: float
) -> None:
    assert per_gpu * 8 == pytest.approx(per_node)
    for share, tokens in ((1.0, full), (0.6, sixty), (0.3, thirty)):
        assert formulas.tokens_needed(per_node, 1.80, share) == pytest.approx(tokens, abs=1)
        assert formulas.per_million(per_node, tokens, share) == pytest.approx(1.80, rel=0.001)


@pytest.mark.parametrize(("tokens_per_gpu", "usd"), [(266, 1.365), (73, 4.86), (23, 15.69)])
def test_a_published_benchmarks_prices_follow_from_its_tokens(tokens_per_gpu: float, usd: float) -> None:
    assert formulas.per_million(1.30, tokens_per_gpu, 1.0) == pytest.approx(usd, rel=0.02)  # its tokens are rounded


def test_an_owned_node_costs_by_the_month_and_by_the_hour_what_was_worked_out() -> None:
    parts = formulas.node_months(OWNED)
    by_hand = {"hardware": 6793, "power": 813, "maintenance": 1250, "staff": 3750, "space": 2500, "redundancy": 0}
    assert {name: round(value) for name, value in parts.items()} == by_hand
    assert sum(parts.values()) == pytest.approx(15_100, rel=0.005)
    hour = formulas.node_hour(OWNED)
    assert hour == pytest.approx(20.7, abs=0.05) and hour / 8 == pytest.approx(2.59, abs=0.005)
    for share, usd in ((1.0, 2.33), (0.6, 3.88), (0.3, 7.76)):
        assert formulas.per_million(hour, 2469, share) == pytest.approx(usd, abs=0.01)
    assert formulas.node_hour(Tco(node_per_hour=16.0)) == 16.0


def test_eight_times_cheaper_holds_for_output_alone_and_not_for_a_blend() -> None:
    assert LARGE.output / 1.80 == pytest.approx(8.33, abs=0.01)
    for ratio, usd, times in ((3, 6.00, 3.3), (10, 4.09, 2.3)):
        assert formulas.blend(LARGE, ratio, 0.0) == pytest.approx(usd, abs=0.005)
        assert formulas.blend(LARGE, ratio, 0.0) / 1.80 == pytest.approx(times, abs=0.05)
    open_model = ApiPrice(input=0.5, output=1.5, cached=0.5, source="by hand")
    assert formulas.blend(open_model, 3, 0.0) < 1.80  # the same open model costs less from an API
    claims = dict(reckoned(utilisation=1.0).golden)
    assert "2,469 tok/s at 100%, 4,115 tok/s at 60%, 8,230 tok/s at 30%" in claims["1.80 USD per million tokens"]
    assert "price of output tokens alone" in claims["8.3 times cheaper than 15 USD"]
    assert "(6.00) 1.80 is 3.3 times cheaper" in claims["8.3 times cheaper than 15 USD"]


def test_an_annuity_pays_off_the_capital_with_its_interest() -> None:
    for capital, interest, years in ((270_000, 0.08, 4), (1000, 0.2, 10), (500, 0.001, 3)):
        owed = capital
        for _ in range(years):  # year by year: interest on what is owed, then twelve monthly parts
            owed = owed * (1 + interest) - 12 * formulas.annuity(capital, interest, years)
        assert owed == pytest.approx(0, abs=1e-6 * capital)
        flows = np.full(years, 12 * formulas.annuity(capital, interest, years))
        present = (flows / (1 + interest) ** np.arange(1, years + 1)).sum()
        assert present == pytest.approx(capital)
    assert formulas.annuity(1200, 0.0, 1) == 100
    assert formulas.annuity(1200, 1e-9, 1) == pytest.approx(100)


def test_prices_rise_with_the_node_and_fall_with_tokens_and_use() -> None:
    shares, prices = (0.1, 0.3, 0.6, 1.0), (1.0, 10.0, 100.0)
    for price in prices:
        row = [formulas.per_million(price, 1000, share) for share in shares]
        assert row == sorted(row, reverse=True) and len(set(row)) == len(row)
    for share in shares:
        column = [formulas.per_million(price, 1000, share) for price in prices]
        assert column == sorted(column) and len(set(column)) == len(column)
    hours = [
        formulas.node_hour(Tco(node_per_hour=0, **{key: 2 * getattr(OWNED, key)}))
        for key in (
            "capex",
            "interest",
            "node_kw",
            "pue",
            "kwh_price",
            "maintenance",
            "space_per_month",
            "staff",
            "staff_per_year",
        )
    ]
    assert min(hours) > formulas.node_hour(OWNED)
    assert formulas.node_hour(Tco(node_per_hour=0, redundancy=0.125)) > formulas.node_hour(OWNED)
    assert formulas.node_hour(Tco(node_per_hour=0, residual=0.5)) < formulas.node_hour(OWNED)


def test_what_a_price_needs_gives_that_price_again() -> None:
    for price, share in ((1.8, 0.6), (0.2, 1.0), (40.0, 0.01)):
        assert formulas.per_million(16, formulas.tokens_needed(16, price, share), share) == pytest.approx(price)
    even = formulas.even_tokens(11_680, 6.0)
    assert even / 1e6 * 6.0 == pytest.approx(11_680)
    hours = formulas.gpu_hours(4 * 3.3e9 * 1e8, 989, 0.25)  # 100 M tokens of a base with 3.3 B active parameters
    assert hours * 2 == pytest.approx(3, abs=0.1)
    assert hours * 3600 * 989e12 * 0.25 == pytest.approx(4 * 3.3e9 * 1e8)


def test_edges_of_nothing_and_everything() -> None:
    assert formulas.per_million(16, 2469, 0.0) == math.inf
    assert formulas.per_million(16, 0.0, 1.0) == math.inf
    assert formulas.per_million(0, 2469, 1.0) == 0
    assert formulas.blend(LARGE, 0, 0.0) == 15
    assert formulas.with_input(LARGE, 3, 1.0) == pytest.approx(15.9)  # all input from the cache
    assert formulas.with_input(LARGE, 3, 0.5) == pytest.approx(15 + 3 * 1.65)
    assert formulas.even_tokens(100, 0) == math.inf
    whole = Tco(node_per_hour=0, residual=1.0, load=0.0, maintenance=0.0, staff=0.0, space_per_month=0.0)
    assert sum(formulas.node_months(whole).values()) == 0
    with pytest.raises(RecipeError, match="TCO-003 the node costs nothing"):
        reckoned(
            **{
                key: getattr(whole, key)
                for key in ("node_per_hour", "residual", "load", "maintenance", "staff", "space_per_month")
            }
        )
    free = reckoned(api_input=0.0, api_output=0.0, api_cached=0.0)
    assert "never: the API costs nothing" in free.figure("break-even").how and "never breaks even" in free.verdict
    json.dumps(free.as_json(), allow_nan=False)


def test_the_month_counts_whole_nodes_however_few_tokens_they_make() -> None:
    few = reckoned(tokens_per_month=1e9, trainings=0.0)
    assert few.figure("own price").value == pytest.approx(3.0, abs=0.01)
    assert few.figure("price at your volume").value == pytest.approx(11.68)  # 730 h x 16 for 1,000 millions
    assert few.figure("break-even").value == pytest.approx(730 * 16 / 6 * 1e6)
    assert "2.0 times cheaper" in few.verdict and "11.68: 1.9 times dearer" in few.verdict
    many = reckoned(tokens_per_month=4e9, trainings=0.0)  # one node at 60 % makes 3.89e9
    assert few.figure("nodes").value == 1 and many.figure("nodes").value == 2
    assert many.figure("price at your volume").value == pytest.approx(2 * 11_680 / 4000)
    assert "never breaks even" in reckoned(tokens_per_second=200.0).verdict


def test_trainings_and_what_else_is_paid_once_are_spread_over_the_tokens() -> None:
    one, three = reckoned(trainings=1.0), reckoned(trainings=3.0, other_costs=1200.0)
    training = one.figure("one training").value
    assert training > 0 and one.figure("paid once").value == training
    assert three.figure("paid once").value == pytest.approx(3 * training + 1200)
    assert three.figure("training").value == pytest.approx((3 * training + 1200) / 12_000)
    assert three.figure("own price").value == three.figure("serving").value + three.figure("training").value


def test_the_sensitivity_table_has_every_latency_use_and_price() -> None:
    cells = reckoned().sensitivity
    assert len(cells) == 4 * 3 * 4 and len({(c.latency, c.utilisation, c.node_per_hour) for c in cells}) == 48
    by_hand = {(c.latency, c.utilisation, c.node_per_hour): c.per_million for c in cells}
    assert by_hand["2,469 tok/s in all", 1.0, 16.0] == pytest.approx(1.80, abs=0.001)
    assert by_hand["42 tok/s per user", 1.0, 10.4] == pytest.approx(1.365, rel=0.02)
    assert by_hand["100 tok/s per user", 0.3, 32.0] == max(by_hand.values())
    assert all(c.cheaper == pytest.approx(6.0 / c.per_million) for c in cells)
    output = reckoned(counts="output").sensitivity
    assert all(c.cheaper == pytest.approx(24.0 / c.per_million) for c in output)


def test_whether_the_weights_fit_the_node_is_said() -> None:
    assert "bf16 fits into 8 x 80 GiB" in reckoned().figure("weights to serve").how
    from finetune.compose import load_recipe

    large = tco(load_recipe("deepseek_v3_finance")).figure("weights to serve")  # 1.25 TiB
    assert "bf16 does not fit" in large.how and "fp8 (625 GiB) fits" in large.how


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"utilisation": 1.2}, "CHK-002 tco.utilisation"),
        ({"residual": 1.2}, "CHK-002 tco.residual"),
        ({"utilisations": [0.0]}, "TCO-001 tco.utilisations"),
        ({"speeds": {"fast": -1.0}}, "TCO-001 tco.speeds"),
        ({"node_prices": [-1.0]}, "TCO-001 tco.node_prices"),
        ({"api_source": " "}, "TCO-002 tco.api_source"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(RecipeError, match=code):
        reckoned(**settings)


def bundled(monkeypatch: pytest.MonkeyPatch, **prices: Any) -> None:
    """Stands in for the package genai-prices with one model of one provider."""
    model = types.SimpleNamespace(get_prices=lambda when: types.SimpleNamespace(**prices))

    class DataSnapshot:
        def __init__(self, providers: list[Any], from_auto_update: bool) -> None:
            assert providers == ["bundled"] and not from_auto_update

        def find_provider_model(self, name: str, provider: None, provider_id: str, url: None) -> tuple[None, Any]:
            if (provider_id, name) != ("maker", "model-1"):
                raise LookupError(f"Unable to find provider {provider_id}")
            return None, model

    package = types.ModuleType("genai_prices")
    package.__path__ = []  # type: ignore[attr-defined]
    for name, value in (("data_snapshot", {"DataSnapshot": DataSnapshot}), ("data", {"providers": ["bundled"]})):
        module = types.ModuleType(f"genai_prices.{name}")
        vars(module).update(value)
        monkeypatch.setitem(sys.modules, f"genai_prices.{name}", module)
    monkeypatch.setitem(sys.modules, "genai_prices", package)
    monkeypatch.setattr("finetune.api_prices.metadata.version", lambda name: "0.2.3")


def test_prices_of_the_bundled_snapshot_are_those_of_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = types.SimpleNamespace(base=Decimal("3"), tiers=["6 above 200,000"])
    bundled(monkeypatch, input_mtok=steps, output_mtok=Decimal("15"), cache_read_mtok=None)
    price = quoted(Tco(api_model="maker:model-1"))
    assert (price.input, price.output, price.cached) == (3.0, 15.0, 3.0)
    assert "genai-prices 0.2.3" in price.source and "valid on 20" in price.source
    for name in ("maker:model-2", "model-1"):
        with pytest.raises(FinetuneError, match="TCO-005"):
            quoted(Tco(api_model=name))
    bundled(monkeypatch, input_mtok=None, output_mtok=Decimal("15"), cache_read_mtok=None)
    with pytest.raises(FinetuneError, match=r"TCO-005 .* no price"):
        quoted(Tco(api_model="maker:model-1"))


def test_without_the_package_prices_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setitem(sys.modules, "genai_prices.data_snapshot", None)
    with pytest.raises(FinetuneError, match=r"TCO-004 .*finetune\[prices\]"):
        quoted(Tco(api_model="maker:model-1"))
    assert quoted(Tco(api_input=1.0, api_source="the maker's page, 2026-11-25")).source.endswith("2026-11-25")


def test_the_package_itself_gives_prices() -> None:
    pytest.importorskip("genai_prices")
    price = quoted(Tco(api_model="mistral:mistral-large"))
    assert 0 < price.input <= price.output < 1000


def test_the_command_prints_a_page_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tco", "recipe=qwen3_30b_legal", "tco.utilisation=1.0", "tco.trainings=0"]
    assert main([*words, "--json", f"plot={tmp_path / 'tco.svg'}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    serving = next(f for f in printed["tokens"] if f["name"] == "serving")
    assert serving["value"] == pytest.approx(1.80, abs=0.001)
    assert all(f["basis"] in ("given", "assumed", "computed") and f["how"] for f in printed["inputs"])
    assert b"<svg" in (tmp_path / "tco.svg").read_bytes()
    assert main([*words, f"plot={tmp_path / 'tco.png'}"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for part in ("what goes in", "break-even", "42 tok/s", "1.80 (3.3x)", "API, blend", "breaks even from"):
        assert part in page
    assert (tmp_path / "tco.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "plot=tco.doc"]) == 2
    assert "TCO-006" in capsys.readouterr().err


def test_a_plot_of_the_same_figures_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, reckoned())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
