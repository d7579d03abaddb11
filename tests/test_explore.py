"""Figures that answer in the page: their data, their form, and what a reader's slider does in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from common import ROOT, one_line, seeded

from tinyhall import datasets, explore
from tinyhall.core._check import TinyhallError
from tinyhall.core.sampling import ddim, ddpm, reverse
from tinyhall.core.schedule import Schedule
from tinyhall.core.training import train
from tinyhall.measure.filtering import Filter
from tinyhall.nets import MLP

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


@pytest.mark.parametrize("thumbs", [1, 10, 60])
def test_few_samples_are_all_shown_once(thumbs: int) -> None:
    scores, bad, x = samples()
    shown = explore.threshold(scores[:10], bad[:10], images=x[:10], thumbs=thumbs).data["thumbs"]
    assert len(set(shown)) == len(shown) == min(thumbs, 10)
    assert scores[:10][shown].tolist() == sorted(scores[:10][shown].tolist())


@pytest.mark.parametrize("remove", [0.3, 0.7, 0.95, 1.0])
def test_the_first_threshold_is_the_filter_s(remove: float) -> None:
    scores, bad = torch.arange(1.0, 41), torch.arange(40) < 20
    data = explore.threshold(scores, bad, remove=remove).data
    expected = Filter.calibrate(scores, bad, remove).threshold
    assert scores.sort().values[data["start"]] == expected  # 0.7 of 20 are 14, though in binary they are a little more
    source = (ROOT / "tinyhall/figures/js/threshold.js").read_text()
    with_names = set(re.findall(r"\w+", re.search(r"data: {(.*?)}", source)[1]))
    assert with_names == data.keys()


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
        (lambda s, b: (s, b[:5]), ("bad", f"({N},)")),
        (lambda s, b: (s, b | True), ("bad", "both classes")),
        (lambda s, b: (-s, b), ("scores", "above 0")),
        (lambda s, b: (s * torch.nan, b), ("scores", "NaN")),
        (lambda s, b: (s * torch.inf, b), ("scores", "finite", "inf")),
    ],
)
def test_errors(change: Any, parts: tuple[str, ...], unchecked: None) -> None:
    scores, bad, _ = samples()
    with pytest.raises(TinyhallError) as caught:
        explore.threshold(*change(scores, bad))
    one_line(caught.value, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"images": torch.zeros(7, 1, 8, 8)}, ("images", f"{N} of them", "(7, 1, 8, 8)")),
        ({"images": torch.zeros(N, 1, 8, 8), "thumbs": 0}, ("thumbs", "at least 1")),
        ({"remove": 0.0}, ("remove", "(0, 1]", "0.0")),
        ({"remove": 1.5}, ("remove", "(0, 1]", "1.5")),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], parts: tuple[str, ...], unchecked: None) -> None:
    scores, bad, _ = samples()
    with pytest.raises(TinyhallError) as caught:
        explore.threshold(scores, bad, **options)
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
def shown(
    browser: Any, figure: explore.Explorer, folder: Path, width: int, still: bool = False, before: str = "", **options: Any
) -> Iterator[Any]:
    """The figure on a page of its own. Nothing may be complained of, requested in vain, or wider than the page.

    Where `still`, its clock runs only as the test says, so that no machine is too slow for it; `before` is a script that runs
    ahead of the page's own.
    """
    place = folder / "page.html"
    place.write_text(f"<!doctype html><html lang='en'><title>x</title><body>{figure.html}</body></html>")
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    if still:
        page.clock.install(time=0)
        page.clock.pause_at(1000)
    if before:
        page.add_init_script(before)
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
        # The two histograms have one area, so that their totals have to be said.
        said = f"{N - int(bad.sum())} in support. Orange: {int(bad.sum())} hallucinated"
        assert said in page.locator(".th-key").first.inner_text()
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

    with shown(browser, figure, tmp_path, width, still=True) as page:
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
        page.clock.run_for(10_000)
        page.get_by_role("button", name="Play").wait_for()  # it stops by itself at the end
        assert told.inner_text() == expected(K - 1, 4)
        page.get_by_role("button", name="Play").click()  # and begins again
        page.clock.run_for(200)
        page.get_by_role("button", name="Pause").click()
        assert page.get_by_role("slider").input_value() not in ("0", str(K - 1))


@pytest.mark.browser
def test_without_javascript_a_sentence_stands_there(browser: Any, tmp_path: Path) -> None:
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad)
    with shown(browser, figure, tmp_path, 1000, java_script_enabled=False) as page:
        assert figure.still in page.inner_text("body")


LINE, QUICK = datasets.GaussianMixture.line(), Schedule.linear(1e-3, 0.2, 100)
WAYS = {"DDPM, 20": ddpm("large", 20), "DDIM, 10": ddim(sample_steps=10)}


class Mulberry:
    """The page's normal numbers: the same generator, in Python's integers."""

    def __init__(self, seed: int) -> None:
        self.state, self.spare = seed, None

    def uniform(self) -> float:
        mask = 2**32 - 1
        self.state = (self.state + 0x6D2B79F5) & mask
        mixed = (self.state ^ self.state >> 15) * (self.state | 1) & mask
        mixed ^= mixed + ((mixed ^ mixed >> 7) * (mixed | 61) & mask) & mask
        return (mixed ^ mixed >> 14) / 2**32

    def normal(self) -> float:
        if self.spare is not None:
            kept, self.spare = self.spare, None
            return kept
        radius, angle = math.sqrt(-2 * math.log(1 - self.uniform())), 2 * math.pi * self.uniform()
        self.spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def randn(self, shape: Any) -> torch.Tensor:
        return torch.tensor([self.normal() for _ in range(math.prod(shape))]).reshape(*shape)


def learned() -> MLP:
    """A network that draws some samples in support and some that are not."""
    net, g = MLP(dim=1, width=16, blocks=2, generator=seeded(3)), seeded(2)
    for _ in train(net, LINE.sample(500, g), QUICK, train_steps=200, batch_size=500, lr=5e-3, generator=g):
        pass
    return net.eval()


@pytest.mark.browser
def test_the_page_computes_both_denoisers(browser: Any, tmp_path: Path) -> None:
    net, wide = learned(), {"every step": ddpm("large")}
    figure = explore.draw(net, QUICK, wide, LINE, most=40)
    x, t = torch.linspace(-4, 4, 161), (0, 1, 17, 99)
    with shown(browser, figure, tmp_path, 1000) as page:
        script = figure.source.replace("export default { render };", "Object.assign(window, { network, exact, normals });")
        page.add_script_tag(type="module", content=script)
        # A module of the page's own text runs some time after it was added.
        page.wait_for_function("() => window.network !== undefined")
        told = page.evaluate(
            "([data, xs, ts]) => [network(data), exact(data)].map((eps) => ts.map((t) => xs.map((x) => eps(t)(x))))",
            [figure.data, x.tolist(), list(t)],  # all times are visited: the k-th is k
        )
        drawn = page.evaluate("() => Array.from({ length: 6 }, normals(5))")
    for denoiser, found, tolerance in ((net, told[0], 5e-3), (LINE.denoiser(QUICK), told[1], 1e-4)):
        with torch.no_grad():
            expected = torch.stack([denoiser(x[:, None], torch.full((161,), moment))[:, 0] for moment in t])
        inside = expected.abs() < 24  # what the table holds; a state is never where the noise would have to be more
        assert float(inside.float().mean()) > 0.6
        torch.testing.assert_close(torch.tensor(found)[inside], expected[inside], rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(torch.tensor(drawn), Mulberry(5).randn((6,)), rtol=1e-6, atol=1e-6)


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_drawing_in_the_page(browser: Any, tmp_path: Path, width: int, motion: str) -> None:
    net = learned()
    figure = explore.draw(net, QUICK, WAYS, LINE, most=2000)
    data = figure.data
    levels = torch.frombuffer(bytearray(base64.b64decode(data["table"]["packed"])), dtype=torch.int16).long() % 2**16
    table = (-25 + 50 * levels.double() / 65_535).reshape(-1, data["points"])
    visited = sorted({c.t for way in WAYS.values() for c in way(QUICK)})

    def tabled(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        row = table[visited.index(int(t[0]))]
        place = (x[:, 0].double() - data["low"]) * (data["points"] - 1) / (data["high"] - data["low"])
        left = place.floor().long().clamp(0, data["points"] - 2)
        return (row[left] + (place - left) * (row[left + 1] - row[left]))[:, None].to(x.dtype)

    def expected(who: str, way: str, seed: int, n: int) -> str:
        noise, x = Mulberry(seed), []
        for _ in range(n // 100):
            *_, last = reverse(
                tabled if who == "network" else LINE.denoiser(QUICK), QUICK, (100, 1), sampler=WAYS[way], generator=noise
            )
            x.append(last.x)
        wrong = int((~LINE.in_support(torch.cat(x))).sum())
        assert 0 < wrong < n
        return (
            f"{who}, seed {seed}: {n:,} of {n:,} samples drawn, {wrong} beyond 6 std of every mode "
            f"({1e5 * wrong / n:.0f} in 100,000)"
        )

    with shown(browser, figure, tmp_path, width, reduced_motion=motion) as page:
        told = page.locator("output")
        idle = page.get_by_role("button", name="Draw")
        idle.wait_for()  # it has begun by itself, and ends
        assert told.inner_text() == expected("network", "DDPM, 20", 0, 1000)
        heights = page.eval_on_selector_all("rect", "all => all.map((r) => Number(r.getAttribute('height')))")
        assert max(heights) > 100
        page.get_by_label("denoiser").select_option("exact denoiser")
        idle.wait_for()
        assert told.inner_text() == expected("exact denoiser", "DDPM, 20", 0, 1000)
        page.get_by_label("sampler").select_option("DDIM, 10")
        page.get_by_label("samples", exact=True).press("Home")
        page.get_by_label("seed").press("ArrowRight")
        idle.wait_for()
        assert told.inner_text() == expected("exact denoiser", "DDIM, 10", 1, 100)


@pytest.mark.browser
def test_drawing_can_be_stopped(browser: Any, tmp_path: Path) -> None:
    figure = explore.draw(MLP(dim=1), QUICK, {"DDPM": ddpm()}, LINE, most=4_000_000)
    # The page's turns come when the test says, so that no machine draws too fast to be stopped.
    held = "window.held = []; window.setTimeout = (f) => window.held.push(f);"
    with shown(browser, figure, tmp_path, 1000, before=held) as page:
        page.get_by_role("button", name="Stop").click()
        page.evaluate("held.splice(0).forEach((f) => f())")
        page.get_by_role("button", name="Draw").wait_for()
        assert page.locator("output").inner_text().startswith("network, seed 0: 0 of 2,000,000 samples drawn, 0 beyond")
        page.get_by_role("button", name="Draw").click()  # a choice that changes meanwhile begins anew, and one alone goes on
        page.get_by_label("seed").press("ArrowRight")
        page.evaluate("held.splice(0).forEach((f) => f())")
        page.get_by_role("button", name="Stop").click()
        page.evaluate("held.splice(0).forEach((f) => f())")
        page.get_by_role("button", name="Draw").wait_for()
        assert page.locator("output").inner_text().startswith("network, seed 1: 0 of")


def plane_samples() -> dict[str, Any]:
    g = seeded(6)
    data = datasets.GaussianMixture.grid(side=3)
    x = torch.cat([data.sample(40, g), data.means[:4].float() / 2])
    return {
        "t": (4, 2, 0), "x": x, "x0_hat": torch.stack([x + s * torch.randn(x.shape, generator=g) for s in (0.5, 0.2, 0.01)], 1),
        "scores": torch.rand(len(x), generator=g) + 0.1, "data": data,
    }  # fmt: skip


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_the_brush_tells_what_is_under_it(browser: Any, tmp_path: Path, width: int) -> None:
    given = plane_samples()
    figure = explore.brush(**given)
    x, bad = given["x"], ~given["data"].in_support(given["x"])
    logs = torch.tensor(figure.data["scores"], dtype=torch.float64)

    def middle(rows: torch.Tensor) -> str:
        return f"10^{float(logs[rows].quantile(0.5, interpolation='lower')):.1f}" if bool(rows.any()) else "-"

    with shown(browser, figure, tmp_path, width) as page:
        told = page.locator("output")
        across, up, size = (page.get_by_label(f"brush, {name}") for name in ("across", "up", "size"))

        def check() -> int:
            a, b, r = (float(s.input_value()) for s in (across, up, size))
            rows = ((x - torch.tensor([a, b])).abs() <= r).all(1)
            assert told.inner_text() == (
                f"brush at ({a:.2f}, {b:.2f}) and {r:.2f} around: {int(rows.sum())} of 44 samples, {int((rows & bad).sum())} "
                f"hallucinated; median trajectory variance: {middle(rows)}, of all: {middle(rows | True)}"
            )
            assert page.locator(".th-picked").count() == int(rows.sum())
            return int(rows.sum())

        assert check() > 0
        size.press("End")
        check()
        across.press("ArrowLeft")
        up.press("Home")
        check()
        size.press("Home")
        box = page.locator("svg").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + box["height"] * 0.46)
        page.mouse.up()
        assert abs(float(across.input_value())) < 0.2
        assert abs(float(up.input_value())) < 0.2
        size.press("PageUp")
        check()
        drawn = page.eval_on_selector_all("polyline", "all => all.filter((p) => p.getAttribute('points')).length")
        assert drawn == 2 * check()  # a trail and a curve for each
        for name, kind in (("good", ~bad), ("bad", bad)):  # each in the colour of its end
            lines = page.locator(f".th-trail-{name}[points]:not([points=''])")
            a, b, r = (float(s.input_value()) for s in (across, up, size))
            assert lines.count() == 2 * int((kind & ((x - torch.tensor([a, b])).abs() <= r).all(1)).sum())


@pytest.mark.browser
def test_a_gallery_is_sorted(browser: Any, tmp_path: Path) -> None:
    g = seeded(7)
    kind = torch.arange(20) % 3
    scores = {"variance": torch.rand(20, generator=g), "area": torch.rand(20, generator=g)}
    names = ("in support", "six", "four")
    figure = explore.gallery(torch.randn(20, 3, 8, 8, generator=g), scores, kind, names, [str(i) for i in range(20)])

    def of(rows: list[int]) -> str:
        counts = [(sum(int(kind[i]) == k for i in rows), name) for k, name in enumerate(names)]
        return ", ".join(f"{count} {name}" for count, name in counts if count)

    with shown(browser, figure, tmp_path, 390) as page:
        told, tiles = page.locator("output"), page.locator(".th-tile")
        for name in scores:
            for which, shown_kind in enumerate(("all", *names)):
                page.get_by_label("sorted by", exact=True).select_option(name)
                page.get_by_label("shown", exact=True).select_option(shown_kind)
                order = [i for i in scores[name].argsort(descending=True).tolist() if which == 0 or kind[i] == which - 1]
                wrong, few = sum(int(kind[i]) > 0 for i in order), min(12, len(order))
                assert told.inner_text() == (
                    f"{len(order)} of 20 images by {name}, {wrong} of them hallucinated. "
                    f"The first {few}: {of(order[:12])}. The last {few}: {of(order[-12:])}."
                )
                assert tiles.all_inner_texts() == [str(i) for i in order]
                places = tiles.evaluate_all("all => all.map((tile) => tile.style.backgroundPosition)")
                assert places == [f"{-(i % 12) * 48}px {-(i // 12) * 48}px" for i in order]


def sheets() -> dict[str, explore.Sheet]:
    return {
        "AUROC": explore.Sheet([[0.5, 1.0], [0.75, None]], "One is perfect.", worst=0.5),
        "calls": explore.Sheet([[0.0, 4.0], [10.0, 2.0]], "Of the network.", "{:.0f}", worst=10, best=0),
    }


@pytest.mark.browser
def test_a_heat_map_is_switched_and_sorted(browser: Any, tmp_path: Path) -> None:
    figure = explore.heat(("first", "second"), ("line", "plane"), sheets())
    assert "AUROC. first: line 0.50, plane 1.00; second: line 0.75." in figure.still
    with shown(browser, figure, tmp_path, 390) as page:
        told, by, which = page.locator("output"), page.get_by_label("sorted by"), page.get_by_label("shown")
        fields = page.locator(".th-heat tbody tr")
        assert told.inner_text() == "One is perfect."
        assert fields.all_inner_texts() == ["first\t0.50\t1.00", "second\t0.75\t-"]
        shades = page.locator(".th-heat tbody td").evaluate_all("all => all.map((td) => td.style.backgroundColor)")
        assert shades == [f"rgba(0, 114, 178, {alpha})" for alpha in ("0", "0.5", "0.25")] + [""]
        by.select_option("line")
        assert fields.all_inner_texts() == ["second\t0.75\t-", "first\t0.50\t1.00"]
        assert told.inner_text() == "AUROC, line: second 0.75, first 0.50"
        by.select_option("plane")
        assert told.inner_text() == "AUROC, plane: first 1.00"  # what is not there comes last, and is not told
        which.select_option("calls")
        assert told.inner_text() == "calls, plane: second 2, first 4"  # fewer are better
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_generations_by_keyboard_and_button(browser: Any, tmp_path: Path, width: int) -> None:
    g = seeded(8)
    arms = {"nothing dropped": 3, "half real": 2}  # which ends before the other
    shapes = {"points": (7, 2), "digits": (5, 1, 8, 8)}
    sets = {
        name: {
            arm: explore.Drawn(torch.randn(depth, *shape, generator=g), torch.rand(depth, shape[0], generator=g) < 0.5, told)
            for arm, depth in arms.items()
            for told in [[f"{name} {i}" for i in range(depth)]]
        }
        for name, shape in shapes.items()
    }
    figure = explore.generations(sets, mixture=datasets.GaussianMixture.grid(side=3))

    def expected(name: str, i: int) -> str:
        there = {arm: drawn for arm, drawn in sets[name].items() if i < len(drawn.x)}
        counts = [f"{arm}, {int(drawn.bad[i].sum())} of {len(drawn.bad[i])} hallucinated" for arm, drawn in there.items()]
        return f"generation {i + 1} of 3: " + "; ".join(counts)

    with shown(browser, figure, tmp_path, width) as page:
        told, slider = page.locator("output"), page.get_by_role("slider")
        assert told.inner_text() == expected("points", 0)
        assert page.locator("svg circle").count() == 2 * 9
        drawn = [path.get_attribute("d").count("M") for path in page.locator("svg path").all()]
        bad = [int(arm.bad[0].sum()) for arm in sets["points"].values()]
        assert drawn == [k for b in bad for k in (7 - b, b)]
        page.get_by_role("combobox").select_option(label="digits")
        assert told.inner_text() == expected("digits", 0)
        slider.press("ArrowRight")
        assert told.inner_text() == expected("digits", 1)
        assert page.locator("p.th-told").all_inner_texts() == [f"{arm}: digits 1" for arm in arms]
        assert page.locator(".th-is-bad").count() == sum(int(arm.bad[1].sum()) for arm in sets["digits"].values())
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Play").wait_for()
        assert told.inner_text() == expected("digits", 2)
        assert "half real: ends with generation 2" in page.locator(".th-explorer").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


PLAIN = explore.Drawn(torch.zeros(2, 3, 2), torch.zeros(2, 3) > 0, ["one", "two"])


def asked() -> dict[str, Any]:
    g = seeded(10)
    given = {name: torch.randn(2, 3, 1, 8, 8, generator=g) for name in ("network", "exact denoiser")}
    near = {patch: torch.randn(2, 3, 1, 8, 8, generator=g) for patch in (9, 13)}
    return {
        "t": (600, 400, 100), "schedule": Schedule.cosine(1000),
        "seen": {"far": torch.randn(3, 1, 8, 8, generator=g), "close": torch.randn(3, 1, 8, 8, generator=g)},
        "given": given, "near": near, "light": {name: torch.rand(2, 3, generator=g) for name in (*given, *near)},
        "what": "second square",
    }  # fmt: skip


@pytest.mark.parametrize("width", [1000, 390])
def test_answers_by_time_and_patch(browser: Any, tmp_path: Path, width: int) -> None:
    told_of = asked()
    figure, light = explore.answers(**told_of), told_of["light"]

    def expected(case: int, k: int, patch: int) -> str:
        names = {"network": "network", "exact denoiser": "exact denoiser", patch: f"near-sighted, P = {patch}"}
        said = "; ".join(f"{name} {round(float(light[key][case, k]), 2):.2f}" for key, name in names.items())
        bar = f"{float(told_of['schedule'].alpha_bar[told_of['t'][k]]):.1%}"
        return f"{('far', 'close')[case]}, t = {told_of['t'][k]}, {bar} of the signal left; second square: {said}"

    with shown(browser, figure, tmp_path, width) as page:
        told = page.locator("output")
        time, patch = page.get_by_role("slider").all()
        assert told.inner_text() == expected(0, 1, 9)
        time.press("ArrowRight")
        patch.press("End")
        assert told.inner_text() == expected(0, 2, 13)
        page.get_by_role("combobox").select_option("close")
        assert told.inner_text() == expected(1, 2, 13)
        assert page.get_by_role("img").count() == 4
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Play").wait_for()
        assert told.inner_text() == expected(1, 2, 13)


def tale() -> dict[str, Any]:
    g = seeded(9)
    return {
        "forward": torch.randn(3, 8, 2, generator=g), "backward": torch.randn(4, 8, 2, generator=g),
        "bad": torch.arange(8) % 4 == 0, "removed": torch.arange(8) % 2 == 0,
        "captions": ["One.", "Two.", "Three.", "Four.", "Five."],
    }  # fmt: skip


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000])
def test_a_story_is_told_and_can_be_stopped(browser: Any, tmp_path: Path, width: int) -> None:
    figure = explore.story(**tale())
    with shown(browser, figure, tmp_path, width, still=True) as page:
        page.get_by_role("button", name="Pause").wait_for()  # it has begun by itself
        first = page.locator("output").inner_text()
        page.clock.run_for(400)
        page.get_by_role("button", name="Pause").click()
        stopped = page.locator("output").inner_text()
        assert stopped != first
        page.clock.run_for(1000)
        assert page.locator("output").inner_text() == stopped


@pytest.mark.browser
def test_a_story_that_the_reader_has_started_is_not_told_twice(browser: Any, tmp_path: Path) -> None:
    figure = SimpleNamespace(html=f"<div style='height: 3000px'></div>{explore.story(**tale()).html}")
    seen = """
        const Real = IntersectionObserver;
        window.IntersectionObserver = class extends Real {
          constructor(f, options) {
            super((entries, self) => {
              f(entries, self);
              if (entries.some((entry) => entry.isIntersecting)) document.body.dataset.seen = "yes";
            }, options);
          }
        };
    """
    with shown(browser, figure, tmp_path, 1000, still=True, before=seen) as page:  # type: ignore[arg-type]
        button, told = page.locator("button"), page.locator("output")
        button.wait_for(state="attached")
        button.dispatch_event("click")  # where it is not seen yet
        assert button.inner_text() == "Pause"
        button.scroll_into_view_if_needed()
        page.locator("body[data-seen]").wait_for()  # now it is, and starts by itself
        page.clock.run_for(200)
        button.click()
        assert button.inner_text() == "Play"
        stopped = told.inner_text()
        page.clock.run_for(1000)
        assert told.inner_text() == stopped


@pytest.mark.browser
def test_a_story_that_is_taken_away_does_not_begin(browser: Any, tmp_path: Path) -> None:
    figure = explore.story(**tale())
    empty = SimpleNamespace(html="<div style='height: 3000px'></div><div id='place'></div>")
    with shown(browser, empty, tmp_path, 1000) as page:  # type: ignore[arg-type]
        script = figure.source.replace("export default { render };", "window.tell = render;")
        page.add_script_tag(type="module", content=script)
        page.wait_for_function("() => window.tell !== undefined")
        page.evaluate(
            "(data) => tell({ model: { get: () => data }, el: document.getElementById('place') })()",  # and stopped at once
            figure.data,
        )
        page.locator("button").scroll_into_view_if_needed()
        page.wait_for_timeout(400)
        assert page.locator("button").inner_text() == "Play"


@pytest.mark.browser
def test_a_story_stands_still_where_that_is_asked(browser: Any, tmp_path: Path) -> None:
    figure = explore.story(**tale())
    scenes = figure.data["scenes"]
    with shown(browser, figure, tmp_path, 1000, still=True, reduced_motion="reduce") as page:
        page.clock.run_for(1000)
        told, slider, said = page.locator("output"), page.get_by_role("slider"), page.locator(".th-caption")
        assert told.inner_text() == f"1 of 5, picture 1 of {len(scenes)}"
        for frame in (1, scenes.index(1), scenes.index(2), scenes.index(3), len(scenes) - 1):
            slider.evaluate("(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }", frame)
            assert said.inner_text() == figure.data["captions"][scenes[frame]]
            assert page.locator(".th-bad").count() == (2 if scenes[frame] >= 3 else 0)
            assert page.locator(".th-gone").count() == (4 if scenes[frame] == 4 else 0)
        slider.press("Home")
        page.get_by_role("button", name="Play").click()  # asked for, it moves
        page.get_by_role("button", name="Pause").click()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: explore.draw(MLP(dim=2), QUICK, WAYS, LINE), ("net", "one dimension")),
        (lambda: explore.draw(MLP(dim=1), QUICK, {}, LINE), ("samplers", "at least one")),
        (
            lambda: explore.draw(MLP(dim=1), QUICK, WAYS, datasets.GaussianMixture.grid()),
            ("data", "grid(5x5)", "one dimension"),
        ),
        (lambda: explore.draw(MLP(dim=1), QUICK, WAYS, datasets.GaussianMixture.line((1,))), ("data", "at least two modes")),
        (lambda: explore.brush(**plane_samples() | {"t": (0, 1, 2)}), ("t", "falling")),
        (lambda: explore.brush(**plane_samples() | {"x0_hat": torch.zeros(44, 2, 2)}), ("x0_hat", "(44, 3, 2)")),
        (lambda: explore.brush(**plane_samples() | {"scores": torch.zeros(44)}), ("scores", "above 0")),
        (lambda: explore.brush(**plane_samples() | {"scores": torch.full((44,), torch.inf)}), ("scores", "finite", "inf")),
        (lambda: explore.gallery(torch.zeros(2, 1, 8, 8), {}, torch.zeros(2, dtype=torch.int64), ["a"]), ("scores",)),
        (
            lambda: explore.gallery(torch.zeros(2, 1, 8, 8), {"s": torch.tensor([1, torch.nan])}, torch.zeros(2).long(), ["a"]),
            ("scores", "finite", "1 of s"),
        ),
        (lambda: explore.gallery(torch.zeros(2, 1, 8, 8), {"s": torch.zeros(3)}, torch.zeros(2).long(), ["a"]), ("s", "(2,)")),
        (lambda: explore.gallery(torch.zeros(2, 1, 8, 8), {"s": torch.zeros(2)}, torch.ones(2).long(), ["a"]), ("kind",)),
        (lambda: explore.heat(("a",), ("b",), {}), ("sheets", "at least one")),
        (lambda: explore.heat(("a",), ("b", "c"), sheets()), ("sheets", "1 rows of 2 values")),
        (lambda: explore.heat(("a",), ("b",), {"s": explore.Sheet([[math.nan]], "")}), ("sheets", "finite")),
        (lambda: explore.heat(("a",), ("b",), {"s": explore.Sheet([[1.0]], "", best=0)}), ("sheets", "best")),
        (lambda: explore.generations({}), ("sets", "one arm")),
        (lambda: explore.generations({"x": {"a": PLAIN, "b": PLAIN._replace(x=torch.zeros(2, 4, 2))}}), ("sets", "of x")),
        (lambda: explore.generations({"x": {"a": PLAIN._replace(bad=torch.zeros(2, 4) > 0)}}), ("bad of a", "(2, 3)")),
        (lambda: explore.generations({"x": {"a": PLAIN._replace(told=["one"])}}), ("told", "2 sentences of a")),
        (
            lambda: explore.gallery(torch.zeros(2, 1, 8, 8), {"s": torch.zeros(2)}, torch.zeros(2).long(), ["a"], ["5"]),
            ("notes",),
        ),
        (lambda: explore.answers(**asked() | {"t": (1, 2, 3)}), ("t", "falling")),
        (lambda: explore.answers(**asked() | {"near": {9: torch.zeros(2, 3, 1, 8, 9)}}), ("9", "(2, 3, 1, 8, 8)")),
        (lambda: explore.answers(**asked() | {"seen": {"far": torch.zeros(3, 1, 8, 8)}}), ("network", "(1, 3, 1, 8, 8)")),
        (lambda: explore.story(**tale() | {"captions": ["One."]}), ("captions", "5 sentences")),
        (lambda: explore.story(**tale() | {"forward": torch.zeros(3, 7, 2)}), ("forward", "8, 2")),
    ],
)
def test_figures_that_cannot_be(make: Any, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


def test_controls_run_the_function_again() -> None:
    from matplotlib.figure import Figure

    asked: list[tuple[int, str]] = []

    def again(n: int = 3, way: str = "b") -> Figure:
        asked.append((n, way))
        return Figure()

    figure = explore.Rerun(again, 'A picture of "b".', n=(1, 9, 2), way=["a", "b"])
    bundle = figure._repr_mimebundle_()
    assert bundle["text/html"].startswith('<img alt="A picture of &quot;b&quot;." src="data:image/png;base64,')
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert set(asked) == {(3, "b")}
    steps, choice = figure.widget.children[:2]
    assert (steps.min, steps.max, steps.step, steps.value, choice.options) == (1, 9, 2, 3, ("a", "b"))
    steps.value, choice.value = 5, "a"
    assert asked[-2:] == [(5, "b"), (5, "a")]


@pytest.mark.parametrize("package", ["anywidget", "ipywidgets"])
def test_without_widgets_there_is_html(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    scores, bad, _ = samples()
    figure = explore.threshold(scores, bad) if package == "anywidget" else explore.Rerun(Figure, "Nothing.")
    assert set(figure._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(TinyhallError) as caught:
        _ = figure.widget
    one_line(caught.value, "widget", package)


def test_a_sheet_of_pictures_as_people_hold_them() -> None:
    for images in (torch.zeros(3, 1, 8, 16), torch.zeros(3, 4, 8, 8), np.zeros((3, 12, 8, 3), np.float32)):
        sheet = explore.sprite(images)
        assert sheet["cell"] == 48 and sheet["sprite"].startswith("data:image/")
    with pytest.raises(TinyhallError) as caught:
        explore.sprite(torch.zeros(8, 8))
    one_line(caught.value, "images", "[n, height, width, channels]")
