"""Products with packed weights give what ordinary ones give, by whichever kernel there is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drex import LLM, EarlyExit, SamplingParams
from drex.compute import linear as linear_module
from drex.compute.heads import ExitHead
from drex.compute.linear import KERNELS, MklLinear, OnednnLinear, PackedLinear, Products, kernels_for, weight_bytes

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3, 4, 5, 8, 17, 64, 128, 129, 300)
PACKED = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for dtype in (torch.float32, torch.bfloat16)
    for name in kernels_for(CPU, dtype)
    if name != "plain"
]
packed = pytest.mark.parametrize(("kernel", "dtype"), PACKED)


@pytest.fixture(autouse=True)
def same_numbers_and_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(got, wanted):
    """To what the dtype can tell."""
    tolerance = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.02, "atol": 0.05}}
    torch.testing.assert_close(got, wanted, **tolerance[got.dtype])


@packed
@pytest.mark.parametrize("shape", [(96, 40), (1, 7), (768, 256), (1000, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_weight_gives_the_same_product_for_any_number_of_rows_and_threads(kernel, dtype, shape, with_bias):
    weight = torch.randn(shape, dtype=dtype)
    bias = torch.randn(shape[0], dtype=dtype) if with_bias else None
    product = KERNELS[kernel](weight, bias)
    assert isinstance(product, PackedLinear)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], dtype=dtype)
            close(product(x), F.linear(x, weight, bias))


@packed
@pytest.mark.parametrize("shape", [(96, 40), (768, 256), (3072, 576)])
def test_a_row_gets_the_same_result_beside_any_others(kernel, dtype, shape):
    """By oneDNN to the last bit; by MKL up to rounding, as output that does not depend on load asks for in float32."""
    product = KERNELS[kernel](torch.randn(shape, dtype=dtype) / shape[1] ** 0.5, None)
    x = torch.randn(300, shape[1], dtype=dtype)
    together = product(x)
    for rows in ROWS[1:]:
        for start in (0, 7 * rows % (301 - rows)):
            alone = product(x[start : start + rows])
            if kernel == "onednn":
                assert torch.equal(alone, together[start : start + rows])
            else:
                torch.testing.assert_close(alone, together[start : start + rows], rtol=0, atol=1e-5)


@packed
def test_rows_that_lie_apart_in_memory_are_multiplied_as_they_are(kernel, dtype):
    weight, x = torch.randn(24, 16, dtype=dtype), torch.randn(5, 48, dtype=dtype)[:, 8:24]
    close(KERNELS[kernel](weight, None)(x), F.linear(x, weight))


@packed
@pytest.mark.parametrize("leading", [(), (2, 3), (4, 1, 5), (0,), (2, 0)])
def test_rows_may_have_any_leading_dimensions(kernel, dtype, leading):
    weight, x = torch.randn(24, 16, dtype=dtype), torch.randn(*leading, 16, dtype=dtype)
    close(KERNELS[kernel](weight, None)(x), F.linear(x, weight))


@pytest.mark.skipif("onednn" not in kernels_for(torch.device("cpu"), torch.float32), reason="torch has no oneDNN")
def test_few_numbers_of_rows_are_compiled_and_change_no_row(monkeypatch):
    """oneDNN keeps some 0.4 MB for each number of rows that it has met."""
    real, met, weight = torch.ops.mkldnn._linear_pointwise, [], torch.randn(24, 16)
    product, bias = OnednnLinear(weight, torch.ones(24)), torch.ones(24)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda rows, *rest: met.append(rows) or real(rows, *rest)
    )
    for count in range(1, 513):
        rows = torch.randn(count, 16)
        assert torch.equal(product(rows), real(rows, product._packed, bias, "none", [], ""))
        assert count <= len(met[-1]) <= max(count, 1.25 * count + 1)
    assert len({len(rows) for rows in met}) <= 32
    assert [len(rows) for rows in met[:8]] == [*range(1, 9)]


@packed
def test_a_packed_weight_is_not_kept(kernel, dtype):
    """Models are read through one buffer: what the next weight overwrites must not be the last one."""
    weight, x = torch.randn(24, 16, dtype=dtype), torch.randn(3, 16, dtype=dtype)
    product = KERNELS[kernel](weight, None)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before)


def test_a_weight_counts_its_bytes_once_packed_or_not():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        for kernel in kernels_for(CPU, dtype):
            product = KERNELS[kernel](torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype))
            assert weight_bytes(product) == 24 * 17 * size


# Which kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype):
    weight = torch.randn(8, 4).to(dtype)
    product = Products(CPU, dtype).linear(weight)
    assert isinstance(product, nn.Linear)
    assert product.weight.data_ptr() == weight.data_ptr()


def test_the_fastest_kernel_of_a_shape_is_found_once_and_taken_for_all_its_weights(monkeypatch, tmp_path):
    tried = []
    seconds = {"usual": 1.0, "other": 0.6, "plain": 2.0}
    made = {name: lambda weight, bias, name=name: name for name in seconds}

    def measure(products, weight):
        tried.append((sorted(products), tuple(weight.shape)))
        return {name: seconds[name] for name in products}

    monkeypatch.setenv("DREX_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_module, "KERNELS", made)
    monkeypatch.setattr(linear_module, "_least_seconds", measure)
    products = Products(CPU, torch.float32, ("usual", "other", "plain"))
    large, small = torch.empty(4096, 1024), torch.empty(8, 4)
    assert [products.linear(weight) for weight in (large, small, large)] == ["other", "usual", "other"]
    # With a part of the weight, and small ones not at all.
    assert tried == [(["other", "plain", "usual"], (1024, 1024))]
    seconds["other"] = 0.75
    assert Products(CPU, torch.float32, ("usual", "other", "plain")).linear(large) == "other", "kept since then"
    assert len(tried) == 1
    (tmp_path / "products.json").write_text("no json")
    assert Products(CPU, torch.float32, ("usual", "other")).linear(large) == "usual", "hardly faster is not enough"


def test_a_weight_that_stays_as_it_is_among_packed_ones_has_memory_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DREX_CACHE", str(tmp_path))
    monkeypatch.setattr(
        linear_module, "_least_seconds", lambda products, _: {name: name != "plain" for name in products}
    )
    products = Products(CPU, torch.float32)
    if not products.packs:
        pytest.skip("nothing is packed here")
    buffer = torch.randn(1024, 1024)
    product = products.linear(buffer)
    assert isinstance(product, nn.Linear)
    assert product.weight.data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("missing", ["onednn", "onednn and mkl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_packed_kernels_the_others_run_and_say_the_same(models, monkeypatch, missing, dtype):
    exits = EarlyExit(layers=[2, 4], thresholds=0.4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def run():
        llm = LLM(models["llama"], early_exit=exits, dtype=dtype)
        kinds = {type(product) for layer in llm.model.decoder.layers for product in (layer.qkv, layer.down)}
        return kinds, [(t.id, t.exit_layer) for t in llm.generate([[5, 9, 11]], params)[0].outputs[0].tokens]

    expected = run()[1]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if "mkl" in missing.split():
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    without, got = run()
    assert OnednnLinear not in without
    assert without <= ({MklLinear, nn.Linear} if missing == "onednn" else {nn.Linear})
    if dtype == "float32":
        assert got == expected
    assert len(got) == len(expected)


def test_an_exit_head_is_packed_with_all_that_it_owns():
    head = ExitHead("mlp", 16, 32, 50, 1e-5, untied=True).requires_grad_(False)
    hidden = torch.randn(3, 16)
    norm = nn.RMSNorm(16)
    features = head.features(hidden, norm)
    logits = head.head(features)
    products = Products(CPU, torch.float32)
    products.pack_inside(head)
    if products.packs:
        assert isinstance(head.head, PackedLinear)
        assert all(
            isinstance(part, PackedLinear) for part in (head.mlp.gate_proj, head.mlp.up_proj, head.mlp.down_proj)
        )
    torch.testing.assert_close(head.features(hidden, norm), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.head(head.features(hidden, norm)), logits, rtol=1e-5, atol=1e-5)
