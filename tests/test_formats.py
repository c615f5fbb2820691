"""Published number formats, against transformers' own reading of them and against sums written out in the tests."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from finetune.formats import block_length, mxfp4, plain_scale, scaled, unpack_e2m1
from tests.quantised import fp4, fp8


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(64, 96, 32, 32), (100, 70, 48, 32), (5, 7, 128, 128)]
)
def test_fp8_blocks_with_a_shorter_last_one_mean_value_times_scale(rows, columns, height, width):
    values, scales, meaning = fp8(torch.randn(rows, columns), height, width)
    assert torch.equal(scaled(values, scales, (height, width)), meaning)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 8), (3, 2)])
def test_a_scale_may_be_one_number_or_stand_for_rows_columns_or_blocks(shape):
    values, scale = torch.randn(6, 8), torch.rand(shape) + 0.5
    wide = scale if scale.numel() == 1 else scale.view(6, 1) if shape == (6,) else scale
    if shape == (3, 2):
        wide = torch.stack([torch.stack([scale[i // 2, j // 4] for j in range(8)]) for i in range(6)])
    assert torch.equal(scaled(values, scale), values * wide)


@pytest.mark.parametrize(("shape", "block"), [((4, 1), None), ((3, 3), (2, 2)), ((2, 3, 1), None)])
def test_a_scale_that_does_not_fit_is_refused(shape, block):
    with pytest.raises(ValueError, match=r"scale"):
        scaled(torch.randn(6, 8), torch.ones(shape), block)


def test_the_declared_block_length_alone_explains_a_shorter_last_block():
    assert block_length(576, 5, 128) == 128
    assert block_length(640, 5, None) == 128
    with pytest.raises(ValueError, match="do not fit"):
        block_length(576, 5, None)


def test_mxfp4_is_what_transformers_reads():
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for e in range(3):
        assert torch.equal(mxfp4(blocks[e], scales[e]).T, theirs[e])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_are_powers_of_two_as_bytes_and_as_e8m0(kind):
    packed, exponents, meaning = fp4(torch.randn(4, 64), kind)
    assert exponents.dtype == kind
    assert torch.equal(scaled(unpack_e2m1(packed), plain_scale(exponents)), meaning)
