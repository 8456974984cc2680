"""From a request's body to a checked object: what takes long happens beside the event loop."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from drex.server.errors import ApiError
from drex.server.explain import explain
from drex.server.serving import Serving

LARGE_BODY = 2**16
"""Bytes from which on a body is read in a thread; smaller ones take the event loop a few milliseconds at most."""
MAX_MEMBERS = 1024
"""Of a JSON object: far more than any request has, and few enough for an error about each."""


def body_route(serving: Serving) -> type[APIRoute]:
    """The class of routes whose handlers get their body from `parse_body`, large ones from a thread of the server's."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            field = self.body_field
            if field is None:
                return handle
            model = field.field_info.annotation
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)

            async def handler(request: Request) -> Response:
                return await handle(_BodyRequest(request, model, serving))

            return handler

    return BodyRoute


class _BodyRequest(Request):
    """A request whose JSON is an object of its endpoint's model already when FastAPI gets it.

    Args:
        request: as it came.
        model: of the endpoint's body.
        serving: has the thread.
    """

    def __init__(self, request: Request, model: type[BaseModel], serving: Serving) -> None:
        super().__init__(request.scope, request.receive)
        self._model, self._serving = model, serving

    async def json(self) -> BaseModel:
        body = await self.body()
        work = partial(parse_body, body, self._model)
        return await self._serving.read(work) if len(body) > LARGE_BODY else work()


def parse_body(body: bytes, model: type[BaseModel]) -> BaseModel:
    """A JSON body as an object of a model.

    Raises:
        ApiError: 400, for what the model does not take; errors are bounded, however long the body is.
        ValueError: what is not JSON.
    """
    with _no_collection():
        data = json.loads(body, object_pairs_hook=_members)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise ApiError(400, *explain(found, model)) from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ApiError (400) for one with too many members: each could be an error of its own."""
    if len(pairs) > MAX_MEMBERS:
        raise ApiError(400, f"an object in the body has {len(pairs)} members: give at most {MAX_MEMBERS}")
    return dict(pairs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within, no garbage is collected: parsing makes none, and a million lists take four times as long with it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
