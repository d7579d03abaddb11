"""Figures that answer: in a page without a kernel, and in a live notebook with the reader's own samples.

Each is one module of JavaScript in `js/`, with `common.js` before it, hosted twice: by anywidget where a kernel is at hand, and
inlined with its data where there is only a page.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import _check, stats
from ._typing import Bool, Float, Int, Tensor
from .adapters import pictures
from .datasets import GaussianMixture
from .filtering import Filter
from .images import quantised
from .nets import MLP
from .sampling import Sampler
from .schedule import Schedule

_MODULES = Path(__file__).parent / "js"
_STYLE = """
.th-explorer { display: grid; gap: 0.6em; max-width: 46em; }
.th-story { max-width: 30em; }
.th-row { display: flex; flex-wrap: wrap; gap: 0.8em; align-items: flex-start; }
.th-plot { flex: 3 1 16em; min-width: 0; max-width: 100%; overflow: visible; }
.th-roc { flex: 1 1 8em; max-width: 13em; }
.th-good { fill: #009E73; fill-opacity: 0.5; }
.th-bad { fill: #D55E00; fill-opacity: 0.5; }
.th-axis, .th-frame { stroke: currentColor; stroke-opacity: 0.5; fill: none; }
.th-line { stroke: currentColor; stroke-width: 2; stroke-dasharray: 5 3; }
.th-curve { stroke: #0072B2; stroke-width: 2; fill: none; }
.th-dot { fill: #D55E00; stroke: currentColor; }
.th-text { fill: currentColor; font-size: 11px; }
.th-slider { display: flex; flex-wrap: wrap; gap: 0.8em; align-items: center; }
.th-slider .th-slider { flex: 1 1 14em; }
.th-choice select { min-height: 2.4em; max-width: 100%; font: inherit; color: inherit; background: transparent; }
.th-choice option { color: #000; background: #fff; }
.th-slider input { flex: 1 1 8em; min-width: 0; }
.th-told { font-variant-numeric: tabular-nums; }
.th-gallery { display: flex; flex-wrap: wrap; gap: 3px; }
.th-tile { image-rendering: pixelated; border: 2px solid #009E73; box-sizing: content-box; }
.th-tile { background-clip: padding-box !important; }  /* not its neighbours on the sheet */
.th-is-bad { border-color: #D55E00; border-style: dashed; }
.th-removed { opacity: 0.22; }
.th-large { border-color: currentColor; }
.th-button { min-height: 2.4em; padding: 0 0.8em; font: inherit; color: inherit; background: none; border: 1px solid; }
.th-labelled { padding: 0; border-color: transparent; color: #fff; font-weight: bold; text-shadow: 0 0 3px #000; }
.th-now { border-color: #0072B2; }
.th-mode { stroke: currentColor; stroke-opacity: 0.25; }
.th-pick { cursor: pointer; fill-opacity: 0.75; }
.th-picked { stroke: currentColor; stroke-width: 2; fill-opacity: 1; }
.th-exact { stroke: #0072B2; stroke-width: 2; fill: none; }
.th-learned { stroke: #E69F00; stroke-width: 2; stroke-dasharray: 5 3; fill: none; }
.th-key { font-size: 0.85em; margin: 0; }
.th-solid { fill-opacity: 1; }
.th-neutral { fill: #0072B2; fill-opacity: 0.7; }
.th-gone { fill-opacity: 0.12; }
.th-caption { min-height: 5em; margin: 0; font-size: 1.1em; }
.th-brush { fill: currentColor; fill-opacity: 0.06; }
.th-trail { stroke: #0072B2; stroke-opacity: 0.6; fill: none; }
.th-trail-bad { stroke: #D55E00; stroke-dasharray: 4 2; }
"""


class _Shown:
    """What offers both of its forms: a widget where there is a kernel for it, and HTML elsewhere."""

    still: str
    html: Any
    widget: Any

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.still, "text/html": self.html}
        try:
            shown = self.widget._repr_mimebundle_()
        except _check.TinyhallError:
            return bundle
        return (shown[0] if isinstance(shown, tuple) else shown) | bundle


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _check.TinyhallError(f"widget: expected {package} to be installed, got none; `.html` needs none") from error


class Explorer(_Shown):
    """A figure of a module in `js/` and its data: a widget where there are anywidget and a kernel, and HTML elsewhere.

    Args:
        module: the file's name without `.js`.
        data: what it draws, as JSON.
        still: the sentence that stands there without JavaScript and in print.
        state: those of the data that the figure changes, and a kernel hears of.
    """

    def __init__(self, module: str, data: dict[str, Any], still: str, state: Sequence[str] = ()) -> None:
        self.source = "\n".join((_MODULES / f"{name}.js").read_text(encoding="utf-8") for name in ("common", module))
        self.data, self.still, self.state = data, still, tuple(state)

    @property
    def html(self) -> str:
        """The figure as a piece of a page: needs no other file and no network."""
        # "</" would end the script, wherever in the data it stood.
        data = json.dumps(self.data, sort_keys=True, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
        place = "th-" + hashlib.sha256((self.source + data).encode()).hexdigest()[:10]
        script = self.source.replace("export default {", "const widget = {")
        # What anywidget would hand over.
        model = '{ get: (name) => name === "data" ? data : data[name], set() {}, on() {}, save_changes() {} }'
        host = (
            f'const data = JSON.parse(document.getElementById("{place}-data").textContent);\n'
            f'widget.render({{ model: {model}, el: document.getElementById("{place}") }});'
        )
        return (
            f'<style>{_STYLE}</style><div id="{place}"><p>{escape(self.still)}</p></div>'
            f'<script type="application/json" id="{place}-data">{data}</script>'
            f'<script type="module">{script}\n{host}</script>'
        )

    @cached_property
    def widget(self) -> Any:
        """The same module under anywidget.

        Raises:
            TinyhallError: anywidget is not installed.
        """
        anywidget, traitlets = _needed("anywidget"), _needed("traitlets")

        class Widget(anywidget.AnyWidget):  # type: ignore[name-defined]
            _esm = self.source
            _css = _STYLE
            data = traitlets.Dict().tag(sync=True)

        widget = Widget(data=self.data)
        widget.add_traits(**{name: traitlets.Any(self.data[name]).tag(sync=True) for name in self.state})
        return widget


class Rerun(_Shown):
    """Plain ipywidgets that run a function again in a live notebook. A page without a kernel shows what its defaults give.

    Args:
        function: has a default for each argument, and returns a matplotlib figure.
        alt: what the picture shows, in words.
        controls: one for each argument, as `ipywidgets.interactive` takes them: a list to choose from, or (low, high, step).
    """

    def __init__(self, function: Callable[..., Any], alt: str, **controls: Any) -> None:
        self.function, self.still, self.controls = function, alt, controls

    @cached_property
    def html(self) -> str:
        """The picture for the defaults."""
        return self._picture()

    def _picture(self, **values: Any) -> str:
        from matplotlib import pyplot

        figure, out = self.function(**values), io.BytesIO()
        figure.savefig(out, format="png", bbox_inches="tight")
        pyplot.close(figure)  # or the notebook would show it a second time
        picture = base64.b64encode(out.getvalue()).decode()
        return f'<img alt="{escape(self.still)}" src="data:image/png;base64,{picture}">'

    @cached_property
    def widget(self) -> Any:
        """The controls, with the picture below them.

        Raises:
            TinyhallError: ipywidgets is not installed.
        """
        ipywidgets, show_in = _needed("ipywidgets"), _needed("IPython.display")

        @wraps(self.function)  # its defaults are where the controls begin
        def show(**values: Any) -> None:
            show_in.display(show_in.HTML(self._picture(**values)))

        return ipywidgets.interactive(show, **self.controls)


def threshold(
    scores: Float[Tensor, " n"],
    bad: Bool[Tensor, " n"],
    *,
    images: Float[Tensor, "n channels size size"] | None = None,
    label: str = "trajectory variance",
    remove: float = 0.95,
    thumbs: int = 60,
) -> Explorer:
    """A slider on the threshold of a score: what is removed and kept changes at once, in counts, on the ROC and in pictures.

    Args:
        scores: positive, drawn on a log axis.
        bad: which samples are hallucinated.
        images: of the samples, in -1..1; `thumbs` of them are shown, in the order of their scores.
        label: the score's name.
        remove: the share of the hallucinated that the first threshold removes.

    Raises:
        TinyhallError: lengths that differ, scores that are not positive and finite, samples of one class only, or a share
            outside (0, 1].
    """
    stats._labelled(scores, bad, "bad")
    if not bool(bad.any()) or bool(bad.all()):
        raise _check.TinyhallError(f"bad: expected samples of both classes, got {int(bad.sum())} hallucinated of {len(bad)}")
    _logarithmic(scores)
    if images is not None and len(images) != len(scores):
        raise _check.fail("images", images, f"{len(scores)} of them, one for each score")
    # Three digits after the point of a logarithm, and few bytes. The first slider position counts with the rounded ones.
    logs = [round(float(v), 3) for v in scores.cpu().log10()]
    ranked = sorted(logs)
    of_bad = [v for v, b in zip(logs, bad.tolist(), strict=True) if b]
    first = Filter.calibrate(torch.tensor(logs, dtype=torch.float64), bad.cpu(), remove).threshold
    data: dict[str, Any] = {
        "scores": logs, "bad": [bool(b) for b in bad], "label": label, "start": ranked.index(first),
        "thumbs": [], "sprite": "", "columns": 1, "cell": 1,
    }  # fmt: skip
    if images is not None:
        # Evenly spaced over the ranks, so that the row of pictures is a row of scores.
        order = sorted(range(len(logs)), key=logs.__getitem__)
        shown = min(_check.positive_int("thumbs", thumbs), len(order))
        rows = [order[round(i * (len(order) - 1) / max(shown - 1, 1))] for i in range(shown)]
        data |= {"thumbs": rows, **sprite(images[rows])}
    removed = sum(v >= first for v in of_bad)
    kept = sum(v < first for v, b in zip(logs, bad.tolist(), strict=True) if not b)
    good = len(logs) - len(of_bad)
    still = (
        f"A threshold on the {label} that removes {removed} of {len(of_bad)} hallucinated samples keeps {kept} of {good} in "
        "support. With JavaScript, a slider moves it."
    )
    return Explorer("threshold", data, still)


def ride(
    t: Sequence[int],
    x: Float[Tensor, "n k"],
    x0_hat: Float[Tensor, "n k"],
    bad: Bool[Tensor, " n"],
    *,
    grid: Float[Tensor, " m"],
    exact: Float[Tensor, "k m"],
    learned: Float[Tensor, "k m"],
    modes: Sequence[float],
) -> Explorer:
    """Time by hand for points on a line: where the samples are, what is predicted for one of them, and what either denoiser
    would predict anywhere. x0_hat and the predictions are cut to the range of `grid`.

    Args:
        t: the k moments, falling.
        x, x0_hat: of n samples at those moments.
        bad: which samples end as hallucinations.
        grid: places of x at which `exact` and `learned` give the predicted x_0.
        modes: of the data.

    Raises:
        TinyhallError: shapes that do not fit, or t that does not fall.
    """
    n, k, m = len(bad), len(t), len(grid)
    _falling(t)
    _shaped(("x", x, (n, k)), ("x0_hat", x0_hat, (n, k)), ("exact", exact, (k, m)), ("learned", learned, (k, m)))
    low, high = float(grid.min()), float(grid.max())

    def short(values: Tensor) -> Any:
        return [[round(float(v), 2) for v in row] for row in values.clamp(low, high)]

    data = {
        "t": [int(v) for v in t], "x": short(x), "x0": short(x0_hat), "bad": [bool(b) for b in bad],
        "grid": [round(float(v), 3) for v in grid], "exact": short(exact), "learned": short(learned),
        "modes": [float(v) for v in modes], "low": low, "high": high,
    }  # fmt: skip
    still = (
        f"{n} samples on their way from noise to data, {int(bad.sum())} of which end as hallucinations. With JavaScript, a "
        "slider and a button move the time."
    )
    return Explorer("ride", data, still)


def draw(
    net: MLP,
    schedule: Schedule,
    samplers: Mapping[str, Sampler],
    data: GaussianMixture,
    *,
    within: float = 5.0,
    bins: int = 160,
) -> Explorer:
    """The network itself in the page: its reader draws samples on a line from it, by a sampler, a number and a seed of their
    choice, and the histogram grows while they run. The weights are rounded to half precision.

    Args:
        net: over one dimension.
        samplers: by the name that the reader chooses from.
        data: its modes say what is hallucinated.
        within: standard deviations around a mode that count as in support.

    Raises:
        TinyhallError: a network or a mixture of more dimensions, a mixture of one mode, or no sampler.
    """
    if not isinstance(net, MLP) or net.dim != 1:
        raise _check.fail("net", net, "an MLP of one dimension")
    if data.dim != 1 or len(data.means) < 2:
        raise _check.fail("data", data.name, "a mixture of one dimension and at least two modes")
    if not samplers:
        raise _check.fail("samplers", samplers, "at least one")
    weights = {name: value.detach().cpu().float() for name, value in net.state_dict().items()}
    modes = [float(v) for v in data.means[:, 0]]
    margin = 1.5 * data.nearest_spacing
    figure = {
        "net": {
            "width": net.width, "blocks": net.blocks, "shared": net.shared,
            "shapes": [[name, value.numel()] for name, value in weights.items()],
            "packed": _packed(torch.cat([value.flatten() for value in weights.values()]).half()),
        },
        "samplers": [[name, _packed(torch.tensor(sampler(schedule)).float())] for name, sampler in samplers.items()],
        "modes": modes, "std": data.std, "within": within, "bins": bins,
        "low": min(modes) - margin, "high": max(modes) + margin,
    }  # fmt: skip
    still = (
        f"A network of {sum(v.numel() for v in weights.values()):,} weights, which draws samples between "
        f"{figure['low']:g} and {figure['high']:g}. With JavaScript, a button draws from it here, without a kernel."
    )
    return Explorer("draw", figure, still)


def brush(
    t: Sequence[int],
    x: Float[Tensor, "n 2"],
    x0_hat: Float[Tensor, "n k 2"],
    scores: Float[Tensor, " n"],
    data: GaussianMixture,
    *,
    within: float = 5.0,
    label: str = "trajectory variance",
) -> Explorer:
    """Samples of the plane under a brush: the way that the predictions of them took, and their scores.

    Args:
        t: the k last moments, falling.
        x: the samples.
        x0_hat: predicted at those moments; cut to the range of the figure.
        scores: positive.
        data: its modes say what is hallucinated.
        within: standard deviations around a mode that count as in support.

    Raises:
        TinyhallError: shapes that do not fit, t that does not fall, or scores that are not positive and finite.
    """
    n, k = len(x), len(t)
    _falling(t)
    _shaped(("x", x, (n, 2)), ("x0_hat", x0_hat, (n, k, 2)), ("scores", scores, (n,)))
    _logarithmic(scores)
    bad = ~data.in_support(x, within)
    edge = round(float(data.means.abs().max()) * 1.25, 2)
    start = x[bad][0] if bool(bad.any()) else x[0]
    figure = {
        "x": _levels(x, -edge, edge), "paths": _levels(x0_hat, -edge, edge), "t": [int(v) for v in t],
        "bad": [bool(b) for b in bad], "scores": [round(float(v), 3) for v in scores.log10()], "label": label,
        "modes": [[round(float(v), 4) for v in m] for m in data.means], "support": within * data.std,
        "low": -edge, "high": edge, "start": [float(v) for v in start],
    }  # fmt: skip
    still = (
        f"{n} samples in the plane, {int(bad.sum())} of which are hallucinated. With JavaScript, a brush shows the "
        "trajectories of those under it."
    )
    return Explorer("brush", figure, still)


def gallery(
    images: Any,
    scores: Mapping[str, Float[Tensor, " n"]],
    kind: Int[Tensor, " n"],
    kinds: Sequence[str],
) -> Explorer:
    """Images sorted by the score of the reader's choice.

    Args:
        images: see `tinyhall.adapters.pictures`.
        scores: by name; the highest comes first.
        kind: of each image, an index of `kinds`, whose first is in support.

    Raises:
        TinyhallError: lengths that differ, no score, one that is not finite, or a kind without a name.
    """
    n = len(images)
    _shaped(*((name, value, (n,)) for name, value in {"kind": kind, **scores}.items()))
    if not scores:
        raise _check.fail("scores", scores, "at least one")
    for name, value in scores.items():
        if odd := int((~torch.isfinite(value)).sum()):
            raise _check.TinyhallError(f"scores: expected finite values, got {odd} of {name} that are not")
    if int(kind.min()) < 0 or int(kind.max()) >= len(kinds):
        raise _check.fail("kind", kind, f"indices of the {len(kinds)} kinds")
    data = {
        "scores": [[name, [float(f"{float(v):.4g}") for v in value]] for name, value in scores.items()],
        "kind": [int(k) for k in kind], "kinds": list(kinds), **sprite(images),
    }  # fmt: skip
    still = (
        f"{n} images, {int((kind > 0).sum())} of which are hallucinated. With JavaScript, they are sorted by "
        f"{' or '.join(scores)}, and shown by kind."
    )
    return Explorer("gallery", data, still)


def generations(
    images: Mapping[str, Float[Tensor, "generations n channels size size"]],
    bad: Mapping[str, Bool[Tensor, "generations n"]],
    figures: Mapping[str, Sequence[Mapping[str, str]]],
) -> Explorer:
    """What each generation drew, in every arm of a recursion: a slider and a button go from one to the next.

    Args:
        images: by arm, in -1..1, as many in each.
        bad: by arm, which of them are hallucinated.
        figures: by arm and generation, what was measured and is shown beside.

    Raises:
        TinyhallError: arms or generations that differ.
    """
    shapes = {tuple(x.shape) for x in images.values()}
    if len(shapes) != 1 or not list(images) == list(bad) == list(figures):
        raise _check.TinyhallError(f"images: expected one shape, and the arms of bad and figures, got {sorted(shapes)}")
    total, each = next(iter(shapes))[:2]
    for arm in images:
        if tuple(bad[arm].shape) != (total, each):
            raise _check.fail("bad", bad[arm], f"shape ({total}, {each})")
        if len(figures[arm]) != total:
            raise _check.TinyhallError(f"figures: expected {total} generations, got {len(figures[arm])}")
    data = {
        "arms": list(images), "bad": [bool(b) for arm in images for b in bad[arm].flatten()], "total": total, "each": each,
        "figures": [", ".join(f"{name} {value}" for name, value in row.items()) for arm in images for row in figures[arm]],
        **sprite(torch.cat([x.flatten(0, 1) for x in images.values()]), columns=each),
    }  # fmt: skip
    still = f"Images of {total} generations in {len(images)} arms. With JavaScript, a slider goes from one to the next."
    return Explorer("generations", data, still)


def story(
    forward: Float[Tensor, "j n 2"],
    backward: Float[Tensor, "k n 2"],
    bad: Bool[Tensor, " n"],
    removed: Bool[Tensor, " n"],
    captions: Sequence[str],
) -> Explorer:
    """The whole story in a moving picture of the plane, with a sentence for each of its five scenes: the data, noise added, the
    way back, what was hallucinated, what a filter removes. It plays once, unless the reader has asked for stillness.

    Args:
        forward: the data on its way to noise, j pictures of n points.
        backward: samples on their way from noise.
        bad: which samples end as hallucinations.
        removed: which a filter takes out.
        captions: five sentences.

    Raises:
        TinyhallError: shapes that do not fit, or another number of captions.
    """
    n = len(bad)
    for name, value in (("forward", forward), ("backward", backward)):
        if value.ndim != 3 or tuple(value.shape[1:]) != (n, 2) or len(value) < 2:
            raise _check.fail(name, value, f"shape (at least 2, {n}, 2)")
    _shaped(("removed", removed, (n,)))
    if len(captions) != 5:
        raise _check.fail("captions", list(captions), "5 sentences")
    hold = 22  # pictures for a sentence to be read in while nothing moves
    frames = torch.cat([forward[:1].expand(hold, n, 2), forward, backward, backward[-1:].expand(2 * hold, n, 2)])
    scenes = [0] * hold + [1] * len(forward) + [2] * len(backward) + [3] * hold + [4] * hold
    edge = 3.0
    data = {
        "frames": _levels(frames, -edge, edge), "n": n, "scenes": scenes, "captions": list(captions),
        "bad": [bool(b) for b in bad], "removed": [bool(r) for r in removed], "low": -edge, "high": edge,
    }  # fmt: skip
    return Explorer("story", data, " ".join(captions))


def _falling(t: Sequence[int]) -> None:
    if len(t) < 2 or any(a <= b for a, b in pairwise(t)):
        raise _check.fail("t", list(t), "at least two falling moments")


def _logarithmic(scores: Tensor) -> None:
    """Refuses scores that have no place on a log axis."""
    odd = scores[~(scores > 0) | ~torch.isfinite(scores)]
    if len(odd):
        raise _check.TinyhallError(f"scores: expected finite values above 0, got {float(odd[0])}")


def _shaped(*expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, value, shape in expected:
        if tuple(value.shape) != shape:
            raise _check.fail(name, value, f"shape {shape}")


def _packed(values: Tensor) -> str:
    """The numbers as they lie in memory, in base64."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _levels(values: Tensor, low: float, high: float) -> dict[str, Any]:
    """Numbers cut to [low, high] in 16 bits each."""
    level = ((values.double().clamp(low, high) - low) / (high - low) * 65_535).round()
    return {"packed": base64.b64encode(level.numpy().astype("<u2").tobytes()).decode(), "low": low, "high": high}


def sprite(images: Any, columns: int = 12) -> dict[str, Any]:
    """Images on one sheet, in a data URL under `sprite`, with its number of `columns` and the size of a `cell`.

    Grey ones come as PNG, coloured ones, whose noise PNG cannot make smaller, as JPEG."""
    from PIL import Image

    images = pictures(images)
    side = max(images.shape[2:])  # cells are square; what is not stands on black
    images = torch.nn.functional.pad(images, (0, side - images.shape[3], 0, side - images.shape[2]), value=-1.0)
    n, channels, height, width = images.shape
    scale = max(48 // width, 1)  # small images are drawn larger; the browser keeps the pixels' edges
    rows = -(-n // columns)
    sheet = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    sheet[:n] = quantised(images)
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    out, kind = io.BytesIO(), "png" if channels == 1 else "jpeg"
    picture = Image.fromarray(sheet.numpy()[..., 0] if channels == 1 else sheet.numpy())
    picture.save(out, kind, optimize=True, **({} if channels == 1 else {"quality": 85}))
    url = f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
    return {"sprite": url, "columns": columns, "cell": width * scale}
