"""Settings of `plan` and `plan tco`: prices, speeds and hours, which are the user's own figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.setting import one_of


@dataclass(kw_only=True, slots=True)
class Costs:
    """What `plan` computes hours and money with. None of it is measured: these are the user's own figures."""

    device: str = "H100 80GB"
    """Name of the planned device, for the table."""
    device_gib: float = 80.0
    """Memory of one device in GiB."""
    device_tflops: float = 989.0
    """Peak bf16 TFLOP/s of one device."""
    utilisation: float = 0.25
    """Share of the peak that a run is assumed to reach."""
    price_per_hour: float = 2.5
    """Price of one device-hour in `currency`."""
    currency: str = "USD"
    """Currency of `price_per_hour`."""
    device_kw: float = 0.7
    """Power draw of one device in kW."""


@dataclass(kw_only=True, slots=True)
class Tco:
    """What `plan tco` computes with: serving the tuned model on a node of your own against an API.

    These are your own figures; the defaults are a worked example of 8 x H100, assumed on 2026-11-23.
    """

    tokens_per_second: float = 2469.0
    """Tokens per second of one node at full load. Measure it at the latency that you want."""
    counts: str = one_of("all", "output")
    """Which tokens that is: `all`, compared with an API's blend of input and output; or `output`, compared with what an
    API takes for an output token and the input that comes with it."""
    tokens_source: str = "assumed: what 1.80 USD per million needs at 16 USD an hour and full load"
    """Where `tokens_per_second` comes from: measured, quoted or assumed, with the date."""
    utilisation: float = 0.6
    """Share of a month's hours that the node is at full load, on average."""
    gpus: int = 8
    """GPUs of a node, to show prices per GPU-hour."""
    node_per_hour: float = 16.0
    """Price of a rented node per hour, in `costs.currency`. 0 means owned: the price then comes from what follows."""
    node_source: str = "assumed: 8 x 2.00 USD"
    """Where the price, or those of an owned node, come from, with the date."""
    capex: float = 300_000.0
    """Price of an owned node."""
    years: float = 4.0
    """Years in which it is paid off."""
    interest: float = 0.08
    """Interest per year."""
    residual: float = 0.1
    """Share of its price that it is worth in the end."""
    node_kw: float = 10.2
    """Its power at full load in kW."""
    load: float = 0.7
    """Share of that power which it draws on average."""
    pue: float = 1.3
    """Power of the building per power of its computers."""
    kwh_price: float = 0.12
    """Price of a kWh."""
    maintenance: float = 0.05
    """Maintenance per year, as a share of `capex`."""
    space_per_month: float = 2500.0
    """Rent for its place and its line, per month."""
    staff: float = 0.25
    """Share of a person who looks after it."""
    staff_per_year: float = 180_000.0
    """What such a person costs per year."""
    redundancy: float = 0.0
    """Spare nodes per node: 0.125 is one for eight. They cost what a node costs, without power and staff."""
    trainings: float = 3.0
    """How many trainings are paid until one is kept: sweeps and failures count."""
    other_costs: float = 0.0
    """What else is paid once: data, labels, evaluation."""
    months: float = 12.0
    """Months that the tuned model serves; what is paid once is spread over their tokens."""
    tokens_per_month: float = 1e9
    """Tokens, as `counts` says, that are served per month."""
    api_model: str = ""
    """Model of an API as provider:model, as genai-prices names them; its prices then come from that package
    (extra [prices], bundled, no network). Empty: the three prices below."""
    api_input: float = 3.0
    """Price of a million input tokens."""
    api_output: float = 15.0
    """Price of a million output tokens."""
    api_cached: float = 0.3
    """Price of a million input tokens that are read from the API's cache."""
    api_source: str = "assumed: a usual price of a large closed model, 2026-11-23"
    """Where these prices were read, with the date."""
    cache_share: float = 0.0
    """Share of the input that is read from the cache."""
    input_per_output: float = 3.0
    """Input tokens per output token."""
    utilisations: list[float] = field(default_factory=lambda: [1.0, 0.6, 0.3])
    """Rows of the sensitivity table."""
    speeds: dict[str, float] = field(
        default_factory=lambda: {"42 tok/s per user": 2128.0, "71 tok/s per user": 584.0, "100 tok/s per user": 184.0}
    )
    """Latency -> tokens per second of a node at it. The default is 8 x what a benchmark quotes per H100 for a model of
    37 B active parameters in fp8 (InferenceX, read 2026-11-23)."""
    node_prices: list[float] = field(default_factory=lambda: [10.4, 16.0, 20.0, 32.0])
    """Prices of a node per hour in that table: the default is 8 x 1.30, 2.00, 2.50 and 4.00."""
