"""What clients get, as typed dictionaries: what is sent is what the OpenAPI schema says."""

from __future__ import annotations

from typing import Literal, NotRequired

# FastAPI takes typing's own only from Python 3.12 on.
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class ErrorDetail(TypedDict):
    """`code` is the HTTP status, or a name of OpenAI's for the error; `param` the field that is at fault, if one is."""

    message: str
    type: str
    param: str | None
    code: int | str


class ErrorReply(TypedDict):
    """OpenAI's error body."""

    error: ErrorDetail


class ExitUsage(TypedDict):
    """How deep the tokens of a reply went.

    `exits` maps a count of layers to the share of tokens that left after it; `confidence_p5` is the confidence that
    95 % of the early tokens had at least, null if none left early.
    """

    mean_depth: float
    exits: dict[str, float]
    confidence_p5: float | None


class Usage(TypedDict):
    """Tokens of all prompts and all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    early_exit: ExitUsage | None


class ExitCheck(TypedDict):
    """What the exit point after `layer` said of a token, and the threshold that was in force there."""

    layer: int
    confidence: float
    threshold: float


class TokenExit(TypedDict):
    """One token with `return_exit_layers`: its id, text, layers executed, and the confidence it left with.

    `checks` are those of every exit point on its way; a request's first token has none.
    """

    id: int
    text: str
    exit_layer: int
    confidence: float
    checks: list[ExitCheck]


class CompletionLogprobs(TypedDict):
    """Lists with one entry a token; the first of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A sample, or what is new of it in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    tokens: NotRequired[list[TokenExit]]


class Completion(TypedDict):
    """Of `/v1/completions`; a chunk of a stream has the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that could have come; `bytes` are its own, also inside a character, or null where they are not known."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token that came, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a message."""

    content: list[ChatLogprob]
    refusal: None


class Message(TypedDict):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict):
    """What is new of a message; the first has the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    """A sample."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    tokens: NotRequired[list[TokenExit]]


class ChatChunkChoice(TypedDict):
    """What is new of a sample."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[int | str | None]
    tokens: NotRequired[list[TokenExit]]


class ChatCompletion(TypedDict):
    """Of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(TypedDict):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class ExitPoints(TypedDict):
    """Where the model may exit; `exits` are counts of layers, with a threshold each (null: never)."""

    layers: int
    exits: list[int]
    thresholds: list[float | None]
    criterion: str
    schedule: str
    kv_fill: str
    run_ahead: str


class ModelCard(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    early_exit: ExitPoints


class ModelList(TypedDict):
    """Of `/v1/models`: one entry a served name."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    """Of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    """Of `/detokenize`."""

    prompt: str


class Version(TypedDict):
    """Of `/version`."""

    version: str


class SegmentWork(TypedDict):
    """What was run over a segment so far."""

    passes: int
    rows: int
    seconds: float


class LivePass(TypedDict):
    """A pass, for those who watch: `time` when it ended, `waiting` the rows in each exit point's buffer before it.

    `waiting` is null where nothing was to be chosen, so that nobody looked.
    """

    number: int
    time: float
    seconds: float
    segment: int
    rows: int
    waiting: list[int] | None


class Live(TypedDict):
    """One event of `/live`: the engine between two passes.

    Attributes:
        time: seconds since the server started.
        running, waiting: requests; running ones have slots.
        buffered: rows that wait after each exit point, by its layer.
        achieved, theta_star, ideal, full: tokens a second while decoding; null where that isn't known yet.
        exits: tokens so far, by layers executed.
        segments: passes, rows and seconds so far, one entry a segment.
        passes: the latest ones; events overlap, so that none is missed: tell them apart by number.
        tokens: so far.
        slots_in_use, slots: of K/V.
    """

    time: float
    running: int
    waiting: int
    buffered: dict[str, int]
    achieved: float | None
    theta_star: float | None
    ideal: float | None
    full: float | None
    exits: dict[str, int]
    segments: list[SegmentWork]
    passes: list[LivePass]
    tokens: int
    slots_in_use: int
    slots: int
