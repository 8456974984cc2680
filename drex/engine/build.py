"""The one place where an engine is put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drex.config import EngineConfig
from drex.control.cost.model import CostModel
from drex.control.memory.slots import SlotLayout
from drex.control.policy.outlook import Solving
from drex.control.scheduler import Scheduler
from drex.engine.engine import Engine
from drex.engine.executor import Executor

if TYPE_CHECKING:  # virtual time needs none
    from transformers import PreTrainedTokenizerBase


def build_engine(
    config: EngineConfig,
    layout: SlotLayout,
    kv_fill: str,
    cost: CostModel,
    executor: Executor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    solving: Solving | None = None,
) -> Engine:
    """An engine without requests.

    Args:
        config: sizes and policy.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        cost: of passes; it learns from those that are run.
        executor: runs the passes, in real or in virtual time.
        tokenizer: for text; None leaves it empty.
        solving: where the optimum is computed; None: in place, which real time has to wait for.

    Raises:
        ValueError: an unknown policy, or parameters that it refuses.
    """
    return Engine(Scheduler(config, layout, kv_fill, cost, solving), executor, tokenizer)
