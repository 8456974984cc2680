"""Triton's kernels against plain torch: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import DEVICE, Case, assert_near, numbers
from conftest import CONFIGS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from drex import LLM, EarlyExit, SamplingParams
from drex.compute.decoder import _rotate
from drex.compute.indices import Room, count_tiles, tiles
from drex.compute.sampler import TorchReductions
from drex.control.hashing import mix

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: it is there on Linux only", allow_module_level=True)

from drex.compute import fused
from drex.compute.fused import FusedLayers
from drex.compute.graphs import Graphs, fill_buckets, row_buckets
from drex.compute.kernels.attention import Partial, Tiles, attend, rows_per_tile
from drex.compute.kernels.check import COLUMNS, FusedReductions
from drex.compute.kernels.layer import add_norm, enter, gate, leave, rotate_and_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attended(case, widest, splits, spare):
    rows, heads, head_dim = case.queries.shape
    most = rows_per_tile(heads, case.keys.shape[2], widest)
    span, first, count = tiles(case.sizes, most)
    empty = [0] * spare
    on = Tiles(
        whole(*first, *empty),
        whole(*count, *empty),
        whole(*(case.seats[i] for i in span), *empty),
        whole(*(int(case.in_run[i]) for i in span), *empty),
        torch.stack([whole(*empty, *(0 for _ in span)), whole(*(case.starts[i] for i in span), *empty)]),
        whole(*case.visible),
    )
    out = torch.empty(rows, heads * head_dim, device=DEVICE, dtype=case.queries.dtype)
    partial = Partial.empty(rows, heads, splits, head_dim, DEVICE) if splits > 1 else None
    table, aliased = case.table.to(DEVICE), case.aliased.to(DEVICE)
    attend(case.queries, case.keys, case.values, case.plane, 1, table, aliased, on, most, splits, partial, out)
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "widest", "splits"),
    [(4, 2, 16, 16, 1), (6, 2, 24, 16, 4), (3, 3, 64, 64, 1), (8, 1, 32, 16, 2)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_the_reference_over_runs_tables_and_aliases(
    dtype, heads, kv_heads, head_dim, widest, splits
):
    case = Case(heads + splits, (1, 70, 9, 33), (1, 3, 2, 9), heads, kv_heads, head_dim, dtype)
    assert_near(attended(case, widest, splits, spare=2), case.expected(), dtype)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 5)), min_size=1, max_size=5),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 1000),
)
def test_attention_holds_for_any_lengths(spans, splits, seed):
    spans = [(length, min(size, length)) for length, size in spans]
    if not any(size for _, size in spans):
        return
    lengths, sizes = zip(*spans, strict=True)
    case = Case(seed, lengths, sizes, 4, 2, 16, torch.float32)
    assert_near(attended(case, 16, splits, spare=0), case.expected(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_torch_and_the_residual_stays(dtype):
    source, weight, delta = (numbers(9, 40, dtype=dtype), numbers(40, dtype=dtype, seed=1), numbers(3, 40, dtype=dtype))
    hidden, normed = (torch.empty(5, 40, device=DEVICE, dtype=dtype) for _ in range(2))
    enter(source, whole(4, 4, 0, 8, 2), weight, 1e-5, hidden, normed)
    taken = source[[4, 4, 0, 8, 2]]
    assert torch.equal(hidden, taken)
    assert_near(normed, torch.nn.functional.rms_norm(taken.float(), (40,), weight.float(), 1e-5), dtype)
    add_norm(hidden, delta, weight, 1e-5, normed)
    taken[:3] += delta
    assert_near(hidden, taken, dtype)
    assert_near(normed, torch.nn.functional.rms_norm(taken.float(), (40,), weight.float(), 1e-5), dtype)


def test_rows_leave_to_their_places_in_the_arena_and_those_that_are_not_there_do_not():
    hidden, delta, arena = numbers(4, 24), numbers(4, 24, seed=2), numbers(6, 24, seed=3)
    expected, summed = arena.clone(), hidden + delta
    expected[[5, 0, 3]] = summed[:3]
    leave(hidden, delta, arena, whole(5, 0, 3, 1), whole(3, 3))
    assert torch.equal(arena, expected)
    assert torch.equal(hidden[:3], summed[:3])


@pytest.mark.parametrize(("full", "counts"), [(5, (4, 0)), (2, (2, 2)), (0, (0, 4))])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_rotated_and_keys_and_values_written_where_they_belong(dtype, normed, full, counts):
    heads, kv_heads, head_dim, rows, cells = 4, 2, 16, 5, 9
    fused = numbers(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = numbers(30, head_dim // 2, seed=4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (numbers(head_dim, dtype=dtype, seed=5), numbers(head_dim, dtype=dtype, seed=6)) if normed else None
    keys, values = (numbers(2, cells, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (7, 8))
    before = keys.clone()
    queries = torch.empty(rows, heads, head_dim, device=DEVICE, dtype=dtype)
    positions, where = [3, 0, 29, 7, 7], [4, 8, 0, 2, 6]
    rotate_and_write(
        fused, whole(*positions), whole(*where), whole(*counts), full, cos, sin, norms, 1e-5, 1, queries, keys, values
    )
    q, k, v = fused.float().view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (
            torch.nn.functional.rms_norm(each, (head_dim,), weight.float(), 1e-5)
            for each, weight in zip((q, k), norms, strict=True)
        )
    turn = [table.float()[positions].unsqueeze(1) for table in (cos, sin)]
    assert_near(queries[:4], _rotate(q, *turn)[:4], dtype)
    assert_near(keys[1, where[:4]], _rotate(k, *turn)[:4], dtype)
    assert torch.equal(values[1, where[:4]], v[:4].to(dtype))
    # The fifth row is beyond the count, and the other plane is another layer's.
    assert torch.equal(keys[1, where[4]], before[1, where[4]])
    assert torch.equal(keys[0], before[0])


def test_between_the_rows_of_a_pass_and_its_kv_only_rows_there_may_be_room():
    fused, keys, values = numbers(6, 4 * 16), numbers(1, 6, 1, 16, seed=1), numbers(1, 6, 1, 16, seed=2)
    before, queries, cos, sin = values.clone(), torch.empty(6, 2, 16, device=DEVICE), numbers(9, 8), numbers(9, 8)
    where = [5, 4, 3, 2, 1, 0]
    rotate_and_write(
        fused, whole(*where), whole(*where), whole(1, 2), 3, cos, sin, None, 1e-5, 0, queries, keys, values
    )
    there, rest = [0, 3, 4], [1, 2, 5]
    assert torch.equal(values[0, [where[row] for row in there], 0], fused[there, 48:])
    assert torch.equal(values[0, [where[row] for row in rest]], before[0, [where[row] for row in rest]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_silu_times_up(dtype):
    gate_up = numbers(3, 2 * 1500, dtype=dtype)
    out = torch.empty(3, 1500, device=DEVICE, dtype=dtype)
    gate(gate_up, out)
    first, second = gate_up.float().chunk(2, -1)
    assert_near(out, torch.nn.functional.silu(first) * second, dtype)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5000), (3, 97), (3, 5), (20, 3000), (300, 5)])
def test_the_check_finds_what_torch_finds_in_the_logits(vocab, rows):
    logits = 4 * numbers(rows, vocab)
    found = FusedReductions().summarise(logits, ())
    expected = TorchReductions().summarise(logits.double(), COLUMNS)
    assert found["argmax"].tolist() == expected["argmax"].tolist()
    for name in COLUMNS:
        torch.testing.assert_close(found[name].double(), expected[name].double(), atol=2e-5, rtol=1e-5)


def test_equal_logits_give_the_first_token():
    logits = torch.zeros(2, 4100, device=DEVICE)
    logits[1, [7, 4000]] = 3.0
    found = FusedReductions().summarise(logits, ())
    assert found["argmax"].tolist() == [0, 7]
    assert found["best"].tolist() == found["second"].tolist() == [0.0, 3.0]


def test_tokens_are_drawn_with_the_same_noise_as_in_torch():
    logits, heat = 3 * numbers(40, 3000), torch.rand(40, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.3
    keys, best = mix(range(40), 3, [5] * 40), logits.amax(-1)
    ours, theirs = (each.draw(logits, best, heat, keys).tolist() for each in (FusedReductions(), TorchReductions()))
    assert ours == theirs
    assert len(set(ours)) > 10


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 16))
def test_tiles_cover_every_row_once_and_none_has_rows_of_two_requests(sizes, most):
    span, first, count = tiles(np.array(sizes), most)
    assert count_tiles(np.array(sizes), most) == len(span)
    assert (count >= 1).all()
    assert (count <= most).all()
    covered = [(int(s), int(f) + i) for s, f, n in zip(span, first, count, strict=True) for i in range(n)]
    assert covered == [(s, row) for s, row in zip(np.repeat(np.arange(len(sizes)), sizes), range(sum(sizes)))]  # noqa: B905


@given(st.integers(1, 3000))
def test_buckets_ascend_to_the_most_and_waste_little(most):
    buckets = row_buckets(most)
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))
    for smaller, larger in itertools.pairwise(buckets):
        assert larger <= 2 * smaller
        assert smaller < 32 or 4 * larger <= 5 * smaller


@given(st.integers(0, 3000))
def test_few_buckets_of_kv_only_rows_reach_from_none_to_the_most(most):
    buckets = fill_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert (buckets[0], buckets[-1]) == (0, most)
    assert len(buckets) <= 6


PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.8, max_tokens=4, seed=5, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=3, seed=5, presence_penalty=0.5, ignore_eos=True),
]


@pytest.fixture(scope="module")
def shallow_models(tmp_path_factory):
    """Of three layers, since the interpreter takes a second for a pass over more."""
    folder = tmp_path_factory.mktemp("shallow")
    return {
        family: make_model(
            type(config)(**{**config.to_dict(), "num_hidden_layers": 3, "layer_types": None}), folder / family
        )
        for family, config in CONFIGS.items()
    }


def served(folder, kernels, run_ahead, threshold, requests=3, **early_exit):
    """Tokens, depths, log-probabilities and confidences of a few requests."""
    exits = EarlyExit(layers=[1, 2], thresholds=threshold, **early_exit)
    # A pool that is short of runs, so that tables and preemption come into play.
    llm = LLM(folder, early_exit=exits, dtype="float32", kernels=kernels, run_ahead=run_ahead, profile="nominal",
              max_num_batched_tokens=5, max_num_seqs=2, kv_cache_tokens=8)  # fmt: skip
    outputs = llm.generate([[5, 9, 11], [40, 3], [7]][:requests], PARAMS[:requests])
    llm.engine.scheduler.check_integrity()
    return [
        [(token.id, token.exit_layer, token.logprob, token.confidence) for token in output.outputs[0].tokens]
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("family", "kv_fill", "criterion", "threshold", "run_ahead", "requests"),
    [
        ("llama", "recompute", "max_prob", 0.2, "trusted", 3),
        ("qwen2", "project", "margin", 0.1, "off", 2),
        ("qwen3", "alias", "entropy", 0.3, "off", 2),
    ],
)
def test_an_engine_over_kernels_gives_what_the_reference_gives(
    shallow_models, family, kv_fill, criterion, threshold, run_ahead, requests
):
    if torch.cuda.is_available():
        pytest.skip("compares with the reference on the CPU, in the interpreter")
    ours, theirs = (
        served(shallow_models[family], kernels, run_ahead, threshold, requests, kv_fill=kv_fill, criterion=criterion)
        for kernels in ("triton", "torch")
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert [token[:2] for token in mine] == [token[:2] for token in reference]
        torch.testing.assert_close(
            torch.tensor([token[2:] for token in mine]), torch.tensor([token[2:] for token in reference]),
            atol=2e-4, rtol=0,
        )  # fmt: skip
    assert len({depth for tokens in theirs for _, depth, *_ in tokens}) > 1


def test_graphs_give_what_the_reference_gives_whatever_they_were_captured_for(shallow_models, monkeypatch):
    """Graphs are stood for by what they would have captured, so this shows sizes and padding, not CUDA's part."""
    if torch.cuda.is_available():
        pytest.skip("there are graphs")
    replayed = set()  # room for rows of both kinds, and how many there were

    def capture(graphs, vector, ends):
        def replay(segment, size):
            replayed.add((*size, *vector[:2].tolist()))
            graphs._launch(segment, size, vector, ends)

        graphs._over = vector, ends
        for size in graphs.graphs():
            graphs._captured[size] = SimpleNamespace(replay=partial(replay, *size))

    monkeypatch.setattr(Graphs, "capture", capture)
    monkeypatch.setattr(fused, "FusedLayers", lambda machinery, _: FusedLayers(machinery, (6, 3)))
    exits = {"kv_fill": "project", "criterion": "margin", "requests": 2}
    ours, theirs = (served(shallow_models["qwen2"], kernels, "off", 0.1, **exits) for kernels in ("triton", "torch"))
    assert [[token[:2] for token in mine] for mine in ours] == [[token[:2] for token in each] for each in theirs]
    # Some had K/V-only rows behind room that was left, some none.
    assert any(there < rows and fills for rows, _, there, fills in replayed)
    assert any(there < rows and not fills for rows, _, there, fills in replayed)


def test_kernels_that_can_not_be_had_are_refused(models):
    with pytest.raises(ValueError, match="choose one of auto, torch, native, triton"):
        LLM(models["llama"], kernels="cuda", profile="nominal")
    with pytest.raises(ValueError, match="no float64"):
        LLM(models["llama"], kernels="triton", dtype="float64", profile="nominal")


def test_the_fields_of_a_vector_do_not_overlap():
    room = Room(full=5, fill=2, tiles=4, parts=3, evaluated=3)
    vector = np.zeros(room.size, dtype=np.int32)
    for number, view in enumerate(room.views(vector).values(), 1):
        assert (view == 0).all()
        view[...] = number
