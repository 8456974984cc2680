"""What is wrong with a body, in one line: the field, what came, and what to give instead of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from drex.server.schema import NOT_SUPPORTED

PART = re.compile(r"^(?!(?:str|int|float|bool)$)[a-z0-9_]+$")
"""Of a path to what is wrong: fields and indices, without the names of types that were tried."""
FORMS = ("prompt", "stop")
"""Fields of several forms, between whose lists an error can't tell: their descriptions name them all."""
LONGEST_VALUE = 40
"""Characters of a value that are repeated to the client."""
WANTED = {
    "string_type": "a string",
    "string_unicode": "valid Unicode",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null, or leave it out",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a token id as a string of digits",
}
"""What to give, by pydantic's name of the error; the names in braces are in the error's context."""


def explain(errors: Sequence[Mapping[str, Any]], body: type[BaseModel] | None) -> tuple[str, str | None]:
    """The message about a body that does not fit, and the top-level field at fault (None: the body itself).

    Args:
        errors: pydantic's, at least one; the first field that is wrong is explained.
        body: the model of the body.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", None
    if len(first["loc"]) < 2:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    field = str(first["loc"][1])
    # A value that may be of several types has an error for each; the innermost tells most.
    same = [error for error in errors if str(error["loc"][1]) == field]
    worst = max(same, key=lambda error: len(error["loc"]))
    path = _path(worst)
    infos = list(_fields(body, path))
    for length, info in enumerate(infos, 1):
        if info is not None and (info.description or "").startswith(NOT_SUPPORTED):
            return f"{'.'.join(path[:length])} is {info.description}", field
    alike = [error for error in same if _path(error) == path and error["type"] != "extra_forbidden"]
    if field in FORMS and infos[0] is not None:
        return f"{field}: give {infos[0].description}", field
    if len(alike) > 1 and infos[-1] is not None and infos[-1].description:
        return f"{'.'.join(path)}: give {infos[-1].description}", field
    return _single(worst, ".".join(path)), field


def _single(error: Mapping[str, Any], where: str) -> str:
    """What one error says of the value at a place."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where} is not a field that is known here: leave it out"
    if kind == "missing":
        return f"{where} is missing: give it"
    if kind not in WANTED:
        return f"{where} is {error['msg']}"
    numbers = {name: f"{one:g}" if isinstance(one, float) else one for name, one in context.items()}
    wanted = WANTED[kind].format(**numbers)
    if "actual_length" in context:
        return f"{where} has {context['actual_length']} entries: give {wanted}"
    if kind.startswith("string_too_") and isinstance(value, str):
        return f"{where} has {len(value)} characters: give {wanted}"
    return f"{where} is {_shown(value)}: give {wanted}"


def _shown(value: Any) -> str:
    """A value, or what it is where that is long."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    said = json.dumps(value[:LONGEST_VALUE] if isinstance(value, str) else value)
    return said if len(said) <= LONGEST_VALUE else f"{said[:LONGEST_VALUE]}…"


def _path(error: Mapping[str, Any]) -> list[str]:
    """Fields and indices down to what is wrong; a field that nobody knows may have any name."""
    parts = [str(part) for part in error["loc"][1:]]
    known = [part for part in parts[:-1] if PART.match(part)]
    last = parts[-1]
    return [*known, last] if PART.match(last) or error["type"] == "extra_forbidden" else known


def _fields(body: type[BaseModel] | None, path: Sequence[str]) -> Iterator[FieldInfo | None]:
    """The field at each part of a path; None for indices and names that no model has."""
    models = [] if body is None else [body]
    for part in path:
        info = next((model.model_fields[part] for model in models if part in model.model_fields), None)
        yield info
        if info is not None:
            models = list(_models(info.annotation))
        elif not part.isdigit():
            models = []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
