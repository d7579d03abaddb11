"""Figures: what was handed in is what is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import one_line
from matplotlib.colors import to_hex

from tinyhall.core._check import TinyhallError
from tinyhall.figures import plots


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with plt.rc_context():
        plots.use()
        yield
    plt.close("all")


def test_histogram_splits_bins_by_the_support() -> None:
    edges = np.linspace(0, 4, 5)
    figure = plots.histogram(edges, np.array([8, 0, 1, 1]), np.ones(4), n=20, support=(0, 1, 2.2, 2.8))
    inside, outside = (p.get_data() for p in figure.axes[0].patches)
    floor = outside.values[0]
    assert inside.values.tolist() == [8 / 20, floor, 1 / 20, floor]
    assert outside.values.tolist() == [floor, 0, floor, 1 / 20]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0.5, 1.5, 2.5, 3.5]


def test_intervals_draw_value_and_ends() -> None:
    figure = plots.intervals(["a", "b"], {"one": [(0.2, 0.1, 0.4, 10), (0.5, 0.5, 0.6, 10)]}, ylabel="y", log=False, note=0.5)
    container = figure.axes[0].containers[0]
    assert container.lines[0].get_ydata().tolist() == [0.2, 0.5]
    segments = container.lines[2][0].get_segments()
    assert np.allclose([s[:, 1] for s in segments], [[0.1, 0.4], [0.5, 0.6]])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_traces_run_towards_zero() -> None:
    t = np.arange(5)[::-1]
    figure = plots.traces(t, np.zeros((3, 5)), np.ones((2, 5)), modes=(1,))
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() == (4, 0)
    assert (len(left.lines), len(right.lines)) == (4, 3)  # a line for the mode in each


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.ridges(np.arange(3.0), [np.arange(1.0, 4.0)] * 2, ["t = 0", "t = 1"]),
        lambda: plots.scores(np.linspace(-1, 0, 9), np.linspace(-3, -1, 9), threshold=-1.0),
        lambda: plots.roc({"a": (np.array([0.0, 1]), np.array([0.0, 1])), "b": (np.array([0.0, 1]), np.array([0.5, 1]))}),
        lambda: plots.loss(np.arange(200.0)),
        lambda: plots.loss(np.arange(3.0)),
    ],
)
def test_every_figure_draws_without_a_warning(figure: object) -> None:
    drawn = figure()  # type: ignore[operator]
    drawn.canvas.draw()
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in drawn.axes)


def test_plane_has_a_panel_for_each_name() -> None:
    good, bad = np.zeros((5, 2)), np.ones((3, 2))
    figure = plots.plane({"a": (good, bad), "b": (good, bad[:0])})
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["a", "b"]
    assert [len(line.get_xdata()) for line in shown[0].lines] == [5, 3]
    assert [len(line.get_xdata()) for line in shown[1].lines] == [5, 0]
    large = plots.plane({"a": (good, bad)}, size=6.2)
    assert large.get_size_inches().tolist() == [6.2, 6.2]
    assert large.axes[0].lines[0].get_markersize() == 2 * shown[0].lines[0].get_markersize()


def test_field_draws_from_to() -> None:
    at = np.array([[0.0, 0.0], [1.0, 0.0]])
    bad = {"exact": np.zeros(2, dtype=bool), "learned": np.array([False, True])}
    figure = plots.field(at, {"exact": at + 1, "learned": at * 2}, modes=at, bad=bad)
    arrows = [[c for c in ax.collections if hasattr(c, "U")] for ax in figure.axes]
    assert [[len(c.U) for c in panel] for panel in arrows] == [[2, 0], [1, 1]]
    good, out = arrows[1]
    assert (good.U.tolist(), out.U.tolist()) == ([0], [1])
    assert good.V.tolist() == out.V.tolist() == [0]
    assert to_hex(out.get_facecolor()[0]) == plots.BAD.lower()


def test_generations_draw_seeds_and_their_mean() -> None:
    figure = plots.generations({"none": [[1.0, 2, 3], [3, 4, 5]], "filtered": [[1.0, 1, 1]]}, ylabel="y")
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert lines[:4] == [[1, 2, 3], [3, 4, 5], [2, 3, 4], [1, 1, 1]]


def test_fates_run_towards_zero() -> None:
    figure = plots.fates(np.array([30, 10, 1]), {"bad": np.array([0.1, 0.5, 1]), "good": np.array([0.1, 0, 0])}, floor=0.1)
    assert figure.axes[0].get_xlim() == (30, 0)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.1, 0.5, 1]


def test_gallery_shows_each_image_in_its_place() -> None:
    grey, colour = -np.ones((2, 1, 4, 4)), np.zeros((3, 3, 4, 4))
    grey[1] = 5.0  # beyond white
    figure = plots.gallery({"grey": grey, "colour": colour}, columns=["a", "b"])
    figure.canvas.draw()
    shown = [[ax.images[0].get_array() for ax in figure.axes[i : i + 3] if ax.images] for i in (0, 3)]
    assert [len(row) for row in shown] == [2, 3]
    assert (shown[0][0].max(), shown[0][1].min()) == (0, 1)
    assert shown[1][0].shape == (4, 4, 3)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["a", "b", ""]
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["grey", "colour"]


def test_gallery_marks_points_of_each_image() -> None:
    images = np.zeros((2, 3, 8, 8))
    images[1] = 0.5
    figure = plots.gallery({"hands": images}, mark=lambda image: [[1.0, 2.0], [3.0, 4.0]] if image.max() else [[5.0, 6.0]])
    marks = [ax.lines[0].get_xydata().tolist() for ax in figure.axes]
    assert marks == [[[5.0, 6.0]], [[1.0, 2.0], [3.0, 4.0]]]


def test_windows_lie_at_their_edges() -> None:
    figure = plots.windows([(0, 10), (0, 20), (10, 20)], {"mean": np.array([0.9, 0.6, 0.5])}, label="AUROC")
    figure.canvas.draw()
    grid = figure.axes[0].images[0].get_array()
    assert grid.filled(np.nan)[0].tolist()[0] == 0.9
    assert np.isnan(grid.filled(np.nan)[0, 1])  # a window cannot end where it begins
    assert grid.filled(np.nan)[1].tolist() == [0.6, 0.5]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["10", "20"]


def test_curves_and_scatter_draw_what_they_are_given() -> None:
    figure = plots.curves([1, 10], {"any": [(0.5, 0.4, 0.6, 9), (0.2, 0.1, 0.3, 9)]}, xlabel="x", ylabel="y", log=True)
    figure.canvas.draw()
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.5, 0.2]
    assert figure.axes[0].get_xscale() == "log"
    figure = plots.scatter({"PCA": {"a": np.zeros((4, 2)), "b": np.ones((2, 2))}})
    figure.canvas.draw()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [4, 2]


def test_a_table_names_its_columns_and_links_its_rows() -> None:
    plain = plots.table(("claim", "verdict"), [("Two, of a shape", "<b>holds</b>")]).data
    assert "<th>claim</th><th>verdict</th>" in plain
    assert "<tr><td data-label='claim'>Two, of a shape</td><td data-label='verdict'><b>holds</b></td></tr>" in plain
    linked = plots.table(("claim", "verdict"), [("Two, of a shape", "holds")], linked=True).data
    assert "<tr id='two-of-a-shape'>" in linked
    assert "href='#two-of-a-shape'" in linked
    with pytest.raises(ValueError):
        plots.table(("claim",), [("more cells", "than columns")])


def test_gallery_takes_pictures_as_people_hold_them() -> None:
    plots.use()
    for images in (
        torch.zeros(2, 3, 8, 16),
        torch.zeros(2, 4, 8, 8),
        np.zeros((2, 8, 16, 3)),
        np.zeros((2, 8, 8, 4), np.uint8),
    ):
        figure = plots.gallery({"": images})
        assert len(figure.axes) == 2
        plt.close(figure)
    with pytest.raises(TinyhallError) as caught:
        plots.gallery({"": torch.zeros(8, 8)})
    one_line(caught.value, "images", "[n, channels, height, width]")
