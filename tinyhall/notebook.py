"""What a notebook needs wherever it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def glue(name: str, value: Any, display: bool = True) -> None:
    """Hands a number to the text of the built book, by myst_nb; prints it under its name where that is missing (Colab)."""
    try:
        from myst_nb import glue as to_book
    except ImportError:
        print(f"{name}: {value}")
    else:
        to_book(name, value, display=display)


def locate(root: str | Path) -> Path:
    """`root` where it is; otherwise the book's folder of that name beside the package, so that a notebook may be opened from
    anywhere in a checkout."""
    root = Path(root)
    beside = Path(__file__).resolve().parent.parent / "book" / root
    return beside if not root.is_absolute() and not root.is_dir() and beside.is_dir() else root
