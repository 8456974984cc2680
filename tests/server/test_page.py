"""The page at `/`: its files and headers, and, where there is a browser, what a visitor sees and does."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixtures import NAME, serving, until, url

import drex.server.page as page_module
from drex import LLM, EarlyExit
from drex.server.run import Server

STATIC = page_module.STATIC
FILES = sorted(path.name for path in STATIC.iterdir())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "correct-horse"


# What needs no browser


def test_the_page_and_its_files_are_served(base: str) -> None:
    page = httpx.get(f"{base}/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == (STATIC / "index.html").read_text()
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for name in FILES:
        reply = httpx.get(f"{base}/static/{name}")
        assert reply.content == (STATIC / name).read_bytes()
        assert reply.headers["content-type"].startswith(kinds[Path(name).suffix])


def test_browsers_are_told_to_load_nothing_from_elsewhere(base: str) -> None:
    for path in ("/", *(f"/static/{name}" for name in FILES)):
        headers = httpx.get(f"{base}{path}").headers
        policy = [part.strip() for part in headers["content-security-policy"].split(";")]
        assert "default-src 'self'" in policy
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_files_name_no_other_place_and_hold_no_markup_from_models() -> None:
    for name in FILES:
        text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        assert not re.search(r"<[^>]+\s(style|on[a-z]+)=", text), f"{name}: inline styles and scripts are forbidden"


def test_files_refer_to_files_that_exist() -> None:
    index = (STATIC / "index.html").read_text()
    linked = set(re.findall(r'(?:src|href)="static/([^"]+)"', index))
    for name in FILES:
        linked |= set(re.findall(r'from "\./([^"]+)"', (STATIC / name).read_text()))
    assert linked == set(FILES) - {"index.html"}


def test_what_has_not_changed_is_not_sent_again(base: str) -> None:
    first = httpx.get(f"{base}/static/page.js")
    again = httpx.get(f"{base}/static/page.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert not again.content
    assert httpx.head(f"{base}/").status_code == 200


def test_only_the_pages_own_files_are_served(base: str) -> None:
    for path in ("/static/none.js", "/static/../page.py", "/static/%2e%2e/page.py", "/static/", "/static"):
        assert httpx.get(f"{base}{path}").status_code == 404, path
    assert httpx.post(f"{base}/static/page.js").status_code == 405


def test_the_first_byte_comes_at_once_while_the_engine_works(base: str) -> None:
    body = {"prompt": [[5, 6, 7]] * 16, "max_tokens": 500, "ignore_eos": True, "stream": True}
    took = []
    with httpx.stream("POST", f"{base}/v1/completions", json=body) as busy, httpx.Client() as client:
        next(busy.iter_lines())
        for _ in range(9):
            started = time.perf_counter()
            with client.stream("GET", f"{base}/") as reply:
                next(reply.iter_raw())
                took.append(time.perf_counter() - started)
    assert sorted(took)[len(took) // 2] < 0.1


def test_tokens_say_what_every_exit_point_said_of_them(base: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_exit_layers": True}
    tokens = httpx.post(f"{base}/v1/completions", json=body).json()["choices"][0]["tokens"]
    assert {token["exit_layer"] for token in tokens} > {2}
    assert tokens[0]["checks"] == []
    for token in tokens[1:]:
        assert [check["layer"] for check in token["checks"]] == [e for e in (2, 4) if e <= token["exit_layer"]]
        reached = [check["confidence"] >= check["threshold"] == 0.3 for check in token["checks"]]
        assert reached == [check["layer"] == token["exit_layer"] for check in token["checks"]]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, as it is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with playwright.sync_playwright() as driver:
        # Inside containers, where tests run as root, Chromium's own sandbox can't be had.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page, and what it did that it must not: errors in the console, requests to other places."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.wrong: list[str] = []
        self.sent: list[Any] = []
        page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._requested)
        page.goto(base)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(f"{self.base}/"):
            self.wrong.append(f"a request to {request.url}")
        if request.url.endswith("/v1/completions"):
            self.sent.append(request.post_data_json)

    def ready(self) -> Visit:
        """Wait until the model is known and the engine is watched; runs are then all alike."""
        self.page.locator("#link[data-state=open]").wait_for()
        self.page.locator("#thresholds input[type=range]").first.wait_for()
        self.page.fill("#seed", "3")
        return self

    def exit_everywhere(self) -> None:
        """Thresholds at which a random model's tokens leave after 2, after 4 and at the end."""
        self.set("threshold-2", 0.4)
        self.set("threshold-4", 0.2)

    def pane(self, number: int) -> Any:
        return self.page.locator(".pane").nth(number)

    def run(self, tokens: int = 40, prompt: str = "the cat sat on") -> None:
        """Run a prompt to its end, under a seed that ends no text early, where none is chosen."""
        self.page.fill("#prompt", prompt)
        if not self.page.input_value("#seed"):
            self.page.fill("#seed", "7")
        self.set("max_tokens", tokens)
        self.page.click("#run")
        until(lambda: self.page.locator("#run").is_enabled())

    def set(self, slider: str, value: float) -> None:
        """Move a slider, as its user's keys would."""
        self.page.locator(f"#{slider}").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})) }",
            value,
        )

    def number(self, css: str) -> int:
        """The first number in an element's text."""
        found = re.search(r"\d+", self.page.locator(css).inner_text().replace(",", ""))
        assert found, css
        return int(found[0])


@contextmanager
def visiting(browser: Any, base: str, **settings: Any) -> Iterator[Visit]:
    """A visit in a browser context of its own, which must have done nothing wrong."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    context.set_default_timeout(20_000)
    try:
        visit = Visit(context.new_page(), base)
        yield visit
        assert visit.wrong == []
    finally:
        context.close()


@pytest.fixture
def visit(browser: Any, base: str) -> Iterator[Visit]:
    with visiting(browser, base) as opened:
        yield opened.ready()


def test_it_loads_and_says_what_is_served(visit: Visit) -> None:
    assert visit.page.locator("#model-name").inner_text() == NAME
    assert "6 layers · exits after 2, 4 · max_prob" in visit.page.locator("#model-facts").inner_text()
    assert visit.page.locator("#legend li").all_inner_texts() == [
        "left after layer 2",
        "left after layer 4",
        "went to full depth, 6 layers",
    ]
    assert visit.page.locator("#run_ahead").input_value() == "trusted"
    assert [visit.page.locator(f"#threshold-{layer}").input_value() for layer in (2, 4)] == ["0.3", "0.3"]


LOOKS = """tokens => tokens.map(token => {
  const style = getComputedStyle(token);
  return [token.dataset.layer, style.backgroundColor, style.getPropertyValue("--line")];
})"""


def test_tokens_are_coloured_and_underlined_by_depth(visit: Visit) -> None:
    visit.page.uncheck("#compare")
    visit.exit_everywhere()
    visit.run(60)
    looks: dict[str, set[tuple[str, str]]] = {}
    for layer, color, line in visit.pane(0).locator(".token").evaluate_all(LOOKS):
        looks.setdefault(layer, set()).add((color, line))
    assert set(looks) == {"2", "4", "6"}
    assert all(len(look) == 1 for look in looks.values())
    for part in (0, 1):
        assert len({next(iter(look))[part] for look in looks.values()}) == 3
    assert visit.pane(0).locator(".state").inner_text() == "reached max tokens"
    said = visit.pane(0).locator(".figures").inner_text()
    assert re.search(r"tokens/s\s+[\d.,]+\s+mean depth\s+\d\.\d+ of 6\s+first token\s+\d+ ms\s+tokens\s+60", said)
    assert len(visit.sent) == 1


def test_a_token_tells_its_confidence_on_hover_and_by_keyboard(visit: Visit) -> None:
    visit.exit_everywhere()
    visit.run(60)
    early = visit.pane(0).locator(".token[data-layer='4']:not(.part)").first
    early.hover()
    card = visit.page.locator("#inspector")
    said = card.inner_text()
    assert "after layer 4" in said
    below, reached = re.findall(r"after \d\s+([\d.]+) ([<≥]) ([\d.]+)\s+(exits|goes on)", said)
    assert (below[1:], reached[1:]) == (("<", "0.40", "goes on"), ("≥", "0.20", "exits"))
    assert float(below[0]) < 0.4
    assert float(reached[0]) >= 0.2
    assert re.search(r"log-probability -\d+\.\d+", said)
    visit.page.mouse.move(5, 5)
    assert card.is_hidden()
    visit.pane(0).locator(".text").focus()
    visit.page.keyboard.press("End")
    visit.page.keyboard.press("Home")
    until(lambda: "first token always goes to full depth" in card.inner_text())
    assert "log-probability" in visit.page.locator("#said").inner_text()
    visit.page.keyboard.press("ArrowRight")
    until(lambda: "after 2" in card.inner_text())
    visit.page.keyboard.press("Escape")
    assert card.is_hidden()


def test_full_depth_runs_beside_it_and_the_first_difference_is_marked(visit: Visit) -> None:
    visit.run(60)
    early, full = sorted(visit.sent, key=lambda body: body["early_exit"] is False)
    assert full["early_exit"] is False
    assert early["prompt"] == "the cat sat on"
    assert early.pop("run_ahead") == "trusted"
    assert {**early, "early_exit": False} == full
    assert set(visit.pane(1).locator(".token").evaluate_all("all => all.map(one => one.dataset.layer)")) == {"6"}
    texts = [visit.pane(n).locator(".token").evaluate_all("all => all.map(one => one.textContent)") for n in (0, 1)]
    first = next(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
    assert f"first differ at token {first + 1}," in visit.page.locator("#difference").inner_text()
    for number in (0, 1):
        marked = visit.pane(number).locator(".token").evaluate_all("all => all.map(one => one.matches('.differs'))")
        assert [index for index, mark in enumerate(marked) if mark] == [first]
    assert "100 % full depth" in str(visit.pane(1).locator(".shares").get_attribute("aria-label"))


STATES_AT_REQUESTS = """() => {
  const sent = window.fetch;
  window.states = [];
  window.fetch = (path, options) => {
    const states = [...document.querySelectorAll(".pane .state")].map((state) => state.textContent);
    if (path.endsWith("v1/completions")) window.states.push(states);
    return sent(path, options);
  };
}"""


def test_the_two_streams_take_turns_and_the_page_says_so(visit: Visit) -> None:
    """Side by side they would slow each other down, and their tokens a second would compare nothing."""
    assert "take turns" in visit.page.locator("#turns").inner_text()
    visit.page.evaluate(STATES_AT_REQUESTS)
    visit.run(60)
    first, second = visit.page.evaluate("window.states")
    assert first == ["waiting", "waits for its turn"]
    assert second == ["reached max tokens", "waiting"]
    visit.page.uncheck("#compare")
    assert visit.page.locator("#turns").is_hidden()


def test_sliders_change_the_request(visit: Visit) -> None:
    visit.page.uncheck("#compare")
    for name, value in (("threshold-2", 0.91), ("threshold-4", 1), ("temperature", 1.25), ("top_p", 0.6)):
        visit.set(name, value)
    visit.page.fill("#seed", "7")
    visit.page.select_option("#run_ahead", "lossless")
    visit.run(5)
    visit.page.uncheck("#exit-2")
    visit.run(5)
    visit.page.uncheck("#exit-4")
    visit.run(5)
    both, one, none = visit.sent
    assert both["early_exit"] == {"layers": [2, 4], "thresholds": [0.91, 1]}
    assert one["early_exit"] == {"layers": [4], "thresholds": [1]}
    assert none["early_exit"] is False
    wanted = {"temperature": 1.25, "top_p": 0.6, "max_tokens": 5, "seed": 7, "run_ahead": "lossless"}
    assert wanted.items() <= both.items()


def test_a_run_can_be_stopped(visit: Visit, server: Server) -> None:
    visit.set("max_tokens", 1000)
    visit.page.fill("#prompt", "the cat")
    visit.page.click("#run")
    visit.pane(0).locator(".token").nth(3).wait_for()
    assert visit.pane(1).locator(".state").inner_text() == "waits for its turn"
    visit.page.click("#stop")
    for number in (0, 1):
        until(lambda pane=number: visit.pane(pane).locator(".state").inner_text() == "stopped")
    assert visit.pane(1).locator(".token").count() == 0
    assert visit.page.locator("#run").is_enabled()
    until(lambda: server.serving.unfinished == 0)


def test_errors_are_said_next_to_their_cause(visit: Visit) -> None:
    visit.page.fill("#seed", "seven")
    visit.page.click("#run")
    assert "whole number" in visit.page.locator("#seed-error").inner_text()
    visit.page.fill("#seed", "")
    visit.page.fill("#prompt", "the cat sat on the mat " * 400)
    visit.page.click("#run")
    until(lambda: visit.page.locator("#prompt-error").inner_text())
    assert not visit.page.locator("#seed-error").inner_text()
    assert visit.page.locator("#prompt").get_attribute("aria-invalid") == "true"
    # The browser itself notes a refused request in its console.
    assert all("400 (Bad Request)" in said for said in visit.wrong)
    visit.wrong.clear()
    visit.run(5)
    assert not visit.page.locator("#prompt-error").inner_text()


def test_text_from_the_model_stays_text(visit: Visit) -> None:
    visit.run(10, prompt="<img src=x onerror=alert(1)><b>the")
    assert visit.pane(0).locator("img, b").count() == 0
    assert visit.pane(0).locator(".prompt").inner_text().startswith("<img")


def test_the_engine_is_seen_at_work(visit: Visit) -> None:
    strips = visit.page.locator(".strip")
    assert strips.locator("h3").all_inner_texts() == [
        *("Buffer after layer 2", "Buffer after layer 4", "Passes", "Throughput", "Requests", "K/V slots")
    ]
    visit.page.select_option("#background", "16")
    until(lambda: visit.number("#gauges div:nth-child(3) dd") >= 16)
    until(lambda: visit.number("#histogram tr:last-child td:nth-child(3)") > 100)
    throughput = strips.nth(3).locator("canvas")
    drawn = throughput.evaluate("canvas => canvas.toDataURL()")
    until(lambda: throughput.evaluate("canvas => canvas.toDataURL()") != drawn)
    shares = visit.page.locator("#histogram td:nth-child(2)").all_inner_texts()
    assert sum(int(share.split()[0]) for share in shares) in range(98, 103)
    until(lambda: visit.number(".strip:nth-child(6) b") > 0)
    visit.page.locator("#span label").nth(2).click()
    until(lambda: visit.page.locator("#histogram-span").inner_text() == "last 1 s")
    visit.page.select_option("#background", "0")
    until(lambda: "Idle" in visit.page.locator("#live-note").inner_text())


def test_watching_ends_while_the_page_is_hidden(visit: Visit) -> None:
    script = """hidden => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    visit.page.evaluate(script, True)
    assert visit.page.locator("#link").inner_text() == "paused"
    visit.page.evaluate(script, False)
    visit.page.locator("#link[data-state=open]").wait_for()


def test_it_connects_again_when_the_server_is_back(browser: Any, make_llm: Callable[..., LLM]) -> None:
    with serving(make_llm()) as first:
        address, (host, port) = url(first), first.address
        context = browser.new_context()
        visit = Visit(context.new_page(), address).ready()
    try:
        visit.page.locator("#link[data-state=broken]").wait_for()
        assert "trying again" in visit.page.locator("#link").inner_text()
        visit.page.click("#run")
        until(lambda: "can't be reached" in visit.pane(0).locator(".error").inner_text())
        with serving(make_llm(early_exit=EarlyExit(layers=[3], thresholds=0.3)), at=(host, port)):
            visit.page.locator("#link[data-state=open]").wait_for()
            visit.page.locator("#threshold-3").wait_for()
            visit.run(10)
            assert visit.pane(0).locator(".token").count() == 10
            context.close()
    finally:
        context.close()


def test_a_key_is_asked_for_where_one_is_needed(browser: Any, make_llm: Callable[..., LLM]) -> None:
    with serving(make_llm(), api_keys=(KEY,)) as guarded, visiting(browser, url(guarded)) as visit:
        visit.page.locator("#key").wait_for()
        assert "wants an API key" in visit.page.locator("#key-error").inner_text()
        visit.page.fill("#key-value", "wrong")
        visit.page.keyboard.press("Enter")
        until(lambda: "not accepted" in visit.page.locator("#key-error").inner_text())
        visit.page.fill("#key-value", KEY)
        visit.page.keyboard.press("Enter")
        visit.ready()
        assert visit.page.locator("#key").is_hidden()
        visit.run(5)
        assert visit.pane(0).locator(".token").count() == 5
        assert KEY not in visit.page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert all("401 (Unauthorized)" in said for said in visit.wrong)
        visit.wrong.clear()


def test_a_model_without_exits_is_shown_all_the_same(browser: Any, make_llm: Callable[..., LLM]) -> None:
    with serving(make_llm(early_exit=EarlyExit.off())) as plain, visiting(browser, url(plain)) as visit:
        visit.page.locator("#link[data-state=open]").wait_for()
        assert visit.page.locator("#run-ahead-field").is_hidden()
        assert "no exit points" in visit.page.locator("#exits-note").inner_text()
        visit.run(10)
        assert visit.pane(0).locator(".token").count() == 10
        assert "agree in all 10 tokens" in visit.page.locator("#difference").inner_text()


# Contrast of text with what is behind it, as WCAG 2 defines it; canvases and disabled controls are exempt.
CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const draw = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (colors) => {
    draw.clearRect(0, 0, 1, 1);
    for (const color of colors) { draw.fillStyle = color; draw.fillRect(0, 0, 1, 1); }
    return [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest(".unseen, .skip, :disabled, noscript, option")) continue;
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [a, b] = [paint(behind), paint([...behind, getComputedStyle(element).color])].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const what = `${element.tagName} ${element.className}: ${element.textContent.trim().slice(0, 20)}`;
    if (ratio < 4.5) found.push(`${what} ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_both_have_contrast(browser: Any, base: str, scheme: str) -> None:
    with visiting(browser, base, color_scheme=scheme) as visit:
        visit.ready().run(60)
        visit.pane(0).locator(".token.early:not(.part)").last.hover()
        background = "getComputedStyle(document.body).backgroundColor"
        before = visit.page.evaluate(background)
        channels = [int(channel) for channel in re.findall(r"\d+", before)]
        assert (sum(channels) > 600) == (scheme == "light")
        assert visit.page.evaluate(CONTRAST) == []
        while visit.page.locator("#theme span").inner_text() != {"light": "dark", "dark": "light"}[scheme]:
            visit.page.click("#theme")
        assert visit.page.evaluate(background) != before
        visit.page.reload()
        visit.ready()
        assert visit.page.evaluate(background) != before
        assert visit.page.evaluate(CONTRAST) == []


def test_it_fits_a_phone(browser: Any, base: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with visiting(browser, base, **phone) as visit:
        visit.ready().run(60, prompt="the cat sat on the mat; " + "x" * 200)
        token = visit.pane(0).locator(".token.early:not(.part)").last
        token.tap()
        assert visit.page.locator("#inspector").is_visible()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
        wide = visit.page.evaluate(
            """() => [...document.querySelectorAll("main *, header *, footer *, #inspector")]
              .filter((one) => one.checkVisibility() && !one.closest(".unseen, pre, .shares"))
              .filter((one) => one.getBoundingClientRect().right > 360.5)
              .map((one) => one.outerHTML.slice(0, 80))"""
        )
        assert wide == []


def test_everything_has_a_name_and_can_be_reached_by_keyboard(visit: Visit) -> None:
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
          .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert visit.page.locator("main, header.top, footer").count() == 3
    reached = set()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.add(visit.page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = {"theme", "prompt", "run", "compare", "threshold-2", "temperature", "seed", "text", "background"}
    assert wanted <= reached
