"""Lets Sphinx read docstrings that were written for people: sentences stay sentences, an indented formula stays as it is."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

_FIELD = re.compile(r"^:\w")
_COMMENTED = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
_as_written: dict[str, list[str]] = {}


def _remember(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # napoleon reads the first line of a property as "type: description"; ours are sentences that may hold a colon.
    if what in ("attribute", "data", "property"):
        _as_written[name] = list(lines)


def _restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _literal(_as_written.pop(name, lines))
    if what == "class" and _is_record(obj):
        # What a field means stands as a comment at the end of its line.
        fields = [f":ivar {field}: {comment}" for field, comment in _COMMENTED.findall(inspect.getsource(obj))]
        lines += ["", *fields, ""] if fields else []


def _is_record(obj: Any) -> bool:
    return dataclasses.is_dataclass(obj) or (isinstance(obj, type) and issubclass(obj, tuple) and hasattr(obj, "_fields"))


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    # A named tuple's fields are listed with the class; Python's own words on them say nothing.
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def _literal(lines: list[str]) -> list[str]:
    # reStructuredText would take an indented paragraph for a quotation, and |T| in it for a substitution.
    out: list[str] = []
    inside = fields = False
    for line in lines:
        fields = fields or bool(_FIELD.match(line))
        indented = line.startswith("    ")
        if indented and not inside and not fields and (not out or not out[-1].strip()):
            out += ["::", ""]
            inside = True
        elif line.strip() and not indented:
            inside = False
        out.append(line)
    return out


def setup(app: Any) -> dict[str, Any]:
    # napoleon, which turns Args and Raises into fields, runs at 500.
    app.connect("autodoc-process-docstring", _remember, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=900)
    app.connect("autodoc-skip-member", _skip)
    return {"version": "1", "parallel_read_safe": True}
