"""A notebook that is opened elsewhere, or without the book's tools."""

from __future__ import annotations

import sys
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
