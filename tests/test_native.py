"""The C++ kernels for a CPU against plain torch, and engines over both."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import Case, assert_near, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from drex import LLM, EarlyExit, SamplingParams
from drex.compute import native
from drex.compute.decoder import _rotate
from drex.compute.sampler import TorchReductions
from drex.compute.segments import pick_kernels
from drex.control.hashing import mix

if native.missing is not None:
    pytest.skip(f"the native kernels are not installed: {native.missing}", allow_module_level=True)

from drex.compute.native import layers
from drex.compute.native.layers import LONGEST_SPAN, NativeAttention
from drex.compute.native.operations import add_norm, gate, rotate_and_write
from drex.compute.native.reductions import COLUMNS, NativeReductions

DTYPES = [torch.float32, torch.bfloat16]
norm = torch.nn.functional.rms_norm


def attended(case):
    planes, cells, kv_heads, _ = case.keys.shape
    memory = torch.stack((case.keys, case.values))
    pool = SimpleNamespace(keys=memory[0], values=memory[1], num_cells=cells, planes=planes)
    pool.views = lambda first, length: tuple(
        memory.flatten(0, 1)[:, first : first + length].transpose(1, 2).unsqueeze(1).unbind(0)
    )
    tables = SimpleNamespace(cells=[case.table[None]], aliased=[case.aliased])
    context = SimpleNamespace(
        lengths=np.array(case.lengths), seats=np.array(case.seats), in_run=case.in_run, starts=np.array([case.starts])
    )
    batch = SimpleNamespace(segment=0, sizes=case.sizes, visible=np.array(case.visible), context=context)
    batch.parts = [batch]
    spec = SimpleNamespace(num_heads=case.queries.shape[1], num_kv_heads=kv_heads)
    machinery = SimpleNamespace(pool=pool, tables=tables, decoder=SimpleNamespace(spec=spec))
    return NativeAttention(machinery, batch).run(0, case.plane, case.queries)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 2, 24), (3, 3, 64), (5, 1, 128), (9, 3, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_attend_to_what_they_see_in_runs_tables_and_aliases(dtype, heads, kv_heads, head_dim):
    longest = LONGEST_SPAN
    spans = [(1, 1), (40, 1), (33, 3), (9, 2), (70, 5), (80, longest), (90, longest + 1), (5, 0), (16, 1), (17, 4)]
    lengths, sizes = zip(*spans, strict=True)
    case = Case(heads, lengths, sizes, heads, kv_heads, head_dim, dtype)
    assert_near(attended(case), case.expected(), dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 5)), min_size=1, max_size=5),
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.integers(0, 1000),
)
def test_attention_holds_for_any_lengths(spans, heads, seed):
    spans = [(length, min(size, length)) for length, size in spans]
    if not any(size for _, size in spans):
        return
    lengths, sizes = zip(*spans, strict=True)
    case = Case(seed, lengths, sizes, *heads, 16, torch.float32)
    assert_near(attended(case), case.expected(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_attends_alike_to_the_last_bit_whatever_rows_are_beside_it(dtype):
    lengths, sizes = [90, 40, 33], [3, 1, 2]
    case = Case(1, lengths, sizes, 6, 2, 64, dtype)
    together = attended(case)
    for number, first in enumerate((0, 3, 4)):
        for row in range(sizes[number]):
            alone = Case(1, lengths, sizes, 6, 2, 64, dtype)
            alone.sizes = np.array([1])
            alone.queries = case.queries[first + row :][:1].contiguous()
            alone.visible, alone.lengths = [case.visible[first + row]], [lengths[number]]
            alone.seats, alone.starts = [case.seats[number]], [case.starts[number]]
            alone.in_run = case.in_run[number : number + 1]
            assert torch.equal(attended(alone)[0], together[first + row])


def test_a_request_with_broken_numbers_does_not_reach_its_neighbours():
    case = Case(3, (30, 20), (1, 1), 4, 2, 16, torch.float32)
    case.in_run, case.starts = np.array([True, True]), [0, 31]
    sound = attended(case)
    case.keys[:, 5] = torch.nan
    broken = attended(case)
    case.visible[0] = max(case.visible[0], 6)
    assert torch.isnan(attended(case)[0]).all()
    assert torch.equal(broken[1], sound[1])


@pytest.mark.parametrize("width", [40, 5, 64, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_torch_and_the_residual_stays(dtype, width):
    hidden, weight, delta = (numbers(5, width, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    weight, before, normed = weight[0].contiguous(), hidden.clone(), torch.empty_like(hidden)
    add_norm(hidden, None, weight, 1e-5, normed)
    assert torch.equal(hidden, before)
    assert_near(normed, norm(before.float(), (width,), weight.float(), 1e-5), dtype)
    add_norm(hidden, delta, weight, 1e-5, normed)
    assert torch.equal(hidden, before + delta)
    assert_near(normed, norm((before + delta).float(), (width,), weight.float(), 1e-5), dtype)


@pytest.mark.parametrize("width", [1500, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_silu_times_up(dtype, width):
    gate_up = 20 * numbers(30, 2 * width, dtype=dtype)
    first, second = gate_up.float().chunk(2, -1)
    assert_near(gate(gate_up), torch.nn.functional.silu(first) * second, dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_rotated_and_keys_and_values_written_where_they_belong(dtype, head_dim, normed):
    heads, kv_heads, rows, full, cells = 4, 2, 5, 3, 9
    fused = numbers(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = numbers(30, head_dim // 2, seed=4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (numbers(head_dim, dtype=dtype, seed=5), numbers(head_dim, dtype=dtype, seed=6)) if normed else None
    keys, values = (numbers(cells, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (7, 8))
    before = keys.clone()
    queries = torch.empty(full, heads, head_dim, dtype=dtype)
    positions, where = [3, 0, 29, 7, 7], [4, 8, 0, 2, 6]
    index = (torch.tensor(positions), torch.tensor(where))
    rotate_and_write(fused, *index, cos, sin, norms, 1e-5, queries, keys, values)
    q, k, v = fused.float().view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (norm(each, (head_dim,), weight.float(), 1e-5) for each, weight in zip((q, k), norms, strict=True))
    turn = [table.float()[positions].unsqueeze(1) for table in (cos, sin)]
    assert_near(queries, _rotate(q, *turn)[:full], dtype)
    assert_near(keys[where], _rotate(k, *turn), dtype)
    assert torch.equal(values[where], v.to(dtype))
    others = [cell for cell in range(cells) if cell not in where]
    assert torch.equal(keys[others], before[others])


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5000), (3, 97), (3, 5), (20, 3000), (300, 5), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reductions_find_what_torch_finds_in_the_logits(dtype, vocab, rows):
    logits = 4 * numbers(rows, vocab, dtype=dtype)
    found = NativeReductions().summarise(logits, ())
    wanted = COLUMNS if vocab > 1 else ("mean",)
    expected = TorchReductions().summarise(logits.double(), wanted)
    # Of equal logits torch may take any.
    chosen = logits.gather(1, found["argmax"].long()[:, None])[:, 0]
    assert torch.equal(chosen.double(), expected["best"])
    for name in expected:
        if name != "argmax":
            torch.testing.assert_close(found[name], expected[name].double(), atol=2e-5, rtol=1e-5)


def test_equal_logits_give_the_first_token():
    logits = torch.zeros(2, 4100)
    logits[1, [7, 4000]] = 3.0
    found = NativeReductions().summarise(logits, ())
    assert found["argmax"].tolist() == [0, 7]
    assert found["best"].tolist() == found["second"].tolist() == [0.0, 3.0]


@pytest.mark.parametrize("place", [0, 1023, 1024, 2999])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show_in_their_row_only(place, broken):
    logits = numbers(3, 3000)
    sound = NativeReductions().summarise(logits, ())["log_sum_exp"]
    logits[1, place] = broken
    found = NativeReductions().summarise(logits, ())["log_sum_exp"]
    assert found.isfinite().tolist() == [True, False, True]
    assert torch.equal(found[[0, 2]], sound[[0, 2]])


def test_banned_tokens_count_for_nothing():
    logits = numbers(2, 3000)
    logits[0, 1:] = -torch.inf
    logits[1, ::2] = -torch.inf
    found = NativeReductions().summarise(logits, ())
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(found["log_sum_exp"] - found["mean"], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heat", [1e-4, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_drawn_with_the_same_noise_as_in_torch(dtype, heat):
    logits = 3 * numbers(200, 3001, dtype=dtype)
    logits[:, ::7] = -torch.inf
    heats = heat * (torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.5)
    keys, best = mix(range(200), 3, [5] * 200), logits.amax(-1).float()
    expected = TorchReductions().draw(logits.float(), best, heats, keys).tolist()
    assert NativeReductions().draw(logits, best, heats, keys).tolist() == expected
    assert len(set(expected)) > 50


PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.8, max_tokens=14, seed=5, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=13, seed=5, presence_penalty=0.5, ignore_eos=True),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("kv_fill", "run_ahead"),
    [(kv_fill, mode) for kv_fill in ("recompute", "project", "alias", "mask") for mode in ("off", "trusted")]
    + [("recompute", "lossless")],
)
def test_an_engine_over_the_kernels_gives_what_the_reference_gives(models, monkeypatch, family, kv_fill, run_ahead):
    # Longer ones go through torch's attention.
    monkeypatch.setattr(layers, "LONGEST_SPAN", 8)

    def served(kernels):
        exits = EarlyExit(layers=[1, 2], thresholds=0.12, kv_fill=kv_fill)
        # A pool that is short of runs, so that tables and preemption come into play.
        llm = LLM(models[family], early_exit=exits, dtype="float32", kernels=kernels, run_ahead=run_ahead,
                  profile="nominal", max_num_batched_tokens=24, max_num_seqs=2, kv_cache_tokens=48)  # fmt: skip
        assert llm.engine.executor.runner.kernels == kernels
        prompts = [list(range(5, 37)), [40, 3], [7]]
        tokens = [output.outputs[0].tokens for output in llm.generate(prompts, PARAMS)]
        llm.engine.scheduler.check_integrity()
        return [[(each.id, each.exit_layer, each.logprob, each.confidence) for each in some] for some in tokens]

    ours, theirs = served("native"), served("torch")
    for mine, reference in zip(ours, theirs, strict=True):
        assert [token[:2] for token in mine] == [token[:2] for token in reference]
        pairs = (torch.tensor([token[2:] for token in each]) for each in (mine, reference))
        torch.testing.assert_close(*pairs, atol=2e-4, rtol=0)


def test_they_are_the_usual_kernels_on_a_cpu_for_the_numbers_that_they_take(models):
    def chosen(asked, dtype):
        return pick_kernels(asked, SimpleNamespace(device=torch.device("cpu"), dtype=dtype))

    assert [chosen("auto", dtype) for dtype in DTYPES] == ["native", "native"]
    assert [chosen("auto", dtype) for dtype in (torch.float64, torch.float16)] == ["torch", "torch"]
    assert chosen("torch", torch.float32) == "torch"
    with pytest.raises(ValueError, match="float32 or bfloat16: use kernels='torch'"):
        chosen("native", torch.float64)


def test_without_them_torch_serves_and_asking_for_them_says_what_to_do(models, monkeypatch, caplog):
    monkeypatch.setattr(native, "missing", "no module named _kernels")
    llm = LLM(models["llama"], dtype="float32", profile="nominal")
    assert llm.engine.executor.runner.kernels == "torch"
    assert "the C++ kernels are not installed" in caplog.text
    with pytest.raises(ValueError, match=r"not installed .*: install drex again where there is a C\+\+ compiler"):
        LLM(models["llama"], dtype="float32", profile="nominal", kernels="native")


def test_every_instruction_set_of_this_machine_gives_the_same(tmp_path):
    """The variable is read once, when the module is imported."""
    code = (
        "import torch; from drex.compute.native import instruction_set, operations; gate = operations.gate;"
        "x = torch.linspace(-30, 30, 2 * 999).view(1, -1); print(instruction_set, gate(x).double().sum().item())"
    )
    found = {}
    for name in ("plain", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"DREX_INSTRUCTION_SET": name}, capture_output=True, text=True, check=True
        )
        used, total = done.stdout.split()
        found[used] = float(total)
    assert "plain" in found
    assert max(found.values()) - min(found.values()) < 1e-3
