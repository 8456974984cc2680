"""Which heads a pass evaluates, and what becomes of a row when its verdict is in."""

from __future__ import annotations

from drex.control.plan import Evaluation, Rows, Verdict
from drex.request import ExitCheck, Request, TokenRecord


def evaluations(request: Request, segment: int, full: Rows) -> list[Evaluation]:
    """Heads to evaluate at the end of a segment: those of rows not decided yet that may exit there, or end there."""
    final = segment == request.num_segments - 1
    out = [] if request.score_rule is None else _scored(request, segment, full, final)
    last, rows = len(request.tokens) - 1, full.positions
    if not rows or rows[-1] != last:
        return out
    threshold = None
    number = last + 1 - len(request.prompt)
    if not final and number:
        threshold = request.rule.threshold(segment, number, request.params.max_tokens)
    if final or threshold is not None:
        agreeing = request.row(last).agreeing
        out.append(Evaluation(len(rows) - 1, last, threshold, request.draws, agreeing, request.banned()))
    return out


def _scored(request: Request, segment: int, full: Rows, final: bool) -> list[Evaluation]:
    """Evaluations of prompt rows whose next token is known and is to be scored."""
    out = []
    rule, draws, length = request.score_rule, request.score_draws, len(request.prompt)
    assert rule is not None
    for row, position in enumerate(full.positions):
        if position < length - 1 and position not in request.prompt_records:
            threshold = None if final else rule.threshold(segment, position, length)
            if final or threshold is not None:
                agreeing, target = request.row(position).agreeing, request.tokens[position + 1]
                out.append(Evaluation(row, position, threshold, draws, agreeing, target=target))
    return out


def judge(request: Request, segment: int, evaluation: Evaluation, verdict: Verdict, exited: bool) -> bool:
    """Note a verdict, and whether the policy lets it exit, in the request's records; returns whether it is decided.

    The live row's token is appended; a scored row's token was known.
    """
    position = evaluation.position
    row = request.undecided[position]
    row.agreeing = verdict.agreeing
    if evaluation.threshold is not None:
        row.checks.append(ExitCheck(segment, verdict.confidence, evaluation.threshold))
    depth = segment + 1
    if not exited and depth < request.num_segments:
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
