"""An open-loop client for any OpenAI-compatible server: requests are sent when they are due, whatever became of others.

Times count from when a request was due, so that a server that falls behind can't hide it. Text is streamed; the server
says how many tokens it was.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from drex.extras import INSTALL_SERVER
from drex.sim.workload import Job

if TYPE_CHECKING:
    import httpx

CALIBRATION_CHARACTERS = 400


@dataclass(frozen=True)
class Target:
    """A server, and how to ask it.

    Args:
        address: as http://127.0.0.1:8000, with or without /v1.
        model: to ask for.
        key: for the Authorization header, or None.
        chat: ask for chat completions.
        ignore_eos: ask to go on after the end token; servers of vLLM's kind and drex know this.
    """

    address: str
    model: str
    key: str | None = None
    chat: bool = False
    ignore_eos: bool = False

    def body(self, prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a greedy request."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.chat:
            return "chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
        return "completions", {**body, "prompt": prompt}


@dataclass
class Outcome:
    """What became of one request; times in seconds from when it was due.

    Attributes:
        first, last: text came for the first and for the last time; None if it never did.
        gaps: between pieces of text.
        prompt_tokens, tokens: as the server counts them.
        error: what went wrong, if something did.
    """

    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


def connect(target: Target) -> httpx.AsyncClient:
    """A client for a server; raises ValueError where its library is missing."""
    try:
        import httpx
    except ImportError:
        raise ValueError(f"drex bench --url needs httpx: {INSTALL_SERVER}") from None
    base = target.address.rstrip("/").removesuffix("/v1") + "/v1/"
    headers = {} if target.key is None else {"authorization": f"Bearer {target.key}"}
    return httpx.AsyncClient(base_url=base, headers=headers, timeout=600, limits=httpx.Limits(max_connections=None))


async def find_model(client: httpx.AsyncClient) -> tuple[str, int | None]:
    """The first model that a server has, and how long its requests may be, if it says so.

    Raises:
        ValueError: there is no such server, or it has none.
    """
    import httpx

    try:
        reply = await client.get("models")
        card = reply.raise_for_status().json()["data"][0]
        return str(card["id"]), card.get("max_model_len")
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"--url {client.base_url}: no models there ({error!r}); name a server that runs") from error


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, tokens: int, due: float) -> Outcome:
    """Send one request, due at a time of `time.perf_counter`, and read its stream to the end."""
    import httpx

    found = Outcome()
    path, body = target.body(prompt, tokens)
    try:
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                found.error = f"status {reply.status_code}: {(await reply.aread())[:200]!r}"
                return found
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    _note(found, json.loads(line[6:]), time.perf_counter() - due)
    except (httpx.HTTPError, ValueError) as error:
        found.error = repr(error)
    if found.error is None and found.first is None:
        found.error = "no text came"
    return found


def _note(found: Outcome, chunk: dict[str, Any], now: float) -> None:
    """Take in one event."""
    if "error" in chunk:
        found.error = str(chunk["error"])
    if chunk.get("usage"):
        found.prompt_tokens, found.tokens = chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]
    for choice in chunk.get("choices", ()):
        if choice.get("text") or choice.get("delta", {}).get("content"):
            if found.last is None:
                found.first = now
            else:
                found.gaps.append(now - found.last)
            found.last = now


def arrive(jobs: Sequence[Job], rate: float | None, burstiness: float, seed: int) -> list[Job]:
    """Give jobs times to arrive: gaps from a gamma distribution, burstiness 1 being a Poisson process.

    Args:
        jobs: in order.
        rate: arrivals a second; None: all at once.
        burstiness: shape of the distribution; below 1 in bursts, above 1 evenly.
        seed: of the gaps.
    """
    if rate is None:
        return list(jobs)
    draw, now, out = random.Random(seed), 0.0, []
    for job in jobs:
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        out.append(replace(job, arrival=now))
    return out


async def characters_per_token(client: httpx.AsyncClient, target: Target, text: str) -> float:
    """How much of a text is a token to a server; asks it, which warms it up too.

    Raises:
        ValueError: it does not answer, or counts no tokens.
    """
    sample = text[:CALIBRATION_CHARACTERS]
    found = await ask(client, target, sample, 1, time.perf_counter())
    if found.error is not None and found.error != "no text came":
        raise ValueError(f"--url: the server does not take a first request ({found.error})")
    if not found.prompt_tokens:
        raise ValueError("--url: the server counts no tokens (stream_options.include_usage); it can't be measured")
    return len(sample) / found.prompt_tokens


async def drive(
    client: httpx.AsyncClient, target: Target, jobs: Sequence[Job], prompts: Sequence[str], told: Callable[[], None]
) -> tuple[list[Outcome], float]:
    """Send every job when it is due; returns what became of them, and seconds from the first to the last.

    Args:
        client, target: of the server.
        jobs: with arrival times.
        prompts: one a job.
        told: called after each.
    """
    start = time.perf_counter()

    async def one(job: Job, prompt: str) -> Outcome:
        due = start + job.arrival
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        found = await ask(client, target, prompt, job.output, due)
        told()
        return found

    outcomes = await asyncio.gather(*(one(job, prompt) for job, prompt in zip(jobs, prompts, strict=True)))
    return outcomes, time.perf_counter() - start
