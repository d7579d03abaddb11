"""What the book's first page and the README share, made from the stored runs: four pictures, and a table of six claims.

python book/front.py    # writes book/images/ and the README's table anew
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import tinyhall as th
from tinyhall import images, plots
from tinyhall.data.shapes import DOUBLE

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKS = "<!-- claims: python book/front.py -->", "<!-- end of claims -->"


class Claim(NamedTuple):
    """A row of the table."""

    claim: str
    found: str
    fails: str
    page: str  # the chapter's file, under book/
    chapter: str


def in_100_000(value: float) -> str:
    return f"{100_000 * value:.1f} in 100,000"


def claims() -> list[Claim]:
    """The six rows; every number is looked up."""
    line, square, ideal = th.load("line123"), th.load("grid"), th.load("line123-exact").fraction("large")
    shapes, local = th.load("simple-shapes", "laptop"), th.load("simple-shapes-local", "laptop")
    hands, digits = th.load("hands", "laptop"), th.histories("mnist", "laptop")

    trained = [seed for name, scale, seed in th.available() if (name, scale) == ("line123", "paper")]
    seeds = [th.load("line123", seed=seed).metrics["large"]["integral"]["6"] for seed in trained]
    kept = line.metrics["large"]["windows"]["[0,15)"]["6"]["kept"][0]
    wide = square.metrics["large"]["windows"]["[0,20)"]["6"]["kept"][0]
    drawn = shapes.samples("small")
    two = drawn["kind"] == DOUBLE
    fine = drawn["kind"] == 0
    white = th.auroc(drawn["white"][two | fine].float(), two[two | fine]).value
    near = max(local.fraction(name, "two of a shape").value for name in local.metrics)
    fingers = hands.samples("small")
    missing, extra = (
        float(((fingers["kind"] == 1) & hit).float().mean()) for hit in (fingers["fingers"] < 5, fingers["fingers"] > 5)
    )
    lots = digits["random-0.077"]["fid"][:, 1:]
    lower, idle = (int((digits[arm]["fid"][:, 1:] < lots).sum()) for arm in ("variance-0.077", "none"))
    left = digits["variance-0.077"]["recall"][:, -1].mean()
    helped = th.histories("mnist-real50", "laptop")["none"]["recall"][:, -1].mean()
    return [
        Claim(
            "Models put samples between the modes of their data",
            f"{in_100_000(line.metrics['large']['integral']['6'])} on a line, as long trained as the paper's",
            f"the luck of a training is worth as much as a factor of {max(seeds) / min(seeds):.1f}",
            "01_gaussian_1d", "1",
        ),
        Claim(
            "because a network cannot jump, and the ideal denoiser does",
            f"with the ideal in its place {round(ideal.value * ideal.n)} of {ideal.n:,}",
            "with few sampler steps the ideal leaves the data, too",
            "01_gaussian_1d", "1",
        ),
        Claim(
            "The model knows: its guess keeps moving",
            f"a filter on the last 15 steps takes 95% of them and keeps {kept:.0%} of the rest",
            f"in the plane a window of 20 steps keeps {wide:.0%}",
            "02_gaussian_2d", "2",
        ),
        Claim(
            "On images: two squares where the data has one",
            f"{shapes.fraction('small', 'two of a shape').value:.0%} of the images",
            f"a denoiser that only sees a patch draws them untrained, up to {near:.0%}; "
            f"counting white pixels finds them (AUROC {white:.2f})",
            "03_simple_shapes", "3",
        ),
        Claim(
            "Hands with too many fingers, or too few",
            f"of drawn hands {extra:.0%} and {missing:.0%}",
            "the measure counts fingers and not faults",
            "04_hands", "4",
        ),
        Claim(
            "A filter slows the decay of models that eat their own samples",
            f"digits: a lower FID than random dropping in {lower} of {lots.numel()} generations",
            f"dropping nothing is lower in {idle} of {lots.numel()}, too, and all variety is lost (recall {left:.0%}); "
            f"half real data keep {helped:.0%}",
            "05_mnist_collapse", "5",
        ),
    ]  # fmt: skip


def _panel() -> tuple[Figure, plt.Axes]:
    figure, ax = plt.subplots(figsize=(2.1, 2.1), facecolor="none")
    figure.subplots_adjust(0.02, 0.02, 0.98, 0.98)
    ax.set_axis_off()
    return figure, ax


def bridges() -> Figure:
    """Samples on a line on a log axis: the data's three modes, and what a network puts between them."""
    run = th.load("line123")
    kept, data = run.samples("large"), run.experiment.data()
    edges, counts = kept["edges"][::4].numpy(), kept["counts"].view(-1, 4).sum(1).numpy()
    centres = (edges[1:] + edges[:-1]) / 2
    inside = data.in_support(torch.from_numpy(centres).float()[:, None], width=6).numpy()
    figure, ax = _panel()
    for colour, shown in ((plots.FOURTH, inside), (plots.BAD, ~inside)):
        ax.stairs(np.where(shown & (counts > 0), counts, 0.5), edges, baseline=0.5, fill=True, color=colour)
    ax.set(yscale="log", ylim=(0.5, 3 * counts.max()), xlim=(0.55, 3.45))
    return figure


def threads() -> Figure:
    """Samples in the plane, between the modes of a lattice."""
    run = th.load("grid")
    x = run.samples("large")["x"]
    bad = ~run.experiment.data().in_support(x, width=6)
    figure, ax = _panel()
    for colour, points, size in ((plots.FOURTH, x[~bad][:4_000], 1), (plots.BAD, x[bad], 3)):
        ax.scatter(*points.T.numpy(), s=size, color=colour, lw=0)
    ax.set(aspect="equal")
    return figure


def _image(x: torch.Tensor, rings: list[tuple[float, float, float]] = ()) -> Figure:
    figure, ax = _panel()
    ax.imshow(x.permute(1, 2, 0).numpy() / 255, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for row, column, radius in rings:
        ax.add_patch(Circle((column, row), radius, fill=False, color=plots.BAD, lw=2))
    return figure


def squares() -> Figure:
    """An image with two squares, in rings."""
    run = th.load("simple-shapes", "laptop")
    kept, data = run.samples("small"), run.experiment.data()
    shown = len(kept["x"])
    x = kept["x"][(kept["kind"][:shown] == DOUBLE) & (kept["counts"][:shown, 1] == 2)][0]
    found = data.places(images.restored(x)[None])
    half = x.shape[-1] / 16  # of a square's side
    return _image(x, [(y + half, left + half, 2 * half) for _, shape, y, left in found.tolist() if shape == 1])


def fingers() -> Figure:
    """A drawn hand with six fingers."""
    kept = th.load("hands", "laptop").samples("small")
    shown = len(kept["x"])
    six = (kept["kind"][:shown] == 1) & (kept["fingers"][:shown] == 6)
    return _image(kept["x"][six][0])


def table(rows: list[Claim]) -> str:
    """The claims in Markdown, with links from the top of the repository."""
    head = "| the paper's claim | what we found | where it fails | chapter |\n| --- | --- | --- | --- |\n"
    return head + "".join(f"| {r.claim} | {r.found} | {r.fails} | [{r.chapter}](book/{r.page}.ipynb) |\n" for r in rows)


def main() -> None:
    matplotlib.use("agg")
    for make in (bridges, threads, squares, fingers):
        path = HERE / "images" / f"{make.__name__}.png"
        make().savefig(path, dpi=200, transparent=True)
    text = README.read_text()
    begin, end = (re.escape(mark) for mark in MARKS)
    new = f"{MARKS[0]}\n{table(claims())}{MARKS[1]}"
    README.write_text(re.sub(f"{begin}.*?{end}", lambda _: new, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
