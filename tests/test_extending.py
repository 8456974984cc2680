"""Criteria and policies of users: found by name, checked before work begins, and served like drex's own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from drex import LLM, EarlyExit, SamplingParams, extensions, register_criterion, register_policy
from drex.compute.criteria import Criterion, MaxProb
from drex.config import EngineConfig, EngineOptions
from drex.control.policy.base import Setting, Split
from drex.control.policy.rebatching import Drex
from drex.errors import SettingError
from drex.extensions import CRITERIA, POLICIES

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/extending.md").read_text(), re.S)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.fixture(autouse=True)
def forget_registered() -> Iterator[None]:
    """Each test registers under names of its own choice."""
    before = {id(each): dict(each._classes) for each in (CRITERIA, POLICIES)}
    yield
    for each in (CRITERIA, POLICIES):
        each._classes = before[id(each)]
    extensions._entry_points.cache_clear()


@dataclass(frozen=True)
class TopMass(Criterion):
    """Probability of the `count` most likely tokens: from a column of its own."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}: give at least 1")

    def columns(self, head: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        most = logits.topk(self.count, dim=-1).values.logsumexp(-1)
        return {f"top_{self.count}": most}

    def confidence(self, measured: Any, rows: Any, evaluations: Any) -> Any:
        found = measured.columns
        mass = torch.from_numpy(found[f"top_{self.count}"][rows] - found["log_sum_exp"][rows]).exp()
        return mass.numpy()


def generated(llm: LLM, params: SamplingParams | list[SamplingParams] = GREEDY) -> list[Any]:
    return [output.outputs[0].tokens for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def left(outputs: list[Any]) -> list[list[tuple[int, int]]]:
    """The tokens of each output, and the layers that each of them executed."""
    return [[(token.id, token.exit_layer) for token in tokens] for tokens in outputs]


def exits_by(criterion: str, **parameters: Any) -> EarlyExit:
    given = parameters or None
    return EarlyExit(layers=[2, 4], thresholds=0.3, criterion=criterion, criterion_parameters=given)


def test_the_examples_of_the_documentation_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        module = ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)
        exec(example, vars(module))
        assert capsys.readouterr().out.strip()


def test_a_criterion_with_a_column_of_its_own_decides_as_the_built_in_one_it_equals(
    models: dict[str, Path],
) -> None:
    register_criterion("top_mass", TopMass)
    plain = generated(LLM(models["llama"], dtype="float64", early_exit=exits_by("max_prob")))
    ours = generated(LLM(models["llama"], dtype="float64", early_exit=exits_by("top_mass", count=1)))
    assert left(ours) == left(plain)
    assert len({token.exit_layer for tokens in ours for token in tokens}) > 1


def test_requests_with_other_parameters_share_passes_and_keep_their_own(models: dict[str, Path]) -> None:
    register_criterion("top_mass", TopMass)
    llm = LLM(models["llama"], dtype="float64", early_exit=exits_by("top_mass", count=1))
    each = [
        SamplingParams(
            temperature=0.0,
            max_tokens=12,
            ignore_eos=True,
            early_exit=EarlyExit(criterion="top_mass", criterion_parameters={"count": 1 + 3 * number}),
        )
        for number in range(len(PROMPTS))
    ]
    together = generated(llm, each)
    alone = [
        llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].tokens
        for prompt, params in zip(PROMPTS, each, strict=True)
    ]
    assert left(together) == left(alone)
    assert [[t.confidence for t in tokens] for tokens in together] == [
        pytest.approx([t.confidence for t in tokens], abs=1e-12) for tokens in alone
    ]


def test_what_a_criterion_can_not_have_is_refused_before_work_begins() -> None:
    @dataclass(frozen=True)
    class Greedy(MaxProb):
        needs = frozenset({"third"})

    with pytest.raises(ValueError, match="needs third: heads measure second, mean, cosine"):
        register_criterion("greedy_one", Greedy)
    with pytest.raises(ValueError, match="'max_prob' is taken"):
        register_criterion("max_prob", TopMass)
    with pytest.raises(ValueError, match="letters, digits"):
        register_criterion("top mass", TopMass)
    register_criterion("top_mass", TopMass)
    register_criterion("top_mass", TopMass)  # again is no other
    with pytest.raises(SettingError, match="'top_mass' has no parameter size: it takes count"):
        LLM(early_exit=exits_by("top_mass", size=2))
    with pytest.raises(ValueError, match="count is 0: give at least 1"):
        LLM(early_exit=exits_by("top_mass", count=0))
    with pytest.raises(SettingError, match="'max_prob' has no parameter count: it takes none"):
        LLM(early_exit=exits_by("max_prob", count=2))
    with pytest.raises(SettingError, match=r"criterion 'other': choose one of max_prob, .*, trace, top_mass"):
        exits_by("other")


def test_a_policy_with_parameters_gives_the_tokens_of_every_other(models: dict[str, Path]) -> None:
    class DeepFirst(Drex):
        def __init__(self, setting: Setting, *, passes: int = 3) -> None:
            super().__init__(setting)
            if passes < 1:
                raise ValueError(f"passes is {passes}: give at least 1")
            self.passes, self.asked = passes, 0

        def choose(self, view: Any) -> Any:
            self.asked += 1
            return Split.choose(self, view) if self.asked % self.passes else super().choose(view)

    register_policy("deep_first", DeepFirst)
    exits = exits_by("max_prob")
    plain = LLM(models["llama"], dtype="float64", early_exit=exits)
    ours = LLM(models["llama"], dtype="float64", early_exit=exits, policy="deep_first", policy_parameters={"passes": 2})
    assert left(generated(ours)) == left(generated(plain))
    policy = ours.engine.scheduler.policy
    assert isinstance(policy, DeepFirst)
    assert policy.passes == 2
    assert policy.asked > 10
    with pytest.raises(SettingError, match="policy 'deep_first' has no parameter rounds: it takes passes") as refused:
        EngineOptions(policy="deep_first", policy_parameters={"rounds": 2})
    assert refused.value.field == "policy_parameters"
    with pytest.raises(ValueError, match="passes is 0"):
        LLM(models["llama"], early_exit=exits, policy="deep_first", policy_parameters={"passes": 0})
    with pytest.raises(SettingError, match="choose one of drex, split, full") as unknown:
        EngineConfig(64, 4, 64, 64, policy="rounds")
    assert unknown.value.field == "policy"


def test_packages_name_theirs_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        found = {
            "drex.criteria": [("their_mass", "test_extending:TopMass"), ("gone", "no_such_package:Gone")],
            "drex.policies": [("theirs", "drex.control.policy.base:Split")],
        }
        return [metadata.EntryPoint(name, value, group) for name, value in found[group]]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    extensions._entry_points.cache_clear()
    assert CRITERIA.make("their_mass", {"count": 3}).count == 3
    assert POLICIES.get("theirs") is Split
    with pytest.raises(ValueError, match="criterion 'gone' can't be imported from no_such_package:Gone"):
        CRITERIA.get("gone")
