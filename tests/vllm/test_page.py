"""The gateway's status page in a real browser, with a real server and real edges that connect and die."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from stack import BIN, EDGE_CORE, Process, start

from vllm_specedge.gateway.pages import MAX_WATCHING

from .conftest import Target, until

sync_api = pytest.importorskip("playwright.sync_api")

WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
sync_api.expect.set_options(timeout=(LIMIT_MS := 30_000))
SECRET = "zanzibar"
PROMPT = f"Repeat this line: {SECRET} rivers. {SECRET} rivers. {SECRET} rivers. {SECRET}"
HOSTILE = "<img src=x onerror=alert(1)> lap"


@contextmanager
def opened(browser: "sync_api.Browser", target: Target, **settings: object) -> Iterator["sync_api.Page"]:
    """The page, live; nothing on it may fail, or come from elsewhere."""
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    faults, asked = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(target.server.gateway_url)
    sync_api.expect(page.locator("#state")).to_have_text("live")
    yield page
    context.close()
    assert faults == []
    assert all(url.startswith(target.server.gateway_url) for url in asked)


@contextmanager
def named_edge(target: Target, name: str, log: Path) -> Iterator[Process]:
    command = [str(BIN / "edge-client"), "connect", target.server.gateway_url, "--draft", "ngram", "--name", name]
    process = start(command, log, core=EDGE_CORE)
    try:
        yield process
    finally:
        process.stop()


def text_of(page: "sync_api.Page", selector: str) -> str:
    return page.locator(selector).inner_text()


def test_an_edge_comes_is_seen_at_work_and_dies(
    browser: "sync_api.Browser", edge_target: Target, tmp_path: Path
) -> None:
    with opened(browser, edge_target, viewport=WIDE) as page:
        page.wait_for_selector("#no-edges:visible")
        assert f"edge-client connect {edge_target.server.gateway_url}" in text_of(page, "#no-edges")
        with named_edge(edge_target, "kitchen laptop", tmp_path / "edge.log") as edge:
            page.wait_for_selector("#edges tr")
            assert page.locator("#no-edges").is_hidden()
            edge_target.greedy(PROMPT, num_tokens=96)
            sync_api.expect(page.locator("#edges tr")).to_contain_text("%")
            row = text_of(page, "#edges tr")
            assert row.startswith("kitchen laptop")
            assert "ms" in row
            assert "prompt lookup" in row, "what it drafts with"
            # The engine reports its steps once a second: an edge's accepted tokens may be seen before its gain.
            sync_api.expect(page.locator("#speedup")).to_contain_text("\N{MULTIPLICATION SIGN}")
            sync_api.expect(page.locator("#timeline rect.edge").first, "no accepted drafts").to_be_attached()
            assert page.locator("#rungs .edge").bounding_box()["width"] > 1
            edge.popen.kill()
            page.wait_for_selector("#no-edges:visible")
            assert page.locator("#edges tr").count() == 0
            assert text_of(page, "#num-edges") == "0"
            assert text_of(page, "#state") == "live"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_fits_screens_and_schemes(
    browser: "sync_api.Browser", edge_target: Target, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    with (
        named_edge(edge_target, HOSTILE + "x" * 80, tmp_path / "edge.log"),
        opened(browser, edge_target, viewport=size, color_scheme=scheme) as page,
    ):
        page.wait_for_selector("#edges tr")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
        assert page.locator("img").count() == 0, "an edge's name is text, never markup"
        assert HOSTILE in text_of(page, "#edges tr")
        red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (red < 64) == (scheme == "dark")


def test_no_text_of_any_user_is_on_it(edge_target: Target) -> None:
    edge_target.greedy(PROMPT, num_tokens=16)
    for path in ("", "status.json", "requests", "metrics"):
        answer = httpx.get(f"{edge_target.server.gateway_url}/{path}", trust_env=False)
        assert answer.status_code == 200
        assert SECRET not in answer.text
    with httpx.stream("GET", f"{edge_target.server.gateway_url}/status/events", trust_env=False) as events:
        line = next(events.iter_lines())
    assert line.startswith("data: {")
    assert SECRET not in line


def test_few_watch_at_a_time_and_those_who_leave_make_room(edge_target: Target) -> None:
    url = f"{edge_target.server.gateway_url}/status/events"
    with httpx.Client(trust_env=False, timeout=10) as client:
        for _ in range(2):
            with ExitStack() as watching:
                for _ in range(MAX_WATCHING):
                    watch(client, url, watching)
                assert client.get(url).status_code == 503


def watch(client: httpx.Client, url: str, watching: ExitStack) -> None:
    """Open one more stream; closed ones are noticed within a second, and until then others are refused."""

    def is_admitted() -> bool:
        with ExitStack() as tried:
            answer = tried.enter_context(client.stream("GET", url))
            if answer.status_code == 200:
                watching.push(tried.pop_all())
            return answer.status_code == 200

    until(is_admitted, "nobody may watch any more")
