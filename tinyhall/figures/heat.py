"""A table of figures whose fields are coloured by how good they are, with a switch between several figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core import _check
from .widgets import Explorer


class Sheet(NamedTuple):
    """One figure of every row in every column."""

    values: Sequence[Sequence[float | None]]  # by row and column; None where there is none
    note: str  # what it is, in a sentence
    spelling: str = "{:.2f}"
    worst: float = 0.0  # has no colour, and neither has what is worse
    best: float = 1.0  # has the deepest


def heat(rows: Sequence[str], columns: Sequence[str], sheets: Mapping[str, Sheet]) -> Explorer:
    """A heat map with a switch between figures; its rows can be sorted by any column.

    Args:
        rows, columns: their names.
        sheets: by the name that the reader chooses from.

    Raises:
        TinyhallError: no sheet, one of another shape, a value that is not finite, or a best that is the worst.
    """
    if not sheets:
        raise _check.fail("sheets", sheets, "at least one")
    drawn: list[dict[str, Any]] = []
    for name, sheet in sheets.items():
        if [len(row) for row in sheet.values] != [len(columns)] * len(rows):
            raise _check.fail("sheets", name, f"{len(rows)} rows of {len(columns)} values")
        if sheet.best == sheet.worst or not all(math.isfinite(v) for row in sheet.values for v in row if v is not None):
            raise _check.fail("sheets", name, "finite values, and a best that is not the worst")
        drawn.append(
            {
                "name": name, "note": sheet.note,
                "texts": [["" if v is None else sheet.spelling.format(v) for v in row] for row in sheet.values],
                "goods": [[None if v is None else round(_share(v, sheet), 4) for v in row] for row in sheet.values],
            }
        )  # fmt: skip
    name, texts = drawn[0]["name"], drawn[0]["texts"]
    said = (
        f"{row}: " + ", ".join(f"{column} {text}" for column, text in zip(columns, line, strict=True) if text)
        for row, line in zip(rows, texts, strict=True)
    )
    still = f"{name}. {'; '.join(said)}. With JavaScript, a switch shows {' or '.join(sheets)}, and the rows can be sorted."
    return Explorer("heat", {"rows": list(rows), "columns": list(columns), "sheets": drawn}, still)


def _share(value: float, sheet: Sheet) -> float:
    """How far a value is from the worst to the best."""
    return (value - sheet.worst) / (sheet.best - sheet.worst)
