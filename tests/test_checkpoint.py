"""early_exit.json and what it resolves to; exit heads and criteria against computations by hand."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import COMMON
from safetensors.torch import save_file

from drex import EarlyExit, SamplingParams
from drex.config import ExitRule, resolve_exits
from drex.config.early_exit_json import EARLY_EXIT_FILE, EarlyExitFile, ExitSpec, read_early_exit, write_early_exit
from drex.llm import LLM

ATOL = 1e-4
HIDDEN, INNER, VOCAB = (COMMON[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
PROMPT = [11, 7, 23, 7, 60, 3]
RECORDED = EarlyExitFile(
    exits=(ExitSpec(2), ExitSpec(3, "norm", "own.safetensors"), ExitSpec(5)),
    criterion="margin",
    thresholds=(0.9, 0.8, 0.7),
    kv_fill="project",
)


# The file


@pytest.mark.parametrize(
    "facts",
    [
        EarlyExitFile((ExitSpec(1),), thresholds=(0.5,)),
        EarlyExitFile(
            exits=(ExitSpec(1), ExitSpec(3, "mlp", "a.safetensors"), ExitSpec(5, "linear", "b.safetensors")),
            criterion="entropy",
            thresholds=(0.0, 0.25, 3.0),
            kv_fill="alias",
            guarantee={"metric": "tokens", "tolerance": 0.05, "prompts": "sha256:00"},
        ),
    ],
    ids=["least", "everything"],
)
def test_what_is_written_is_read_back(tmp_path, facts):
    for spec in facts.exits:
        if spec.weights:
            (tmp_path / spec.weights).touch()
    write_early_exit(tmp_path, facts)
    assert read_early_exit(tmp_path, num_layers=6) == facts


def test_fields_left_out_have_defaults(tmp_path):
    assert read_early_exit(tmp_path, num_layers=6) is None
    content = {"version": 1, "exits": [{"layer": 2}, {"layer": 4}], "thresholds": [1, 0.5]}
    (tmp_path / EARLY_EXIT_FILE).write_text(json.dumps(content))
    facts = read_early_exit(tmp_path, num_layers=6)
    assert facts == EarlyExitFile((ExitSpec(2), ExitSpec(4)), "max_prob", (1.0, 0.5), "recompute", None)


# What an engine resolves it to


def test_without_a_file_and_without_a_wish_there_are_no_exits():
    for asked in (None, EarlyExit.off()):
        plan = resolve_exits(asked, None, 6)
        assert (plan.exits, plan.rule.thresholds, plan.kv_fill) == ((), (), "recompute")
    assert resolve_exits(EarlyExit.off(), RECORDED, 6).exits == ()


@pytest.mark.parametrize("asked", [None, EarlyExit()], ids=["none", "empty"])
def test_the_file_is_the_default(asked):
    plan = resolve_exits(asked, RECORDED, 6)
    assert plan.exits == RECORDED.exits
    assert plan.rule == ExitRule("margin", (0.9, 0.8, 0.7), "constant", 2)
    assert (plan.kv_fill, plan.layers) == ("project", (2, 3, 5))


@pytest.mark.parametrize(
    ("asked", "layers", "rule", "kv_fill"),
    [
        ({"thresholds": 0.4}, (2, 3, 5), ExitRule("margin", (0.4, 0.4, 0.4)), "project"),
        ({"thresholds": [0.1, 0.2, 0.3]}, (2, 3, 5), ExitRule("margin", (0.1, 0.2, 0.3)), "project"),
        ({"layers": [5]}, (5,), ExitRule("margin", (0.7,)), "project"),
        ({"layers": [2, 5]}, (2, 5), ExitRule("margin", (0.9, 0.7)), "project"),
        ({"layers": [3, 4], "thresholds": [0.2, 0.6]}, (3, 4), ExitRule("margin", (0.2, 0.6)), "project"),
        ({"min_layer": 3}, (2, 3, 5), ExitRule("margin", (None, 0.8, 0.7)), "project"),
        ({"criterion": "state", "kv_fill": "mask"}, (2, 3, 5), ExitRule("state", (0.9, 0.8, 0.7)), "mask"),
        (
            {"schedule": "calm_code", "patience": 4},
            (2, 3, 5),
            ExitRule("margin", (0.9, 0.8, 0.7), "calm_code", 4),
            "project",
        ),
    ],
    ids=str,
)
def test_wishes_override_the_file_field_by_field(asked, layers, rule, kv_fill):
    plan = resolve_exits(EarlyExit(**asked), RECORDED, 6)
    assert (plan.layers, plan.rule, plan.kv_fill) == (layers, rule, kv_fill)
    recorded = {spec.layer: spec for spec in RECORDED.exits}
    assert plan.exits == tuple(recorded.get(layer, ExitSpec(layer, "shared")) for layer in layers)


def test_without_a_file_exits_are_shared_heads():
    plan = resolve_exits(EarlyExit(layers=[1, 4], thresholds=0.8), None, 6)
    assert plan.exits == (ExitSpec(1), ExitSpec(4))
    assert plan.rule == ExitRule("max_prob", (0.8, 0.8))


@pytest.mark.parametrize(
    ("asked", "recorded", "message"),
    [
        (EarlyExit(thresholds=0.5), None, r"name them, as in EarlyExit\(layers="),
        (EarlyExit(layers=[]), RECORDED, "no exit points"),
        (EarlyExit(layers=[2]), None, "give one number"),
        (EarlyExit(layers=[2, 4]), RECORDED, "give one number"),
        (EarlyExit(layers=[2, 4], thresholds=[0.5]), None, "one for each of 2 exits"),
        (EarlyExit(thresholds=[0.5, 0.5]), RECORDED, "one for each of 3 exits"),
        (EarlyExit(layers=[99], thresholds=0.5), None, r"exits lie in 1\.\.5"),
        (EarlyExit(layers=[6], thresholds=0.5), None, r"exits lie in 1\.\.5"),
        (EarlyExit(layers=[0], thresholds=0.5), None, r"exits lie in 1\.\.5"),
        (EarlyExit(layers=[4, 2], thresholds=0.5), None, "ascending and distinct"),
        (EarlyExit(layers=[2, 2], thresholds=0.5), None, "ascending and distinct"),
    ],
)
def test_wishes_that_cannot_be_met(asked, recorded, message):
    with pytest.raises(ValueError, match=message):
        resolve_exits(asked, recorded, 6)


# What a request resolves it to


@pytest.mark.parametrize(
    ("request_asks", "thresholds"),
    [
        ({}, (0.9, 0.8, 0.7)),
        ({"enabled": False}, (None, None, None)),
        ({"layers": []}, (None, None, None)),
        ({"layers": [3]}, (None, 0.8, None)),
        ({"layers": [5, 2]}, (0.9, None, 0.7)),
        ({"thresholds": 0.3}, (0.3, 0.3, 0.3)),
        ({"thresholds": [0.1, 0.2, 0.3]}, (0.1, 0.2, 0.3)),
        ({"layers": [2, 5], "thresholds": [0.1, 0.3]}, (0.1, None, 0.3)),
        ({"layers": [5, 2], "thresholds": [0.3, 0.1]}, (0.1, None, 0.3)),
        ({"min_layer": 3}, (None, 0.8, 0.7)),
        ({"min_layer": 4, "thresholds": 0.5}, (None, None, 0.5)),
        ({"min_layer": 6}, (None, None, None)),
        ({"kv_fill": "project"}, (0.9, 0.8, 0.7)),
    ],
    ids=str,
)
def test_a_request_overrides_the_engine(request_asks, thresholds):
    plan = resolve_exits(None, RECORDED, 6)
    rule = plan.rule_for(EarlyExit(**request_asks))
    assert rule == ExitRule("margin", thresholds)
    assert rule.never == (thresholds == (None, None, None))
    assert plan.rule_for(None) is plan.rule


def test_a_request_overrides_how_confidence_is_measured():
    plan = resolve_exits(EarlyExit(schedule="calm_code", patience=3), RECORDED, 6)
    assert plan.rule_for(EarlyExit(thresholds=0.5)) == ExitRule("margin", (0.5,) * 3, "calm_code", 3)
    asked = EarlyExit(criterion="patience", schedule="constant", patience=5)
    assert plan.rule_for(asked) == ExitRule("patience", (0.9, 0.8, 0.7), "constant", 5)


@pytest.mark.parametrize(
    ("request_asks", "message"),
    [
        ({"layers": [4]}, r"layers \[4\]: the engine has exits after layers \[2, 3, 5\]"),
        ({"layers": [2, 99]}, r"layers \[99\]: the engine has exits"),
        ({"kv_fill": "mask"}, "the engine serves 'project' for all requests; leave it out"),
        ({"thresholds": [0.5]}, "one for each of 3 exits"),
        ({"layers": [2, 3], "thresholds": [0.5, 0.5, 0.5]}, "one for each of 2 exits"),
    ],
    ids=str,
)
def test_requests_that_ask_for_what_the_engine_lacks(request_asks, message):
    with pytest.raises(ValueError, match=message):
        resolve_exits(None, RECORDED, 6).rule_for(EarlyExit(**request_asks))


def test_an_engine_without_exits_refuses_a_request_that_names_one():
    plan = resolve_exits(EarlyExit.off(), RECORDED, 6)
    assert plan.rule_for(EarlyExit(thresholds=0.5)).thresholds == ()
    with pytest.raises(ValueError, match="the engine has exits after layers"):
        plan.rule_for(EarlyExit(layers=[2]))


# Threshold schedules


@pytest.mark.parametrize("base", [0.0, 0.35, 0.9, 1.0])
def test_schedules_are_the_published_formulas(base):
    for output_index, max_tokens in ((0, 10), (1, 10), (5, 10), (9, 10), (3, 512)):
        decay = math.exp(-4 * output_index / max_tokens)
        for schedule, expected in (
            ("constant", base),
            ("calm_paper", min(1.0, max(0.0, 0.9 * base + 0.1 * decay))),
            ("calm_code", base * (0.9 + 0.1 * decay)),
        ):
            rule = ExitRule("max_prob", (None, base, 1.5), schedule)
            assert rule.threshold(1, output_index, max_tokens) == pytest.approx(expected, abs=1e-12)
            assert rule.threshold(0, output_index, max_tokens) is None
            assert rule.threshold(2, output_index, max_tokens) is None


@pytest.mark.parametrize("schedule", ["constant", "calm_paper", "calm_code"])
def test_the_engine_applies_the_schedule_by_output_position(models, schedule):
    exits = EarlyExit(layers=[2, 4], thresholds=[0.6, 0.2], schedule=schedule)
    llm = LLM(models["llama"], early_exit=exits, dtype="float32")
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    tokens = output.outputs[0].tokens
    assert tokens[0].checks == ()
    rule = ExitRule("max_prob", (0.6, 0.2), schedule)
    for number, token in enumerate(tokens[1:], 1):
        assert token.checks[0].exit_index == 0
        for check in token.checks:
            assert check.threshold == rule.threshold(check.exit_index, number, 9)
    assert len({check.threshold for token in tokens for check in token.checks}) > (2 if schedule != "constant" else 1)


# Heads and criteria


def random_weights(layer, kind, seed=0):
    """Tensors of one exit, by the names of docs/early_exit_json.md."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale):
        return scale * torch.randn(*shape, generator=generator)

    names = {"probe.weight": normal(2, HIDDEN, scale=0.3), "probe.bias": normal(2, scale=0.5)}
    if kind in ("norm", "mlp", "mlp_untied"):
        names["norm.weight"] = 1 + normal(HIDDEN, scale=0.3)
    if kind in ("linear", "mlp_untied"):
        names["head.weight"] = normal(VOCAB, HIDDEN, scale=0.4)
    if kind in ("mlp", "mlp_untied"):
        names["mlp.norm.weight"] = 1 + normal(HIDDEN, scale=0.3)
        names["mlp.gate_proj.weight"] = normal(INNER, HIDDEN, scale=0.3)
        names["mlp.up_proj.weight"] = normal(INNER, HIDDEN, scale=0.3)
        names["mlp.down_proj.weight"] = normal(HIDDEN, INNER, scale=0.3)
    return {f"exits.{layer}.{name}": tensor for name, tensor in names.items()}


def rms_norm(hidden, weight, eps=1e-6):
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@torch.inference_mode()
def logits_by_hand(kind, model, hidden, weights):
    """The table of drex.compute.heads, written out. Shapes: hidden (tokens, hidden) -> (tokens, vocab)."""
    w = {name.split(".", 2)[2]: tensor.double() for name, tensor in weights.items()}
    final_norm, lm_head = model.model.norm.weight, model.lm_head.weight
    if kind == "shared":
        return rms_norm(hidden, final_norm) @ lm_head.T
    if kind == "norm":
        return rms_norm(hidden, w["norm.weight"]) @ lm_head.T
    if kind == "linear":
        return rms_norm(hidden, final_norm) @ w["head.weight"].T
    normed = rms_norm(hidden, w["mlp.norm.weight"])
    gate = normed @ w["mlp.gate_proj.weight"].T
    inner = gate / (1 + (-gate).exp()) * (normed @ w["mlp.up_proj.weight"].T)
    hidden = hidden + inner @ w["mlp.down_proj.weight"].T
    return rms_norm(hidden, w["norm.weight"]) @ w.get("head.weight", lm_head).T


def confidence_by_hand(criterion, logits, before, hidden, weights):
    """One row. Shapes: logits (vocab,), before and hidden (hidden,)."""
    p = logits.softmax(-1)
    if criterion == "max_prob":
        return float(p.max())
    if criterion == "margin":
        first, second = p.sort(descending=True).values[:2].tolist()
        return first - second
    if criterion == "entropy":
        return 1 + float((p * p.log()).sum()) / math.log(VOCAB)
    if criterion == "state":
        return max(0.0, float(before @ hidden / (before.norm() * hidden.norm())))
    weight, bias = (next(t for n, t in weights.items() if n.endswith(f"probe.{part}")) for part in ("weight", "bias"))
    return float((weight.double() @ hidden + bias.double()).softmax(-1)[1])


@pytest.fixture
def checkpoint(models, tmp_path):
    """A function (kinds by layer, **facts) -> (folder with these exits, their weights by layer)."""

    def make(kinds, **facts):
        shutil.copytree(models["llama"], tmp_path / "model")
        weights, specs = {}, []
        for layer, kind in kinds.items():
            weights[layer] = random_weights(layer, kind, seed=layer)
            save_file(weights[layer], tmp_path / "model" / f"exit-{layer}.safetensors")
            specs.append(ExitSpec(layer, kind.removesuffix("_untied"), f"exit-{layer}.safetensors"))
        write_early_exit(tmp_path / "model", EarlyExitFile(tuple(specs), **facts))
        return tmp_path / "model", weights

    return make


@torch.inference_mode()
def hidden_states(plain_model, folder, output):
    """(model, states): states[e] is (tokens, hidden) after e layers, for each generated token the row that drew it."""
    model = plain_model(folder, torch.float64)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return model, [state[0, len(output.prompt_token_ids) - 1 : -1] for state in states]


@pytest.mark.parametrize("kind", ["shared", "norm", "linear", "mlp", "mlp_untied"])
@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy", "state", "probe"])
def test_heads_and_criteria_equal_a_computation_by_hand(checkpoint, plain_model, kind, criterion):
    folder, weights = checkpoint({4: kind}, criterion=criterion, thresholds=(0.0,))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=20)
    [output] = LLM(folder, dtype="float64", max_num_batched_tokens=4).generate([PROMPT], params)
    tokens = output.outputs[0].tokens
    assert [token.exit_layer for token in tokens] == [6] + [4] * 7
    model, states = hidden_states(plain_model, folder, output)
    logits = logits_by_hand(kind, model, states[4], weights[4])
    for number, token in enumerate(tokens[1:], 1):
        logprobs = logits[number].log_softmax(-1)
        best = logprobs.topk(20)
        assert token.id == int(best.indices[0])
        assert token.logprob == pytest.approx(float(best.values[0]), abs=ATOL)
        assert [t for t, _ in token.top_logprobs] == best.indices.tolist()
        assert [v for _, v in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=ATOL)
        expected = confidence_by_hand(criterion, logits[number], states[3][number], states[4][number], weights[4])
        assert token.confidence == token.checks[0].confidence == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("kind", ["shared", "norm", "linear", "mlp", "mlp_untied"])
def test_heads_in_float32_equal_a_computation_by_hand(checkpoint, plain_model, kind):
    folder, weights = checkpoint({4: kind}, criterion="max_prob", thresholds=(0.0,))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [output] = LLM(folder, dtype="float32", max_num_batched_tokens=4).generate([PROMPT], params)
    model, states = hidden_states(plain_model, folder, output)
    logits = logits_by_hand(kind, model, states[4], weights[4])
    for number, token in enumerate(output.outputs[0].tokens[1:], 1):
        assert token.exit_layer == 4
        assert token.logprob == pytest.approx(float(logits[number].log_softmax(-1)[token.id]), abs=1e-3)


@pytest.mark.parametrize("criterion", ["max_prob", "probe"])
def test_each_exit_has_its_own_head_and_threshold(checkpoint, plain_model, criterion):
    """A token exits at the first exit whose confidence, computed by hand, reaches that exit's threshold."""
    kinds, thresholds = {2: "mlp", 3: "linear", 5: "norm"}, {2: 0.7, 3: 0.55, 5: 0.4}
    folder, weights = checkpoint(kinds, criterion=criterion, thresholds=tuple(thresholds.values()))
    params = SamplingParams(seed=1, max_tokens=25, ignore_eos=True)
    [output] = LLM(folder, dtype="float64").generate([PROMPT], params)
    model, states = hidden_states(plain_model, folder, output)
    logits = {layer: logits_by_hand(kind, model, states[layer], weights[layer]) for layer, kind in kinds.items()}
    depths = []
    for number, token in enumerate(output.outputs[0].tokens[1:], 1):
        expected, exit_layer = [], 6
        for layer, threshold in thresholds.items():
            states_there = states[layer - 1][number], states[layer][number]
            expected.append(confidence_by_hand(criterion, logits[layer][number], *states_there, weights[layer]))
            if expected[-1] >= threshold:
                exit_layer = layer
                break
        assert token.exit_layer == exit_layer
        assert [check.confidence for check in token.checks] == pytest.approx(expected, abs=ATOL)
        assert [check.threshold for check in token.checks] == list(thresholds.values())[: len(expected)]
        depths.append(exit_layer)
    assert len(set(depths)) >= 3, "the thresholds above are to spread the tokens over the exits"


def test_patience_counts_exits_in_a_row_that_agree(models, plain_model):
    """Confidence is the length of the run of equal argmaxes, this exit's included, over the patience."""
    exits = EarlyExit(layers=[1, 2, 3, 4, 5], thresholds=1.0, criterion="patience", patience=2)
    llm = LLM(models["llama"], early_exit=exits, dtype="float64")
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    model, states = hidden_states(plain_model, models["llama"], output)
    best = {layer: logits_by_hand("shared", model, states[layer], {}).argmax(-1).tolist() for layer in range(1, 6)}
    depths = []
    for number, token in enumerate(output.outputs[0].tokens[1:], 1):
        agree = [layer for layer in range(2, 6) if best[layer][number] == best[layer - 1][number]]
        assert token.exit_layer == min(agree, default=6)
        assert [check.confidence for check in token.checks] == [0.5] * len(token.checks[:-1]) + [1.0 if agree else 0.5]
        depths.append(token.exit_layer)
    assert len(set(depths)) >= 3


def test_a_subset_of_the_recorded_exits_keeps_its_heads(checkpoint):
    folder, _ = checkpoint({2: "norm", 4: "linear"}, thresholds=(0.3, 0.0))
    llm = LLM(folder, early_exit=EarlyExit(layers=[3, 4], thresholds=0.0), dtype="float32")
    assert [head.kind for head, _ in llm.model.heads] == ["shared", "linear"]
    assert LLM(folder, policy="full").model.heads == ()
    assert LLM(folder, early_exit=EarlyExit.off()).model.layout.lengths == (6,)
