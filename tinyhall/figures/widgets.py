"""How a figure that answers is hosted: by anywidget where a kernel is at hand, and inlined with its data where there is only a
page. Each is one module of JavaScript in `js/`, with `common.js` before it."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..adapters import pictures
from ..core import _check
from ..data.images import quantised

_MODULES = Path(__file__).parent / "js"
_STYLE = (_MODULES / "explorer.css").read_text(encoding="utf-8")


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
