"""`generation_config.json`: how a model's authors recommend to sample, as the defaults of requests that say nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drex.compute.config_file import read_json
from drex.compute.spec import end_tokens
from drex.sampling_params import SamplingParams

FILE = "generation_config.json"
AUTO, NONE = "auto", ("none", "vllm")
"""Choices beside a folder: the model's own file, or none of its defaults (the second name is vLLM's)."""
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The file's fields that are defaults, as in vLLM, and their names in `SamplingParams`."""
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "length_penalty"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("top_h", "watermarking_config"), ()),
}
"""Its fields that would change the text and that drex does not have, with the values that ask for nothing."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What a generation config says of requests that leave it open.

    Attributes:
        settings: of `SamplingParams`, by name.
        not_applied: fields that would change the text and that drex does not have.
        eos_token_ids: end tokens, where the file is in a folder that was named; None: those of the model hold.
        path: of the file; None: there is none, or it was not to be read.
    """

    settings: Mapping[str, float] = field(default_factory=dict)
    not_applied: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] | None = None
    path: Path | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """The settings that say how tokens are drawn, without the one that says how many there may be."""
        return {name: value for name, value in self.settings.items() if name != "max_tokens"}

    def describe(self, but: Collection[str] = ()) -> str:
        """The settings in one line, all but some, with how to do without them; empty where there are none."""
        said = ", ".join(f"{name} {value:g}" for name, value in self.settings.items() if name not in but)
        if not said:
            return ""
        return f"{self.path}: requests that don't say otherwise get {said}; generation_config none leaves that out"

    def announce(self, log: logging.Logger) -> None:
        """Say what of the file is applied, and warn of what is not."""
        if self.settings:
            log.info("%s", self.describe())
        if self.not_applied:
            log.warning("%s: not applied, since drex does not have it: %s", self.path, ", ".join(self.not_applied))


def read_generation_defaults(choice: str | Path, model: Path) -> GenerationDefaults:
    """Read the defaults of requests.

    Args:
        choice: `auto` (the model's own file, if it has one), `none`, or a folder that holds such a file.
        model: folder of the model.

    Raises:
        ValueError: no such file, or a value out of range; says what to do about it.
    """
    if str(choice) in NONE:
        return GenerationDefaults()
    path = (model if str(choice) == AUTO else Path(choice)) / FILE
    if not path.is_file():
        if str(choice) == AUTO:
            return GenerationDefaults()
        raise ValueError(
            f"generation_config {choice}: there is no {FILE}; name a folder that has one, or auto, or none"
        )
    content = read_json(path)
    settings = {}
    for theirs, ours in SETTINGS.items():
        value = content.get(theirs)
        if value is None:
            continue
        try:
            SamplingParams(**{ours: value})
        except ValueError as error:
            said = str(error).replace(ours, theirs, 1)
            raise ValueError(f"{path}: {said}; mend the file, or set generation_config to none") from error
        settings[ours] = value
    ends = end_tokens(content, path) if str(choice) != AUTO else frozenset()
    return GenerationDefaults(settings, _not_applied(content), ends or None, path)


def _not_applied(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that would change the text and that drex does not have."""
    given = {name: content.get(name) for name in NOT_APPLIED}
    return tuple(name for name, value in given.items() if value and value not in NOT_APPLIED[name])
