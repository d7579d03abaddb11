"""What a notebook owes to those who read it otherwise than by eye, or not in its order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from common import ROOT

import tinyhall as th

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb")) + sorted((ROOT / "book").glob("evidence/*.ipynb"))
TERMS = set(re.findall(r"^(\w[^\n]*)$", (ROOT / "book" / "glossary.md").read_text().split("```")[1], re.MULTILINE)) - {
    "{glossary}"
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT / "book").with_suffix(""))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_every_picture_says_what_it_shows(path: Path) -> None:
    for number, cell in enumerate(cells(path)):
        shown = any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))
        said = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert shown == bool(said), f"cell {number}"
        if shown:
            # A sentence, and no figure that another run would make false.
            assert len(said.split()) > 8 and said.endswith("."), f"cell {number}"
            assert not re.search(r"\d[.,]\d|\d%", said), f"cell {number}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[0].isdigit() and p.parent.name == "book"], ids=named)
def test_a_chapter_links_its_words_to_the_glossary(path: Path) -> None:
    linked = {
        term
        for cell in cells(path)
        if cell["cell_type"] == "markdown"
        for term in re.findall(r"{term}`([^`<]+)`", "".join(cell["source"]))
    }
    assert len(linked) >= 3
    assert linked <= TERMS


# Settings, thresholds and what the paper reports. What else has a point or a percent sign was measured, and is a variable.
GIVEN = {"0.05", "0.5", "0.707", "0.92", "1%", "2.4%", "3.11", "5%", "80%", "81%", "95%", "96%", "98%"}


def typed(text: str) -> set[str]:
    """Numbers that look like measurements, outside code, formulas, roles and links."""
    for apart in (
        r"```.*?```",
        r"^ {4}.*$",
        r"\$\$.*?\$\$",
        r"\$[^$]*\$",
        r"(\{[^}]*\})?`[^`]*`",
        r"arXiv [\d.]+",
        r"[Ss]ection \d+\.\d+",
        r"\]\([^)]*\)",
    ):
        text = re.sub(apart, "", text, flags=re.DOTALL if "```" in apart or "$$" in apart else re.MULTILINE)
    return set(re.findall(r"\d[\d,.]*\s?%|(?<![\w.])\d+\.\d+(?!\w)|\d+e-\d+", text))


def test_a_typed_measurement_is_noticed() -> None:
    text = "It keeps 97.2% of $12.5%$ and {glue:text}`3.4%`, AUROC 0.93, 6.2e-05 of arXiv 2605.06831, section 5.2, `1.5`."
    text += "\n\n    x = 2.5\n"
    assert typed(text) == {"97.2%", "0.93", "2e-05"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_no_measurement_is_typed(path: Path) -> None:
    for number, cell in enumerate(cells(path)):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and "{exercise}" not in text:
            assert typed(text) <= GIVEN, f"cell {number}"


# One figure, several pages: what is looked up, and the pages that tell it. A run that is drawn anew changes all of them.
QUOTED = (
    (
        ("line123", "paper", "large"),
        ("windows", "[0,15)", "6", "kept"),
        ("01_gaussian_1d", "evidence/01_gaussian_1d", "beside"),
    ),
    (("line123", "paper", "large"), ("windows", "[0,10)", "6", "kept"), ("evidence/01_gaussian_1d", "beside")),
    (("grid", "paper", "large"), ("windows", "[0,8)", "6", "kept"), ("02_gaussian_2d", "evidence/02_gaussian_2d", "beside")),
    (("grid", "paper", "large"), ("windows", "[0,10)", "6", "kept"), ("02_gaussian_2d", "evidence/02_gaussian_2d", "beside")),
    (("grid", "paper", "large"), ("windows", "[0,20)", "6", "kept"), ("02_gaussian_2d", "evidence/02_gaussian_2d", "beside")),
    (
        ("simple-shapes", "laptop", "small"),
        ("fraction", "two of a shape"),
        ("03_simple_shapes", "evidence/03_simple_shapes", "beside"),
    ),
    (("hands-n500", "laptop", "small"), ("fraction", "any"), ("evidence/04_hands", "beside")),
)


@pytest.mark.parametrize(("run", "keys", "pages"), QUOTED, ids=lambda value: "-".join(value))
def test_a_figure_is_the_same_on_every_page_that_quotes_it(
    run: tuple[str, str, str], keys: tuple[str, ...], pages: tuple[str, ...]
) -> None:
    name, scale, sampler = run
    found = th.load(name, scale, root=ROOT / "book" / "artifacts").metrics[sampler]
    for key in keys:
        found = found[key]
    spelled = {f"{found[0]:.1%}", f"{100 * found[0]:.1f} ["}
    for page in pages:
        told = json.dumps([cell.get("outputs") for cell in cells(ROOT / "book" / f"{page}.ipynb")])
        assert any(spelling in told for spelling in spelled), page


def test_the_readme_has_the_table_of_the_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    import front

    rows, readme = front.claims(), (ROOT / "README.md").read_text()
    assert front.table(rows) in readme  # else: python book/front.py
    told = json.dumps([cell.get("outputs") for cell in cells(ROOT / "book" / "intro.ipynb")])
    for row in rows:
        assert all(json.dumps(text)[1:-1] in told for text in (row.claim, row.found, row.fails)), row.claim
    assert len(rows) == 6 and {path.stem for path in (ROOT / "book" / "images").iterdir()} == {
        "bridges", "threads", "squares", "fingers",
    }  # fmt: skip
