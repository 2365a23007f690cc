"""The status page as readers see it: in Chromium, on a phone and a desktop, light and dark, with and without figures.

Its data comes from the gateway's own view of simulated engines and edges; only the stream that updates it each second
is replaced, so that a picture is the same each time. tests/vllm/test_page.py tests the stream.

The pictures in `status-page/` were approved by a person. A test fails if the page differs by more than another font
would, and leaves its picture in the folder that pytest names; if that one is right, move it there.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.test_overview import engine
from vllm_specedge.gateway.demand import DemandBook
from vllm_specedge.gateway.known import POOL, ROLES, RouterLimits
from vllm_specedge.gateway.pages import PAGE, PAGE_HEADERS
from vllm_specedge.gateway.router import Router
from vllm_specedge.gateway.status import Overview
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello
from vllm_specedge.wire.telemetry import Group

sync_api = pytest.importorskip("playwright.sync_api")

ORIGIN = "http://gateway.test"
SIZES = {"wide": {"width": 1200, "height": 900}, "phone": {"width": 390, "height": 844}}
PICTURES = Path(__file__).with_name("status-page")
CELL_PIXELS = 24
"""Pictures are compared by the mean colour of squares of this size, in which letters of another font look the same."""
MAX_MEAN_DIFFERENCE = 4.0
"""Largest mean difference over all squares, of 255."""
MIN_CONTRAST = 4.5
"""Least contrast of text, by WCAG 2.2, 1.4.3."""
MIN_SHAPE_CONTRAST = 3.0
"""Least contrast of graphics, by 1.4.11."""
SENDS_ONCE = """
window.EventSource = class {
  constructor() { setTimeout(() => this.onmessage({data: JSON.stringify(%s)})); }
};
"""
CONTRAST = """
() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const contrast = (one, other) => {
    const [light, dark] = [one, other].map(luminance).sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const found = [];
  for (const mark of document.querySelectorAll(".legend i"))
    found.push(["shape", contrast(behind(mark), behind(mark.parentElement)), mark.className]);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const seen = contrast(rgb(getComputedStyle(node).color), behind(node));
    found.push(["text", seen, texts.currentNode.textContent.trim()]);
  }
  return found;
}
"""


def edge(router: Router, number: int, name: str, client: str, accepted: int) -> None:
    router.edge_hello(
        number, Hello(PROTOCOL_VERSION, client, name, POOL, "f", 4), f"session-{number}", frozenset(ROLES)
    )
    info = router.edges[number]
    info.num_proposed_tokens, info.num_verified_tokens, info.num_accepted_tokens = 3 * accepted, 2 * accepted, accepted


def view_of(router: Router, overview: Overview, now_s: float) -> dict[str, Any]:
    return {**overview.view(router, {1: 0.0213, 2: 0.0061}, now_s), "capacity": DemandBook().view()}


def nothing() -> dict[str, Any]:
    """The state right after the start."""
    return view_of(Router(RouterLimits()), Overview(), 0.0)


def idle() -> dict[str, Any]:
    """A model without requests and edges."""
    router, overview = Router(RouterLimits()), Overview()
    for second in (0, 2, 4):
        engine(router, b"a", committed_tokens=0)
        overview.sample(router, float(second))
    return view_of(router, overview, 4.0)


def busy(accepted: int = 300) -> dict[str, Any]:
    """Two edges whose drafts are accepted, or none of whose drafts are."""
    router, overview = Router(RouterLimits()), Overview()
    for second in range(0, 12, 2):
        engine(
            router,
            b"a",
            committed_tokens=second * 60,
            steps=second * 30,
            verified_drafts=second * 20 * (accepted > 0),
            ngram_verified_drafts=second * 4,
            engine_steps=second * 10,
            engine_step_us=second * 10 * 52_000,
            verified_tokens=second * accepted // 5,
            accepted_tokens=second * accepted // 10,
            ngram_verified_tokens=second * 8,
            ngram_accepted_tokens=second * 4,
            decode_us=second * 400_000,
            plain_decode_us=second * 600_000,
        )
        overview.sample(router, float(second))
    edge(router, 1, "kitchen laptop", "edge-client 0.4.0, smollm2-draft (int8)", accepted)
    edge(router, 2, "workstation", "edge-client 0.4.0, prompt lookup", accepted // 4)
    overview.steps(Group(10.0 - 0.1 * index, 0.08, 3, 9, 4 + index % 5) for index in range(60))
    return view_of(router, overview, 10.0)


SHOWN = {"nothing": nothing(), "busy": busy()}


def served(route: "sync_api.Route") -> None:
    """Serve the page's own files, with the gateway's headers."""
    path = route.request.url.removeprefix(ORIGIN + "/").removeprefix("page/") or "index.html"
    found = PAGE / path
    route.fulfill(path=found, headers=PAGE_HEADERS) if found.exists() else route.fulfill(status=404)


@contextmanager
def shown(
    browser: "sync_api.Browser", view: dict[str, Any], size: str = "wide", scheme: str = "light"
) -> Iterator["sync_api.Page"]:
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    page.add_init_script(SENDS_ONCE % json.dumps(view))
    page.route("**/*", served)
    page.goto(ORIGIN)
    sync_api.expect(page.locator("#state")).to_have_text("live")
    yield page
    context.close()


def squares(picture: Path, width: int, height: int) -> "np.ndarray[Any, Any]":
    """Mean colours of a picture's squares, scaled to the given size."""
    with Image.open(picture) as image:
        small = image.convert("RGB").resize((width // CELL_PIXELS, height // CELL_PIXELS), Image.Resampling.BOX)
    return np.asarray(small, dtype=float)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHOWN)
def test_it_looks_as_it_did(browser: "sync_api.Browser", tmp_path: Path, name: str, size: str, scheme: str) -> None:
    file = f"{name}-{size}-{scheme}.png"
    with shown(browser, SHOWN[name], size, scheme) as page:
        page.screenshot(path=tmp_path / file, full_page=True)
    with Image.open(PICTURES / file) as known, Image.open(tmp_path / file) as now:
        width, height = known.size
        assert now.size[0] == width, "it scrolls sideways"
        assert abs(now.size[1] - height) <= 0.1 * height
    difference = np.abs(squares(PICTURES / file, width, height) - squares(tmp_path / file, width, height)).mean()
    assert difference <= MAX_MEAN_DIFFERENCE, f"look at {tmp_path / file}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [nothing(), idle(), busy()], ids=["nothing", "idle", "busy"])
def test_every_text_and_colour_can_be_told_from_its_ground(
    browser: "sync_api.Browser", view: dict[str, Any], scheme: str
) -> None:
    with shown(browser, view, scheme=scheme) as page:
        found = page.evaluate(CONTRAST)
    assert len(found) > 15
    least = {"text": MIN_CONTRAST, "shape": MIN_SHAPE_CONTRAST}
    assert [(what, contrast) for kind, contrast, what in found if contrast < least[kind]] == []


def test_it_says_how_much_faster_how_much_came_from_edges_and_what_each_gave(browser: "sync_api.Browser") -> None:
    with shown(browser, busy()) as page:
        for tile, said in (("#speedup", "1.50"), ("#from-edges", "50 %"), ("#tokens", "60"), ("#step", "52.0 ms")):
            assert said in page.locator(tile).inner_text()
        rows = page.locator("#edges tr").all_inner_texts()
        assert page.locator("#hint").is_hidden()
    assert [row.split()[:2] for row in rows] == [["kitchen", "laptop"], ["workstation", "edge-client"]]
    assert "21.3 ms" in rows[0]
    assert "300" in rows[0].split()
    assert "75" in rows[1].split()


@pytest.mark.parametrize(
    ("view", "hint"),
    [
        (nothing(), "vllm serve MODEL --speculative-config edge"),
        (idle(), "Ask the model something"),
        (busy(accepted=0), f"edge-client doctor {ORIGIN} --draft MODEL"),
    ],
    ids=["no engine", "no request", "no draft is used"],
)
def test_where_nothing_is_to_be_seen_it_says_what_to_do(
    browser: "sync_api.Browser", view: dict[str, Any], hint: str
) -> None:
    with shown(browser, view) as page:
        assert hint in page.locator("#hint").inner_text()
        if not view["edges"]:
            assert f"edge-client connect {ORIGIN} --draft MODEL" in page.locator("#no-edges").inner_text()
            assert page.locator("#edge-table").is_hidden()


@pytest.mark.parametrize("size", SIZES)
def test_a_screen_reader_hears_figures_with_their_names(browser: "sync_api.Browser", size: str) -> None:
    """Also on a phone, where the table's cells are laid out one below the other."""
    with shown(browser, busy(), size) as page:
        heard = page.locator("body").aria_snapshot()
        table = page.get_by_role("table", name="Edges (2)")
        assert table.get_by_role("columnheader").all_inner_texts()[-1] == "acceptance"
        assert table.get_by_role("rowheader").count() == 2
        assert page.get_by_role("img", name="60 groups; of 540 draft tokens 360 were accepted").count() == 1
        assert page.get_by_role("status").inner_text() == "live"
    for said in ("term: tokens from edges", "definition: 50 %", "listitem: an edge's draft 67 %"):
        assert said in heard
    assert [line for line in heard.splitlines() if line.strip() == "- img"] == [], "every picture has a name"


def test_the_whole_page_is_reached_by_the_keyboard(browser: "sync_api.Browser") -> None:
    view = busy()
    view["edges"] = view["edges"] * 60
    with shown(browser, view) as page:
        page.keyboard.press("End")
        page.wait_for_function("() => window.scrollY + window.innerHeight >= document.body.scrollHeight - 2")
        assert page.locator("#edges tr").last.is_visible()
