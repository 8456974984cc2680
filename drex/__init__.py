"""drex: the serving engine for early-exit language models.

`LLM`, `SamplingParams`, `EarlyExit` and `RequestOutput` are the public API, `register_criterion` and `register_policy`
extend it. They are imported on first use, so that
control code and tools that need no torch can be imported without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drex.config import EarlyExit
from drex.extensions import register_criterion, register_policy
from drex.outputs import RequestOutput
from drex.sampling_params import SamplingParams

if TYPE_CHECKING:
    from drex.llm import LLM

__all__ = ["LLM", "EarlyExit", "RequestOutput", "SamplingParams", "register_criterion", "register_policy"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from drex.llm import LLM

        return LLM
    raise AttributeError(f"module 'drex' has no attribute {name!r}")
