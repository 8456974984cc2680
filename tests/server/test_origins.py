"""Browsers' pages of other origins: who may use the server, and what they may send."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from server_fixtures import serving, url

from drex import LLM


@pytest.fixture(scope="module")
def allowing(make_llm: Callable[..., LLM]) -> Iterator[str]:
    """The address of a server with a key that lets one origin in."""
    with serving(make_llm(), api_keys=("first",), allowed_origins=("https://page.example",)) as server:
        yield url(server)


def test_browsers_pages_elsewhere_are_let_in_only_where_they_are_named(allowing: str, base: str) -> None:
    def preflight(address: str, origin: str) -> httpx.Response:
        asked = {"origin": origin, "access-control-request-method": "POST"}
        return httpx.options(f"{address}/v1/completions", headers=asked)

    named = preflight(allowing, "https://page.example")
    assert named.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in preflight(allowing, "https://other.example").headers
    assert "access-control-allow-origin" not in preflight(base, "https://page.example").headers


def test_pages_elsewhere_may_send_the_headers_of_openais_clients(allowing: str) -> None:
    # The names that the JavaScript client adds, and those that the Python one sends.
    names = {"authorization", "content-type", "x-request-id", "x-stainless-helper-method", "x-stainless-timeout"}
    names |= {f"x-stainless-{name}" for name in ("arch", "lang", "os", "package-version", "retry-count", "runtime")}
    names |= {"x-stainless-runtime-version", "openai-organization", "openai-project"}

    def note(sent: httpx.Request) -> None:
        names.update(name for name in sent.headers if name.startswith("x-"))

    with (
        httpx.Client(event_hooks={"request": [note]}) as below,
        openai.OpenAI(base_url=f"{allowing}/v1", api_key="first", max_retries=0, http_client=below) as client,
    ):
        client.models.list()
    for method in ("GET", "HEAD", "POST"):
        asked = {
            "origin": "https://page.example",
            "access-control-request-method": method,
            "access-control-request-headers": ",".join(sorted(names)),
        }
        reply = httpx.options(f"{allowing}/v1/completions", headers=asked)
        assert reply.status_code == 200, reply.text
        allowed = {name.strip() for name in reply.headers["access-control-allow-headers"].split(",")}
        assert names <= allowed
    # An answer, and an error too, can be read by the page.
    for key, status in (("first", 200), ("wrong", 401)):
        headers = {"origin": "https://page.example", "authorization": f"Bearer {key}"}
        reply = httpx.get(f"{allowing}/v1/models", headers=headers)
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == "https://page.example"
    # Elsewhere nothing is said.
    asked["origin"] = "https://other.example"
    assert httpx.options(f"{allowing}/v1/completions", headers=asked).status_code == 400
