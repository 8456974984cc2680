"""From what a user asks for to requests that can be served, or a ValueError that names the remedy."""

from __future__ import annotations

import inspect
import itertools
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from drex.compute.load import LoadedModel
from drex.config import EarlyExit, EngineConfig, ExitRule, check_lossless
from drex.control.request import Request
from drex.errors import SettingError
from drex.inputs.prompts import Message, Prompt, check_prompt, kind, plain_messages
from drex.sampling_params import SamplingParams

NO_VARIABLES = frozenset(
    {"messages", "conversations", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
)
"""Names that are no variables of a chat template: with them a client could replace the template, or how it is used."""


class ContextLengthError(SettingError):
    """A prompt is longer than a request may be.

    Clients look for the words "maximum context length" in the message, in order to shorten the conversation.

    Args:
        most: tokens that a request may have, prompt and output together.
        found: the prompt's length in words, as in "the prompt has 1500".
        remedy: as in "shorten it".
    """

    def __init__(self, most: int, found: str, remedy: str) -> None:
        super().__init__(
            "prompt", f"This model's maximum context length is {most} tokens (max_model_len), and {found}: {remedy}"
        )


class InputProcessor:
    """Makes requests for one model and engine, numbered in order of arrival.

    Args:
        model: for its vocabulary, exits and end tokens.
        config: with `max_model_len` resolved.
        tokenizer: None takes prompts as token ids only.
        check_fits: raises ValueError for a request that the engine could never serve.
        eos_token_ids: instead of the model's; None: those, or the tokeniser's where the model's configs name none.

    Attributes:
        eos_token_ids: that end the text of a request, unless it ignores them.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        check_fits: Callable[[Request], None],
        eos_token_ids: frozenset[int] | None = None,
    ) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer
        named = model.decoder.spec.eos_token_ids if eos_token_ids is None else eos_token_ids
        if not named and tokenizer is not None and tokenizer.eos_token_id is not None:
            named = frozenset([tokenizer.eos_token_id])
        self.eos_token_ids = frozenset(token for token in named if 0 <= token <= self._last_token)
        self._check_fits = check_fits
        self._arrivals = itertools.count(1)
        # Tokenizers fail, or truncate what another thread gives them, where two threads use one.
        self._tokenizing = threading.Lock()

    def requests(self, prompt: Prompt, params: SamplingParams, *, score_exits: bool = False) -> list[Request]:
        """The n samples of a prompt as requests; raises ValueError if they can't be served.

        With `params.prompt_logprobs` the first sample scores the prompt: at full depth, or, with `score_exits`, as the
        request's exits have it.
        """
        ids = self.encode(prompt)
        room = self.config.max_model_len - len(ids)
        if room < 1:
            raise ContextLengthError(
                self.config.max_model_len,
                f"the prompt has {len(ids)} tokens",
                "shorten the prompt so that at least one token can follow, or raise max_model_len",
            )
        self._check_tokens(ids, self.config.max_model_len)
        for name, tokens in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids or ())):
            outside = [token for token in tokens if not 0 <= token <= self._last_token]
            if outside:
                raise SettingError(name, f"{name} has token {outside[0]}: the vocabulary has ids 0..{self._last_token}")
        rule = self._rule(params.early_exit)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        params = replace(params, max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room))
        requests = []
        for sample in range(params.n):
            scored = params.prompt_logprobs is not None and sample == 0
            scores = rule if score_exits else self.model.exits.rule_for(EarlyExit.off())
            score_rule = scores if scored else None
            requests.append(self._request(ids, params, rule, sample, seed, score_rule))
        self._check_fits(requests[0])
        return requests

    def scoring(self, ids: Sequence[int], early_exit: EarlyExit | None) -> Request:
        """A request that scores a token sequence; None is full depth. Raises ValueError if it can't be served."""
        if len(ids) < 2:
            raise ValueError(f"scoring takes at least 2 tokens, got {len(ids)}")
        self._check_tokens(ids, len(ids))
        rule = self._rule(EarlyExit.off() if early_exit is None else early_exit)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        return self._request(ids, params, rule, sample=0, seed=0, score_rule=rule)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, special tokens as the tokeniser adds them; ids pass through.

        Raises:
            ValueError: an empty prompt, another kind of value, or text without a tokeniser.
        """
        check_prompt(prompt)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise SettingError(
                    "model", "the model folder has no tokeniser: give prompts as token ids, or name a tokenizer"
                )
            check_unicode(prompt)
            with self._tokenizing:
                ids = self.tokenizer(prompt)["input_ids"]
            assert isinstance(ids, list)
        else:
            ids = list(prompt)
        if not ids:
            raise SettingError("prompt", "the prompt is empty: give at least one token")
        return ids

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Args:
            messages: each with a `role` and its `content`.
            add_generation_prompt: end with what opens the assistant's turn; None: unless the last message is continued.
            continue_final_message: leave the last message open, so that the text goes on where it ends.
            chat_template_kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: no chat template, or messages or settings that it does not take.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise SettingError(
                "model", "the model has no chat template: use generate, or set chat_template in its tokenizer"
            )
        if continue_final_message and add_generation_prompt:
            raise SettingError(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other: set one of them",
            )
        plain = plain_messages(messages)
        for message in plain:
            check_unicode(message["content"])
        if continue_final_message and not plain[-1]["content"]:
            raise SettingError(
                "continue_final_message",
                "continue_final_message: the last message has no text to continue; give some, or leave it out",
            )
        variables = dict(chat_template_kwargs or {})
        refused = sorted(NO_VARIABLES.intersection(variables))
        if refused:
            raise SettingError(
                "chat_template_kwargs",
                f"chat_template_kwargs has {refused[0]}, which is no variable of a template: leave it out",
            )
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        try:
            with self._tokenizing:
                ids = self.tokenizer.apply_chat_template(
                    plain,
                    add_generation_prompt=opens,
                    continue_final_message=continue_final_message,
                    return_dict=False,
                    **variables,
                )
        except Exception as error:  # the template is a program of the model's author: it may raise anything
            said = " ".join(str(error).split())
            raise ValueError(f"the chat template does not take these messages: {said}") from error
        assert isinstance(ids, list)
        return [int(token) for token in ids]  # type: ignore[arg-type]

    def _rule(self, early_exit: EarlyExit | None) -> ExitRule:
        """The exit rule of a request; raises ValueError if this model can't follow it."""
        rule = self.model.exits.rule_for(early_exit)
        if rule.criterion == "probe" and any(probe is None for _, probe in self.model.heads):
            raise SettingError("criterion", "criterion 'probe': this model has no probes; choose another criterion")
        return rule

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        rule: ExitRule,
        sample: int,
        seed: int,
        score_rule: ExitRule | None,
    ) -> Request:
        number = next(self._arrivals)
        return Request(
            request_id=f"request-{number}",
            prompt=tuple(ids),
            params=params,
            rule=rule,
            seed=seed,
            eos_token_ids=self.eos_token_ids,
            num_segments=len(self.model.layout.lengths),
            arrival=number,
            sample=sample,
            score_rule=score_rule,
            run_ahead=self._run_ahead(params),
        )

    def _run_ahead(self, params: SamplingParams) -> str:
        """How far a request runs ahead here; raises ValueError where it can't be lossless."""
        mode = self.config.run_ahead if params.run_ahead is None else params.run_ahead
        check_lossless(mode, self.model.exits.kv_fill)
        # The baselines decide for a whole batch, and without exits there is nothing to run ahead of.
        able = self.config.policy in ("drex", "split") and len(self.model.layout.lengths) > 1
        return mode if able else "off"

    @property
    def _last_token(self) -> int:
        return self.model.decoder.spec.vocab_size - 1

    def _check_tokens(self, ids: Sequence[int], length: int) -> None:
        if length > self.config.max_model_len:
            raise ContextLengthError(self.config.max_model_len, f"the text has {length} tokens", "shorten it")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= self._last_token:
                of_type = "" if isinstance(token, int) else f" ({kind(token)})"
                raise SettingError(
                    "prompt",
                    f"the prompt has token id {token!r}{of_type}: the vocabulary has ids 0..{self._last_token}",
                )


def spread(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Settings for each of `count` prompts; raises ValueError for a list of another length."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one a prompt")
    return list(params)


def check_unicode(text: str) -> None:
    """Raise ValueError for text that is not valid Unicode, as JSON can hold it: it has no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a surrogate pair at character {error.start}: leave it out") from error
