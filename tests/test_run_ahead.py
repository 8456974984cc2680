"""Run-ahead as users see it: the same text as without, the full-depth model's own when lossless, streams that hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drex import LLM, EarlyExit, SamplingParams
from drex.comparison.policy_names import policy_settings
from drex.comparison.runner import while_all_decode
from drex.comparison.simulate import Scenario
from drex.config import EngineConfig
from drex.control.cost.profile import Curve, Profile, SegmentCost
from drex.control.policy.base import Choice, View
from drex.control.policy.rebatching import Drex
from drex.control.scheduler import Scheduler
from drex.outputs import RequestOutput
from drex.sim.executor import RecordedConfidences
from drex.sim.workload import Job

PROMPTS = ["the cat", "on the mat; the", "dog", "the log. the cat sat", "sat", "o"]


def make(folder: Path, mode: str, **changes: Any) -> LLM:
    exits = EarlyExit(layers=[2, 4], thresholds=0.12, kv_fill="recompute")
    settings: dict[str, Any] = {"early_exit": exits, "dtype": "float64", "run_ahead": mode, "max_num_seqs": 4}
    return LLM(folder, **(settings | changes))


def params(**changes: Any) -> list[SamplingParams]:
    return [
        SamplingParams(seed=number, max_tokens=24, temperature=0.8 * (number % 2), **changes)
        for number in range(len(PROMPTS))
    ]


def said(outputs: list[RequestOutput]) -> list[tuple[str, list[int], str, int | str | None]]:
    samples = [output.outputs[0] for output in outputs]
    return [(sample.text, sample.token_ids, sample.finish_reason, sample.stop_reason) for sample in samples]


STOPS = [{}, {"stop": ["t", "at"]}, {"stop": ["s"], "min_tokens": 5}, {"frequency_penalty": 0.7, "stop": ["e "]}]


@pytest.mark.parametrize("changes", STOPS, ids=str)
def test_trusted_run_ahead_changes_nothing_that_is_said(text_model: Path, changes: dict[str, Any]) -> None:
    plain, ahead = make(text_model, "off"), make(text_model, "trusted")
    expected = said(plain.generate(PROMPTS, params(**changes)))
    assert said(ahead.generate(PROMPTS, params(**changes))) == expected
    drafts = ahead.engine.scheduler.drafts
    assert drafts.drafted > 20
    assert drafts.rolled_back > 0
    assert drafts.acceptance.report()["accepted"] > 0
    assert ahead.engine.scheduler.pool.in_use == 0


@pytest.mark.parametrize("changes", STOPS, ids=str)
def test_lossless_run_ahead_says_what_full_depth_says(text_model: Path, changes: dict[str, Any]) -> None:
    full = LLM(text_model, policy="full", dtype="float64")
    ahead = make(text_model, "lossless")
    outputs = ahead.generate(PROMPTS, params(**changes))
    assert said(outputs) == said(full.generate(PROMPTS, params(**changes)))
    assert ahead.engine.scheduler.drafts.drafted > 20
    stats = ahead.exit_stats(outputs)
    assert stats.mean_depth == 6
    assert stats.involuntary_stays == stats.involuntary_exits == 0


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_what_is_unchecked_runs_all_segments_at_once_and_is_what_full_depth_says(
    text_model: Path, fill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = LLM(text_model, policy="full", dtype="float64", max_num_seqs=4)
    llm = make(text_model, "off", early_exit=EarlyExit(layers=[2, 4], thresholds=0.12, kv_fill=fill))
    llm.engine.history = []
    monkeypatch.setattr(Drex, "resting", property(lambda self: True))
    monkeypatch.setattr(Drex, "_probes_next", property(lambda self: False))
    assert said(llm.generate(PROMPTS, params())) == said(full.generate(PROMPTS, params()))
    assert all(record.through for record in llm.engine.history)
    assert any(record.prompts for record in llm.engine.history)
    assert llm.engine.scheduler.pool.in_use == 0


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_behind_tokens_that_have_exited_all_segments_at_once_say_what_they_say_one_by_one(
    text_model: Path, fill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits, choose = EarlyExit(layers=[2, 4], thresholds=0.12, kv_fill=fill), Drex.choose
    rests = False

    def rest_by_token(self: Drex, view: View) -> Choice | None:
        nonlocal rests
        if not any(view.live):
            rests = self._asked % 8 >= 4
        return choose(self, view)

    monkeypatch.setattr(Drex, "choose", rest_by_token)
    monkeypatch.setattr(Drex, "resting", property(lambda _: rests))
    monkeypatch.setattr(Drex, "_probes_next", property(lambda _: False))
    found = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(Scheduler, "_goes_through", lambda *_: False)
        llm = make(text_model, "off", early_exit=exits)
        llm.engine.history = []
        # One request at a time, so that the same tokens are checked.
        found.append([llm.generate([prompt], each)[0] for prompt, each in zip(PROMPTS, params(), strict=True)])
        assert any(record.through for record in llm.engine.history) is at_once
        assert llm.engine.scheduler.pool.in_use == 0
    assert said(found[0]) == said(found[1])
    assert {token.exit_layer for output in found[0] for token in output.outputs[0].tokens} == {2, 4, 6}


def test_prompts_are_scored_while_exits_are_left_unchecked(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, llm = LLM(text_model, policy="full", dtype="float64"), make(text_model, "off")
    llm.engine.history = []
    monkeypatch.setattr(Drex, "resting", property(lambda self: True))
    asked = SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=0)
    for mine, theirs in zip(llm.generate(PROMPTS, asked), full.generate(PROMPTS, asked), strict=True):
        assert mine.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        logprobs = [[token.logprob for token in each.prompt_logprobs[1:]] for each in (mine, theirs)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-9)
    through = [record.through for record in llm.engine.history]
    assert not through[0]
    assert any(through), "a request whose prompt is scored decodes like others"


def test_lossless_text_is_full_depths_whenever_exits_are_left_unchecked(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, llm = LLM(text_model, policy="full", dtype="float64"), make(text_model, "lossless")
    llm.engine.history = []
    monkeypatch.setattr(Drex, "resting", property(lambda self: self._asked % 9 < 5))
    changes = {"stop": ["s"], "frequency_penalty": 0.7}
    assert said(llm.generate(PROMPTS, params(**changes))) == said(full.generate(PROMPTS, params(**changes)))
    assert llm.engine.scheduler.drafts.drafted > 5
    through = [record.through for record in llm.engine.history]
    assert 5 < sum(through) < len(through) - 5


def test_each_request_may_choose_its_own_mode(text_model: Path) -> None:
    llm, full = make(text_model, "off"), LLM(text_model, policy="full", dtype="float64")
    modes = ["lossless", "off", "trusted", "lossless", None, "trusted"]
    asked = [SamplingParams(seed=i, max_tokens=20, run_ahead=mode) for i, mode in enumerate(modes)]
    found = said(llm.generate(PROMPTS, asked))
    early = said(llm.generate(PROMPTS, [SamplingParams(seed=i, max_tokens=20) for i in range(len(PROMPTS))]))
    deep = said(full.generate(PROMPTS, [SamplingParams(seed=i, max_tokens=20) for i in range(len(PROMPTS))]))
    assert found == [deep[i] if mode == "lossless" else early[i] for i, mode in enumerate(modes)]


def test_a_stream_never_shows_what_is_taken_back(text_model: Path) -> None:
    llm = make(text_model, "trusted")
    asked = params(stop=["at"])
    whole = said(llm.generate(PROMPTS, asked))
    texts, tokens = [""] * len(PROMPTS), [[] for _ in PROMPTS]
    several = 0
    for chunk in llm.stream(PROMPTS, asked):
        texts[chunk.prompt_index] += chunk.text
        tokens[chunk.prompt_index].extend(token.id for token in chunk.tokens)
        several += len(chunk.tokens) > 1
    assert list(zip(texts, tokens, strict=True)) == [(text, ids) for text, ids, *_ in whole]
    assert several, "no chunk had more than one token: nothing was held"


def test_lossless_run_ahead_needs_exact_keys_and_values(text_model: Path) -> None:
    llm = make(text_model, "off", early_exit=EarlyExit(layers=[2, 4], thresholds=0.12, kv_fill="project"))
    with pytest.raises(ValueError, match="choose kv_fill 'recompute', or run_ahead 'trusted'"):
        llm.generate("the", SamplingParams(run_ahead="lossless"))
    with pytest.raises(ValueError, match="choose one of off, trusted, lossless"):
        SamplingParams(run_ahead="always")


def costs_by_the_row(accepted: float, threshold: float = 0.5) -> Scenario:
    """Costs grow with every row: a draft that is taken back is work for nothing, and each check a layer of four."""
    each = Curve((1.0, 64.0), (1e-3, 64e-3))
    layers = SegmentCost(Curve((1.0, 64.0), (2e-3, 128e-3)), each, 0.0, 0.0, 0.0)
    draw = np.random.default_rng(0)
    recorded = RecordedConfidences(draw.random((1, 4000)), draw.random((1, 4000)) < accepted)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    return Scenario(
        (2, 2), Profile((layers, layers)), (0.5,), "recompute", params, confidences=recorded, thresholds=(threshold,)
    )


@pytest.mark.parametrize(("count", "threshold"), [(1, 0.5), (2, 0.5), (4, 1.5)])
def test_where_lossless_drafts_do_not_pay_that_is_said_once(
    caplog: pytest.LogCaptureFixture, count: int, threshold: float
) -> None:
    """Also where so few rows are checked, or exit, that nothing was solved yet."""
    config = replace(EngineConfig(420, count, 512, count * 420), **policy_settings("drex+lossless"))
    scenario = costs_by_the_row(0.1, threshold)
    engine = scenario.engine(config.policy, config, count)
    for arrival, request in scenario.requests([Job(8, 400)] * count, engine.scheduler.segments, config.run_ahead):
        engine.add(request, arrival)
    while engine.scheduler.passes < 300:
        engine.step()
    assert [record.args[-1] for record in caplog.records if "does not pay" in record.message] == [count]


@pytest.mark.parametrize("accepted", [0.1, 1.0])
def test_adaptive_lossless_run_ahead_rests_where_it_earns_less_than_full_depth(accepted: float) -> None:
    scenario, rates = costs_by_the_row(accepted), {}
    for name in ("full", "drex+lossless", "drex+lossless+adaptive"):
        settings = policy_settings(name)
        config = replace(EngineConfig(820, 8, 512, 8 * 820), **settings)
        engine = scenario.engine(config.policy, config, 8)
        arrivals = scenario.requests([Job(8, 800)] * 8, engine.scheduler.segments, config.run_ahead)
        passes = while_all_decode(engine, arrivals, 8)
        rates[name] = sum(one.tokens for one in passes) / sum(one.seconds for one in passes)
        assert ("adaptive" in name) == (engine.scheduler.unchecked > 0)
    assert rates["drex+lossless"] < 0.9 * rates["full"]
    # The first passes find out what it earns, and one in 64 goes on to.
    assert rates["drex+lossless+adaptive"] > 0.95 * rates["full"]
