"""Puts the server together: an application around one model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from drex import __version__
from drex.server import chat, completions, errors, monitor, page, tokens
from drex.server.middleware import BodyLimit, Guard, RequestLog
from drex.server.serving import Serving
from drex.server.settings import Keys


def create_app(serving: Serving) -> FastAPI:
    """The application of a server; the engine runs from its start-up to its shut-down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        try:
            yield
        finally:
            await serving.stop()

    # No pages of documentation: those that FastAPI has load scripts from elsewhere.
    app = FastAPI(title="drex", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    for module in (completions, chat, tokens, monitor):
        router = module.routes(serving)
        _answer_head(router)
        app.include_router(router)
    app.include_router(page.routes())
    _document(app)
    settings = serving.settings
    app.add_middleware(BodyLimit, serving=serving)
    app.add_middleware(Guard, keys=Keys(settings.api_keys))
    app.add_middleware(RequestLog, telemetry=serving.telemetry)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "HEAD", "POST"],
            # Clients have headers of their own (OpenAI's: x-stainless-*), and here none opens anything but the key.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _answer_head(router: APIRouter) -> None:
    """Make HEAD do what GET does, wherever that is; the server leaves the body out."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _document(app: FastAPI) -> None:
    """Drop from the OpenAPI schema what FastAPI adds of its own and never happens here: invalid bodies get a 400."""
    generate = app.openapi

    def schema() -> dict[str, Any]:
        found = generate()
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return found

    app.openapi = schema  # type: ignore[method-assign]
