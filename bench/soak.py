"""A long run of mixed requests, some of which are cancelled midway and some of which are wrong.

    python bench/soak.py --requests 20000
    python bench/soak.py --requests 20000 --tokenizer-kind byte-fallback

Checked: every request ended as it should (an answer with the tokens, choices and log-probabilities that were asked for,
a refusal, or its own cancelling), none failed in the engine, no K/V slot is in use at the end, and the server's memory
beside the K/V pool grew by less than 2 % in the last half. (The pool's size is fixed at the start; its pages come into
memory as load first reaches them, so that a rare peak still adds some late.) Without --url a server is started. Exit
code 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from served import Served, add_server_options, server_of

WORDS = ("def", "class", "import", "return", "self", "for", "in", "if", "None", "os", "path", "open", "read", "list")
WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": 7},
    {"max_tokens": -2},
    {"prompt": []},
    {"prompt": [10**9]},
    {"nonsense": 1},
    {"model": "another"},
    {"early_exit": {"layers": [1000]}},
)
REPLACEMENT = "\ufffd"
STOPS = ("\n", "def", " the", "é", REPLACEMENT, "(", "日本", "self.", "\U0001f642", "x" * 200)
BYTES = (3, 259)
"""Tokens of single bytes, nearly all of them: in a byte-fallback vocabulary, and among the bundled model's."""
TEXTS = 2000
"""Different prompts. A tokenizer that does not split text keeps the tokens of the last 10,000 that it has seen, some
3 KB each; it is to be full long before the last half."""
CANCELLED, INVALID = 0.2, 0.05
"""Shares of the requests."""
GROWTH = 0.02


@dataclass
class Soak:
    """What happened so far.

    Attributes:
        ends: how requests ended: `whole`, `streamed`, `cancelled`, `refused`; anything else is wrong.
        memory, pool: resident bytes of the server beside the K/V pool, and of the pool, after each twentieth of the
            requests.
    """

    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    memory: list[float] = field(default_factory=list)
    pool: list[float] = field(default_factory=list)


def drawn_body(number: int, draw: random.Random) -> dict[str, Any]:
    """A request that is right, as drawn."""
    words = random.Random(number % TEXTS)
    prompt: Any = " ".join(words.choice(WORDS) for _ in range(words.randint(1, 40)))
    body: dict[str, Any] = {
        "prompt": prompt if draw.random() < 0.7 else [draw.randrange(3, 256) for _ in range(draw.randint(1, 64))],
        "max_tokens": draw.choice((1, 4, 8, 16, 32)),
        "temperature": draw.choice((0, 0.8)),
        "seed": number,
        "ignore_eos": True,
        "stream": draw.random() < 0.5,
    }
    if draw.random() < 0.2:
        body["logprobs"] = draw.randint(0, 5)
    if draw.random() < 0.1:
        body |= {"echo": True, "n": 2}
    if draw.random() < 0.3:
        # Bytes in any order: most are no characters, or parts of such.
        body["logit_bias"] = {str(draw.randrange(*BYTES)): draw.choice((5, 20, 100)) for _ in range(draw.randint(1, 8))}
    if draw.random() < 0.2:
        body["stop"] = draw.sample(STOPS, draw.randint(1, 4))
    return body


async def one(client: httpx.AsyncClient, number: int) -> tuple[str, int]:
    """One request, a function of its number; returns how it ended, and the tokens that came."""
    draw = random.Random(number)
    body, kind = drawn_body(number, draw), draw.random()
    if kind < INVALID:
        reply = await client.post("/v1/completions", json=body | draw.choice(WRONG))
        return ("refused" if reply.status_code in (400, 404) and "error" in reply.json() else "not refused"), 0
    if kind < INVALID + CANCELLED:
        return await cancelled(client, body | {"stream": True, "max_tokens": 32}, draw), 0
    if not body["stream"]:
        reply = await client.post("/v1/completions", json=body)
        if reply.status_code != 200:
            return f"status {reply.status_code}", 0
        return fault(body, [reply.json()]) or "whole", reply.json()["usage"]["completion_tokens"]
    events, done = [], False
    async with client.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as reply:
        async for line in reply.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    if not done or not events or not events[-1].get("usage"):
        return f"stream with status {reply.status_code} that ends early", 0
    return fault(body, events) or "streamed", events[-1]["usage"]["completion_tokens"]


def fault(body: dict[str, Any], events: list[dict[str, Any]]) -> str | None:
    """What is wrong with the answer to a request, as one object or as a stream's events; None: nothing."""
    choices = [choice for event in events for choice in event["choices"]]
    made, wanted = events[-1]["usage"]["completion_tokens"], body["max_tokens"] * body.get("n", 1)
    ends = sorted((choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"])
    if [index for index, _ in ends] != list(range(body.get("n", 1))):
        return f"finish reasons {ends}"
    if made != wanted and (made > wanted or not any(reason == "stop" for _, reason in ends)):
        return f"{made} tokens instead of {wanted}"
    for index, _ in ends:
        text = "".join(choice["text"] for choice in choices if choice["index"] == index)
        # Replacement characters may also be what an unfinished character leaves at the end, which stops nothing.
        if not body.get("echo") and any(stop in text for stop in body.get("stop", ()) if stop != REPLACEMENT):
            return f"a stop string in {text!r}"
    if "logprobs" not in body:
        return None
    logs = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    if any(len({len(log[name]) for name in fields}) != 1 for log in logs):
        return "log-probabilities of unequal length"
    reported = sum(len(log["tokens"]) for log in logs)
    prompts = events[-1]["usage"]["prompt_tokens"] * body.get("n", 1) if body.get("echo") else 0
    return None if reported == made + prompts else f"{reported} log-probabilities of {made} + {prompts} tokens"


async def cancelled(client: httpx.AsyncClient, body: dict[str, Any], draw: random.Random) -> str:
    """Leave a stream after some events, or a request before there is an answer."""
    if draw.random() < 0.3:
        try:
            await client.post("/v1/completions", json=body | {"stream": False}, timeout=draw.uniform(0.01, 0.2))
        except httpx.TimeoutException:
            return "cancelled"
        return "whole"
    leave, seen = draw.randint(1, 20), 0
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            seen += line.startswith("data: ")
            if seen >= leave:
                break
    return "cancelled"


async def soak(server: Served, requests: int, clients: int) -> Soak:
    """Send requests, so many at a time."""
    found, numbers = Soak(), iter(range(requests))
    step = max(1, requests // 20)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.address, timeout=120, limits=limits) as client:

        async def work() -> None:
            for number in numbers:
                try:
                    end, tokens = await one(client, number)
                except httpx.HTTPError as error:
                    end, tokens = f"lost: {error!r}", 0
                found.ends[end] += 1
                found.tokens += tokens
                if found.ends.total() % step == 0:
                    rest, pool = await asyncio.to_thread(server.resident)
                    found.memory.append(rest)
                    found.pool.append(pool)

        await asyncio.gather(*(work() for _ in range(clients)))
    return found


def judge(server: Served, found: Soak, seconds: float) -> dict[str, Any]:
    """The report; `problems` is what does not hold."""
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    slots = server.metric("drex_kv_slots", 'state="in_use"')
    reasons = {
        reason: int(server.metric("vllm:request_success_total", f'finished_reason="{reason}"'))
        for reason in ("stop", "length", "abort", "error")
    }
    half = found.memory[len(found.memory) // 2 - 1]
    growth = found.memory[-1] / half - 1
    problems = [end for end in found.ends if end not in ("whole", "streamed", "cancelled", "refused")]
    if slots:
        problems.append(f"{slots} slots are in use")
    if reasons["error"]:
        problems.append(f"{reasons['error']} requests failed")
    if growth >= GROWTH:
        problems.append(f"memory beside the K/V pool grew by {growth:.1%} in the last half")
    return {
        "requests": found.ends.total(),
        "ends": dict(found.ends),
        "tokens": found.tokens,
        "seconds": round(seconds, 1),
        "finished": reasons,
        "slots_in_use": slots,
        "memory_mib": [round(size / 2**20, 1) for size in found.memory],
        "pool_mib": [round(size / 2**20, 1) for size in found.pool],
        "last_half_growth": round(growth, 4),
        "problems": problems,
    }


def main() -> None:
    """Read the arguments, run, report."""
    parser = argparse.ArgumentParser(description="A long run of mixed requests.")
    add_server_options(parser)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=48, help="Requests at a time.")
    given = parser.parse_args()
    with server_of(given) as server:
        began = time.monotonic()
        found = asyncio.run(soak(server, given.requests, given.clients))
        report = judge(server, found, time.monotonic() - began)
    print(json.dumps(report))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
