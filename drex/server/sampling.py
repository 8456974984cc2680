"""From a body to sampling settings: the same objects, and so the same checks, as in Python."""

from __future__ import annotations

from drex.config import EarlyExit
from drex.inputs.generation_config import GenerationDefaults
from drex.sampling_params import SamplingParams
from drex.server.errors import ApiError
from drex.server.schema import NO_LIMIT, EarlyExitOptions, Generation

DIRECT = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "run_ahead", "priority", "ttft_ms", "tpot_ms", "itl_ms"),
)
"""Fields that are sampling settings of the same name."""


def sampling_params(
    body: Generation,
    defaults: GenerationDefaults,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Sampling settings of a request.

    Args:
        body: of the request.
        defaults: of the fields that it leaves open.
        max_tokens: at least 1.
        logprobs, prompt_logprobs: most likely tokens to report, for the output and for the prompt.

    Raises:
        ApiError: 400.
    """
    given = {name: getattr(body, name) for name in DIRECT}
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    try:
        return SamplingParams(
            **{**defaults.sampling, **{name: value for name, value in given.items() if value is not None}},
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=bias or None,
            early_exit=_early_exit(body.early_exit),
        )
    except ValueError as error:
        raise ApiError.of(error, list(type(body).model_fields)) from error


def _early_exit(options: EarlyExitOptions | bool | None) -> EarlyExit | None:
    if options is None:
        return None
    if isinstance(options, bool):
        return EarlyExit.off()
    try:
        return EarlyExit(**options.model_dump(exclude={"score"}))
    except ValueError as error:
        raise ApiError(400, f"early_exit: {error}", "early_exit") from error


def scores_exits(body: Generation) -> bool:
    """Whether an echoed prompt is to be scored under the request's exits."""
    return isinstance(body.early_exit, EarlyExitOptions) and body.early_exit.score


def wanted_tokens(body: Generation, field: str, most: int, default: int, least: int = 1) -> int:
    """Output tokens that a request asks for.

    Args:
        body: of the request.
        field: that holds the number; NO_LIMIT asks for as many as there is room for.
        most: tokens that a request may have.
        default: where the field is left out.
        least: smaller numbers are refused.

    Raises:
        ApiError: 400, a number that no prompt leaves room for, or one that is too small.
    """
    asked: int | None = getattr(body, field)
    if asked is None:
        return min(default, most)
    if asked == NO_LIMIT:
        return most
    if asked < least:
        raise ApiError(400, f"{field} is {asked}: give at least {least}, or {NO_LIMIT} for no limit", field)
    if asked > most:
        raise ApiError(400, f"{field} is {asked} and max_model_len is {most}, prompt included: ask for less", field)
    return asked


def check_stream_options(body: Generation) -> None:
    """Raise ApiError (400) for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options goes with stream: true", "stream_options")
