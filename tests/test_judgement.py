"""What a head's logits mean for rows of unlike requests side by side, and where a limit is met exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drex import SamplingParams
from drex.compute.head_output import HeadOutput
from drex.compute.sampler import Judgement, TorchReductions
from drex.config import ExitRule
from drex.control.plan import Draws, Evaluations, Verdicts


def draws(seed: int = 0, criterion: str = "max_prob", **params: Any) -> Draws:
    """A request whose prompt is token 0, and whose output so far is tokens 1 and 2."""
    asked = SamplingParams(**({"temperature": 0.0} | params))
    return Draws(f"r{seed}", ExitRule(criterion, (0.5,), patience=2), asked, seed, 0, [0, 1, 2], 1)


def judged(
    logits: list[list[float]],
    asked: list[Draws],
    *,
    positions: list[int] | None = None,
    threshold: float = 0.5,
    agreeing: np.ndarray | None = None,
    banned: dict[int, tuple[int, ...]] | None = None,
    targets: dict[int, int] | None = None,
) -> Verdicts:
    count = len(asked)
    evaluations = Evaluations(
        rows=np.arange(count),
        positions=np.array(positions or [2] * count),
        thresholds=np.full(count, threshold),
        draws=asked,
        agreeing=np.zeros((2, count), dtype=np.int64) if agreeing is None else agreeing,
        banned=banned or {},
        targets=targets or {},
    )
    none = torch.zeros(count, 1)
    return Judgement(
        HeadOutput(torch.tensor(logits), none, none, 0, False, None), evaluations, TorchReductions()
    ).verdicts()


LOGITS = [[0.1, 2.0, 1.0, 3.0, -1.0], [3.0, 0.5, 2.5, 1.5, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0.4, 0.3, 0.2, 0.1, 0.0]]


def test_each_row_reports_as_many_likely_tokens_as_it_asks_for_and_they_are_its_own() -> None:
    counts = [2, 20, None, 2]  # 20 are more than there are tokens
    found = judged(LOGITS, [draws(logprobs=count) for count in counts]).tops
    assert sorted(found) == [0, 1, 3]
    for row, top in found.items():
        logprobs = torch.tensor(LOGITS[row]).double().log_softmax(-1)
        order = logprobs.argsort(descending=True).tolist()[: counts[row]]
        assert [token for token, _ in top] == order
        assert [logprob for _, logprob in top] == pytest.approx(logprobs[order].tolist(), abs=1e-6)


def test_scored_rows_report_as_many_as_the_prompt_asks_for() -> None:
    asked = [draws(logprobs=1, prompt_logprobs=3)] * 2
    found = judged(LOGITS[:2], asked, targets={1: 4})
    assert [len(found.tops[row]) for row in (0, 1)] == [1, 3]
    assert found.tokens.tolist() == [3, 4]


def test_the_token_with_which_the_mass_is_full_is_the_last_that_top_p_keeps() -> None:
    """Four tokens have a quarter each, exactly; with .5, two of them stay."""
    rows = 200
    found = judged([[1.0] * 4] * rows, [draws(seed, temperature=1.0, top_p=0.5) for seed in range(rows)])
    assert set(found.tokens.tolist()) == {0, 1}


def test_a_token_just_as_likely_as_min_p_says_stays() -> None:
    rows = 200
    found = judged([[1.0, 1.0, 0.9]] * rows, [draws(seed, temperature=1.0, min_p=1.0) for seed in range(rows)])
    assert set(found.tokens.tolist()) == {0, 1}


def test_bans_are_of_their_own_row_whatever_rows_stand_before_it() -> None:
    asked = [draws(), draws(), draws(logit_bias={2: 0.1}), draws()]
    found = judged(LOGITS, asked, banned={1: (0, 2), 3: (0,)})
    assert found.tokens.tolist() == [3, 3, 4, 1]
    # A ban that changes the most likely token keeps its row from exiting.
    found = judged(LOGITS, asked, banned={1: (0,)}, threshold=0.0)
    assert found.exited.tolist() == [True, False, True, True]


def test_scored_rows_exit_by_what_the_head_says_and_not_by_how_tokens_are_drawn() -> None:
    """A penalty or bias that changes what would be drawn is nothing to a token that is given."""
    bias = draws(logit_bias={4: 90.0}, repetition_penalty=1.9)
    found = judged(LOGITS[:2], [bias, bias], targets={1: 2}, threshold=0.3)
    assert found.exited.tolist() == [False, True]
    assert found.tokens.tolist() == [4, 2]
    logprobs = torch.tensor(LOGITS[1]).double().log_softmax(-1)
    assert found.logprobs[1] == pytest.approx(float(logprobs[2]), abs=1e-6)


def test_noise_is_that_of_the_rows_own_position_among_rows_that_draw_none() -> None:
    logits = [[1.0, 1.1, 0.9, 1.05, 0.95]] * 4
    drawing = [draws(seed, temperature=1.0) for seed in range(12)]
    for first, second in zip(drawing[::2], drawing[1::2], strict=True):
        alone = [judged(logits[:1], [each], positions=[at]).tokens[0] for each, at in ((first, 1), (second, 2))]
        among = judged(logits, [draws(), first, draws(), second], positions=[0, 1, 0, 2]).tokens
        assert among.tolist() == [1, alone[0], 1, alone[1]]


def test_an_exit_agrees_with_those_before_it_only_if_there_were_some() -> None:
    """The most likely token is 3, which stands in the first row's column by chance."""
    logits, before = [LOGITS[0]] * 3, np.array([[3, 3, 1], [0, 1, 1]])
    found = judged(logits, [draws(criterion="patience")] * 3, agreeing=before, threshold=1.0)
    assert found.agreeing.tolist() == [[3, 3, 3], [1, 2, 1]]
    assert found.confidences.tolist() == [0.5, 1.0, 0.5]
    assert found.exited.tolist() == [False, True, False]
