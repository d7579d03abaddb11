"""The built pages in a real browser, with every other host cut off: `make book` or `make preview`, then `make pages`."""

from __future__ import annotations

import functools
import html
import http.server
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from common import ROOT

BUILT = ROOT / "_build" / "html"
PAGES = sorted(str(p.relative_to(BUILT)) for p in BUILT.glob("book/**/*.html"))
STILL = {page: re.findall(r'<div id="th-\w{10}"><p>(.*?)</p>', (BUILT / page).read_text("utf-8"), re.DOTALL) for page in PAGES}
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder
HEAVIEST = 2 * 2**20  # bytes of a page and its pictures; the theme's scripts and fonts, and MathJax, are the same for all
THEME = ("THEBE_JS_URL", "Got invalid theme mode")  # what the theme's own scripts complain of
# Barriers that are not the book's to mend: how Sphinx lists parameters one to a line (dd without dt), and docutils references
# (links among the items of a list).
KNOWN = {"definition-list": "dt.sig > dl", "aria-required-children": ".citation-list"}
# Contrast is most of the work, and most of it is code, thousands of words in a dozen colours: one word of each is looked at.
BARRIERS = """async ([known, repeated]) => {
  const options = { resultTypes: ["violations", "incomplete"], preload: false };
  const once = {};
  for (const word of document.querySelectorAll("article .highlight span[class]"))
    if (word.textContent.trim().length > 1) once[word.className] ??= word; // of a single sign, axe cannot tell
  for (const word of Object.values(once)) word.dataset.once = "";
  const contrast = { include: ["article", "[data-once]"], exclude: repeated };
  const found = [
    await axe.run("article", { ...options, rules: { "color-contrast": { enabled: false } } }),
    await axe.run(contrast, { ...options, runOnly: ["color-contrast"] }),
  ];
  // What has hardly any contrast axe leaves to people: it might be hidden on purpose. Here nothing is.
  const vanished = (node) => node.any.some((check) => check.data?.messageKey === "equalRatio");
  const unseen = found.flatMap((results) => results.incomplete)
    .map((v) => ({ ...v, impact: "serious", nodes: v.nodes.filter(vanished) }));
  return found.flatMap((results) => results.violations).concat(unseen)
    .filter((v) => ["serious", "critical"].includes(v.impact))
    .flatMap((v) => v.nodes.map((node) => [v.id, node.target.join(" "), node.failureSummary]))
    .filter(([id, target]) => !(id in known && document.querySelector(target).matches(known[id])));
}"""
DANGLING = """() => [...document.querySelectorAll("article a.headerlink")].map((a) => decodeURIComponent(a.hash.slice(1)))
  .filter((name) => document.querySelectorAll("#" + CSS.escape(name)).length !== 1)"""
# Chapters keep what follows.
SECOND = ["01_gaussian_1d", "02_gaussian_2d", "03_simple_shapes", "04_hands", "05_mnist_collapse", "06_bench"]
# What a reader meets of a chapter: its words, code, figures, and what sticks out of its place.
MET = r"""() => {
  const article = document.querySelector("article");
  const words = (node) => (node.textContent.match(/[\p{L}\p{N}][^\s]*/gu) || []).length;
  const copy = article.cloneNode(true);
  const off = "pre, details.hide, .math, mjx-container, .headerlink, .th-time, .th-explorer, script, style, .prev-next-footer";
  copy.querySelectorAll(off).forEach((node) => node.remove());
  const all = words(copy);
  copy.querySelectorAll(".exercise, .solution").forEach((node) => node.remove());
  const seen = (node) => node.checkVisibility() && !node.closest("details:not([open])");
  const inputs = [...article.querySelectorAll(".cell_input pre")].filter(seen);
  const code = inputs.map((pre) => pre.textContent.trimEnd().split("\n"));
  const top = article.getBoundingClientRect().top, height = article.getBoundingClientRect().height;
  const box = (node) => node.getBoundingClientRect();
  const figures = [...article.querySelectorAll("img[src*='_images/'], .th-explorer")];
  const captioned = (node) => node.closest("figure")?.querySelector("figcaption .caption-number") &&
    words(node.closest("figure").querySelector("figcaption")) > 8;
  const paragraphs = [...copy.querySelectorAll("p")].map((p) => p.textContent.replace(/\s+/g, " "));
  const frame = (node) => {  // the nearest that scrolls by itself, if any
    for (let at = node; at && at !== article; at = at.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(at).overflowX)) return at;
    return null;
  };
  const places = "p, li, pre, table, img, svg, .th-explorer, figcaption, h1, h2, h3";
  const wide = (node) => {
    const scrolls = frame(node);
    return scrolls ? scrolls.scrollWidth > scrolls.clientWidth + 1 : box(node).right > innerWidth + 1;
  };
  // A formula must end before its number begins.
  const hidden = (node) => {
    const number = node.querySelector(".eqno");
    return number && box(node.querySelector("mjx-container svg")).right > box(number).left;
  };
  const cut = [...article.querySelectorAll(places)].filter(seen).filter(wide)
    .concat([...article.querySelectorAll("div.math")].filter(hidden))
    .map((node) => [node.tagName, Boolean(node.closest("pre, table")), node.textContent.slice(0, 50)]);
  return {
    words: words(copy), all, cells: code.length, lines: Math.max(...code.map((lines) => lines.length)),
    columns: Math.max(...code.flat().map((line) => line.length)),
    picture: box(figures[0]).bottom + scrollY, interactive: (box(document.querySelector(".th-explorer")).top - top) / height,
    bare: figures.filter((node) => !captioned(node)).length,
    unsaid: [...article.querySelectorAll("img[src*='_images/']")].filter((img) => words({ textContent: img.alt }) < 8).length,
    long: paragraphs.filter((text) => text.split(" ").length > 90),
    asides: paragraphs.flatMap((text) => text.match(/\([^()]{41,}\)/g) || []),
    bold: [...copy.querySelectorAll("strong")].map((node) => node.textContent).filter((text) => /\d/.test(text)),
    plumbing: code.flat().filter((line) => /glue|print\(|ljust|\bsay\(|^(import|from) /.test(line)),
    cut,
  };
}"""
REPEATED = [".highlight", "dl.py dl.py"]  # code, and members of a class, which look as functions do

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(not PAGES, reason="needs a built book: make book, or make preview"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BUILT))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def axe() -> str:
    from axe_playwright_python.sync_playwright import Axe

    return Axe().axe_script


def cut_off(page: Any, address: str) -> list[str]:
    """Lets the page have what is at the address and nothing else; the list fills with its complaints and failed requests."""
    said: list[str] = []

    def only_here(route: Any) -> None:
        if route.request.url.startswith((address, "data:")):
            route.continue_()
        else:
            route.abort()

    def complain(text: str) -> None:
        if not any(known in text for known in THEME):
            said.append(text)

    page.route("**/*", only_here)
    page.on("console", lambda m: complain(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complain(str(e)))
    page.on("requestfailed", lambda r: said.append(f"{r.failure} {r.url}"))
    page.on("response", lambda r: said.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return said


def answers(page: Any, figure: Any) -> bool:
    """Whether what a figure says changes once its controls are used."""
    told = figure.locator("output").first
    before = told.inner_text()
    for control in figure.locator("input[type=range], select").all():
        control.focus()
        page.keyboard.press("Home" if control.evaluate("c => c.value === c.max") else "End")
    if told.inner_text() == before:
        figure.get_by_role("button").first.click()
    return told.inner_text() != before


# From a server on a telephone, and from a folder on a dark desktop: two loads of a page are enough to see both of each.
@pytest.mark.parametrize("page_name", PAGES)
@pytest.mark.parametrize(("width", "scheme", "served"), [(390, "light", True), (1280, "dark", False)], ids=["phone", "dark"])
def test_a_page_needs_nothing_else(
    browser: Any, address: str, axe: str, page_name: str, width: int, scheme: str, served: bool
) -> None:
    at = address if served else BUILT.as_uri()
    with closing(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)) as page:
        said, sent = cut_off(page, at), []
        page.on("response", lambda r: sent.append(r))
        page.goto(f"{at}/{page_name}", wait_until="networkidle")
        page.wait_for_load_state("load")  # an idle network does not say that the page's own scripts have run
        if page.locator("article .math").count():
            page.wait_for_function("() => window.MathJax?.startup?.promise")
        assert page.locator("html").get_attribute("data-theme") == scheme
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        page.evaluate("window.MathJax?.startup?.promise.then(() => null)")
        assert page.locator("mjx-container").count() == page.locator("article .math").count()
        assert page.locator("[data-mjx-error], [data-mml-node=merror]").count() == 0

        # A picture waits until it is scrolled to, in a place of its size; a chapter says how long it takes.
        assert page.locator("article img[src*='/_images/']:not([loading=lazy][width][height]):not([src$='.svg'])").count() == 0
        assert page.locator("article .th-time").count() == bool(re.match(r"book/\d", page_name))

        # Headings, equations, figures and verdicts can be linked to.
        assert page.locator("article img[src*='/_images/']:not([id])").count() == 0
        assert page.evaluate(DANGLING) == []

        if SCREENSHOTS:
            name = f"{Path(page_name).stem}-{'phone' if served else scheme}.jpg"
            page.screenshot(path=Path(SCREENSHOTS) / name, full_page=True, quality=60, type="jpeg")
        page.evaluate(axe)
        assert page.evaluate(BARRIERS, [KNOWN, REPEATED]) == []

        figures = page.locator(".th-explorer").all()
        assert len(figures) == len(STILL[page_name])
        assert [i for i, figure in enumerate(figures) if not answers(page, figure)] == []
        assert said == []
        if served:
            own = [r for r in sent if "/_static/" not in r.url and "/mathjax/" not in r.url]
            assert sum(int(r.headers.get("content-length", 0)) for r in own) <= HEAVIEST


@pytest.mark.parametrize("chapter", SECOND)
def test_a_chapter_reads_as_the_second_edition_does(browser: Any, address: str, chapter: str) -> None:
    with closing(browser.new_page(viewport={"width": 1280, "height": 900})) as page:
        cut_off(page, address)
        page.goto(f"{address}/book/{chapter}.html", wait_until="networkidle")
        page.locator(".th-explorer").first.wait_for()  # an idle network does not say that the page's own scripts have run
        page.evaluate("window.MathJax?.startup?.promise.then(() => null)")
        met = page.evaluate(MET)
        assert 1500 <= met["words"] <= 1900
        assert met["all"] <= 2500
        assert met["cells"] <= 12
        assert met["lines"] <= 10
        assert met["columns"] <= 79
        assert met["picture"] <= 900
        assert met["interactive"] <= 0.4  # where it begins
        for key in ("bare", "unsaid"):
            assert met[key] == 0, key
        for key in ("long", "asides", "bold", "plumbing", "cut"):
            assert met[key] == [], key
        page.set_viewport_size({"width": 390, "height": 900})
        # On a phone code and tables scroll in frames of their own, and nothing else does.
        assert [text for _, framed, text in page.evaluate(MET)["cut"] if not framed] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("page_name", [page for page, still in STILL.items() if still])
def test_without_javascript_a_page_still_tells(browser: Any, page_name: str) -> None:
    with closing(browser.new_page(java_script_enabled=False)) as page:
        page.goto((BUILT / page_name).as_uri())
        text = page.locator("article").inner_text()
        assert page.locator("article h1").inner_text().strip("#") in text
        assert len(text) > 1000
        for sentence in STILL[page_name]:
            assert html.unescape(sentence) in text


def test_search_finds_a_sixth_finger(browser: Any, address: str) -> None:
    with closing(browser.new_page()) as page:
        said = cut_off(page, address)
        page.goto(f"{address}/search.html?q=sixth+finger")
        page.locator("#search-results a[href*='04_hands']").first.wait_for()
        assert said == []


@pytest.mark.parametrize("page_name", [p for p in PAGES if re.match(r"book/0[1-5]_", p)])
def test_at_its_foot_a_chapter_leads_to_the_next(page_name: str) -> None:
    foot = re.search(r'class="right-next"\s+href="([^"]*)"', (BUILT / page_name).read_text("utf-8"))
    number = int(Path(page_name).name[:2])
    assert foot and re.fullmatch(rf"0{number + 1}_\w+\.html", foot[1])
