"""The way a GPU takes, as far as a CPU can run it: the same numbers, no wait for the host, stacks unpacked once.

Speed is for scripts/bench_experts.py. What needs a GPU is marked so.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.adapters import attach
from finetune.base import load_base
from finetune.experts import grouped, products, routing
from finetune.experts.grouped import experts_forward, plan
from finetune.experts.products import grouped_mm_is_right
from finetune.experts.routing import route, route_on_device
from finetune.experts.scratch import SCRATCH
from finetune.recipe import Adapter
from tests.test_experts import E_, H, experts_module, factors
from tests.test_experts import routing as some_routing
from tests.tiny_models import checkpoint, some_ids


@pytest.fixture(autouse=True)
def empty_scratch():
    SCRATCH.release()
    SCRATCH.unpacked = SCRATCH.found = 0
    yield
    SCRATCH.release()


@pytest.fixture
def on_device(monkeypatch):
    """Every module takes the way of a GPU."""

    def planned(index_TK, module, dtype):
        experts = next(iter(module.finetune_layout.shapes.values()))[0]
        return route_on_device(index_TK, experts, absent=module.finetune_layout.absent)

    monkeypatch.setattr(grouped, "plan", planned)


def run(module, x, index, weights, lora, way):
    """(output, gradients of everything) by one of the two ways."""
    x = x.clone().requires_grad_()
    weights = weights.clone().requires_grad_()
    leaves = [x, weights, *(t for f in lora.values() for t in (f.left_ENr, f.right_ErM))]
    output = experts_forward(module, x, index, weights, lora=lora, routing=way)
    return output, torch.autograd.grad(output.square().sum(), leaves)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kind", ["random", "one expert", "some experts idle"])
def test_both_ways_give_the_same_output_and_gradients(kind, rank, packed):
    module, lora = experts_module(torch.float32, packed=packed), factors(torch.float32, rank=rank)
    index, weights = some_routing(37, kind)
    x = torch.randn(37, H)
    loop = run(module, x, index, weights.float(), lora, route(index, E_))
    device = run(module, x, index, weights.float(), lora, route_on_device(index, E_))
    for a, b in zip((device[0], *device[1]), (loop[0], *loop[1]), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert b.norm() > 0


def test_both_ways_agree_in_bf16_to_its_precision():
    module = experts_module(torch.float32, packed=True)
    index, weights = some_routing(70, "random")
    x = torch.randn(70, H)
    exact = run(module, x, index, weights.float(), factors(torch.float32), route(index, E_))
    for way in (route(index, E_), route_on_device(index, E_)):
        found = run(module, x.bfloat16(), index, weights.bfloat16(), factors(torch.float32), way)
        for a, b in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
            assert (a.float() - b).norm() / b.norm() < 2e-2


class NoHost(TorchDispatchMode):
    """Refuses every operation whose result is a number or a shape that only the values of a tensor tell."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select", "repeat_interleave", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_on_a_device_nothing_waits_for_the_host():
    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32)
    index, weights = some_routing(24, "random")
    x = torch.randn(24, H, requires_grad=True)
    grouped_mm_is_right(torch.device("cpu"), torch.float32)  # once per process, before
    with NoHost():
        way = route_on_device(index, E_)
        experts_forward(module, x, index, weights.float(), lora=lora, routing=way).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="waits for the device"), NoHost():
        route(index, E_)


@pytest.mark.parametrize("way", ["loop", "device"])
def test_a_choice_whose_expert_is_elsewhere_adds_nothing_and_gets_no_gradient(way, monkeypatch):
    """Rows of no expert are poisoned: whatever a product leaves there must not reach anyone."""
    from dataclasses import replace

    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32)
    module.finetune_layout = replace(module.finetune_layout, absent=True)
    index, weights = some_routing(20, "random")
    here = torch.rand(index.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    marked = torch.where(here, index, E_)
    x = torch.randn(20, H)

    if way == "device":
        real = products.F.grouped_mm

        def poisoned(a, b, offs=None):
            y = real(a, b, offs=offs)
            if y.dim() == 2:
                y[int(offs[-1]) :] = float("nan")
            return y

        grouped_mm_is_right(torch.device("cpu"), torch.float32)
        monkeypatch.setattr(products.F, "grouped_mm", poisoned)
        routed = route_on_device(marked, E_, absent=True)
    else:
        routed = route(marked, E_, absent=True)
    found = run(module, x, marked, weights.float(), lora, routed)
    expected = run(module, x, index, (weights * here).float(), lora, route(index, E_))
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    for number, (a, b) in enumerate(zip(found[1], expected[1], strict=True)):
        b = b * here if number == 1 else b  # a weight of zero still has a gradient, a choice that is not here has none
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_without_expert_parallelism_an_absent_expert_is_refused():
    module = experts_module(torch.float32)
    with pytest.raises(ValueError, match="names expert 4 of 4"):
        plan(torch.tensor([[4, 0]]), module, torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_layer_shares_its_unpacked_stacks_with_its_backward_pass(on_device, reentrant):
    """Per step and projection: one per layer forwards, one per layer again (not for the last), none for gradients."""
    base = load_base(checkpoint("mixtral"), load_in_4bit=True, precision="fp32")
    model = attach(base, Adapter(targets="experts", rank=4, expert_rank=4)).train()
    layers = base.model.config.num_hidden_layers
    ids = some_ids(base)

    def step():
        SCRATCH.release()
        SCRATCH.unpacked = SCRATCH.found = 0
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        return SCRATCH.unpacked, SCRATCH.found, gradients

    first = step()
    assert first[0] == 2 * (2 * layers - 1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    second = step()
    assert second[0] == 2 * (2 * layers - 1), "recomputed layers cost no unpacking of their own"
    assert second[1] == 2 * layers + 2
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_one_backward_do_not_mix_up_their_stacks(on_device):
    base = load_base(checkpoint("qwen3_moe"), load_in_4bit=True, precision="fp32")
    model = attach(base, Adapter(targets="experts", rank=4, expert_rank=4)).train()
    a, b = some_ids(base), some_ids(base).flip(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    apart = [torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained) for ids in (a, b)]
    losses = [model(input_ids=ids, labels=ids).loss for ids in (a, b)]
    together = torch.autograd.grad(losses[0] + losses[1], trained)
    for one, two, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-5, atol=1e-7)


def test_a_stack_that_is_loaded_anew_is_unpacked_anew():
    module = experts_module(torch.float32, packed=True)
    before = SCRATCH.stack(module, "down_proj", torch.float32).clone()
    with torch.no_grad():
        module.down_proj.copy_(module.down_proj.flip(0))
    assert not torch.equal(SCRATCH.stack(module, "down_proj", torch.float32), before)
    assert SCRATCH.unpacked == 2


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "deepseek_v4", "qwen3_moe"])
def test_whole_models_agree_by_both_ways(family, on_device, monkeypatch):
    base = load_base(checkpoint(family), load_in_4bit=True, precision="fp32")
    model = attach(base, Adapter(targets="all", rank=4, expert_rank=3)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    ids = some_ids(base)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run_model():
        loss = model(input_ids=ids, labels=ids).loss
        return loss.detach(), torch.autograd.grad(loss, trained)

    device = run_model()
    assert SCRATCH.unpacked > 0
    monkeypatch.undo()
    loop = run_model()
    torch.testing.assert_close(device[0], loop[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(device[1], loop[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_probe_of_grouped_products_passes_here_and_can_fail(monkeypatch):
    cpu = torch.device("cpu")
    assert grouped_mm_is_right(cpu, torch.bfloat16)
    products.grouped_mm_is_right.cache_clear()
    real = products.F.grouped_mm
    monkeypatch.setattr(products.F, "grouped_mm", lambda a, b, offs=None: real(a, b, offs=offs) * 1.5)
    try:
        assert not grouped_mm_is_right(cpu, torch.bfloat16)
        with pytest.raises(RuntimeError, match="multiplies groups wrongly"):
            products.grouped_mm(torch.randn(8, 8).bfloat16(), torch.randn(1, 8, 8).bfloat16(), torch.tensor([8]))
    finally:
        products.grouped_mm_is_right.cache_clear()


def test_a_plan_on_a_device_is_that_of_the_loop_without_its_padding():
    index, _ = some_routing(50, "random")
    loop, device = route(index, E_, fill=False), route_on_device(index, E_)
    assert torch.equal(loop.token_P, device.token_P)
    assert torch.equal(loop.position_TK, device.position_TK)
    assert torch.equal(loop.expert_P, device.expert_P)
    assert [end for _, _, end in loop.groups] == device.offsets_E.tolist()


@pytest.mark.parametrize(
    ("count", "rows"),
    [
        (0, 0),
        (1, 8),
        (9, 16),
        (32, 32),
        (33, 48),
        (65, 80),
        (128, 128),
        (129, 144),
        (257, 288),
        (513, 576),
        (4097, 4608),
    ],
)
def test_a_group_is_padded_to_one_of_few_lengths(count, rows):
    assert routing.padded(count, True) == rows
    assert routing.padded(count, False) == count


def test_groups_have_few_lengths_and_little_padding():
    """oneDNN keeps 1024 kernels: sixteen products of a layer times the lengths of groups must fit."""
    lengths = {routing.padded(count, True) for count in range(1, 4097)}
    assert len(lengths) * 16 < 1024
    assert all(routing.padded(count, True) < 1.13 * count for count in range(128, 4097))


def test_a_cpu_without_bf16_instructions_multiplies_in_fp32(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda: False)
    assert products.arithmetic(torch.bfloat16, cpu) == torch.float32
    assert products.arithmetic(torch.float64, cpu) == torch.float64
    monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda: True)
    assert products.arithmetic(torch.bfloat16, cpu) == torch.bfloat16


@pytest.mark.triton
def test_the_fused_kernel_gives_what_unpacking_and_multiplying_gives():
    """In Triton's interpreter, in a process of its own: it must be switched on before Triton is imported."""
    code = "import tests.fused_kernel as t; t.main()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "36 products agree"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 300, 4096])
def test_on_a_gpu_the_output_and_gradients_are_those_of_a_cpu(tokens):
    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32, rank=8)
    index, weights = some_routing(tokens, "random")
    x = torch.randn(tokens, H)
    exact = run(module, x, index, weights.float(), lora, None)
    lora = {
        name: grouped.Factors(
            f.left_ENr.detach().cuda().requires_grad_(), f.right_ErM.detach().cuda().requires_grad_(), f.scale
        )
        for name, f in lora.items()
    }
    found = run(module.cuda(), x.bfloat16().cuda(), index.cuda(), weights.bfloat16().cuda(), lora, None)
    for a, b in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert (a.float().cpu() - b).norm() / b.norm() < 2e-2
