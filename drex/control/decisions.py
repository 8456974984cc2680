"""Which heads a pass evaluates, and what becomes of a row when its verdict is in."""

from __future__ import annotations

from collections.abc import Iterator

from drex.config import ExitRule
from drex.control.plan import Evaluation, Rows, Verdict
from drex.request import ExitCheck, Request, TokenRecord, Undecided


def evaluations(request: Request, segment: int, full: Rows) -> Iterator[Evaluation]:
    """Heads to evaluate at the end of a segment: those of rows not decided yet that may exit there, or end there."""
    final = segment == request.num_segments - 1
    if request.score_rule is not None:
        for row, position in enumerate(full.positions.tolist()):
            if position < len(request.prompt) - 1 and position not in request.prompt_records:
                threshold = None if final else request.score_rule.threshold(segment, position, len(request.prompt))
                if final or threshold is not None:
                    target = request.tokens[position + 1]
                    yield _evaluation(request, row, position, threshold, request.score_rule, target)
    last = len(request.tokens) - 1
    if not len(full) or int(full.positions[-1]) != last:
        return
    threshold = None
    if not final and request.num_output:
        threshold = request.rule.threshold(segment, request.num_output, request.max_tokens)
    if final or threshold is not None:
        yield _evaluation(request, len(full) - 1, last, threshold, request.rule, None)


def _evaluation(
    request: Request, row: int, position: int, threshold: float | None, rule: ExitRule, target: int | None
) -> Evaluation:
    return Evaluation(
        row=row,
        position=position,
        threshold=threshold,
        rule=rule,
        agreeing=request.undecided.setdefault(position, Undecided()).agreeing,
        params=request.params,
        seed=request.seed,
        sample=request.sample,
        tokens=request.tokens,
        prompt_length=len(request.prompt),
        banned=request.banned() if target is None else (),
        target=target,
    )


def judge(request: Request, segment: int, evaluation: Evaluation, verdict: Verdict) -> bool:
    """Note a verdict in the request's records; returns whether the row is decided.

    The live row's token is appended; a scored row's token was known.
    """
    position = evaluation.position
    row = request.undecided[position]
    row.agreeing = verdict.agreeing
    if evaluation.threshold is not None:
        row.checks.append(ExitCheck(segment, verdict.confidence, evaluation.threshold))
    depth = segment + 1
    if not verdict.exited and depth < request.num_segments:
        return False
    checks = tuple(request.undecided.pop(position).checks)
    record = TokenRecord(verdict.token_id, verdict.logprob, depth, verdict.confidence, checks, verdict.top)
    if evaluation.target is not None:
        request.prompt_records[position] = record
        request.depths[position] = depth
    else:
        request.records.append(record)
        request.depths.append(depth)
        request.tokens.append(verdict.token_id)
    return True
