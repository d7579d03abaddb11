"""Runs notebooks where they lie and stores their outputs: `python book/store.py book/01_gaussian_1d.ipynb`.

As `jupyter execute --inplace` does, but without the time of day at every cell, which would make each run a change.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def light(png: str) -> str:
    """The picture in 256 colours of its own, a third of the size, where that is lighter; a book that runs has all of them."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    picture.convert("RGBA").quantize(256).save(out, "PNG", optimize=True, dpi=picture.info.get("dpi", (100, 100)))
    return min(png, base64.b64encode(out.getvalue()).decode() + "\n", key=len)


def store(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    # A figure with an HTML form needs no widget in a stored notebook, whose number is another at every run.
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output["data"].pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = light(output["data"]["image/png"])
    # The interpreter's version would differ from machine to machine.
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        store(Path(name))
