"""Figures that answer in the page: their data, their form, and what a reader's slider does in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from common import one_line, seeded

from tinyhall import explore
from tinyhall._check import TinyhallError

N = 80


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


K, M = 9, 21


def journey() -> dict[str, Any]:
    g = seeded(4)
    return {
        "t": list(range(K - 1, -1, -1)),
        "x": torch.randn(6, K, generator=g),
        "x0_hat": 3 * torch.randn(6, K, generator=g),
        "bad": torch.tensor([False, True, False, False, True, False]),
        "grid": torch.linspace(-2, 2, M),
        "exact": torch.randn(K, M, generator=g),
        "learned": torch.randn(K, M, generator=g),
        "modes": (-1, 1),
    }


def test_a_ride_is_rounded_and_cut_to_its_range() -> None:
    given = journey()
    data = inlined(explore.ride(**given))
    torch.testing.assert_close(torch.tensor(data["x"]), given["x"].clamp(-2, 2), rtol=0, atol=6e-3)
    torch.testing.assert_close(torch.tensor(data["x0"]), given["x0_hat"].clamp(-2, 2), rtol=0, atol=6e-3)
    torch.testing.assert_close(torch.tensor(data["learned"]), given["learned"].clamp(-2, 2), rtol=0, atol=6e-3)
    assert (data["t"], data["modes"], data["bad"]) == (given["t"], [-1, 1], given["bad"].tolist())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"t": list(range(K))}, ("t", "falling")),
        ({"x": torch.zeros(6, 3)}, ("x", "(6, 9)")),
        ({"learned": torch.zeros(K, 3)}, ("learned", "(9, 21)")),
    ],
)
def test_a_ride_that_does_not_fit(change: dict[str, Any], parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        explore.ride(**journey() | change)
    one_line(caught.value, *parts)


@contextmanager
def shown(browser: Any, figure: explore.Explorer, folder: Path, width: int, **options: Any) -> Iterator[Any]:
    """The figure on a page of its own. Nothing may be complained of, requested in vain, or wider than the page."""
    place = folder / "page.html"
    place.write_text(f"<!doctype html><html lang='en'><title>x</title><body>{figure.html}</body></html>")
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(place.as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_the_slider_counts_as_python_does(browser: Any, tmp_path: Path, width: int) -> None:
    scores, bad, x = samples()
    figure = explore.threshold(scores, bad, images=x, thumbs=20)
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
    with shown(browser, figure, tmp_path, width) as page:
        slider, told = page.get_by_role("slider"), page.locator("output")
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


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_a_ride_by_keyboard_and_mouse(browser: Any, tmp_path: Path, width: int) -> None:
    figure = explore.ride(**journey())
    data = figure.data

    def expected(k: int, sample: int) -> str:
        end = "as a hallucination" if data["bad"][sample] else "in support"
        x, x0 = data["x"][sample][k], data["x0"][sample][k]
        return f"t = {data['t'][k]}; sample {sample + 1} of 6, which ends {end}: x = {x:.2f}, predicted x0 = {x0:.2f}"

    with shown(browser, figure, tmp_path, width) as page:
        told = page.locator("output")
        assert told.inner_text() == expected(0, 1)  # the first hallucination is picked
        page.get_by_role("slider").focus()
        page.keyboard.press("ArrowRight")
        assert told.inner_text() == expected(1, 1)
        page.get_by_role("button", name="Pick another").press("Enter")
        assert told.inner_text() == expected(1, 2)
        page.locator("circle.th-pick").nth(4).dispatch_event("click")
        assert told.inner_text() == expected(1, 4)
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Pause").wait_for()
        page.get_by_role("button", name="Play").wait_for()  # it stops by itself at the end
        assert told.inner_text() == expected(K - 1, 4)
        page.get_by_role("button", name="Play").click()  # and begins again
        page.get_by_role("button", name="Pause").click()
        assert page.get_by_role("slider").input_value() != str(K - 1)


@pytest.mark.browser
def test_without_javascript_a_sentence_stands_there(browser: Any, tmp_path: Path) -> None:
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad)
    with shown(browser, figure, tmp_path, 1000, java_script_enabled=False) as page:
        assert figure.still in page.inner_text("body")
