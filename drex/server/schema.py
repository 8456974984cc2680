"""What clients may send. The models are the OpenAPI schema, the checks of single fields, and what is not supported.

Types are strict, unknown fields are refused, and null is what leaving a field out is. Fields of OpenAI's or vLLM's that
drex does not have are known all the same. Those that can't change the answer are hints, accepted and without effect.
Of the others values that ask for nothing are accepted, and anything else is refused by name, with what to do instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

from drex.config import SCHEDULES
from drex.extensions import CRITERIA
from drex.sampling_params import MAX_LOGPROBS

INT64 = 2**63
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_SAMPLES = 32, 1000, 300, 128
"""What costs time for every token is bounded: stop strings and their length, biased tokens; and samples of a prompt."""
MAX_PROMPTS = 2**16
"""Of a body: more than any queue takes, and few enough to be looked at before they are counted against it."""
TOKEN_IDS = r"^[0-9]{1,9}$"
NO_LIMIT = -1
"""As `max_tokens`, from front ends: as many as there is room for."""
NOT_SUPPORTED = "not supported: "
"""Begins the descriptions of fields that drex does not have; what follows says what to do instead."""


def _yielding(value: Any) -> Any:
    """The value itself: where Python code runs between the elements of a long list, so can other threads."""
    return value


Yielding = BeforeValidator(_yielding)
Int64 = Annotated[int, Field(ge=-INT64, lt=INT64)]
Count = Annotated[int, Field(ge=0, lt=INT64)]
Target = Annotated[float, Field(gt=0, lt=1e9)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenKey = Annotated[str, StringConstraints(pattern=TOKEN_IDS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[Count], Field(min_length=1, fail_fast=True)]
"""Lists stop at their first error: one for each element of a large body takes minutes, and gigabytes."""
Limit = Annotated[int, Field(ge=NO_LIMIT, lt=INT64)]
Never = Annotated[list[Any], Field(max_length=0)]
Ignored = dict[str, Any]


class Strict(BaseModel):
    """No coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class EarlyExitOptions(Strict):
    """Early-exit settings of one request; what is left out is as the engine has it."""

    enabled: bool = Field(True, description="false: full depth for every token")
    layers: Annotated[list[Count], Field(fail_fast=True)] | None = Field(
        None, description="exits that it may take, of those that the engine has"
    )
    thresholds: float | Annotated[list[float], Field(fail_fast=True)] | None = Field(
        None, description="one number, or one for each of its exits"
    )
    criterion: Literal[CRITERIA.names()] | None = None  # type: ignore[valid-type]
    criterion_parameters: dict[str, Any] | None = Field(None, description="of the criterion, by name")
    schedule: Literal[SCHEDULES] | None = None  # type: ignore[valid-type]
    patience: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    min_layer: Count = Field(0, description="no exit before so many layers")
    kv_fill: str | None = Field(None, description="engine-wide: only what the engine has is accepted")
    score: bool = Field(False, description="echo scores the prompt with these exits, not at full depth")


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool | None = Field(None, description="a last chunk without choices that holds the usage")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far, in every chunk")


class Hints(Strict):
    """Known fields that can't change the answer: accepted, and without effect."""

    user: str | None = None
    safety_identifier: str | None = Field(None, description="a newer name of user")
    metadata: Ignored | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Ignored | None = None
    prompt_cache_retention: str | None = None
    cache_salt: str | None = None
    prediction: Ignored | None = None


def unsupported(remedy: str) -> Any:
    """A field that drex does not have; `remedy` says what to do instead."""
    return Field(None, description=NOT_SUPPORTED + remedy)


CALLS = "drex calls no functions; leave it out"
TEXT_ONLY = "drex reads and writes text only; leave it out"
ANY_FORM = "drex can't force a form on its answers; leave it out, and ask for the form in the prompt"
BANS = "use logit_bias, -100 for a token that must not come"
TOKEN_IDS_OUT = "use return_exit_layers, which gives the id of each token"
ENGINE_ONLY = "it belongs to another engine; leave it out"


class Unsupported(Hints):
    """Known fields that drex does not have, with the values that ask for nothing."""

    tools: Never | None = unsupported(CALLS)
    tool_choice: Literal["none", "auto"] | None = unsupported(CALLS)
    functions: Never | None = unsupported(CALLS)
    function_call: Literal["none", "auto"] | None = unsupported(CALLS)
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1)] | None = unsupported(
        ANY_FORM
    )
    guided_json: None = unsupported(ANY_FORM)
    guided_regex: None = unsupported(ANY_FORM)
    guided_choice: None = unsupported(ANY_FORM)
    guided_grammar: None = unsupported(ANY_FORM)
    structured_outputs: None = unsupported(ANY_FORM)
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = unsupported(TEXT_ONLY)
    audio: None = unsupported(TEXT_ONLY)
    media_io_kwargs: None = unsupported(TEXT_ONLY)
    mm_processor_kwargs: None = unsupported(TEXT_ONLY)
    suffix: Literal[""] | None = unsupported("drex writes on from the end of a prompt; leave it out")
    use_beam_search: Literal[False] | None = unsupported("leave it out, or ask for several samples with n")
    length_penalty: Literal[1] | None = unsupported("it belongs to beam search; leave it out")
    prompt_logprobs: None = unsupported("use echo with logprobs, in /v1/completions")
    prompt_embeds: None = unsupported("give the prompt as text or token ids")
    truncate_prompt_tokens: None = unsupported("shorten the prompt yourself; /tokenize counts its tokens")
    return_token_ids: Literal[False] | None = unsupported(TOKEN_IDS_OUT)
    return_tokens_as_token_ids: Literal[False] | None = unsupported(TOKEN_IDS_OUT)
    request_id: None = unsupported("send it as the header X-Request-Id")
    logits_processors: Never | None = unsupported(BANS)
    bad_words: Never | None = unsupported(BANS)
    allowed_token_ids: None = unsupported(BANS)
    spaces_between_special_tokens: Literal[True] | None = unsupported("leave it out")
    kv_transfer_params: None = unsupported(ENGINE_ONLY)
    vllm_xargs: None = unsupported(ENGINE_ONLY)
    moderation: None = unsupported("drex does not moderate; leave it out")
    reasoning_effort: Literal["none"] | None = unsupported(
        'set what the model\'s chat template knows of it, as in chat_template_kwargs: {"enable_thinking": false}'
    )
    web_search_options: None = unsupported("drex does not search; leave it out")


class Generation(Unsupported):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="one of the served names; null or empty: the only model there is")
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = Field(None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Int64 | None = Field(None, description="-1 is none: other noise each time")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description=f"a non-empty string of at most {MAX_STOP_LENGTH} characters, or up to {MAX_STOPS} of them"
    )
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_BIASES, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Limit | None = Field(None, description="-1: as many as there is room for")
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[Annotated[TokenIds, Yielding]], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(
        description="a string, a list of strings, a list of token ids, or a list of lists of token ids; "
        f"at most {MAX_PROMPTS} prompts"
    )
    echo: bool | None = Field(None, description="the prompt before the completion, with its log-probabilities")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = Field(None, description="only as many as n")
    add_special_tokens: Literal[True] | None = unsupported("give the prompt as token ids; /tokenize makes them")


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    cache_control: Ignored | None = Field(None, description="a hint: accepted, and without effect")

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "text":
            raise PydanticCustomError("other_part", "not supported: drex reads text only; leave all other parts out")
        return value


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Annotated[TextPart, Yielding]], Field(fail_fast=True)] | None = Field(
        None, description="a string, or a list of text parts"
    )
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="for chat templates that repeat it")
    reasoning: str | None = Field(None, description="a newer name of reasoning_content")
    cache_control: Ignored | None = Field(None, description="a hint: accepted, and without effect")
    refusal: None = unsupported("leave it out, or give its text as content")
    audio: None = unsupported(TEXT_ONLY)
    function_call: None = unsupported(CALLS)
    tool_calls: Never | None = unsupported(CALLS)
    annotations: Never | None = unsupported("leave it out")


class Templating(Strict):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = Field(
        None, description="end with what opens the assistant's turn; true, unless the last message is continued"
    )
    continue_final_message: bool | None = Field(None, description="go on where the last message ends")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the model's chat template, such as enable_thinking"
    )


Messages = Annotated[list[Annotated[ChatMessage, Yielding]], Field(min_length=1, fail_fast=True)]


class ChatRequest(Generation, Templating):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Limit | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = unsupported("use /v1/completions, or put the message before the answer yourself")
    add_special_tokens: Literal[False] | None = unsupported("the chat template writes them; leave it out")
    chat_template: None = unsupported("start the server with --chat-template")
    documents: Never | None = unsupported("put their text into a message")


class TokenizeRequest(Templating):
    """`POST /tokenize`: a prompt, or messages under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="of a prompt; true unless said otherwise")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Count], Field(fail_fast=True)]


BODIES: dict[str, type[Strict]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
"""What each path takes."""
