"""Teacher-forced quality of an early-exit model by threshold: what `drex evaluate` measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drex.config import EarlyExit, ExitPlan, per_exit
from drex.config.early_exit_json import Thresholds, write_early_exit
from drex.llm import LLM
from drex.outputs import Scored
from drex.progress import Progress
from drex.tuning.corpus import Blocks, Document, tokenize
from drex.tuning.early_exit_file import measured_exits


@dataclass(frozen=True)
class Quality:
    """Held-out measurements at one threshold, or one an exit point (None: full depth).

    Attributes:
        loss: nats a token.
        loss_ratio: loss over that of full depth.
        agreement: share of positions whose most likely token is full depth's.
        exit_share: share of positions that exited before the last layer.
        mean_depth: layers a position.
        exits: share of positions by layers executed.
    """

    threshold: Thresholds | None
    loss: float
    loss_ratio: float
    agreement: float
    exit_share: float
    mean_depth: float
    exits: dict[int, float]


def held_out_blocks(llm: LLM, documents: Sequence[Document], tokens: int) -> list[list[int]]:
    """Sequences of at most `max_model_len` tokens, about `tokens` in all, spread evenly over `documents`."""
    if llm.tokenizer is None:
        raise ValueError("the model has no tokeniser: evaluation starts from text")
    blocks = Blocks(tokenize(list(documents), llm.tokenizer), llm.config.max_model_len - 1)
    if not len(blocks):
        raise ValueError(f"too little text: less than {blocks.length} tokens; give more documents")
    count = min(len(blocks), max(1, tokens // blocks.length))
    numbers = [i * len(blocks) // count for i in range(count)]
    return [[int(token) for token in block] for block in blocks.batch(numbers)]


def evaluate(llm: LLM, sequences: Sequence[Sequence[int]], thresholds: Iterable[Thresholds]) -> list[Quality]:
    """Score `sequences` at full depth, then at each threshold under the fill that the engine serves.

    Args:
        llm: an engine with exit points.
        sequences: token ids, each of at least 2.
        thresholds: to measure one after the other, each for all exit points, or one an exit point.

    Returns:
        Full depth first, then in the order of `thresholds`.
    """
    layers, thresholds = llm.model.decoder.spec.num_layers, list(thresholds)
    with Progress("scoring", len(sequences) * (1 + len(thresholds))) as progress:
        full = llm.score(sequences, each=progress.advance)
        out = [_quality(None, full, full, layers)]
        for threshold in thresholds:
            scored = llm.score(sequences, early_exit=EarlyExit(thresholds=threshold), each=progress.advance)
            out.append(_quality(threshold, scored, full, layers))
    return out


def confidences(llm: LLM, sequences: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What each exit point says at each position, teacher-forced, and whether its token is full depth's.

    Args:
        llm: an engine with exit points.
        sequences: token ids, each of at least 2.

    Returns:
        For each sequence, `confidences` and `right`, lists an exit point, with an entry for every token but the first.
    """
    layers = llm.model.exits.layers
    with Progress("scoring", len(sequences) * (1 + len(layers))) as progress:
        full = llm.score(sequences, each=progress.advance)
        # A threshold of 0 lets everything out there.
        each = [EarlyExit(layers=[layer], thresholds=0.0) for layer in layers]
        alone = [llm.score(sequences, early_exit=exits, each=progress.advance) for exits in each]
    return [
        {
            "confidences": [[round(c, 4) for c in scored.confidences] for scored in exits],
            "right": [[int(a == b) for a, b in zip(scored.best, whole.best, strict=True)] for scored in exits],
        }
        for whole, *exits in zip(full, *alone, strict=True)
    ]


def _quality(threshold: Thresholds | None, scored: Sequence[Scored], full: Sequence[Scored], layers: int) -> Quality:
    depths = Counter(layer for each in scored for layer in each.exit_layers)
    total = sum(depths.values())
    loss = -sum(sum(each.logprobs) for each in scored) / total
    full_loss = -sum(sum(each.logprobs) for each in full) / total
    same = sum(
        a == b for ours, theirs in zip(scored, full, strict=True) for a, b in zip(ours.best, theirs.best, strict=True)
    )
    return Quality(
        threshold=threshold,
        loss=loss,
        loss_ratio=loss / full_loss,
        agreement=same / total,
        exit_share=1 - depths[layers] / total,
        mean_depth=sum(layer * count for layer, count in depths.items()) / total,
        exits={layer: depths[layer] / total for layer in sorted(depths)},
    )


def set_threshold(folder: Path, num_layers: int, measured: Sequence[Quality], within: float, plan: ExitPlan) -> Quality:
    """Write the lowest measured threshold whose loss is within `within` (a share) of full depth to early_exit.json.

    Args:
        folder: of the checkpoint; an early_exit.json is made where it has none.
        num_layers: of its decoder.
        measured: full depth and thresholds.
        within: share by which the loss may be higher.
        plan: exits, criterion and K/V fill that were measured.

    Raises:
        ValueError: no threshold is that good, or a folder that is not the user's own to change.
    """
    good = [q for q in measured if q.threshold is not None and q.loss_ratio <= 1 + within]
    if not good:
        raise ValueError(f"no threshold keeps the loss within {within:.1%} of full depth: measure higher thresholds")
    best = min(good, key=lambda q: q.threshold if isinstance(q.threshold, tuple) else (q.threshold or 0.0,))
    assert best.threshold is not None
    facts = measured_exits(folder, num_layers, plan)
    write_early_exit(folder, replace(facts, thresholds=per_exit(best.threshold, len(facts.exits))))
    return best
