"""How `drex generate` writes what it generates: JSON lines, or text coloured by exit depth on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from drex.outputs import ExitStats, TokenOutput

DEPTH_COLOURS = ("green", "yellow", "cyan", "magenta", "blue")
"""Of the exits, first to last; tokens of full depth keep the terminal's own colour."""


@dataclass
class Job:
    """One prompt and what has come of it; `error` is why it can't be served."""

    prompt: str | list[int]
    prompt_tokens: int = 0
    error: str | None = None
    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)
    finish_reason: str | None = None
    seconds: float = 0.0


class JsonWriter:
    """One object a prompt."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def progress(self, job: Job) -> None:
        """JSON is written when a prompt is done."""

    def finish(self, job: Job) -> None:
        sys.stdout.write(json.dumps(self._object(job)) + "\n")
        sys.stdout.flush()

    def _object(self, job: Job) -> dict[str, Any]:
        if job.error is not None:
            return {"prompt": job.prompt, "error": job.error}
        stats = ExitStats.of(job.tokens, self._num_layers)
        return {
            "prompt": job.prompt,
            "text": job.text,
            "finish_reason": job.finish_reason,
            "tokens": [
                {
                    "id": token.id,
                    "text": token.text,
                    "logprob": token.logprob,
                    "exit_layer": token.exit_layer,
                    "confidence": token.confidence,
                }
                for token in job.tokens
            ],
            "usage": {
                "prompt_tokens": job.prompt_tokens,
                "completion_tokens": stats.tokens,
                "mean_depth": stats.mean_depth,
                "exits": {str(layer): count for layer, count in stats.exits.items()},
                "involuntary_exits": stats.involuntary_exits,
                "involuntary_stays": stats.involuntary_stays,
                "tokens_per_s": stats.tokens / job.seconds if job.seconds else 0.0,
            },
        }


class TextWriter:
    """The text as it comes, coloured by exit depth on a terminal; several prompts one after the other."""

    def __init__(self, exits: Sequence[int], single: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._colours = {layer: DEPTH_COLOURS[min(i, len(DEPTH_COLOURS) - 1)] for i, layer in enumerate(exits)}
        self._single = single
        self._shown = 0
        self._tokens = 0
        self._begun = False

    def progress(self, job: Job) -> None:
        self._begin(job)
        while self._tokens < len(job.tokens) and self._shown < len(job.text):
            token = job.tokens[self._tokens]
            # The text may end before the token does: a stop string was cut, or may be on its way.
            piece = job.text[self._shown : self._shown + len(token.text)]
            self._write(piece, self._colours.get(token.exit_layer))
            self._shown += len(piece)
            self._tokens += 1
            if len(piece) < len(token.text):
                break

    def finish(self, job: Job) -> None:
        self._begin(job)
        if job.error is not None:
            sys.stderr.write(f"drex: {job.error}\n")
        else:
            self.progress(job)
            self._write(job.text[self._shown :] + "\n", None)
        self._shown = self._tokens = 0
        self._begun = False

    def _begin(self, job: Job) -> None:
        if self._begun:
            return
        self._begun = True
        if not self._single:
            self._write(f"--- {str(job.prompt)[:70]!r}\n", "bright_black")
        elif isinstance(job.prompt, str) and self._console.is_terminal:
            self._write(job.prompt, "bright_black")

    def _write(self, text: str, colour: str | None) -> None:
        self._console.print(Text(text, style=Style(color=colour)), end="")
