"""Kinds of prompts and messages that users give: made alike, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from drex.errors import SettingError

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

ONE = "text or a list of token ids"
MESSAGE = '{"role": ..., "content": ...}'


def list_prompts(prompts: object) -> list[Prompt]:
    """One prompt or a list of them, as a list.

    Raises:
        ValueError: neither, naming what it is.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        raise SettingError("prompts", f"prompts is {kind(prompts)}: give {ONE}, or a list of prompts")
    listed = list(cast(Sequence[Any], prompts))
    if listed and isinstance(listed[0], int):
        return [listed]
    for number, prompt in enumerate(listed):
        check_prompt(prompt, f"prompts[{number}]")
    return listed


def list_token_ids(token_ids: object) -> list[Sequence[int]]:
    """One sequence of token ids or a list of them, as a list.

    Raises:
        ValueError: neither, naming what it is.
    """
    if not is_list(token_ids):
        raise SettingError(
            "token_ids", f"token_ids is {kind(token_ids)}: give a list of token ids, or a list of such lists"
        )
    listed = list(cast(Sequence[Any], token_ids))
    if not listed or isinstance(listed[0], int):
        return [listed]
    for number, ids in enumerate(listed):
        if not is_list(ids):
            raise SettingError(
                "token_ids", f"token_ids[{number}] is {kind(ids)}: give a list of token ids; text is tokenised first"
            )
    return listed


def check_prompt(prompt: object, name: str = "the prompt") -> None:
    """Raise ValueError, naming what it is, for a prompt that is neither text nor a list."""
    if isinstance(prompt, Mapping):
        raise SettingError(
            "prompt", f"{name} is {kind(prompt)}: give {ONE}, as its value of 'prompt' or 'prompt_token_ids' may be"
        )
    if not isinstance(prompt, str) and not is_list(prompt):
        raise SettingError("prompt", f"{name} is {kind(prompt)}: give {ONE}")


def list_conversations(messages: object) -> list[Sequence[Message]]:
    """One conversation or a list of them, as a list.

    Raises:
        ValueError: neither, naming what it is.
    """
    if not is_list(messages):
        raise SettingError("messages", f"messages is {kind(messages)}: give a list of {MESSAGE}")
    listed = list(cast(Sequence[Any], messages))
    if not listed:
        raise SettingError("messages", "messages is empty: give at least one")
    return listed if is_list(listed[0]) else [listed]


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text parts joined by newlines, `developer` as `system`.

    Args:
        messages: a list of {"role", "content"}, the content being text or a list of {"type": "text", "text"}.

    Raises:
        ValueError: another kind of message or content, by name and place.
    """
    if not is_list(messages):
        raise SettingError("messages", f"a conversation is {kind(messages)}: give a list of {MESSAGE}")
    found = []
    for number, message in enumerate(cast(Sequence[object], messages)):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise SettingError("messages", f"{where} is {kind(message)}: give {MESSAGE}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise SettingError("messages", f"{where}: role is {role!r}: give one such as 'user'")
        text = _text(message.get("content"), role, where)
        # Templates know no developer, and may drop without a word what they don't know.
        found.append({**message, "role": "system" if role == "developer" else role, "content": text})
    if not found:
        raise SettingError("messages", "messages is empty: give at least one")
    return found


def _text(content: object, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if content is None:
        raise SettingError("messages", f"{where}: a message of role {role!r} has no content: give text")
    if not is_list(content):
        raise SettingError("messages", f"{where}: content is {kind(content)}: give text, or a list of text parts")
    return "\n".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(cast(Sequence[object], content)))


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise SettingError("messages", f'{where} is {kind(part)}: give {{"type": "text", "text": ...}}')
    if part.get("type") != "text":
        raise SettingError("messages", f"{where} is of type {part.get('type')!r}: drex takes parts of type 'text' only")
    text = part.get("text")
    if not isinstance(text, str):
        raise SettingError("messages", f"{where}: text is {kind(text)}: give text")
    return text


def is_list(value: object) -> bool:
    """Whether a value is a list, tuple or the like: not text, bytes, a mapping or an array."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def kind(value: object) -> str:
    """The type of a value, as a message says it."""
    if value is None:
        return "None"
    made = type(value)
    name = made.__name__ if made.__module__ == "builtins" else f"{made.__module__}.{made.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
