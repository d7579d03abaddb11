"""The book's figures. Each takes arrays, draws one figure and returns it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from ..adapters import pictures

# Okabe and Ito's colours, told apart by every kind of colour vision: data, learned, hallucinated, further ones.
DATA, LEARNED, BAD, FOURTH, FIFTH = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (DATA, LEARNED, FOURTH, FIFTH, BAD, "#56B4E9")
MARKERS = "osD^vP"
INK = "#767676"  # of axes and words: read on white and, since figures have no ground of their own, in the dark


def use() -> None:
    """Sets the book's style for all figures that follow."""
    sns.set_theme(context="notebook", style="ticks", palette=list(COLOURS))
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.fonttype": "none",
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        }
    )


def _open(width: float = 8.0, height: float = 3.4, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    return plt.subplots(1, columns, figsize=(width, height), **kwargs)


def histogram(
    edges: np.ndarray,
    counts: np.ndarray,
    density: np.ndarray | None = None,
    *,
    n: int | None = None,
    support: Sequence[float] = (),
) -> Figure:
    """Density of samples on a log axis, over the data's own; bins outside the support are drawn in another colour.

    Args:
        edges: `[bins + 1]`.
        counts: `[bins]`.
        density: the data's, at the bins' centres.
        n: samples in all, for the scale; the counts' sum without it.
        support: low, high, low, high, ... of the intervals that hold the data.
    """
    figure, ax = _open()
    centres = (edges[1:] + edges[:-1]) / 2
    height = counts / (n or counts.sum()) / np.diff(edges)
    bounds = np.asarray(support).reshape(-1, 2)
    inside = np.ones(len(centres), dtype=bool)
    if len(bounds):
        inside = ((centres[:, None] >= bounds[:, 0]) & (centres[:, None] <= bounds[:, 1])).any(1)
    positive = height[height > 0]
    floor = positive.min() / 3 if len(positive) else 1e-6
    # stairs and not bars: at hundreds of bins, bars leave hairlines between them.
    ax.stairs(np.where(inside, height, floor), edges, baseline=floor, fill=True, color=FOURTH, label="generated, in support")
    ax.stairs(np.where(inside, floor, height), edges, baseline=floor, fill=True, color=BAD, label="generated, hallucinated")
    if density is not None:
        ax.plot(centres, density, color=INK, lw=1.5, label="density of the data")
    ax.set(yscale="log", ylim=(floor, 2 * height.max()), xlim=(edges[0], edges[-1]), xlabel="x", ylabel="density")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3)
    return figure


def ridges(x: np.ndarray, densities: Sequence[np.ndarray], names: Sequence[str]) -> Figure:
    """Densities over the same x, one row each, from the first at the top."""
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 0.75 * len(names) + 0.6), sharex=True)
    for ax, y, name in zip(np.atleast_1d(axes), densities, names, strict=True):
        ax.fill_between(x, y / y.max(), color=INK, alpha=0.35, lw=0)
        ax.plot(x, y / y.max(), color=INK, lw=1.2)
        ax.set(yticks=[], ylim=(0, 1.1))
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines.left.set_visible(False)
    ax.set_xlabel("x at time t (each row scaled to its own height)")
    return figure


def intervals(
    names: Sequence[str],
    series: dict[str, Sequence[Sequence[float]]],
    *,
    ylabel: str,
    log: bool = True,
    note: float | None = None,
) -> Figure:
    """Estimates (value, low, high, ...) with their intervals, one group of points per name."""
    figure, ax = _open(9)
    place = np.arange(len(names))
    for i, (label, values) in enumerate(series.items()):
        v = np.array([list(e)[:3] for e in values], dtype=float)
        shift = 0.12 * (i - (len(series) - 1) / 2)
        error = np.clip(np.stack([v[:, 0] - v[:, 1], v[:, 2] - v[:, 0]]), 0, None)
        ax.errorbar(place + shift, v[:, 0], error, fmt=MARKERS[i % 6], color=COLOURS[i % 6], capsize=3, label=label)
    if note is not None:
        ax.axhline(note, color="0.5", lw=1, ls=":")
    ax.set_xticks(place, names)
    ax.set(ylabel=ylabel, xlim=(-0.5, len(names) - 0.5))
    if log:
        ax.set_yscale("log")
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(series), 4))
    return figure


def traces(t: np.ndarray, bad: np.ndarray, good: np.ndarray, *, modes: Sequence[float] = ()) -> Figure:
    """Predicted x_0 along the last reverse steps, `[samples, len(t)]` each: hallucinated left, the others right."""
    figure, axes = _open(9, 3.4, 2, sharey=True)
    for ax, lines, colour, name in ((axes[0], bad, BAD, "hallucinated"), (axes[1], good, FOURTH, "in support")):
        for m in modes:
            ax.axhline(m, color="0.8", lw=1, zorder=0)
        ax.plot(t, lines.T, color=colour, lw=0.9, alpha=0.6)
        ax.set(title=name, xlabel="t (sampling runs to the right, down to t = 0)", xlim=(t.max(), t.min()))
    axes[0].set_ylabel("predicted $x_0$")
    return figure


def scores(bad: np.ndarray, good: np.ndarray, *, threshold: float | None = None, xlabel: str = "trajectory variance") -> Figure:
    """Distributions of log10 scores, hallucinated and in support, each to its own total."""
    figure, ax = _open(8, 3.0)
    bins = np.linspace(min(bad.min(), good.min()), max(bad.max(), good.max()), 60)
    for values, colour, name in ((good, FOURTH, "in support"), (bad, BAD, "hallucinated")):
        sns.histplot(x=values, bins=bins, stat="probability", color=colour, label=name, element="step", alpha=0.35, ax=ax)
    if threshold is not None:
        ax.axvline(threshold, color="0.3", ls="--", label="threshold, set on the calibration half")
    ax.set(xlabel=f"log10 of the {xlabel}", ylabel="share")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3)
    return figure


def roc(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Share of hallucinated samples removed against share of in-support samples lost, a curve per score."""
    figure, ax = _open(5.2, 4.2)
    ax.plot([0, 1], [0, 1], color="0.8", lw=1, zorder=0)
    for i, (name, (lost, removed)) in enumerate(curves.items()):
        ax.plot(lost, removed, color=COLOURS[i % 6], label=name)
    ax.set(xlabel="in-support samples lost", ylabel="hallucinated samples removed", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(loc="lower right")
    return figure


def loss(values: np.ndarray) -> Figure:
    """Training loss by step on a log axis, with a running mean."""
    figure, ax = _open(8, 2.6)
    width = max(len(values) // 50, 1)
    ax.plot(values, color=LEARNED, lw=0.5, alpha=0.5)
    mean = np.convolve(values, np.ones(width) / width, "valid")
    ax.plot(np.arange(width - 1, len(values)), mean, color=DATA)
    ax.set(yscale="log", xlabel="step", ylabel="mean squared error")
    return figure


def plane(panels: dict[str, tuple[np.ndarray, np.ndarray]], *, size: float = 3.1) -> Figure:
    """Samples in the plane, a panel for each name: in-support points and, over them, hallucinated ones, `[n, 2]` each. `size`
    is a panel's in inches; the points grow with it."""
    shape = (-(-len(panels) // 3), min(3, len(panels)))
    figure, axes = plt.subplots(*shape, figsize=(size * shape[1], size * shape[0]), squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, (good, bad)) in zip(axes.flat, panels.items(), strict=False):
        # Rasterised: ten thousand points as vectors would make a page of megabytes.
        ax.plot(*good.T, ".", color=FOURTH, ms=0.5 * size, alpha=0.5, rasterized=True, label="in support")
        ax.plot(*bad.T, ".", color=BAD, ms=0.5 * size, alpha=0.8, rasterized=True, label="hallucinated")
        ax.set(title=name, aspect="equal", xticks=[], yticks=[])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=18 / size)
    return figure


def field(
    at: np.ndarray, vectors: dict[str, np.ndarray], *, modes: np.ndarray, bad: dict[str, np.ndarray] | None = None
) -> Figure:
    """Arrows from states `at` `[n, 2]` to what is predicted from them, `[n, 2]` each, a panel for each name, one below another.

    `bad` says of each panel's arrows, `[n]`, which end out of support: these have the colour of hallucinations, and lie on top.
    """
    wide, high = np.ptp(at, axis=0)
    size = (7, (4.7 * high / wide + 0.3) * len(vectors) + 0.4)
    figure, axes = plt.subplots(len(vectors), 1, figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, (name, to) in zip(axes[:, 0], vectors.items(), strict=True):
        out = bad[name] if bad else np.zeros(len(at), dtype=bool)
        for rows, colour in ((~out, FOURTH), (out, BAD)):
            ax.quiver(
                *at[rows].T, *(to - at)[rows].T, color=colour, angles="xy", scale_units="xy", scale=1, width=0.003, headwidth=4
            )
        ax.plot(*modes.T, "o", color=INK, ms=6)
        ax.set(title=name, aspect="equal", ylabel="$y$")
    axes[-1, 0].set_xlabel("$x$")
    return figure


def generations(series: dict[str, Any], *, ylabel: str, ax: Any = None, note: tuple[str, float] | None = None) -> Figure:
    """A figure by generation, a line for each arm with its name at its end: values `[seeds, generations]`, each seed thin,
    their mean thick. `note` names a level that is drawn across, such as that of real data."""
    figure, ax = _open(8, 3.4) if ax is None else (ax.figure, ax)
    ends = []
    for i, (name, values) in enumerate(series.items()):
        v = np.asarray(values, dtype=float)
        number, colour = np.arange(1, v.shape[1] + 1), COLOURS[i % 6]
        if len(v) > 1:
            ax.plot(number, v.T, color=colour, lw=0.7, alpha=0.5)
        ax.plot(number, v.mean(0), color=colour, marker=MARKERS[i % 6], ms=5, lw=1.8)
        ends.append((v.mean(0)[-1], number[-1], name, colour))
    if note is not None:
        ax.axhline(note[1], color="0.5", lw=1, ls=":")
        ends.append((note[1], number[-1], note[0], INK))
    ax.set(xlabel="generation", ylabel=ylabel, xticks=number)
    low, high = ax.get_ylim()
    line = 0.085 * (high - low) * 3.4 / figure.get_figheight()
    at = -np.inf
    for end, last, name, colour in sorted(ends, key=lambda e: e[0]):
        at = max(end, at + line)  # names keep a line's height apart
        place = {"xytext": (last + 0.12, at), "va": "center", "annotation_clip": False}
        ax.annotate(name, (last, end), **place, color=colour, fontsize="small")
    return figure


def fates(t: np.ndarray, chance: dict[str, np.ndarray], *, floor: float | None = None) -> Figure:
    """How often a state at t, continued anew, ends as a hallucination: a line for each group of states."""
    figure, ax = _open(6.8, 3.0)
    for (name, values), colour in zip(chance.items(), (BAD, FOURTH), strict=True):
        ax.plot(t, values, color=colour, marker="o", ms=4, label=name)
    if floor is not None:
        ax.axhline(floor, color="0.5", lw=1, ls=":", label="all samples")
    ax.set(
        xlabel="t (sampling runs to the right)", ylabel="share that ends hallucinated", xlim=(t.max(), 0), ylim=(-0.02, 1.02)
    )
    ax.legend(loc="upper left")
    return figure


def gallery(
    rows: dict[str, Any] | Sequence[tuple[str, Any]],
    *,
    columns: Sequence[str] = (),
    cell: float = 0.8,
    mark: Callable[[Any], Any] | None = None,
) -> Figure:
    """Images as `tinyhall.adapters.pictures` takes them, a row for each name, in order; `columns` are titles above them.
    `mark` gives points `[k, 2]` of an image, x and y in pixels, that are marked in it."""
    named = [(name, pictures(images)) for name, images in (rows.items() if isinstance(rows, dict) else rows)]
    wide = max(len(images) for _, images in named)
    longest = max(len(name) for name, _ in named)
    figure, axes = plt.subplots(
        len(named), wide, figsize=(cell * wide + 0.085 * longest, cell * len(named) + 0.35 * bool(columns)), squeeze=False
    )
    for line, (name, images) in zip(axes, named, strict=True):
        for ax, image in zip(line, images, strict=False):
            picture = np.moveaxis((np.clip(np.asarray(image), -1, 1) + 1) / 2, 0, -1)
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if mark is not None:
                ax.plot(*np.asarray(mark(image)).T, "o", mfc="none", mec=DATA, ms=5, mew=1.4)
        for ax in line:
            ax.set(xticks=[], yticks=[])
        for ax in line[len(images) :]:
            ax.axis("off")
        line[0].axis("on")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, title in zip(axes[0], columns, strict=False):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        for spine in ax.spines.values():
            spine.set(visible=True, color="0.6")
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    return figure


def curves(
    x: Sequence[float], series: dict[str, Sequence[Sequence[float]]], *, xlabel: str, ylabel: str, log: bool = False
) -> Figure:
    """Estimates (value, low, high, ...) along x, a line with its interval for each name; `log` for the x axis."""
    figure, ax = _open()
    for i, (name, values) in enumerate(series.items()):
        v = np.array([list(e)[:3] for e in values], dtype=float)
        ax.plot(x, v[:, 0], color=COLOURS[i % 6], marker=MARKERS[i % 6], ms=5, label=name)
        ax.fill_between(x, v[:, 1], v[:, 2], color=COLOURS[i % 6], alpha=0.2, lw=0)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    if log:
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{v:,}" for v in x])
        ax.minorticks_off()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
    return figure


def windows(pairs: Sequence[tuple[int, int]], values: dict[str, np.ndarray], *, label: str) -> Figure:
    """A figure for every window of the reverse process, from T1 (across) to T2 (up), a panel for each name; 0.5 is grey."""
    starts, ends = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    figure, axes = _open(4.6 * len(values), 4.2, len(values), squeeze=False, sharey=True)
    for ax, (name, v) in zip(axes[0], values.items(), strict=True):
        grid = np.full((len(ends), len(starts)), np.nan)
        for (a, b), value in zip(pairs, v, strict=True):
            grid[ends.index(b), starts.index(a)] = value
        image = ax.imshow(grid, origin="lower", cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                shade = "white" if abs(value - 0.5) > 0.3 else "black"
                ax.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=8, color=shade)
        ax.set_xticks(range(len(starts)), starts, rotation=90)
        ax.set_yticks(range(len(ends)), ends)
        ax.set(title=name, xlabel="T1, the window's lowest t")
    axes[0, 0].set_ylabel("T2, the window's end")
    figure.colorbar(image, ax=axes, label=label)
    return figure


def scatter(groups: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Points `[n, 2]` by group, a panel for each embedding; axes have no unit. Later groups lie on top, larger."""
    figure, axes = _open(4.6 * len(groups), 4.4, len(groups), squeeze=False)
    for ax, (title, points) in zip(axes[0], groups.items(), strict=True):
        for i, (name, at) in enumerate(points.items()):
            ax.plot(*at.T, MARKERS[i % 6], color=COLOURS[i % 6], ms=2.5 + 0.7 * i, alpha=0.6, lw=0, label=name)
        ax.set(title=title, xticks=[], yticks=[])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], linked: bool = False) -> Any:
    """A table of HTML cells for a notebook. Each cell knows its column's name, which a narrow page shows before it.

    Args:
        linked: give each row an address, the words of its first cell, and a link to it.
    """
    from IPython.display import HTML

    def row(cells: Sequence[Any]) -> str:
        place, first = "-".join(re.findall(r"\w+", str(cells[0]).lower())), str(cells[0])
        if linked:
            first += f"<a class='headerlink' href='#{place}' title='Link to this row'>#</a>"
        columns = zip(head, (first, *cells[1:]), strict=True)
        tag = f"<tr id='{place}'>" if linked else "<tr>"
        return tag + "".join(f"<td data-label='{name}'>{cell}</td>" for name, cell in columns) + "</tr>"

    top, body = "".join(f"<th>{name}</th>" for name in head), "".join(map(row, rows))
    return HTML(
        f"<div class='th-wide'><table class='th-table'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
