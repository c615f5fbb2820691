"""The experts: 4-bit storage and split LoRA, against float64 arithmetic and against stock libraries."""

import pytest
import torch
import transformers
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from finetune.base import load_base
from finetune.experts import EXPERTS, nf4, products
from finetune.experts.grouped import Factors, experts_forward
from finetune.experts.routing import ROWS, padded, route
from finetune.experts.stack import set_layout, width
from finetune.families import FAMILIES
from tests.tiny_models import checkpoint

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


def test_only_tokens_weights_factors_their_first_products_and_one_projection_are_kept_for_the_backward_pass():
    """No stack, no sorted copy of the tokens, no activation, no output of an expert."""
    module, lora = experts_module(torch.float32, packed=True), factors(torch.float32)
    index, weights = routing(8, "random")
    saved = []
    x, scores = torch.randn(8, H, requires_grad=True), weights.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = experts_forward(module, x, index, scores, lora=lora)
    rows = route(index, E_, fill=False).token_P.shape[0]
    given = [x, scores, *(t for f in lora.values() for t in (f.left_ENr, f.right_ErM))]
    own = [t for t in saved if not any(t is g or t.data_ptr() == g.data_ptr() for g in given)]
    ranks = [(rows, f.left_ENr.shape[2]) for f in lora.values()]
    assert [tuple(t.shape) for t in own] == [(rows, 2 * INTER), *ranks]
    assert len(saved) == len(given) + 3
    output.sum().backward()
    assert x.grad.abs().sum() > 0


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


@pytest.mark.parametrize("shape", [(2, 64, 256), (3, 64, 96)])
def test_double_quantisation_gives_the_bits_that_bitsandbytes_gives(shape):
    """Also where the maxima of an expert do not fill blocks of 256."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stack = torch.randn(shape)
    module = nn.Module()
    for suffix, part in nf4.pack(stack, double=True).items():
        module.register_parameter("w" + suffix, nn.Parameter(part, requires_grad=False))
    whole = nf4.unpack(module.w, nf4.maxima(module, "w"), shape, torch.float32)
    for e in range(shape[0]):
        values, state = quantize_4bit(stack[e].view(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = dequantize_4bit(values, state).view(shape[1:])
        assert torch.equal(module.w[e], values.view(-1))
        assert torch.equal(nf4.unpack(module.w[e], nf4.maxima(module, "w", e), shape[1:], torch.float32), theirs)
        assert torch.equal(whole[e], theirs)
    assert nf4.bytes_per_parameter(True) == pytest.approx(0.5159, abs=1e-4)


MOE = [key for key, family in FAMILIES.items() if family.experts]


@pytest.mark.parametrize(
    ("precision", "near", "instructions"), [("fp32", 1e-5, False), ("bf16", 1e-2, False), ("bf16", 1.5e-2, True)]
)
@pytest.mark.parametrize("family", MOE)
def test_every_familys_experts_in_4_bits_equal_its_own_class_in_float64(
    family, precision, near, instructions, monkeypatch
):
    """The stock class, its weights dequantised and W + s B A formed, in float64: output and every gradient.

    On a CPU with and without instructions for bf16, whatever this one has.

    Biases, clamps and interleaving are the class's own there. Where the stock block scales inputs instead of outputs
    the whole block is compared.
    """
    monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda: instructions)
    base = load_base(checkpoint(family), load_in_4bit=True, precision=precision)
    module = next(m for m in base.model.modules() if hasattr(m, "finetune_layout"))
    layout, dtype = module.finetune_layout, torch.float32 if precision == "fp32" else torch.bfloat16
    experts, hidden = layout.shapes["down_proj"][0], base.model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = {name: (width(module, name, back=True), width(module, name)) for name in layout.shapes}
    leaves = {n: (draw(experts, i, 3) / i**0.5, draw(experts, 3, o) / 3**0.5) for n, (i, o) in sizes.items()}
    x, weights = draw(13, hidden).to(dtype), torch.rand(13, 2, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(13)])
    pull = draw(13, hidden).to(dtype).double()
    repeats = FAMILIES[family].repeats_tokens
    index = index[:, :1].reshape(-1, 1) if repeats else index

    def ours():
        lora = {n: Factors(a.float().requires_grad_(), b.float().requires_grad_(), 0.6) for n, (a, b) in leaves.items()}
        moved, scores = x.clone().requires_grad_(), weights.to(dtype).requires_grad_()
        if repeats:
            output = module(moved, index, lora=lora)
        else:
            output = experts_forward(module, moved, index, scores, lora=lora)
        inputs = [moved, *([] if repeats else [scores]), *(t for f in lora.values() for t in (f.left_ENr, f.right_ErM))]
        return output, torch.autograd.grad(output, inputs, pull.to(output.dtype))

    def exact():
        fields = dict(FAMILIES[family].tiny)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        config._experts_implementation = "eager"
        stock = getattr(transformers, FAMILIES[family].auto_class).from_config(config)
        stock = next(m for m in stock.modules() if type(m).__name__ == FAMILIES[family].experts_class).double()
        values = {name: p.detach().double() for name, p in module.named_parameters() if "absmax" not in name}
        lora = {n: (a.clone().requires_grad_(), b.clone().requires_grad_()) for n, (a, b) in leaves.items()}
        for name, shape in layout.shapes.items():
            stack = nf4.unpack(getattr(module, name), nf4.maxima(module, name), shape, torch.float32).double()
            delta = 0.6 * lora[name][0] @ lora[name][1]
            values[name] = stack + (delta if layout.transposed else delta.mT)
        moved, scores = x.double().requires_grad_(), weights.to(dtype).double().requires_grad_()
        if repeats:
            rows = torch.zeros(experts, 13, hidden, dtype=torch.float64)
            rows = rows.index_put((index[:, 0], torch.arange(13)), moved).view(-1, hidden)
            every = torch.func.functional_call(stock, values, (rows,)).view(experts, 13, hidden)
            output = every[index[:, 0], torch.arange(13)]
        else:
            output = torch.func.functional_call(stock, values, (moved, index, scores))
        inputs = [moved, *([] if repeats else [scores]), *(t for pair in lora.values() for t in pair)]
        return output, torch.autograd.grad(output, inputs, pull)

    found, expected = ours(), exact()
    for number, (a, b) in enumerate(zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)):
        assert b.norm() > 0
        assert (a.double() - b).norm() <= near * b.norm(), number
