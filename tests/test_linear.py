"""Products with packed weights give what ordinary ones give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drex.compute.heads import ExitHead
from drex.compute.linear import PackedLinear, linear, pack_inside, weight_bytes

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="weights are packed where torch has MKL")


@pytest.fixture(autouse=True)
def same_numbers_and_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_mkl
@pytest.mark.parametrize("shape", [(96, 40), (1, 7), (768, 256), (1000, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_weight_gives_the_same_product_for_any_number_of_rows_and_threads(shape, with_bias):
    weight = torch.randn(shape)
    bias = torch.randn(shape[0]) if with_bias else None
    product = linear(weight, bias)
    assert isinstance(product, PackedLinear)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (0, 1, 2, 3, 4, 5, 8, 17, 64, 128, 129, 300):
            x = torch.randn(rows, shape[1])
            torch.testing.assert_close(product(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@needs_mkl
def test_rows_that_lie_apart_in_memory_are_multiplied_as_they_are():
    weight, x = torch.randn(24, 16), torch.randn(5, 48)[:, 8:24]
    torch.testing.assert_close(linear(weight)(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@needs_mkl
@pytest.mark.parametrize("leading", [(), (2, 3), (4, 1, 5)])
def test_rows_may_have_any_leading_dimensions(leading):
    weight, x = torch.randn(24, 16), torch.randn(*leading, 16)
    torch.testing.assert_close(linear(weight)(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@needs_mkl
def test_a_weight_counts_its_bytes_once_packed_or_not():
    weight, bias = torch.randn(24, 16), torch.randn(24)
    assert weight_bytes(linear(weight, bias)) == weight_bytes(linear(weight.bfloat16(), bias.bfloat16())) * 2
    assert weight_bytes(linear(weight, bias)) == 24 * 17 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(dtype):
    weight = torch.randn(8, 4, dtype=dtype)
    product = linear(weight)
    assert isinstance(product, nn.Linear)
    assert product.weight.data_ptr() == weight.data_ptr()


@needs_mkl
def test_an_exit_head_is_packed_with_all_that_it_owns():
    head = ExitHead("mlp", 16, 32, 50, 1e-5, untied=True).requires_grad_(False)
    hidden = torch.randn(3, 16)
    norm = nn.RMSNorm(16)
    features = head.features(hidden, norm)
    logits = head.head(features)
    pack_inside(head)
    assert isinstance(head.head, PackedLinear)
    assert all(isinstance(part, PackedLinear) for part in (head.mlp.gate_proj, head.mlp.up_proj, head.mlp.down_proj))
    torch.testing.assert_close(head.features(hidden, norm), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.head(head.features(hidden, norm)), logits, rtol=1e-5, atol=1e-5)
