"""Figures that answer: in a page without a kernel, and in a live notebook with the reader's own samples.

Each is one module of JavaScript in `js/`, with `common.js` before it, hosted twice: by anywidget where a kernel is at hand, and
inlined with its data where there is only a page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import _check, stats
from ._typing import Bool, Float, Tensor
from .images import quantised

_MODULES = Path(__file__).parent / "js"
_STYLE = """
.th-explorer { display: grid; gap: 0.6em; max-width: 46em; }
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
.th-slider { display: flex; gap: 0.8em; align-items: center; }
.th-slider input { flex: 1; min-width: 0; }
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
"""


class Explorer:
    """A figure of a module in `js/` and its data: a widget where there are anywidget and a kernel, and HTML elsewhere.

    Args:
        module: the file's name without `.js`.
        data: what it draws, as JSON.
        still: the sentence that stands there without JavaScript and in print.
        state: those of the data that the figure changes, and a kernel hears of.
    """

    def __init__(self, module: str, data: dict[str, Any], still: str, state: Sequence[str] = ()) -> None:
        self.source = "\n".join((_MODULES / f"{name}.js").read_text() for name in ("common", module))
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
        try:
            import anywidget
            import traitlets
        except ImportError as error:
            raise _check.TinyhallError("widget: expected anywidget to be installed, got none; `.html` needs nothing") from error

        class Widget(anywidget.AnyWidget):
            _esm = self.source
            _css = _STYLE
            data = traitlets.Dict().tag(sync=True)

        widget = Widget(data=self.data)
        widget.add_traits(**{name: traitlets.Any(self.data[name]).tag(sync=True) for name in self.state})
        return widget

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.still, "text/html": self.html}
        try:
            shown = self.widget._repr_mimebundle_()
        except _check.TinyhallError:
            return bundle
        return (shown[0] if isinstance(shown, tuple) else shown) | bundle


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
        TinyhallError: lengths that differ, scores that are not positive, or samples of one class only.
    """
    stats._labelled(scores, bad)
    if not bool(bad.any()) or bool(bad.all()):
        raise _check.TinyhallError(f"bad: expected samples of both classes, got {int(bad.sum())} hallucinated of {len(bad)}")
    if not bool((scores > 0).all()):
        raise _check.TinyhallError(f"scores: expected values above 0, got {float(scores.min())}")
    # Three digits after the point of a logarithm, and few bytes. The first slider position counts with the rounded ones.
    logs = [round(float(v), 3) for v in scores.cpu().log10()]
    ranked = sorted(logs)
    of_bad = sorted((v for v, b in zip(logs, bad.tolist(), strict=True) if b), reverse=True)
    first = of_bad[max(min(int(-(-remove * len(of_bad) // 1)), len(of_bad)), 1) - 1]
    data: dict[str, Any] = {
        "scores": logs, "bad": [bool(b) for b in bad], "label": label, "start": ranked.index(first),
        "thumbs": [], "sprite": "", "columns": 1, "cell": 1,
    }  # fmt: skip
    if images is not None:
        # Evenly spaced over the ranks, so that the row of pictures is a row of scores.
        order = sorted(range(len(logs)), key=logs.__getitem__)
        rows = [order[round(i * (len(order) - 1) / max(thumbs - 1, 1))] for i in range(min(thumbs, len(order)))]
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
    if k < 2 or any(a <= b for a, b in pairwise(t)):
        raise _check.fail("t", list(t), "at least two falling moments")
    for name, value, shape in (
        ("x", x, (n, k)),
        ("x0_hat", x0_hat, (n, k)),
        ("exact", exact, (k, m)),
        ("learned", learned, (k, m)),
    ):
        if tuple(value.shape) != shape:
            raise _check.fail(name, value, f"shape {shape}")
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


def sprite(images: Float[Tensor, "n channels size size"], columns: int = 12) -> dict[str, Any]:
    """Images on one sheet, in a data URL under `sprite`, with its number of `columns` and the size of a `cell`.

    Grey ones come as PNG, coloured ones, whose noise PNG cannot make smaller, as JPEG."""
    from PIL import Image

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
