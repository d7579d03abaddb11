"""Figures that answer in the page: their data, their form, and what a reader's slider does in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import one_line, seeded

from tinyhall import explore
from tinyhall._check import TinyhallError

N = 80
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = seeded()
    bad = torch.rand(N, generator=g) < 0.4
    scores = 10 ** (-3 + bad + 0.6 * torch.randn(N, generator=g))
    return scores, bad, torch.randn(N, 1, 8, 8, generator=g)


def inlined(figure: explore.Explorer) -> dict[str, Any]:
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', figure.html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_data_is_the_samples() -> None:
    scores, bad, x = samples()
    figure = explore.threshold(scores, bad, images=x, thumbs=20)
    data = inlined(figure)
    torch.testing.assert_close(torch.tensor(data["scores"]), scores.log10(), rtol=0, atol=6e-4)
    assert data["bad"] == bad.tolist()
    shown = [data["scores"][row] for row in data["thumbs"]]
    assert len(set(data["thumbs"])) == 20
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (min(data["scores"]), max(data["scores"]))
    first = sorted(data["scores"])[data["start"]]
    removed = sum(s >= first for s, b in zip(data["scores"], data["bad"], strict=True) if b)
    assert removed / int(bad.sum()) >= 0.95
    assert f"removes {removed} of {int(bad.sum())}" in figure.still


def test_the_same_figure_is_the_same_bytes() -> None:
    scores, bad, x = samples()
    assert explore.threshold(scores, bad, images=x).html == explore.threshold(scores, bad, images=x).html


def test_a_name_cannot_end_the_script() -> None:
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad, label="</script><b>x")
    assert inlined(figure)["label"] == "</script><b>x"
    assert figure.html.count("</script>") == 2
    assert "<b>x" not in figure.html.split("<script")[0]


def test_both_forms_are_offered() -> None:
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad)
    bundle = figure._repr_mimebundle_()
    assert bundle["text/html"] == figure.html
    assert bundle["text/plain"] == figure.still
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert figure.widget._esm == figure.source
    assert figure.widget.data == figure.data
    assert "http" not in figure.html.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s, b: (s, b[:5]), ("positive", f"({N},)")),
        (lambda s, b: (s, b | True), ("bad", "both classes")),
        (lambda s, b: (-s, b), ("scores", "above 0")),
        (lambda s, b: (s * torch.nan, b), ("scores", "NaN")),
    ],
)
def test_errors(change: Any, parts: tuple[str, ...], unchecked: None) -> None:
    scores, bad, _ = samples()
    with pytest.raises(TinyhallError) as caught:
        explore.threshold(*change(scores, bad))
    one_line(caught.value, *parts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_the_slider_counts_as_python_does(browser: Any, tmp_path: Path, width: int) -> None:
    scores, bad, x = samples()
    figure = explore.threshold(scores, bad, images=x, thumbs=20)
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<!doctype html><html lang='en'><title>x</title><body>{figure.html}</body></html>")
    page = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(page_file.as_uri())
    slider, told = page.get_by_role("slider"), page.locator("output")
    logs, ranked = figure.data["scores"], sorted(figure.data["scores"])

    def expected(rank: int) -> str:
        threshold = ranked[rank] if rank < N else float("inf")
        gone = [sum(s >= threshold for s, b in zip(logs, figure.data["bad"], strict=True) if b == which) for which in (0, 1)]
        good, wrong = N - int(bad.sum()), int(bad.sum())
        return (
            f"removed: {gone[1]} of {wrong} hallucinated ({100 * gone[1] / wrong:.1f}%); "
            f"kept: {good - gone[0]} of {good} in support ({100 * (good - gone[0]) / good:.1f}%)"
        )

    start = figure.data["start"]
    assert told.inner_text() == expected(start)
    slider.focus()
    for key, rank in (("ArrowRight", start + 1), ("ArrowRight", start + 2), ("Home", 0), ("End", N)):
        page.keyboard.press(key)
        assert told.inner_text() == expected(rank), key
    assert page.locator(".th-removed").count() == 0
    page.keyboard.press("Home")
    assert page.locator(".th-removed").count() == 20
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert told.inner_text() == expected(int(slider.input_value()))
    assert abs(int(slider.input_value()) - N / 2) <= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    page.close()


@pytest.mark.browser
def test_without_javascript_a_sentence_stands_there(browser: Any, tmp_path: Path) -> None:
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad)
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<!doctype html><html lang='en'><body>{figure.html}</body></html>")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert figure.still in page.inner_text("body")
    context.close()
