"""What clients may send. The models are the OpenAPI schema, the checks of single fields, and what is not supported.

Types are strict, unknown fields are refused, and null is what leaving a field out is. Fields of OpenAI's or vLLM's that
drex does not have are known all the same: their no-op values are accepted, and anything else is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from drex.checkpoint import CRITERIA
from drex.config import SCHEDULES
from drex.request import MAX_LOGPROBS

INT64 = 2**63
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_SAMPLES = 32, 1000, 300, 128
"""What costs time for every token is bounded: stop strings and their length, biased tokens; and samples of a prompt."""
TOKEN_IDS = r"^[0-9]{1,9}$"

Int64 = Annotated[int, Field(ge=-INT64, lt=INT64)]
Count = Annotated[int, Field(ge=0, lt=INT64)]
Target = Annotated[float, Field(gt=0, lt=1e9)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenKey = Annotated[str, StringConstraints(pattern=TOKEN_IDS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[Count], Field(min_length=1)]
Never = Annotated[list[Any], Field(max_length=0)]
NothingIn = Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """No coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class EarlyExitOptions(Strict):
    """Early-exit settings of one request; what is left out is as the engine has it."""

    enabled: bool = Field(True, description="false: full depth for every token")
    layers: list[Count] | None = Field(None, description="exits that it may take, of those that the engine has")
    thresholds: float | list[float] | None = Field(None, description="one number, or one for each of its exits")
    criterion: Literal[CRITERIA] | None = None  # type: ignore[valid-type]
    schedule: Literal[SCHEDULES] | None = None  # type: ignore[valid-type]
    patience: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    min_layer: Count = Field(0, description="no exit before so many layers")
    kv_fill: str | None = Field(None, description="engine-wide: only what the engine has is accepted")
    score: bool = Field(False, description="echo scores the prompt with these exits, not at full depth")


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool | None = Field(None, description="a last chunk without choices that holds the usage")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far, in every chunk")


class Unsupported(Strict):
    """Known fields that drex does not have, with the values that ask for nothing."""

    tools: Never | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Never | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: NothingIn | None = None
    suffix: Literal[""] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Literal[1] | None = None
    prompt_logprobs: None = None
    prompt_embeds: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    cache_salt: None = None
    moderation: None = None
    truncate_prompt_tokens: None = None
    return_token_ids: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    kv_transfer_params: None = None
    media_io_kwargs: None = None
    mm_processor_kwargs: None = None
    vllm_xargs: None = None
    request_id: None = None
    spaces_between_special_tokens: Literal[True] | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None
    logits_processors: Never | None = None
    bad_words: Never | None = None
    allowed_token_ids: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None


class Generation(Unsupported):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="one of the served names; null: the only model there is")
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = Field(None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Int64 | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"a non-empty string of at most {MAX_STOP_LENGTH} characters, or up to {MAX_STOPS} of them"
    )
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_BIASES)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = Field(None, description="a newer name of user")
    early_exit: EarlyExitOptions | Literal[False] | None = Field(
        None, description="an object with early-exit settings, or false for full depth"
    )
    run_ahead: Literal["off", "trusted", "lossless"] | None = Field(
        None, description="draft on while waiting; lossless gives full depth's own tokens"
    )
    priority: Int64 | None = Field(None, description="smaller numbers are served first")
    ttft_ms: Target | None = Field(None, description="target for the first token, milliseconds")
    tpot_ms: Target | None = Field(None, description="target for the mean time of the tokens after it")
    itl_ms: Target | None = Field(None, description="target for every gap between two tokens")
    return_exit_layers: bool | None = Field(None, description="each token's exit layer and confidence")


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | list[str] | TokenIds | list[TokenIds] = Field(
        description="a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )
    echo: bool | None = Field(None, description="the prompt before the completion, with its log-probabilities")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = Field(None, description="only as many as n")
    add_special_tokens: Literal[True] | None = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(None, description="a string, or a list of text parts")
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Never | None = None
    tool_call_id: str | None = None
    annotations: Never | None = None


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    chat_template: None = None
    chat_template_kwargs: NothingIn | None = None
    documents: Never | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: a prompt, or messages under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="of a prompt; true unless said otherwise")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Count]


UNSUPPORTED = frozenset(Unsupported.model_fields)
"""Names whose errors say that the field is not supported."""
FORMS = {name: CompletionRequest.model_fields[name].description for name in ("prompt", "stop")}
"""What fields of several forms take."""
