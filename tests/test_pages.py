"""The built pages in a real browser, with every other host cut off: `make book`, then `make pages`."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from common import ROOT

BUILT = ROOT / "_build" / "html"
PAGES = sorted(str(p.relative_to(BUILT)) for p in BUILT.glob("book/*.html"))
HEAVIEST = 2 * 2**20  # bytes of a page and its pictures; the theme's scripts and fonts, and MathJax, are the same for all
THEME = ("THEBE_JS_URL", "Got invalid theme mode")  # what the theme's own scripts complain of

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(not PAGES, reason="needs a built book: make book"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BUILT))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("page_name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_needs_nothing_else(browser: Any, address: str, page_name: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, refused, sent = [], [], []

    def complain(text: str) -> None:
        if not any(known in text for known in THEME):
            said.append(text)

    page.on("console", lambda m: complain(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complain(str(e)))
    page.on("response", lambda r: said.append(f"{r.status} {r.url}") if r.status >= 400 else sent.append(r))

    def only_here(route: Any) -> None:
        if route.request.url.startswith((address, "data:")):
            route.continue_()
        else:
            refused.append(route.request.url)
            route.abort()

    page.route("**/*", only_here)
    page.goto(f"{address}/{page_name}", wait_until="networkidle")
    assert said == []
    assert refused == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for slider in page.locator(".th-explorer input[type=range]").all():  # a figure answers where it stands
        told = slider.locator("xpath=ancestor::div[contains(@class, 'th-explorer')]").locator("output")
        before = told.inner_text()
        slider.focus()
        page.keyboard.press("End")
        assert told.inner_text() != before
    own = [r for r in sent if "/_static/" not in r.url and "/mathjax/" not in r.url]
    assert sum(int(r.headers.get("content-length", 0)) for r in own) <= HEAVIEST
    page.close()
