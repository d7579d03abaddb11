"""The photographs of 11k Hands, where a reader has them: found, set upright, made small, and kept."""

from __future__ import annotations

import csv
import hashlib
import json
import struct
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import _check
from ..core._typing import Float, Tensor, UInt8
from ..store.files import read_tensors, write_tensors
from .fingers import CountedHands
from .images import drawn, restored

_READING = 2  # how photographs are read: to be raised whenever the same file would give other pixels than before
_WORN = {"0": False, "0.0": False, "false": False, "no": False, "1": True, "1.0": True, "true": True, "yes": True}
_SUFFIXES = {"": ".jpg", ".jpeg": ".jpg", ".tiff": ".tif"}  # other ways to write one
# What sets a picture upright, by EXIF's orientation.
_TURNS = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2))


@dataclass(frozen=True)
class HandPhotos(CountedHands):
    """The photographs of 11k Hands (Afifi, "11K Hands", 2019), as their users have them: 11,076 JPEGs and `HandInfo.csv`.

    They are read once, upright, cut to the square in their middle, and kept, made small, in one file, as long as the same ones
    are there. What is transparent becomes white, as the background of 11k Hands is. `judge` is that of drawn hands and was
    never tried on photographs, whose fingers may lie side by side: a first sorting, to be checked with labels by eye, as
    `tinyhall.figures.labels` takes them.

    File names are those of the table in any case, `.jpeg` or nothing for `.jpg`. Under "accessories" the table has 0, 0.0,
    false or no, or else 1, 1.0, true or yes, in any case. Photographs that are not found or cannot be read are left out, with
    a warning: see `missing` and `unreadable`.

    Args:
        folder: holds `HandInfo.csv` and the photographs, each in the folder itself, in its `Hands/`, or in its `Hands/Hands/`.
        size: height and width in pixels that the photographs are made.
        aspect: "dorsal" or "palmar"; None for both.
        side: "left" or "right"; None for both.
        accessories: whether hands with rings and the like are taken, too.
        cache: a folder for the small copy; None for `folder`.

    Raises:
        TinyhallError: an argument that is none of these; on first use, a folder without the data, a table that cannot be
            understood, and photographs of which none is asked for, found or read.
    """

    folder: str | Path
    size: int = 64
    aspect: str | None = None
    side: str | None = None
    accessories: bool = False
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("aspect", self.aspect, ("dorsal", "palmar")), ("side", self.side, ("left", "right"))):
            if value is not None and value not in known:
                raise _check.fail(name, value, f"{known[0]}, {known[1]} or None")

    @cached_property
    def names(self) -> list[str]:
        """The file names of the photographs that the arguments ask for, in the order of the table."""
        table = self._find("HandInfo.csv")
        if table is None:
            raise _check.TinyhallError(
                f"folder: expected HandInfo.csv and the photographs of 11k Hands, got no such file in {self._places}; the data "
                "are free for research from their author: https://sites.google.com/view/11khands"
            )
        with table.open(newline="", encoding="utf-8-sig") as file:
            try:
                rows = list(csv.DictReader(file))
            except (UnicodeDecodeError, csv.Error) as error:
                raise _check.TinyhallError(
                    f"folder: expected a table in UTF-8, got something else in {table} ({error})"
                ) from error
        short = next((line for line, row in enumerate(rows, 2) if None in row.values()), None)
        if short is not None:
            raise _check.TinyhallError(f"folder: expected a value for every column, got fewer in line {short} of {table}")
        needed = {"imageName", "aspectOfHand", "accessories"}
        missing = needed - set(rows[0] if rows else ())
        if missing:
            raise _check.TinyhallError(f"folder: expected a column {', '.join(sorted(missing))} in {table}, got none")
        rows = [row for row in rows if any(row[column].strip() for column in needed)]  # spreadsheets add rows of commas
        asked = {word for word in (self.aspect, self.side) if word}
        names = [
            row["imageName"].strip()
            for row in rows
            if asked <= set(row["aspectOfHand"].lower().split()) and (self.accessories or not _worn(row, table))
        ]
        if not names:
            raise _check.TinyhallError(
                f"folder: expected photographs of the kind asked for, got none of {len(rows)} in {table}"
            )
        for name in names:
            if not name or Path(name).name != name:
                raise _check.TinyhallError(f"folder: expected file names under imageName, got {name!r} in {table}")
        return names

    @cached_property
    def _index(self) -> dict[str, list[Path]]:
        """What lies in `_places`, by `_key`, the outermost first."""
        index: dict[str, list[Path]] = {}
        level = [Path(self.folder)]
        for _ in range(3):
            inside = [path for place in level if place.is_dir() for path in sorted(place.iterdir())]
            for path in inside:
                index.setdefault(_key(path.name), []).append(path)
            level = [path for path in inside if path.name.lower() == "hands"]
        return index

    @property
    def _places(self) -> str:
        return f"{self.folder}, its Hands/ or its Hands/Hands/"

    def _find(self, name: str) -> Path | None:
        """The file of this very name, wherever it lies, before one of a name that means the same."""
        same = [path for path in self._index.get(_key(name), []) if path.is_file()]
        return min(same, key=lambda path: path.name != name, default=None)

    @cached_property
    def _found(self) -> list[Path | None]:
        return [self._find(name) for name in self.names]

    @cached_property
    def _bytes(self) -> tuple[Tensor, list[str]]:
        """The photographs, uint8 `[n, 3, size, size]`, and the names of those that could not be read."""
        # With sizes: a photograph that is added later, or whole at last, makes another file. So does another way of reading.
        seen = [
            f"{name} {path.relative_to(self.folder)} {path.stat().st_size}" if path else f"{name} missing"
            for name, path in zip(self.names, self._found, strict=True)
        ]
        digest = hashlib.sha256("\n".join([f"{self.size} {_READING}", *seen]).encode()).hexdigest()[:12]
        kept = Path(self.cache or self.folder) / f"hands-{self.size}-{digest}.safetensors"
        if kept.is_file():
            tensors, note = read_tensors(kept)
            x, unreadable = tensors["x"], json.loads(note["unreadable"])
        else:
            pictures = [
                (name, _photograph(path, self.size)) for name, path in zip(self.names, self._found, strict=True) if path
            ]
            good = [picture for _, picture in pictures if picture is not None]
            unreadable = [name for name, picture in pictures if picture is None]
            if not good:
                raise _check.TinyhallError(
                    f"folder: expected photographs, got none of {len(self.names)} that can be read: {self._told(unreadable)}"
                )
            x = torch.stack(good)
            write_tensors(kept, {"x": x}, {"unreadable": json.dumps(unreadable)})
        left_out = len(self.names) - len(x)
        if left_out:
            text = f"folder: {left_out} of {len(self.names)} photographs are left out: {self._told(unreadable)}"
            warnings.warn(text, stacklevel=4)  # at the line that asks: `cached_property` and a public method lie between
        return x, unreadable

    def _told(self, unreadable: list[str]) -> str:
        """What is left out and why, with an example of each."""
        told = []
        if self.missing:
            told.append(f"{len(self.missing)} not found in {self._places} (the first is {self.missing[0]})")
        if unreadable:
            told.append(f"{len(unreadable)} found, but damaged or no picture (the first is {unreadable[0]})")
        return "; ".join(told)

    @property
    def missing(self) -> list[str]:
        """The names of the photographs asked for that were not found."""
        return [name for name, path in zip(self.names, self._found, strict=True) if path is None]

    @property
    def unreadable(self) -> list[str]:
        """The names of the photographs asked for that were found, but are damaged, no pictures, or of a kind whose white is
        not known: numbers of 32 bits."""
        return list(self._bytes[1])

    @property
    def skipped(self) -> int:
        """How many of the photographs asked for are left out: `missing` and `unreadable` together."""
        return len(self.names) - len(self._bytes[0])

    def __len__(self) -> int:
        return len(self._bytes[0])

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 3 size size"]:
        """n photographs, float32 in -1..1, none twice. Raises TinyhallError for more than there are, or no generator."""
        _check.generator("generator", generator)  # before all photographs are read
        x = self._bytes[0]
        return restored(x[drawn(n, len(x), generator)])


def _key(name: str) -> str:
    """The same for file names that mean the same: in any case, however the suffix is written."""
    path = Path(name.lower())
    return path.stem + _SUFFIXES.get(path.suffix, path.suffix)


def _worn(row: dict[str, str], table: Path) -> bool:
    """Whether accessories are worn, as the table says it or as programs do that have rewritten it."""
    worn = _WORN.get(row["accessories"].strip().lower())
    if worn is None:
        got = f"{row['accessories']!r} for {row['imageName']} in {table}"
        raise _check.TinyhallError(f"folder: expected one of {', '.join(_WORN)} under accessories, got {got}")
    return worn


def _photograph(path: Path, size: int) -> UInt8[Tensor, "3 size size"] | None:
    """The square in the middle of a picture, upright, made small; None for a file that is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (4 * size, 4 * size))  # a JPEG can be opened at an eighth of its size, and sooner
            whole = _plain(picture)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):  # Pillow's, over files that are none
        return None
    edge = min(whole.size)
    left, top = (whole.width - edge) // 2, (whole.height - edge) // 2
    small = whole.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def _plain(picture: Any) -> Any:
    """A Pillow image upright, in 8 bits a channel, on white where it is transparent; ValueError where white is not known."""
    from PIL import Image

    picture.load()
    # Cameras do not turn the picture but say how it lies. (Pillow's `exif_transpose` also writes that note anew, and fails
    # over notes that are damaged.)
    turn = _TURNS.get(picture.getexif().get(0x0112))
    if turn is not None:
        picture = picture.transpose(Image.Transpose[turn])
    if picture.mode in ("I", "F"):
        raise ValueError(f"{picture.mode}: numbers of 32 bits, which do not say what white is")
    if picture.mode.startswith("I;16"):  # grey; `convert` would cut it off at 255. Colours in 16 bits Pillow scales itself
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
