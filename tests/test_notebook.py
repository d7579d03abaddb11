"""A notebook that is opened elsewhere, or without the book's tools."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest
from common import ROOT

import tinyhall as th
from tinyhall.notebook import glue, locate


def test_glue_without_the_book_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    glue("auroc", "0.92", display=False)
    assert capsys.readouterr().out == "auroc: 0.92\n"


def test_artifacts_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("artifacts") == ROOT / "book" / "artifacts"
    name, scale, seed = th.available()[0]
    assert th.load(name, scale, seed).info["seed"] == seed
    (tmp_path / "artifacts").mkdir()
    assert locate("artifacts") == Path("artifacts")  # what is here comes first
    assert locate(tmp_path / "none") == tmp_path / "none"


def test_one_extra_brings_all_that_the_pages_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        names: set[str] = set()
        for wanted in extras[extra]:
            name, _, inner = wanted.partition("[")
            if name == "tinyhall":
                names = names.union(*(brought(other) for other in inner.rstrip("]").split(",")))
            else:
                names.add(wanted.split(">")[0])
        return names

    there = brought("notebooks") | {wanted.split(">")[0] for wanted in project["dependencies"]}
    there |= {path.stem for path in (ROOT / "book").glob("*.py")} | {"tinyhall", "matplotlib_inline", "IPython"}
    for package, modules in {"scikit-learn": {"sklearn"}, "matplotlib": {"PIL"}}.items():  # the latter needs pillow
        there |= modules if package in there else set()
    imported: set[str] = set()
    for path in (ROOT / "book").glob("**/*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        for node in ast.walk(ast.parse("\n".join("".join(cell["source"]) for cell in cells))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= there
    assert "torch" in imported
