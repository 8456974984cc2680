"""How tokens are drawn, when a request stops, and how its text is put together."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import COMMON

from drex import EarlyExit, SamplingParams
from drex.compute.head_output import HeadOutput
from drex.compute.noise import gumbel
from drex.compute.sampler import Judgement, TorchReductions
from drex.config import ExitRule
from drex.control.hashing import GOLDEN, MIX, mix, uniform
from drex.control.plan import Draws, Evaluations, Verdicts
from drex.control.request import Request
from drex.engine.detokenizer import Detokenizer
from drex.engine.metrics import Metrics
from drex.llm import LLM

CPU = torch.device("cpu")
PROMPT = [11, 7, 23, 7, 60, 3]
ATOL = 1e-4


# A slow reference, in plain Python, for one token


def slow_logits(logits, params, history, prompt_length, banned=()):
    """Penalties, bias and bans, by their definitions."""
    logits = [float(value) for value in logits]
    for token in set(history):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    output = list(history[prompt_length:])
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in banned:
        logits[token] = -math.inf
    return logits


def slow_support(logits, params):
    """Scaled logits of the tokens that may be drawn: min_p, then top_k, then top_p."""
    scaled = {token: value / params.temperature for token, value in enumerate(logits)}
    best = max(scaled.values())
    weight = {token: math.exp(value - best) for token, value in scaled.items()}
    ranked = sorted((t for t in scaled if weight[t] >= params.min_p), key=lambda t: -scaled[t])
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, mass, kept = sum(weight[token] for token in ranked), 0.0, []
    for token in ranked:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += weight[token] / total
    return {token: scaled[token] for token in kept}


def slow_token(logits, params, history, prompt_length, seed, sample=0, banned=()):
    logits = slow_logits(logits, params, history, prompt_length, banned)
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda token: logits[token])
    noise = gumbel(mix(seed, sample, len(history) - 1), len(logits), CPU)[0].tolist()
    support = slow_support(logits, params)
    return max(support, key=lambda token: support[token] + noise[token])


class Asked(NamedTuple):
    """One evaluation."""

    position: int
    draws: Draws
    banned: tuple[int, ...]


def tokens(logits, asked):
    """What is drawn for each of the evaluations."""
    logits = torch.as_tensor(logits)
    none = torch.zeros(len(logits), 1)
    rows = np.arange(len(asked))
    evaluations = Evaluations(
        rows=rows,
        positions=np.array([each.position for each in asked]),
        thresholds=np.full(len(asked), np.nan),
        draws=[each.draws for each in asked],
        agreeing=np.zeros((2, len(asked)), dtype=np.int64),
        banned={row: each.banned for row, each in enumerate(asked) if each.banned},
        targets={},
    )
    head = HeadOutput(logits, none, none, 0, True, None)
    return Judgement(head, evaluations, TorchReductions()).verdicts().tokens.tolist()


def evaluation(params, history=(0,), prompt_length=1, seed=0, sample=0, banned=()):
    draws = Draws("", ExitRule("max_prob", ()), params, seed, sample, list(history), prompt_length)
    return Asked(len(history) - 1, draws, banned)


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": -1},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 0.1, "temperature": 0.5},
    {"top_k": 7, "top_p": 0.7, "temperature": 1.7},
    {"top_k": 20, "min_p": 0.05, "top_p": 0.8},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"presence_penalty": 1.5, "temperature": 0.0},
    {"frequency_penalty": -0.8, "presence_penalty": 0.5},
    {"logit_bias": {3: 4.0, 5: -100.0}},
    {"logit_bias": {8: 2.0}, "repetition_penalty": 1.3, "frequency_penalty": 1.0, "top_p": 0.9, "temperature": 0.8},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_tokens_equal_the_slow_reference(dtype):
    """All settings in one batch, so that a row that reads its neighbour's settings is found out."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    evaluations, expected = [], []
    logits = 3 * torch.randn(12 * len(SETTINGS), 40, generator=generator, dtype=dtype)
    for row, settings in zip(logits, SETTINGS * 12, strict=True):
        params = SamplingParams(**settings)
        history = [rng.randrange(12) for _ in range(rng.randrange(4, 20))]
        facts = {"history": history, "prompt_length": 3, "seed": rng.getrandbits(63), "sample": rng.randrange(3)}
        facts["banned"] = tuple(rng.sample(range(40), rng.choice((0, 0, 5))))
        evaluations.append(evaluation(params, **facts))
        expected.append(slow_token(row.tolist(), params, **facts))
    assert tokens(logits, evaluations) == expected
    assert len(set(expected)) > 20


@pytest.mark.parametrize(
    ("settings", "logits", "expected"),
    [
        # The history is prompt [0, 0], output [1, 1, 2].
        ({"repetition_penalty": 2.0}, [3.0, -1.0, 1.0, 1.4], [1.5, -2.0, 0.5, 1.4]),
        ({"repetition_penalty": 0.5}, [3.0, -1.0, 1.0, 1.4], [6.0, -0.5, 2.0, 1.4]),
        ({"presence_penalty": 0.75}, [3.0, -1.0, 1.0, 1.4], [3.0, -1.75, 0.25, 1.4]),
        ({"frequency_penalty": 0.75}, [3.0, -1.0, 1.0, 1.4], [3.0, -2.5, 0.25, 1.4]),
        ({"presence_penalty": -1.0, "frequency_penalty": 0.25}, [3.0, -1.0, 1.0, 1.4], [3.0, -0.5, 1.75, 1.4]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0}, [3.0, -1.0, 1.0, 1.4], [1.5, -3.0, -0.5, 1.4]),
        ({"logit_bias": {0: -2.5, 3: 0.5}}, [3.0, -1.0, 1.0, 1.4], [0.5, -1.0, 1.0, 1.9]),
    ],
)
def test_penalties_by_hand(settings, logits, expected):
    """Differences between the adjusted logits are found as the bias on each token at which it wins the argmax."""
    history = [0, 0, 1, 1, 2]
    bias = settings.pop("logit_bias", {})
    for token in range(4):
        gap = max(v for t, v in enumerate(expected) if t != token) - expected[token]
        for extra, wins in ((gap + 0.01, True), (gap - 0.01, False)):
            params = SamplingParams(temperature=0, logit_bias={**bias, token: bias.get(token, 0.0) + extra}, **settings)
            [drawn] = tokens([logits], [evaluation(params, history, prompt_length=2)])
            assert (drawn == token) == wins


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_do_not_see_what_stands_behind_the_row(penalty):
    """Under run-ahead a request has tentative tokens beyond the row that a head is asked about."""
    logits = [1.0, 1.2, 3.0, 2.9]
    params = SamplingParams(temperature=0, **{penalty: 2.0})
    draws = Draws("", ExitRule("max_prob", ()), params, 0, 0, [0, 1, 2, 2], 1)
    assert tokens([logits], [Asked(1, draws, ())]) == [2]
    # The last row has said both, and the penalty is on its most likely token then.
    assert tokens([logits], [Asked(3, draws, ())]) == [3]


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy", "state"])
def test_a_confidence_that_just_reaches_its_threshold_exits(criterion):
    def judged(threshold):
        draws = Draws("", ExitRule(criterion, (threshold,)), SamplingParams(temperature=0), 0, 0, [0, 1], 1)
        none = np.zeros((2, 1), dtype=np.int64)
        asked = Evaluations(np.zeros(1, int), np.ones(1, int), np.array([threshold]), [draws], none, {}, {})
        hidden, before = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
        head = HeadOutput(torch.tensor([[0.3, 1.1, 0.2]]), hidden, before, 0, False, None)
        return Judgement(head, asked, TorchReductions()).verdicts()

    [confidence] = judged(0.5).confidences.tolist()
    assert 0 < confidence < 1
    assert judged(confidence).exited.tolist() == [True]
    assert judged(np.nextafter(confidence, 1)).exited.tolist() == [False]


def test_agreeing_exits_reach_a_threshold_of_one(models):
    """Confidence by patience is exactly 1 as soon as enough exits agree: the first one, where one is enough."""
    exits = EarlyExit(layers=[2, 4], thresholds=1.0, criterion="patience", patience=1)
    llm = LLM(models["llama"], early_exit=exits, dtype="float64")
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert [token.exit_layer for token in output.outputs[0].tokens] == [6] + [2] * 7
    assert llm.engine.metrics.involuntary_exits == llm.engine.metrics.involuntary_stays == 0
    assert dict(llm.engine.metrics.reached) == {0: 7}


def test_a_tiny_temperature_is_greedy():
    """Scaled logits overflow there; the most likely token must still win, not the first that overflowed."""
    logits = torch.tensor([[5.0, 8.0, 7.0, -3.0]])
    for temperature in (1e-3, 1e-20, 1e-38, 1e-40, 1e-300):
        for truncation in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}):
            params = SamplingParams(temperature=temperature, **truncation)
            assert tokens(logits, [evaluation(params)]) == [1], (temperature, truncation)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3, "temperature": 1.3}],
    ids=str,
)
def test_frequencies_are_those_of_the_distribution(settings):
    params, draws = SamplingParams(**settings), 4000
    logits = [1.0, 0.2, -0.5, 2.0, 0.0, -3.0, 1.3, 0.9]
    rows = torch.tensor([logits], dtype=torch.float64).expand(draws, -1)
    found = tokens(rows, [evaluation(params, history=[0] * (i + 1), seed=5) for i in range(draws)])
    counts = [found.count(token) for token in range(len(logits))]
    support = slow_support(logits, params)
    total = sum(map(math.exp, support.values()))
    for token, count in enumerate(counts):
        p = math.exp(support[token]) / total if token in support else 0.0
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p)), token


# Noise


def kolmogorov_smirnov(values):
    """sqrt(n) times the largest distance from the uniform distribution; above 1.95 in one of a thousand samples."""
    ordered = values.flatten().double().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = max((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
    return float(distance) * math.sqrt(len(ordered))


def test_noise_is_uniform_and_independent():
    """Over tokens, positions, samples and seeds, each alone and beside its neighbour."""
    keys = {
        "positions": mix(0, 0, range(300)),
        "samples": mix(0, range(300), 9),
        "seeds": mix(range(300), 0, 9),
    }
    for name, some in keys.items():
        noise = gumbel(some, 400, CPU)
        u = torch.exp(-torch.exp(-noise))
        assert 0 < u.min() < u.max() < 1
        assert kolmogorov_smirnov(u) < 1.95, name
        for neighbour in (u[1:] - u[:-1], u[:, 1:] - u[:, :-1]):
            # Of two independent uniform numbers, the difference modulo 1 is uniform too.
            assert kolmogorov_smirnov(neighbour.remainder(1)) < 1.95, name
        assert abs(float(noise.mean()) - 0.5772) < 0.02
        assert abs(float(noise.var()) - math.pi**2 / 6) < 0.04
    assert kolmogorov_smirnov(torch.from_numpy(uniform(1, 2, range(5000)))) < 1.95


def test_noise_depends_on_each_of_its_inputs_and_on_nothing_else():
    base = gumbel(mix(1, 2, 3), 50, CPU)
    assert torch.equal(base, gumbel(mix([9, 1], [9, 2], np.array([9, 3])), 70, CPU)[1:, :50])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 3, 2)):
        assert not torch.isclose(base, gumbel(mix(*other), 50, CPU)).any()


def test_noise_is_made_of_the_published_outputs_of_splitmix64():
    """Those of seed 1234567, one a token: a seed means the same tokens in any version, and in Triton's kernel."""
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    expected = [-math.log(-math.log(((output >> 12) + 0.5) / 2**52)) for output in outputs]
    [noise] = gumbel(np.array([1234567], dtype=np.uint64), len(outputs), CPU).tolist()
    assert noise == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bits", [0, 2**64 - 1], ids=["lowest", "highest"])
def test_noise_is_finite_at_its_extremes(bits):
    """The keys that give the first token the lowest and the highest number, by inverting the mixing function."""
    state = bits
    for shift, factor in reversed(MIX):
        state = mixed = state * pow(factor, -1, 2**64) % 2**64
        for _ in range(64 // shift):
            state = mixed ^ (state >> shift)
    assert gumbel(np.array([(state - GOLDEN) % 2**64], dtype=np.uint64), 3, CPU).isfinite().all()


# Sampling through the engine


@pytest.fixture(scope="module")
def sampler(models):
    return LLM(models["llama"], early_exit=EarlyExit(layers=[2, 4], thresholds=2.0), dtype="float64")


@pytest.mark.parametrize("exits", [False, True], ids=["full-depth", "at-the-exit"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 4, "frequency_penalty": 0.7, "presence_penalty": 0.3, "logit_bias": {20: 1.0}},
        {"min_p": 0.1, "n": 3, "min_tokens": 8},
    ],
    ids=str,
)
def test_generated_tokens_equal_the_slow_reference(models, plain_model, settings, exits):
    """The noise is given by (seed, sample, position), and the rest by what transformers computes there."""
    rule = EarlyExit(layers=[2, 4], thresholds=[2.0, 0.0 if exits else 2.0])
    llm = LLM(models["llama"], early_exit=rule, dtype="float64", max_num_batched_tokens=4)
    params = SamplingParams(seed=42, max_tokens=10, ignore_eos=True, **settings)
    model = plain_model(models["llama"], torch.float64)
    [output] = llm.generate([PROMPT], params)
    layers = []
    for sample in output.outputs:
        ids = [*PROMPT, *sample.token_ids]
        with torch.inference_mode():
            plain = model(torch.tensor([ids]), output_hidden_states=True)
            at_exit = model.lm_head(model.model.norm(plain.hidden_states[4]))[0]
        for number, token in enumerate(sample.tokens):
            position = len(PROMPT) - 1 + number
            row = (at_exit if token.exit_layer == 4 else plain.logits[0])[position]
            banned = (1,) if number < params.min_tokens else ()
            history = ids[: position + 1]
            assert token.id == slow_token(row.tolist(), params, history, len(PROMPT), 42, sample.index, banned)
            # Log-probability and confidence are of the distribution before all of these settings.
            assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.id]), abs=ATOL)
            assert token.confidence == pytest.approx(float(row.softmax(-1).max()), abs=ATOL)
        layers.extend(token.exit_layer for token in sample.tokens)
    assert len(layers) == 10 * params.n
    assert layers.count(4) >= (5 * params.n if exits else 0)
    assert exits or set(layers) == {6}


def test_a_row_whose_argmax_is_changed_does_not_exit(models):
    llm = LLM(models["llama"], early_exit=EarlyExit(layers=[2], thresholds=0.0), dtype="float32")
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [plain] = llm.generate(PROMPT, greedy)
    assert [token.exit_layer for token in plain.outputs[0].tokens] == [6] + [2] * 7
    unused = next(token for token in range(97) if token not in plain.outputs[0].token_ids)
    for bias, depth in (({unused: 100.0}, 6), ({unused: -100.0}, 2)):
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias=bias)
        [biased] = llm.generate(PROMPT, params)
        assert [token.exit_layer for token in biased.outputs[0].tokens] == [6] + [depth] * 7
        assert (biased.outputs[0].token_ids == [unused] * 8) == (depth == 6)


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_in_any_order(models, sampler):
    prompts = [PROMPT, PROMPT, [5, 6], [90] * 12, [8]]
    params = [SamplingParams(seed=s, max_tokens=9, ignore_eos=True, temperature=1.5) for s in (1, 2, 3, 1, -7)]
    alone = [sampler.generate([p], s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    batched = [output.outputs[0].token_ids for output in sampler.generate(prompts, params)]
    backwards = [output.outputs[0].token_ids for output in sampler.generate(prompts[::-1], params[::-1])]
    assert alone == batched == backwards[::-1]
    assert len(set(map(tuple, alone))) == len(prompts)
    small = LLM(
        models["llama"],
        early_exit=EarlyExit(layers=[2, 4], thresholds=2.0),
        dtype="float64",
        max_num_batched_tokens=3,
        kv_cache_tokens=22,
    )
    assert [output.outputs[0].token_ids for output in small.generate(prompts, params)] == alone
    assert small.engine.scheduler.admission.preemptions > 0


def test_samples_differ_and_do_not_depend_on_how_many_there_are(sampler):
    def samples(n):
        params = SamplingParams(n=n, seed=6, max_tokens=8, ignore_eos=True)
        [output] = sampler.generate([PROMPT], params)
        assert [sample.index for sample in output.outputs] == list(range(n))
        return [sample.token_ids for sample in output.outputs]

    four = samples(4)
    assert len(set(map(tuple, four))) == 4
    assert samples(2) == four[:2]
    assert samples(1) == four[:1]


def test_without_a_seed_each_request_draws_its_own(sampler):
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=2.0)
    outputs = [
        o.outputs[0].token_ids for o in (*sampler.generate([PROMPT] * 2, params), *sampler.generate([PROMPT], params))
    ]
    assert len(set(map(tuple, outputs))) == 3


def test_one_set_of_params_a_prompt(sampler):
    outputs = sampler.generate([[5], [6]], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3, n=2)])
    assert [[len(sample.tokens) for sample in output.outputs] for output in outputs] == [[2], [3, 3]]


def test_logit_bias_forces_and_forbids(sampler):
    forced = SamplingParams(temperature=2.0, seed=0, max_tokens=6, logit_bias={42: 100.0})
    assert sampler.generate(PROMPT, forced)[0].outputs[0].token_ids == [42] * 6
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    likely = sampler.generate(PROMPT, greedy)[0].outputs[0].token_ids
    forbidden = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias=dict.fromkeys(likely, -100))
    assert not set(likely) & set(sampler.generate(PROMPT, forbidden)[0].outputs[0].token_ids)


# Where a request ends

EOS = COMMON["eos_token_id"]


@pytest.mark.parametrize(
    ("settings", "count", "last", "reason", "stop_reason"),
    [
        ({}, 1, EOS, "stop", None),
        ({"ignore_eos": True}, 12, EOS, "length", None),
        ({"ignore_eos": True, "max_tokens": 1}, 1, EOS, "length", None),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, 1, EOS, "stop", EOS),
        ({"min_tokens": 5}, 6, EOS, "stop", None),
        ({"min_tokens": 12}, 12, 42, "length", None),
        ({"min_tokens": 5, "stop_token_ids": [42, 9]}, 6, EOS, "stop", None),
        ({"min_tokens": 5, "stop_token_ids": [EOS, 9]}, 6, EOS, "stop", EOS),
        ({"stop_token_ids": [42], "logit_bias": {EOS: -100, 42: 100}}, 1, 42, "stop", 42),
        ({"stop_token_ids": [9], "logit_bias": {EOS: -100, 42: 100}}, 12, 42, "length", None),
        ({"logit_bias": {EOS: -100, 42: 100}, "max_tokens": 3}, 3, 42, "length", None),
    ],
    ids=str,
)
def test_stop_tokens_and_lengths(sampler, settings, count, last, reason, stop_reason):
    """The end token is forced, and token 42 where that one may not come."""
    defaults = {"max_tokens": 12, "temperature": 1.0, "seed": 1, "logit_bias": {EOS: 100.0, 42: 50.0}}
    [output] = sampler.generate(PROMPT, SamplingParams(**{**defaults, **settings}))
    done = output.outputs[0]
    assert (len(done.tokens), done.token_ids[-1]) == (count, last)
    assert (done.finish_reason, done.stop_reason) == (reason, stop_reason)
    banned = {EOS, *settings.get("stop_token_ids", ())} if settings.get("min_tokens") else set()
    assert not banned & set(done.token_ids[: settings.get("min_tokens", 0)])


def test_output_ends_with_max_model_len(models):
    llm = LLM(models["llama"], early_exit=EarlyExit(layers=[3], thresholds=0.0), max_model_len=16)
    [output] = llm.generate([list(range(2, 12))], SamplingParams(max_tokens=100, min_tokens=50, ignore_eos=True))
    assert len(output.outputs[0].tokens) == 6
    assert output.outputs[0].finish_reason == "length"


# Log-probabilities


def test_logprobs_are_raw_and_sorted_and_name_the_right_tokens(models, plain_logprobs):
    llm = LLM(models["qwen2"], early_exit=EarlyExit.off(), dtype="float32")
    params = SamplingParams(
        temperature=1.8,
        top_k=40,
        repetition_penalty=1.2,
        logit_bias={5: 3.0},
        seed=3,
        max_tokens=12,
        ignore_eos=True,
        logprobs=4,
    )
    tokens = llm.generate(PROMPT, params)[0].outputs[0].tokens
    expected = plain_logprobs(models["qwen2"], [*PROMPT, *(token.id for token in tokens)])[len(PROMPT) - 1 : -1]
    outside = 0
    for token, row in zip(tokens, expected, strict=True):
        best = row.topk(4)
        assert token.logprob == pytest.approx(float(row[token.id]), abs=ATOL)
        assert [t for t, _ in token.top_logprobs] == best.indices.tolist()
        assert [v for _, v in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=ATOL)
        outside += token.id not in best.indices.tolist()
    assert outside, "a token outside of its own top list has its log-probability all the same"


@pytest.mark.parametrize("count", [None, 0, 1, 20])
def test_as_many_logprobs_as_asked_for(sampler, count):
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=count, prompt_logprobs=count)
    [output] = sampler.generate(PROMPT, params)
    assert [len(token.top_logprobs) for token in output.outputs[0].tokens] == [count or 0] * 3
    if count is None:
        assert output.prompt_logprobs is None
    else:
        assert [len(token.top_logprobs) for token in output.prompt_logprobs[1:]] == [count] * (len(PROMPT) - 1)


@pytest.mark.parametrize("kv_fill", ["recompute", "mask"])
def test_prompt_logprobs_are_those_of_full_depth(models, plain_logprobs, kv_fill):
    """Whatever the exits and the sampling settings are; in chunks, after preemptions, and with several samples."""
    llm = LLM(
        models["mistral"],
        early_exit=EarlyExit(layers=[2, 4], thresholds=0.0, kv_fill=kv_fill),
        dtype="float32",
        max_num_batched_tokens=4,
        kv_cache_tokens=40,
    )
    prompts = [list(range(2, 20)), PROMPT * 2, [4, 9]]
    params = SamplingParams(n=2, seed=0, max_tokens=12, ignore_eos=True, prompt_logprobs=3, logit_bias={7: 5.0})
    outputs = llm.generate(prompts, params)
    assert llm.engine.scheduler.admission.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = plain_logprobs(models["mistral"], prompt)[:-1]
        assert output.prompt_logprobs[0] is None
        for target, token, row in zip(prompt[1:], output.prompt_logprobs[1:], expected, strict=True):
            best = row.topk(3)
            assert (token.id, token.exit_layer) == (target, 6)
            assert token.logprob == pytest.approx(float(row[target]), abs=ATOL)
            assert [t for t, _ in token.top_logprobs] == best.indices.tolist()
            assert [v for _, v in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=ATOL)


# Text

TEXT = "the cat sat on the mat; 東京 🙂 naïve the end"


@pytest.fixture
def speak(text_model):
    """A function (ids) -> an LLM whose passes give these tokens as the output, whatever the prompt is."""
    llm = LLM(text_model, policy="full", dtype="float32")

    def scripted(ids):
        def start(batch):
            asked = batch.evaluations
            said = [ids[p + 1 - d.prompt_length] for p, d in zip(asked.positions, asked.draws, strict=True)]
            ones = np.ones(len(said))
            agreeing = np.ones((2, len(said)), dtype=np.int64)
            return Verdicts(np.array(said), -ones, ones, ones < 0, agreeing, {}, ones > 0)

        llm.engine.executor.runner.start = start
        llm.engine.executor.runner.finish = lambda verdicts: verdicts
        return llm

    return scripted


def stream_texts(llm, params):
    """The text shown so far after each chunk, and the last chunk."""
    shown, texts, chunk = "", [], None
    for chunk in llm.stream([1, 2], params):
        shown += chunk.text
        texts.append(shown)
    return texts, chunk


@pytest.mark.parametrize(
    ("stop", "text", "hit"),
    [
        ("on the", "the cat sat ", "on the"),
        (["mat; 東"], "the cat sat on the ", "mat; 東"),
        (["🙂"], "the cat sat on the mat; 東京 ", "🙂"),
        (["ï"], "the cat sat on the mat; 東京 🙂 na", "ï"),
        (["mat", "sat"], "the cat ", "sat"),
        (["a"], "the c", "a"),
        (["the"], "", "the"),
        (["the end"], "the cat sat on the mat; 東京 🙂 naïve ", "the end"),
        (["sat on a", "cat sat!", "the mat, "], TEXT, None),
        (["the end of"], TEXT, None),
    ],
    ids=[
        "tokens",
        "mixed",
        "emoji",
        "letter",
        "earliest",
        "in-token",
        "at-once",
        "at-end",
        "near-misses",
        "unfinished",
    ],
)
@pytest.mark.parametrize("include", [False, True], ids=["cut", "include"])
def test_stop_strings(speak, tokenizer, stop, text, hit, include):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > 25
    llm = speak(ids)
    params = SamplingParams(max_tokens=len(ids), stop=stop, include_stop_str_in_output=include)
    done = llm.generate([1, 2], params)[0].outputs[0]
    whole = text + (hit or "" if include else "")
    assert done.text == whole
    assert (done.finish_reason, done.stop_reason) == (("stop", hit) if hit else ("length", None))
    # It ends with the token that completes the stop string, not later.
    if hit:
        assert hit in tokenizer.decode(done.token_ids)
        assert hit not in tokenizer.decode(done.token_ids[:-1])
    texts, last = stream_texts(llm, params)
    assert texts[-1] == whole
    assert all(whole.startswith(shown) for shown in texts)
    assert last.finish_reason == done.finish_reason
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.pool.in_use == 0


def test_text_is_streamed_as_soon_as_it_cannot_become_a_stop_string(speak, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    stop = "cat sat up"
    texts, _ = stream_texts(speak(ids), SamplingParams(max_tokens=len(ids), stop=stop))
    whole = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))]
    for number, (shown, known) in enumerate(zip(texts, whole, strict=True)):
        held = next(n for n in range(len(stop), -1, -1) if known.endswith(stop[:n]))
        assert shown == (TEXT if number == len(ids) - 1 else known[: len(known) - held])


def slow_stop(pieces, stops, min_tokens, include):
    """(text, tokens, stop string): the first stop string, from min_tokens on, that a piece completes."""
    text = ""
    for number, piece in enumerate(pieces, 1):
        before, text = len(text), text + piece
        ends = [(at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
        ends = [(at, stop) for at, stop in ends if at + len(stop) > before]
        if ends and number >= min_tokens:
            at, stop = min(ends)
            return text[: at + (len(stop) if include else 0)], number, stop
    return text, len(pieces), None


@pytest.mark.parametrize("min_tokens", [0, 3, 7])
def test_stop_strings_equal_a_slow_search(tokenizer, min_tokens):
    """Short strings over few letters overlap in every way; one that is complete before min_tokens does not count."""
    rng = random.Random(min_tokens)
    stopped = 0
    for _ in range(600):
        text = "".join(rng.choice("ab;") for _ in range(rng.randrange(1, 14)))
        ids = [tokenizer.convert_tokens_to_ids(letter) for letter in text]
        stops = tuple(
            "".join(rng.choice("ab;") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        )
        include = rng.random() < 0.5
        detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include)
        count, shown = 0, ""
        for count, token in enumerate(ids, 1):
            detokenizer.push(token, may_stop=count >= min_tokens)
            if detokenizer.stopped_at is not None:
                break
            shown += detokenizer.show(finished=False)
        detokenizer.finish()
        shown += detokenizer.show(finished=True)
        expected = slow_stop(text, stops, min_tokens, include)
        assert (detokenizer.text, count, detokenizer.stopped_at) == expected, (text, stops, include)
        assert shown == detokenizer.text
        stopped += detokenizer.stopped_at is not None
    assert stopped > 100


@pytest.mark.parametrize("overlapping", [False, True])
def test_what_comes_behind_a_stop_string_leaves_the_record_too(text_model, tokenizer, overlapping):
    """Under run-ahead several tokens come at once, and more while the next pass runs."""
    llm = LLM(text_model, early_exit=EarlyExit(layers=[2, 4], thresholds=0.0), dtype="float64", run_ahead="lossless")
    llm.engine.executor.asynchronous = overlapping
    surplus, counted = 0, 0
    take = Request.take

    def counting(self, record):
        nonlocal surplus
        surplus += 1
        take(self, record)

    for seed in range(27):
        plain = SamplingParams(temperature=0.9, max_tokens=24, seed=seed, ignore_eos=True)
        text = llm.generate([PROMPT], plain)[0].outputs[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        [request] = llm.inputs.requests(PROMPT, replace(plain, stop=[stop]))
        llm.engine.add(request)
        llm.engine.metrics, wholes = Metrics(), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Request, "take", counting)
            while llm.engine.busy:
                wholes += [whole for _, _, whole in llm.engine.step() if whole is not None]
        [whole] = wholes
        assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
        assert llm.engine.metrics.tokens == len(whole.tokens)
        assert request.num_output == len(request.records) == len(whole.tokens)
        assert request.tokens[len(PROMPT) :] == whole.token_ids
        assert len(request.depths) == len(request.tokens) - 1
        counted += len(whole.tokens)
    assert surplus > counted, "no token came behind a stop string: the test shows nothing"


def test_min_tokens_holds_stop_strings_back(speak, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids[:1]) == "the", "the first stop string is complete with the first token"
    done = speak(ids).generate([1, 2], SamplingParams(max_tokens=len(ids), stop="the", min_tokens=2))[0].outputs[0]
    assert (done.text, done.stop_reason) == ("the cat sat on ", "the")


def test_end_token_or_stop_string_whichever_comes_first(speak, tokenizer):
    """And special tokens are text only where that is asked for."""
    ids = [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id, *tokenizer(" sat")["input_ids"]]
    llm = speak(ids)

    def done(**settings):
        output = llm.generate([1, 2], SamplingParams(max_tokens=len(ids), **settings))[0].outputs[0]
        return output.text, output.finish_reason, output.stop_reason

    assert done(stop="sat") == ("the cat", "stop", None)
    assert done(stop="sat", ignore_eos=True) == ("the cat ", "stop", "sat")
    assert done(ignore_eos=True) == ("the cat sat", "length", None)
    assert done(ignore_eos=True, skip_special_tokens=False) == ("the cat<|endoftext|> sat", "length", None)
    assert done(skip_special_tokens=False) == ("the cat", "stop", None)
    shown = done(skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown == ("the cat<|endoftext|>", "stop", None)


def test_characters_are_never_split(speak, tokenizer):
    text = "🙂東京naïve👩‍👩‍👧日本 ok"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) + 5
    params = SamplingParams(max_tokens=len(ids))
    chunks = list(speak(ids).stream([1, 2], params))
    assert len(chunks) == len(ids)
    for chunk in chunks:
        assert "\ufffd" not in chunk.text
        assert [token.text for token in chunk.tokens] == [chunk.text]
    assert "".join(chunk.text for chunk in chunks) == text


def test_a_character_that_is_cut_off_ends_as_the_full_decode_has_it(speak, tokenizer):
    ids = tokenizer("the 🙂")["input_ids"][:-1]
    llm = speak(ids)
    done = llm.generate([1, 2], SamplingParams(max_tokens=len(ids)))[0].outputs[0]
    assert done.text == tokenizer.decode(ids) == "the " + "\ufffd"
    assert "".join(token.text for token in done.tokens) == done.text
    assert stream_texts(llm, SamplingParams(max_tokens=len(ids)))[0][-1] == done.text


@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_of_any_tokens_make_up_the_full_decode(tokenizer, skip_special):
    """Random bytes are mostly no characters at all; ids beyond the tokeniser's are no text."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer) + 5) for _ in range(rng.randrange(1, 40))]
        detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        pieces = [detokenizer.push(token) for token in ids]
        pieces.append(detokenizer.finish())
        assert "".join(pieces) == detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip_special)


# Calls


@pytest.fixture
def talker(text_model):
    return LLM(text_model, early_exit=EarlyExit(layers=[2], thresholds=0.1), dtype="float64", max_num_batched_tokens=6)


def test_chat_prompts_by_the_template(talker, tokenizer):
    one = [{"role": "user", "content": "the cat"}]
    two = [*one, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
    params = SamplingParams(temperature=0, max_tokens=4)
    [first] = talker.chat(one, params)
    assert tokenizer.decode(first.prompt_token_ids) == "[user]the cat\n[assistant]"
    both = talker.chat([one, two], params)
    assert tokenizer.decode(both[1].prompt_token_ids) == "[user]the cat\n[assistant]sat\n[user]on\n[assistant]"
    assert both[0].outputs[0].token_ids == first.outputs[0].token_ids
    assert first.outputs[0].token_ids == talker.generate("[user]the cat\n[assistant]", params)[0].outputs[0].token_ids


def test_text_prompts_are_tokenised_and_decoded(talker, tokenizer):
    [output] = talker.generate("the cat", SamplingParams(seed=1, max_tokens=10, ignore_eos=True))
    assert output.prompt == "the cat"
    assert list(output.prompt_token_ids) == tokenizer("the cat")["input_ids"]
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)


def idle(llm):
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    return (
        not llm.engine.busy
        and not scheduler.admission.running
        and not scheduler.admission.waiting
        and scheduler.pool.in_use == 0
    )


def test_a_stream_concatenates_to_what_generate_gives(talker):
    params = SamplingParams(n=3, seed=5, max_tokens=14, stop=["a", "東"], ignore_eos=True)
    samples = talker.generate("the cat", params)[0].outputs
    chunks = list(talker.stream("the cat", params))
    assert sum(len(chunk.tokens) for chunk in chunks) == sum(len(sample.tokens) for sample in samples)
    for sample in samples:
        own = [chunk for chunk in chunks if chunk.index == sample.index]
        assert "".join(chunk.text for chunk in own) == sample.text
        streamed = [token for chunk in own for token in chunk.tokens]
        # Other rows may have shared the passes this time: in float32 the last digits are not promised.
        for got, wanted in zip(streamed, sample.tokens, strict=True):
            assert (got.id, got.text, got.exit_layer) == (wanted.id, wanted.text, wanted.exit_layer)
            assert (got.logprob, got.confidence) == pytest.approx((wanted.logprob, wanted.confidence), abs=1e-5)
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [sample.finish_reason]
    assert idle(talker)


def test_a_stream_of_several_prompts_says_whose_each_chunk_is(talker):
    prompts, params = ["the cat", "the dog sat", "on"], SamplingParams(n=2, seed=5, max_tokens=6, ignore_eos=True)
    chunks = list(talker.stream(prompts, params))
    for number, output in enumerate(talker.generate(prompts, params)):
        for sample in output.outputs:
            own = [chunk for chunk in chunks if (chunk.prompt_index, chunk.index) == (number, sample.index)]
            assert "".join(chunk.text for chunk in own) == sample.text
            assert [token.id for chunk in own for token in chunk.tokens] == sample.token_ids
    assert idle(talker)


def test_leaving_a_stream_early_frees_everything(talker):
    chunks = talker.stream("the cat", SamplingParams(n=2, max_tokens=30, ignore_eos=True))
    for _ in range(5):
        next(chunks)
    assert not idle(talker)
    chunks.close()
    assert idle(talker)


def test_streams_side_by_side_each_get_their_own(talker, monkeypatch):
    params = SamplingParams(seed=5, max_tokens=6, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in talker.generate(["the cat", "the dog"], params)]
    step, steps = talker.engine.step, iter(range(200))

    def bounded():
        assert next(steps, None) is not None, "a stream waits for ever"
        return step()

    monkeypatch.setattr(talker.engine, "step", bounded)
    streams = [talker.stream(prompt, params) for prompt in ("the cat", "the dog")]
    got = [[next(stream).tokens[0].id] for stream in streams]
    for ids, stream in zip(got, streams, strict=True):
        ids.extend(token.id for chunk in stream for token in chunk.tokens)
    assert got == expected
    assert idle(talker)


def test_a_space_that_the_tokeniser_drops_at_the_start_stays_after_a_prompt() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "▁sat": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    detokenizer = Detokenizer(metaspace, prompt=[0, 1])
    assert detokenizer.push(2) == " sat"
    assert Detokenizer(metaspace).push(2) == "sat"
