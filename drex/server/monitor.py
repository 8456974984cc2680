"""What operators and pages ask: the models, health, version, metrics, and the engine as it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from drex import __version__
from drex.engine.streams import EngineStoppedError
from drex.server.errors import ApiError, documented
from drex.server.replies import ErrorReply, ExitPoints, Live, ModelCard, ModelList, Version
from drex.server.serving import RETRY_AFTER, Serving
from drex.server.streaming import EventStream, encode, event

LIVE_SECONDS = 0.2
"""Between two events of /live."""
OVERLAP = 3
"""Events of /live that a pass is told in."""
MAX_WATCHERS = 32


def routes(serving: Serving) -> APIRouter:
    """The endpoints, for one server."""
    router = APIRouter()
    watch = Watch(serving)

    @router.get("/v1/models", responses=documented(ModelList))
    async def models() -> Response:
        """The served names of the model, and where it may exit."""
        found: ModelList = {"object": "list", "data": [_card(serving, name) for name in serving.settings.served_names]}
        return Response(encode(found), media_type="application/json")

    @router.get("/v1/models/{name:path}", responses=documented(ModelCard))
    async def model(name: str) -> Response:
        """One served name of the model."""
        return Response(encode(_card(serving, serving.check_model(name))), media_type="application/json")

    @router.get(
        "/health",
        response_class=Response,
        responses={503: {"model": ErrorReply, "description": "Nothing new is served."}},
    )
    async def health() -> Response:
        """200 while requests are let in, 503 otherwise."""
        serving.check_open()
        return Response()

    @router.get("/version", responses=documented(Version))
    async def version() -> Response:
        """Of drex."""
        found: Version = {"version": __version__}
        return Response(encode(found), media_type="application/json")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        report = await serving.engine.ask(lambda engine: engine.report())
        return Response(serving.telemetry.render(report), media_type=CONTENT_TYPE_LATEST)

    @router.get("/live", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
    async def live(request: Request) -> Response:
        """The engine's state, about five times a second, as server-sent events."""
        watch.check_room()
        # A stream has no end, and so the server could not leave it out.
        events = _nothing() if request.method == "HEAD" else watch.events()
        return EventStream(events, serving.settings.body_timeout)

    return router


def _card(serving: Serving, name: str) -> ModelCard:
    llm = serving.llm
    plan = llm.model.exits
    exits: ExitPoints = {
        "layers": llm.model.decoder.spec.num_layers,
        "exits": list(plan.layers),
        "thresholds": list(plan.rule.thresholds),
        "criterion": plan.rule.criterion,
        "schedule": plan.rule.schedule,
        "kv_fill": plan.kv_fill,
        "run_ahead": llm.config.run_ahead,
    }
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "drex",
        "root": llm.model.folder.name,
        "parent": None,
        "max_model_len": llm.config.max_model_len,
        "early_exit": exits,
    }


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield b""


class Watch:
    """Looks at the engine for all who watch it, once for all of them, and not at all while nobody does.

    Args:
        serving: whose engine it is.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._watchers = 0
        self._latest, self._looked = b"", -LIVE_SECONDS
        self._looking = asyncio.Lock()
        self._started = time.monotonic()

    def check_room(self) -> None:
        """Raise ApiError (429) if as many watch as may."""
        if self._watchers >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} clients watch already: close one of them", headers=RETRY_AFTER)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """States of the engine, until the server shuts down."""
        serving = self._serving
        self._watchers += 1
        try:
            while not (serving.draining or serving.engine.stopped.is_set()):
                yield await self._state()
                await asyncio.sleep(LIVE_SECONDS)
        except EngineStoppedError:
            return
        finally:
            self._watchers -= 1

    async def _state(self) -> bytes:
        async with self._looking:
            if time.monotonic() - self._looked >= LIVE_SECONDS / 2:
                report = await self._serving.engine.ask(lambda engine: engine.report())
                self._looked = time.monotonic()
                self._latest = event(self._describe(report))
        return self._latest

    def _describe(self, report: dict[str, Any]) -> Live:
        telemetry = self._serving.telemetry
        layers = self._serving.llm.model.exits.layers
        now = time.monotonic()
        # A copy first: the engine's thread may add to it at any time.
        recent = [one for one in telemetry.latest.copy() if one["time"] > now - OVERLAP * LIVE_SECONDS]
        return {
            "time": round(now - self._started, 3),
            "running": report["running"],
            "waiting": report["waiting"],
            "buffered": {str(layer): count for layer, count in zip(layers, report["buffered"], strict=True)},
            "achieved": report["achieved"],
            "theta_star": report["theta_star"],
            "ideal": report["ideal"],
            "full": report["full"],
            "exits": {str(layer): count for layer, count in telemetry.exit_counts.items()},
            "segments": [segment.copy() for segment in telemetry.segments],
            "passes": [{**one, "time": round(one["time"] - self._started, 4)} for one in recent],
            "tokens": telemetry.tokens,
            "slots_in_use": report["slots_in_use"],
            "slots": report["slots"],
        }
