"""What HTTP costs: tokens a second of concurrent streams from a server, and of the Python API, in turns.

    OMP_NUM_THREADS=1 python bench/http_overhead.py

Both serve the same prompts with the bundled model, float32, one engine thread each, greedy. The turn that warms up
checks that they give the same tokens. The client only reads; it parses what it got when the clock has stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from typing import Any

from served import Served, served

from drex import LLM, SamplingParams
from drex.comparison import machine

PROMPT_TOKENS = 32


async def read(host: str, port: int, body: dict[str, Any]) -> bytes:
    """One streamed completion, as it came."""
    reader, writer = await asyncio.open_connection(host, port)
    text = json.dumps(body).encode()
    lines = ("POST /v1/completions HTTP/1.1", f"host: {host}", "content-type: application/json", "connection: close")
    writer.write("\r\n".join((*lines, f"content-length: {len(text)}", "", "")).encode() + text)
    reply = await reader.read(-1)
    writer.close()
    return reply


async def over_http(
    server: Served, prompts: list[list[int]], tokens: int, ids: bool
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds for all streams together, and their events; with token ids or without."""
    host, port = server.address.removeprefix("http://").split(":")
    body: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_exit_layers": ids,
    }
    body["stream_options"] = {"include_usage": True}
    began = time.perf_counter()
    replies = await asyncio.gather(*(read(host, int(port), {**body, "prompt": prompt}) for prompt in prompts))
    seconds = time.perf_counter() - began
    # Pieces are whole events, so the lengths between them (HTTP's chunks) are on lines of their own.
    lines = [line for reply in replies for line in reply.splitlines() if line.startswith(b"data: {")]
    return seconds, [json.loads(line[6:]) for line in lines]


def check(events: list[dict[str, Any]], expected: list[list[int]], made: int) -> None:
    """Raise SystemExit unless the streams brought as many tokens as they should, and the expected ones, if any."""
    usages = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    if sum(usages) != made:
        raise SystemExit(f"{sum(usages)} tokens came over HTTP, and {made} were asked for")
    found: dict[str, list[int]] = {}
    for event in events:
        for choice in event["choices"]:
            found.setdefault(event["id"], []).extend(token["id"] for token in choice.get("tokens", ()))
    if expected and list(found.values()) != expected:
        raise SystemExit("the tokens over HTTP are not those of the Python API")


def in_python(llm: LLM, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """The same from the Python API."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began, [output.outputs[0].token_ids for output in outputs]


def main() -> None:
    """Read the arguments, take turns, report."""
    parser = argparse.ArgumentParser(description="What HTTP costs.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="Of each stream.")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: with one engine thread each, both ways have the same machine")
    llm = LLM(dtype="float32", max_num_seqs=given.streams)
    text = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n\n\n" * PROMPT_TOKENS
    ids = llm.inputs.encode(text)
    prompts = [ids[start : start + PROMPT_TOKENS] for start in range(given.streams)]
    ratios, speeds = [], {"python": [], "http": []}  # type: ignore[var-annotated]
    made = given.streams * given.tokens
    with served("--dtype", "float32", "--max-num-seqs", str(given.streams)) as server:
        for turn in range(-1, given.turns):
            alone, expected = in_python(llm, prompts, given.tokens)
            seconds, events = asyncio.run(over_http(server, prompts, given.tokens, ids=turn < 0))
            check(events, expected if turn < 0 else [], made)
            if turn < 0:
                continue
            speeds["python"].append(made / alone)
            speeds["http"].append(made / seconds)
            ratios.append(alone / seconds)
    print(
        json.dumps(
            {
                **machine.describe(),
                "streams": given.streams,
                "tokens": given.tokens,
                "tokens_per_s": {way: [round(speed, 1) for speed in each] for way, each in speeds.items()},
                "ratios": [round(ratio, 3) for ratio in ratios],
                "median_ratio": round(statistics.median(ratios), 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
