"""The experts: 4-bit storage and split LoRA, against float64 arithmetic and against stock libraries."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from finetune.experts import EXPERTS, nf4
from finetune.experts.grouped import Factors, experts_forward
from finetune.experts.routing import ROWS, padded, route
from finetune.experts.stack import set_layout

E_, H, INTER, R = 4, 64, 128, 3


def experts_module(
    dtype: torch.dtype = torch.float64, packed: bool = False, num_experts: int = E_, double: bool = False
) -> nn.Module:
    """A Mixtral experts module with random weights, frozen."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=H, intermediate_size=INTER, num_local_experts=num_experts, num_experts_per_tok=2)
    config._experts_implementation = EXPERTS
    module = MixtralExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2).requires_grad_(False)
    set_layout(module, ("gate_up_proj", "down_proj"), transposed=False)
    if packed:
        for name in ("gate_up_proj", "down_proj"):
            for suffix, part in nf4.pack(getattr(module, name).float(), double=double).items():
                setattr(module, name + suffix, nn.Parameter(part, requires_grad=False))
    return module


def factors(dtype: torch.dtype, num_experts: int = E_, rank: int = R) -> dict[str, Factors]:
    """Random LoRA factors of both stacks, with gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "gate_up_proj": Factors(draw(num_experts, H, rank), draw(num_experts, rank, 2 * INTER), 0.7),
        "down_proj": Factors(draw(num_experts, INTER, rank), draw(num_experts, rank, H), 0.3),
    }


def plain_loop(module, x, index, weights, lora):
    """The definition, token by token and choice by choice, with dense weights and without sorting or padding."""
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros(H, dtype=x.dtype)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            mid = x[t] @ module.gate_up_proj[e].T
            out = module.down_proj
            if lora:
                f = lora["gate_up_proj"]
                mid = mid + f.scale * (x[t] @ f.left_ENr[e]) @ f.right_ErM[e]
            gate, up = mid.chunk(2)
            act = nn.functional.silu(gate) * up
            y = act @ out[e].T
            if lora:
                f = lora["down_proj"]
                y = y + f.scale * (act @ f.left_ENr[e]) @ f.right_ErM[e]
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows)


def routing(tokens: int, kind: str, num_experts: int = E_, top_k: int = 2):
    """(index, weights) of one of several ways in which tokens can meet experts."""
    generator = torch.Generator().manual_seed(2)
    if kind == "one expert":
        index = torch.stack([torch.full((tokens,), 2), torch.full((tokens,), 0)], 1)
    elif kind == "some experts idle":
        index = torch.randint(0, 2, (tokens, 1), generator=generator).repeat(1, top_k)
        index[:, 1] = 1 - index[:, 0]
    else:
        index = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])
    return index, torch.rand(tokens, index.shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["random", "one expert", "some experts idle"])
@pytest.mark.parametrize("tokens", [1, 5, ROWS + 3])
def test_forward_and_every_gradient_equal_the_plain_loop_in_float64(kind, tokens):
    module, lora = experts_module(), factors(torch.float64)
    index, weights = routing(tokens, kind)
    x = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    w = weights.requires_grad_()
    leaves = [x, w] + [t for f in lora.values() for t in (f.left_ENr, f.right_ErM)]
    expected = plain_loop(module, x, index, w, lora)
    grads = torch.autograd.grad(expected.sin().sum(), leaves)
    ours = experts_forward(module, x, index, w, lora=lora)
    ours_grads = torch.autograd.grad(ours.sin().sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(ours_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert all(g.abs().sum() > 0 for g in grads)


def test_without_an_adapter_the_output_is_the_stock_one():
    module = experts_module()
    index, weights = routing(9, "random")
    x = torch.randn(9, H, dtype=torch.float64)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(experts_forward(module, x, index, weights), module(x, index, weights))


@pytest.mark.parametrize(("num_experts", "top_k", "rank"), [(1, 1, 1), (8, 1, 1), (8, 3, 8)])
def test_one_expert_one_choice_and_other_ranks(num_experts, top_k, rank):
    module, lora = experts_module(num_experts=num_experts), factors(torch.float64, num_experts, rank)
    index, weights = routing(7, "random", num_experts, top_k)
    x = torch.randn(7, H, dtype=torch.float64)
    torch.testing.assert_close(
        experts_forward(module, x, index, weights, lora=lora), plain_loop(module, x, index, weights, lora)
    )


def test_no_tokens_give_an_empty_output():
    module, lora = experts_module(torch.float32), factors(torch.float32)
    x = torch.zeros(0, H, requires_grad=True)
    y = experts_forward(module, x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), lora=lora)
    assert y.shape == (0, H)
    y.sum().backward()


def test_packed_experts_equal_their_dequantised_twin():
    packed = experts_module(torch.float32, packed=True)
    twin = experts_module(torch.float32)
    for name, shape in packed.finetune_layout.shapes.items():
        for e in range(E_):
            absmax = nf4.maxima(packed, name, e)
            getattr(twin, name).data[e] = nf4.unpack(getattr(packed, name)[e], absmax, shape[1:], torch.float32)
    index, weights = routing(11, "random")
    x = torch.randn(11, H)
    lora = factors(torch.float32)
    a = experts_forward(packed, x, index, weights.float(), lora=lora)
    b = plain_loop(twin, x, index, weights.float(), lora)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_four_bits_are_four_bits_and_a_maximum_per_64():
    packed = experts_module(torch.float32, packed=True)
    parameters = sum(e * o * i for e, o, i in packed.finetune_layout.shapes.values())
    size = sum(p.numel() * p.element_size() for p in packed.parameters())
    assert size / parameters == 0.5625


@pytest.mark.parametrize("shape", [(2, 64, 96), (2, 6, 32), (1, 128, 64)])
def test_packing_per_expert_gives_the_bits_of_packing_that_matrix_alone(shape):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stack = torch.randn(shape)
    made = nf4.pack(stack)
    packed, absmax = made[""], made[nf4.ABSMAX]
    for e in range(shape[0]):
        values, state = quantize_4bit(stack[e], blocksize=64, quant_type="nf4")
        assert torch.equal(packed[e], values.view(-1))
        mine = nf4.unpack(packed[e], absmax[e], shape[1:], torch.float32)
        if shape[2] % 64 == 0:
            assert torch.equal(mine, dequantize_4bit(values, state))
        assert (mine - stack[e]).norm() / stack[e].norm() < 0.11  # 9.1 % is NF4's error on a normal distribution


def test_a_stack_that_does_not_split_into_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks of 64"):
        nf4.pack(torch.randn(2, 3, 5))


def test_an_expert_id_out_of_range_is_refused():
    with pytest.raises(ValueError, match="names expert 4 of 4"):
        route(torch.tensor([[4, 0]]), 4)


def test_rows_of_an_expert_are_padded_and_every_pair_has_its_own_row():
    index, _ = routing(100, "random")
    plan = route(index, E_)
    assert all(end - start == padded(end - start, True) for _, start, end in plan.groups)
    rows = plan.position_TK.reshape(-1)
    assert rows.unique().numel() == rows.numel() == 200
    owner = torch.empty(plan.token_P.numel(), dtype=torch.long)
    for e, start, end in plan.groups:
        owner[start:end] = e
    assert torch.equal(owner[plan.position_TK], index)
    assert torch.equal(plan.token_P[plan.position_TK], torch.arange(100).unsqueeze(1).expand(-1, 2))


def test_nothing_of_the_size_of_a_stack_is_kept_for_the_backward_pass():
    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32)
    index, weights = routing(8, "random")
    saved = []
    x = torch.randn(8, H, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        experts_forward(module, x, index, weights.float(), lora=lora)
    stack = E_ * 2 * INTER * H
    assert saved
    assert max(shape.numel() for shape in saved) < stack


def test_two_forwards_before_one_backward_and_repeats_are_bit_equal():
    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32)
    index, weights = routing(70, "random")
    leaves = [t for f in lora.values() for t in (f.left_ENr, f.right_ErM)]
    x, other = torch.randn(70, H), torch.randn(70, H)

    def gradients(interleave: bool):
        y = experts_forward(module, x, index, weights.float(), lora=lora)
        if interleave:
            experts_forward(module, other, index, weights.float(), lora=lora)
        return torch.autograd.grad(y.square().sum(), leaves)

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mutation", ["swap gate and up", "drop the scale", "permute B"])
def test_a_wrong_update_is_seen(mutation):
    """The comparison above can fail: each classic mistake moves the output by far more than its tolerance."""
    module, lora = experts_module(), factors(torch.float64)
    index, weights = routing(6, "random")
    x = torch.randn(6, H, dtype=torch.float64)
    expected = plain_loop(module, x, index, weights, lora)
    f = lora["gate_up_proj"]
    if mutation == "swap gate and up":
        f = Factors(f.left_ENr, f.right_ErM.roll(INTER, dims=2), f.scale)
    elif mutation == "drop the scale":
        f = Factors(f.left_ENr, f.right_ErM, 1.0)
    else:
        f = Factors(f.left_ENr, f.right_ErM.roll(1, dims=0), f.scale)
    ours = experts_forward(module, x, index, weights, lora=lora | {"gate_up_proj": f})
    assert (ours - expected).abs().max() > 1e-2
