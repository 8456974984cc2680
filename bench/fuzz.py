"""Fuzzing: Schemathesis over the served OpenAPI schema, until enough cases were run.

    python bench/fuzz.py --cases 5000
    python bench/fuzz.py --cases 5000 --tokenizer-kind byte-fallback

Every reply must be one that the schema documents, with a body of its form, and none may be a 5xx. Afterwards the
engine must be idle, with no K/V slot in use, and still serve. Without --url a server is started. Exit code 1
if anything was found.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from served import Served, add_server_options, server_of

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
OPTIONS = ("--max-model-len", "48", "--dtype", "float32", "--max-num-seqs", "64")
"""Of a server that is started here: outputs are short, so that time goes into requests."""

NEARLY_RIGHT: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/completions",
        {
            "prompt": ["def add", "import os"],
            "max_tokens": 2,
            "logit_bias": {"5": 1.5},
            "early_exit": {"layers": [4]},
            "stop": ["\n\n", "\u00e9"],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "\U0001f642"}]}],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 3,
            "logit_bias": {"163": 100},
        },
    ),
    ("/v1/completions", {"prompt": [[5, 200, 131], [7]], "max_tokens": 1, "echo": True, "logprobs": 2, "n": 2}),
    ("/detokenize", {"tokens": [243, 162, 156, 133]}),
)
"""Paths and bodies that are right until bytes of them change."""


def run(server: Served, examples: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run of Schemathesis; returns its report. /live never ends, and is left out."""
    report = folder / "report.json"
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.address}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--exclude-path", "/live", "--request-timeout", "60"),
        *("--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure", "--warnings", "off"),
        *("--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode not in (0, 1) or not report.is_file():
        raise RuntimeError(f"Schemathesis failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {**found, "text": done.stdout, "failed": done.returncode != 0}


def check_idle(server: Served) -> None:
    """Raise AssertionError unless nothing is left of all requests, and the server goes on."""
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < end, "requests are left over"
        time.sleep(0.2)
    assert server.metric("drex_kv_slots", 'state="in_use"') == 0
    assert post(server, "/v1/completions", json.dumps({"prompt": "def add", "max_tokens": 4}).encode()) == 200


def mutate(body: bytes, draw: random.Random) -> bytes:
    """A body with a few bytes changed, dropped, repeated or put elsewhere."""
    out = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at, to = sorted(draw.randrange(len(out) + 1) for _ in range(2))
        kind = draw.randrange(4)
        if kind == 0:
            out[at:at] = bytes([draw.randrange(256)])
        elif kind == 1:
            del out[at:to]
        elif kind == 2:
            out[at:at] = out[at:to] * draw.randint(1, 20)
        else:
            out[at:to] = draw.choice((b"[", b"}", b'"', b"\\u", b"1e99", b"null", b"-0", b"\xc3"))
    return bytes(out)


def malformed(server: Served, count: int, seed: int) -> dict[str, int]:
    """Send bodies that are nearly right; returns how often each status came back. Raises AssertionError for a 5xx."""
    draw, statuses = random.Random(seed), Counter[str]()
    for number in range(count):
        path, good = NEARLY_RIGHT[number % len(NEARLY_RIGHT)]
        body = mutate(json.dumps(good).encode(), draw)
        status = post(server, path, body)
        assert status < 500, (path, body)
        statuses[str(status)] += 1
    return dict(statuses)


def post(server: Served, path: str, body: bytes) -> int:
    """The status of a request."""
    asked = urllib.request.Request(f"{server.address}{path}", body, {"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def fuzz(server: Served, cases: int, examples: int, seed: int) -> dict[str, Any]:
    """Rounds of Schemathesis with different seeds until there were enough cases, then malformed bodies."""
    began, generated, rounds = time.monotonic(), 0, 0
    failures: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        while generated < cases and not failures:
            report = run(server, examples, seed + rounds, Path(folder))
            rounds += 1
            generated += report["test_cases"]["generated"]
            failures += report["failures"] + report["errors"]
            if failures:
                sys.stderr.write(report["text"])
    statuses = malformed(server, cases // 10, seed)
    check_idle(server)
    return {
        "cases": generated,
        "rounds": rounds,
        "failures": len(failures),
        "malformed": statuses,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Read the arguments, run, report."""
    parser = argparse.ArgumentParser(description="Schemathesis over the served schema.")
    add_server_options(parser)
    parser.add_argument("--cases", type=int, default=5000, help="At least so many.")
    parser.add_argument("--examples", type=int, default=200, help="Of each operation in a round.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with server_of(given, *OPTIONS) as server:
        found = fuzz(server, given.cases, given.examples, given.seed)
    print(json.dumps(found))
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
