"""Families x ways to tune: each trains, and stock PEFT computes the same from its file, or is refused by name."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from finetune import sizes
from finetune.adapters import attach, keeping_fp32, load_adapter, without_update
from finetune.adapters.initial import factors
from finetune.base import load_base
from finetune.check import problems
from finetune.errors import NumbersError, RecipeError
from finetune.experts import ExpertsLora
from finetune.families import FAMILIES
from finetune.merge import merge_folder
from finetune.progress import Guard
from finetune.recipe import Adapter
from finetune.rundir import read_json
from finetune.train.learnt import unlearnt
from finetune.train.state import trainable
from tests.job import good
from tests.tiny_models import checkpoint, some_ids

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "olora": {"init": "olora"},
    "pissa, rslora": {"init": "pissa", "rslora": True},
    "pissa_niter_16": {"init": "pissa_niter_16"},
    "patterns, olora, rslora": {"init": "olora", "rslora": True, "alpha_pattern": {r"layers\.1\..*": 3.0}},
    "dora": {"method": "dora"},
    "dora, pissa": {"method": "dora", "init": "pissa"},
}
TARGETS = ("attention", "experts", "all")
TABLE = [(family, method, targets) for family in FAMILIES for method in METHODS for targets in TARGETS]
TRAINED = [
    (family, method, targets)
    for family, method, targets in TABLE
    if targets == "all" or (targets == "attention" and "dora" in method) or (targets == "experts" and method == "lora")
]
"""`all` holds what the other two do; they are trained where it is refused, or as the default."""


def still(layer: Any) -> list[int]:
    """The experts of a layer, or [0], whose update is zero."""
    return without_update(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def settings(family: str, method: str, targets: str) -> Adapter:
    """The adapter of one cell of the table."""
    adapter = Adapter(targets=targets, rank=4, alpha=8.0, expert_rank=2, expert_alpha=3.0, **METHODS[method])
    if "patterns" in method:
        kind = FAMILIES[family]
        there = {m.name for m in kind.matrices(kind.tiny)}
        adapter.rank_pattern = {next(name for name in kind.attention if name in there): 6}
        if targets != "attention" and kind.experts:
            adapter.rank_pattern[kind.expert_parameters[1]] = 3
    return adapter


def refusals(family: str, adapter: Adapter, **changes: Any) -> list[str]:
    """What `check` says of an adapter on a tiny model."""
    model = {"model__family": family, "model__config": dict(FAMILIES[family].tiny)}
    return problems(good(**(model | {"adapter": adapter, "data__max_length": 64} | changes)))


def stock(folder: Path) -> Any:
    """The model in a folder as transformers loads it, in fp32."""
    family = next(
        f for f in FAMILIES.values() if set(f.model_types) & {read_json(folder / "config.json")["model_type"]}
    )
    experts = {"experts_implementation": "eager"} if family.experts else {}
    return getattr(transformers, family.auto_class).from_pretrained(folder, dtype=torch.float32, **experts)


def stock_peft(folder: Path, adapter: Path) -> Any:
    """The same with an adapter as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(stock(folder), adapter).eval()


def train_steps(model: Any, ids: torch.Tensor, steps: int = 2, kind: Any = torch.optim.AdamW, **options: Any) -> None:
    """A few updates. Raises NumbersError, as a run does, when a kind of weight gets no gradient or does not learn."""
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    model.train()
    for step in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        Guard().on_pre_optimizer_step(None, type("State", (), {"global_step": step})(), None, model=model)
        optimizer.step()
        optimizer.zero_grad()
    unlearnt(model, trainable(model))
    model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits in evaluation mode."""
    return model.eval()(input_ids=ids).logits


def expected_refusal(family: str, method: str, targets: str) -> list[str]:
    """The codes that `check` must give."""
    if targets == "experts" and not FAMILIES[family].experts:
        return ["ADP-003"]
    return ["ADP-006"] if "dora" in method and targets != "attention" and FAMILIES[family].experts else []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_or_a_family_cannot_do_is_refused_by_name_and_nothing_else_is(family):
    for _, method, targets in (cell for cell in TABLE if cell[0] == family):
        said = [line[:7] for line in refusals(family, settings(family, method, targets))]
        assert said == expected_refusal(family, method, targets), (method, targets)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "targets"), [c for c in TRAINED if not expected_refusal(*c)])
def test_every_other_combination_trains_and_stock_peft_computes_the_same_from_its_file(
    family, method, targets, tmp_path
):
    adapter, kind = settings(family, method, targets), FAMILIES[family]
    base = load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    untouched = logits(base.model, ids)
    torch.manual_seed(5)
    model = attach(base, adapter)
    torch.testing.assert_close(logits(model, ids), untouched, rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sizes.lora_parameters(kind.matrices(kind.tiny), kind, adapter)
    train_steps(model, ids)
    model.save_pretrained(tmp_path)
    ours = logits(model, ids)
    assert (ours - untouched).abs().max() > 1e-3
    torch.testing.assert_close(logits(stock_peft(base.folder, tmp_path), ids), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_beginning_at_the_base_trains_as_peft_does_which_changes_the_base(init):
    """PEFT takes the main part out of the frozen weight and trains it; ours subtracts it beside an unchanged one."""
    folder = checkpoint("qwen3", True)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    ours = attach(base, Adapter(targets="attention", rank=4, alpha=6.0, init=init))
    names = list(FAMILIES["qwen3"].attention)
    theirs = get_peft_model(stock(folder), LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=init))
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        for _ in range(4):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with ours.disable_adapter():
        start = logits(ours, ids)
    assert (logits(theirs, ids) - start).abs().max() > 0.05
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["mixtral", "llama4", "gpt_oss"])
def test_what_pissa_subtracts_is_the_best_approximation_of_every_experts_weight(family):
    """By numpy, for each of the three ways in which stacks are laid out."""
    import numpy as np

    base = load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32")
    kind = base.family
    stacks = {
        name: p.detach().numpy().copy()
        for name, p in base.model.named_parameters()
        if name.endswith(kind.expert_parameters)
    }
    model = attach(base, Adapter(rank=4, expert_rank=3, expert_alpha=7.0, init="pissa"))
    checked = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, ExpertsLora):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        stack = stacks[f"{path}.{layer.parameter_name}"]
        for expert, (a, b) in enumerate(factors(layer, "default")):
            begun = (layer.scaling["default"] * b[:, :3] @ a[:3]).detach().numpy()
            weight = (
                stack[expert]
                if begun.shape == stack[expert].shape and not layer_is_in_first(layer)
                else stack[expert].T
            )
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            np.testing.assert_allclose(begun, u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-4)
            checked += 1
    assert checked == len(stacks) * stack.shape[0]


def layer_is_in_first(layer: ExpertsLora) -> bool:
    """Whether the stack is stored as PEFT takes one that says `is_transposed`: (E, in, out)."""
    return bool(getattr(layer.get_base_layer(), "is_transposed", False))


def optimizers() -> list[Any]:
    """Those that run on a CPU, with their options."""
    from bitsandbytes.optim import AdamW, Lion
    from transformers.optimization import Adafactor

    plain = {"weight_decay": 0.0}
    return [
        (torch.optim.AdamW, plain),
        (AdamW, plain),
        (Lion, plain),
        (Adafactor, {"scale_parameter": False, "relative_step": False}),
    ]


@pytest.mark.parametrize("number", range(4))
def test_no_optimizer_moves_the_half_that_subtracts(number):
    kind, options = optimizers()[number]
    base = load_base(checkpoint("mixtral", True), load_in_4bit=True, precision="fp32")
    ids = some_ids(base)
    model = attach(base, Adapter(rank=4, expert_rank=2, init="pissa"))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [[(a.clone(), b.clone()) for a, b in factors(layer, "default")] for layer in layers]
    train_steps(model, ids, 3, kind, **options)
    for layer, pairs in zip(layers, before, strict=True):
        for (a, b), (old_a, old_b) in zip(factors(layer, "default"), pairs, strict=True):
            half = a.shape[0] // 2
            assert torch.equal(a[half:], old_a[half:]) and torch.equal(b[:, half:], old_b[:, half:])
            if not still(layer):
                assert not torch.equal(a[:half], old_a[:half])


def test_an_orthogonal_beginning_is_zero_though_neither_factor_is():
    base = load_base(checkpoint("mixtral", True), load_in_4bit=True, precision="bf16")
    model = attach(base, Adapter(rank=4, expert_rank=2, init="orthogonal"))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 4 + 2 * 2
    for layer in layers:
        for a, b in factors(layer, "default"):
            assert a.std() > 0.01 and b.std() > 0.01
            assert (b @ a).abs().max() < 1e-6 * a.norm() * b.norm()
        assert still(layer) == list(range(getattr(layer, "num_experts", 1)))
    with pytest.raises(NumbersError, match="TRN-002"):
        unlearnt(model, trainable(model))


def test_what_is_trained_is_the_same_bits_after_a_library_cast_it():
    base = load_base(checkpoint("mixtral"), load_in_4bit=True, precision="fp32")
    model = attach(base, Adapter(targets="attention", rank=4, method="dora"))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with keeping_fp32(model):
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    for parameter, old in zip(trained, before, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, old)
    assert any(not torch.equal(old, old.bfloat16().float()) for old in before)  # or the test would prove nothing


@pytest.mark.parametrize(
    ("family", "targets", "changes"),
    [
        ("mixtral", "attention", {"method": "dora"}),
        ("deepseek_v3", "attention", {"method": "dora", "rslora": True}),
        ("llama", "all", {"method": "dora", "init": "pissa"}),
        ("qwen3_moe", "all", {"init": "pissa", "rslora": True}),
        ("llama4", "all", {"init": "olora", "rank_pattern": {r"layers\.1\..*": 6}}),
        ("gpt_oss", "experts", {"init": "orthogonal", "alpha_pattern": {r"layers\.0\.mlp.*": 9.0}}),
    ],
)
def test_merging_gives_the_adapter_on_the_original_base_whatever_the_method(family, targets, changes, tmp_path):
    """Trained beside a 4-bit base, merged into the original one; stock PEFT on that base says what must come out."""
    base = load_base(checkpoint(family, True), load_in_4bit=True, precision="fp32")
    ids = some_ids(base)
    model = attach(base, Adapter(targets=targets, rank=4, expert_rank=2, **changes))
    train_steps(model, ids, 3)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_base(checkpoint(family, True), load_in_4bit=True, precision="fp32"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    merge_folder(base.folder, tmp_path / "adapter", tmp_path / "merged")
    expected = logits(stock_peft(base.folder, tmp_path / "adapter"), ids)
    merged = logits(stock(tmp_path / "merged"), ids)
    assert (expected - logits(stock(base.folder), ids)).abs().max() > 1e-3
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_file_whose_lengths_belong_to_other_rows_is_refused(tmp_path):
    from safetensors.torch import save_file

    from finetune.errors import AdapterError

    base = load_base(checkpoint("mixtral", True), load_in_4bit=False, precision="fp32")
    attach(base, Adapter(targets="attention", rank=2, method="dora")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    key = next(key for key in values if key.endswith("k_proj.lora_magnitude_vector"))
    save_file(values | {key: values[key][:-1].clone()}, file, metadata={"format": "pt"})
    fresh = load_base(checkpoint("mixtral", True), load_in_4bit=False, precision="fp32")
    with pytest.raises(AdapterError, match=r"ADP-011 .*k_proj has 31 lengths for 32 rows"):
        load_adapter(fresh, tmp_path)


def test_patterns_reach_the_file_and_those_that_fit_only_some_layers_do_so_there(tmp_path):
    base = load_base(checkpoint("mixtral", True), load_in_4bit=True, precision="fp32")
    patterns = {r"layers\.1\.mlp\.experts\.down_proj": 5, "down_proj": 3, "q_proj": 7}
    attach(base, Adapter(rank=4, expert_rank=2, rank_pattern=patterns)).save_pretrained(tmp_path)
    shapes = {key: tuple(v.shape) for key, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    ranks = {
        key.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight"): shape[0]
        for key, shape in shapes.items()
        if key.endswith("lora_A.weight")
    }
    for layer, down in ((0, 3), (1, 5)):
        assert ranks[f"{layer}.self_attn.q_proj"] == 7
        assert ranks[f"{layer}.self_attn.k_proj"] == 4
        stacks = sorted(value // 4 for name, value in ranks.items() if name.startswith(f"{layer}.mlp.experts"))
        assert stacks == [2, down]


def test_a_pattern_that_fits_nothing_in_the_loaded_model_is_refused():
    """`check` looks at every layer for every weight; the model knows that its first layer is dense."""
    adapter = Adapter(rank=2, expert_rank=2, rank_pattern={r"layers\.0\.mlp\.experts\.down_proj": 4})
    assert not refusals("qwen3_moe", adapter)
    base = load_base(checkpoint("qwen3_moe"), load_in_4bit=True, precision="fp32")
    with pytest.raises(RecipeError, match=r"ADP-005 layers\\\.0.* no adapted weight's path ends so"):
        attach(base, adapter)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": Adapter(method="dora")}, "ADP-006 .*no DoRA for expert stacks.*Set adapter.targets=attention"),
        ({"adapter": Adapter(method="dora", targets="attention", router=True)}, "ADP-006 .*Set adapter.router=false"),
        ({"adapter": Adapter(targets="attention", router=True, dropout=0.1)}, "ADP-002 .*adapter.router=true"),
        ({"adapter": Adapter(rank_pattern={"q_porj": 4})}, "ADP-005 adapter.rank_pattern: q_porj fits no .*q_proj"),
        ({"adapter": Adapter(targets="attention", alpha_pattern={"down_proj": 4.0})}, "ADP-005 adapter.alpha_pattern"),
        ({"adapter": Adapter(rank_pattern={"q_proj(": 4})}, "ADP-005 .* is no regular expression"),
        ({"adapter": Adapter(rank_pattern={"q_proj": 0})}, "CHK-002 adapter.rank_pattern: q_proj=0"),
        ({"adapter": Adapter(alpha_pattern={"q_proj": -1.0})}, "CHK-002 adapter.alpha_pattern: q_proj=-1"),
        (
            {"adapter": Adapter(init="orthogonal", expert_rank=3)},
            "ADP-007 .*even ranks.*gate_up_proj and .*down_proj is odd",
        ),
        ({"adapter": Adapter(init="pissa", rank=64)}, "ADP-007 .*k_proj has 32 directions"),
        ({"adapter": Adapter(init="olora"), "train__weight_decay": 0.1}, "ADP-008 train.weight_decay=0.1"),
        ({"adapter": Adapter(init="pissa"), "train__optimizer": "adamw_8bit"}, "ADP-008 train.optimizer=adamw_8bit"),
        ({"adapter": Adapter(init="svd")}, "CHK-001 adapter.init=svd"),
        (
            {"adapter": Adapter(method="full"), "export__formats": ["hf"]},
            "ADP-021 adapter.load_in_4bit=true .*cannot be trained. Set adapter=full",
        ),
        (
            {"adapter": Adapter(method="full", load_in_4bit=False), "export__formats": ["hf", "peft"]},
            "EXP-009 export.formats: peft .*there is no adapter.*Set export=hf",
        ),
        (
            {"adapter": Adapter(method="full", load_in_4bit=False, rslora=True), "export__formats": ["hf"]},
            "ADP-009 adapter.rslora=True with adapter.method=full",
        ),
        (
            {
                "adapter": Adapter(method="full", load_in_4bit=False),
                "export__formats": ["hf"],
                "launch__devices": 2,
                "launch__distribution": "fsdp2",
            },
            "LCH-012 launch.distribution=fsdp2 with adapter.method=full: .*Set launch.distribution=ddp",
        ),
        ({"adapter": Adapter(embeddings=True)}, "ADP-009 adapter.embeddings=true with adapter.method=lora"),
        ({"adapter": Adapter(lora_plus_ratio=0.5)}, "CHK-002 adapter.lora_plus_ratio"),
        ({"train__neftune_alpha": -1.0}, "CHK-002 train.neftune_alpha"),
        ({"train__optimizer": "sgd"}, "CHK-001 train.optimizer=sgd"),
    ],
)
def test_what_cannot_work_is_said_before_the_weights_load(changes, sentence):
    (said,) = problems(good(**changes))
    assert re.match(sentence, said), said


@pytest.mark.parametrize(
    ("rslora", "scales"),
    [
        (False, {"q_proj": 7 / 6, "k_proj": 8 / 4, "gate_up_proj": 3 / 2, "down_proj": 3 / 5}),
        (True, {"q_proj": 7 / 6**0.5, "k_proj": 8 / 2, "gate_up_proj": 3 / 2**0.5, "down_proj": 3 / 5**0.5}),
    ],
)
@pytest.mark.parametrize("begin", ["default", "pissa"])
def test_every_update_is_scaled_by_its_alpha_over_its_rank_or_the_root_of_it(rslora, scales, begin):
    """Also where the file is twice as wide as the rank."""
    base = load_base(checkpoint("mixtral", True), load_in_4bit=True, precision="fp32")
    patterns = {"rank_pattern": {"q_proj": 6, "down_proj": 5}, "alpha_pattern": {"q_proj": 7.0}}
    adapter = Adapter(rank=4, alpha=8.0, expert_rank=2, expert_alpha=3.0, init=begin, rslora=rslora, **patterns)
    seen = set()
    for path, layer in attach(base, adapter).named_modules():
        if isinstance(layer, LoraLayer):
            name = getattr(layer, "parameter_name", path.rpartition(".")[2])
            if name in scales:
                assert layer.scaling["default"] == pytest.approx(scales[name]), name
                seen.add(name)
    assert seen == set(scales)


def test_the_plan_counts_a_pattern_that_fits_only_some_layers():
    """Of qwen3_moe's three tiny layers the first is dense."""
    kind = FAMILIES["qwen3_moe"]
    patterns = {r"layers\.1\.mlp\.experts\.down_proj": 5, r"layers\.0\..*": 3, r"layers\.2\.self_attn\.q_proj": 9}
    adapter = Adapter(targets="all", rank=4, expert_rank=2, rank_pattern=patterns)
    model = attach(load_base(checkpoint("qwen3_moe"), load_in_4bit=True, precision="fp32"), adapter)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.lora_parameters(kind.matrices(kind.tiny), kind, adapter) == counted
    plain = Adapter(targets="all", rank=4, expert_rank=2)
    assert sizes.lora_parameters(kind.matrices(kind.tiny), kind, plain) != counted


@pytest.mark.parametrize("family", [key for key, family in FAMILIES.items() if family.router])
def test_a_router_too_begins_at_its_base_and_stock_peft_reads_it(family, tmp_path):
    adapter = Adapter(targets="attention", rank=2, router=True, init="pissa", rslora=True)
    assert not refusals(family, adapter)
    base = load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    untouched = logits(base.model, ids)
    model = attach(base, adapter)
    torch.testing.assert_close(logits(model, ids), untouched, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    routers = [m for name, m in model.named_modules() if isinstance(m, LoraLayer) and name.endswith(base.family.router)]
    assert routers and any(not still(module) for module in routers)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(stock_peft(base.folder, tmp_path), ids), logits(model, ids), rtol=1e-4, atol=1e-5)
