"""Hands that can be counted: drawn from a few dozen numbers each, always with five fingers unless asked for others. And the
photographs of 11k Hands, where a reader has them."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import struct
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core import _check
from ..core._typing import Bool, Float, Tensor, UInt8
from ..store.files import read_tensors, write_tensors
from .fingers import IN_SUPPORT, KINDS, HandJudgement, judge

_CHUNK = 256  # hands at a time: their distances to two dozen shapes take 100 MB at 64 pixels
_FRAME = 2.0  # the picture's height in the units of the hand, whose middle finger is 0.6 long
_TONES = ((0.35, 0.22, 0.16), (0.55, 0.36, 0.26), (0.76, 0.55, 0.42), (0.88, 0.69, 0.56), (0.93, 0.76, 0.64))
_LENGTHS = (0.50, 0.60, 0.56, 0.42)  # of the long fingers, index to little
_READING = 2  # how photographs are read: to be raised whenever the same file would give other pixels than before
_WORN = {"0": False, "0.0": False, "false": False, "no": False, "1": True, "1.0": True, "true": True, "yes": True}
_SUFFIXES = {"": ".jpg", ".jpeg": ".jpg", ".tiff": ".tif"}  # other ways to write one
# What sets a picture upright, by EXIF's orientation.
_TURNS = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2))


class _Random:
    """Uniform numbers for n hands from one generator."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator, self.device = n, generator, generator.device

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.n, *shape, generator=self.generator, device=self.device)


class CountedHands:
    """Images of hands, `size` pixels wide and high, judged by their silhouettes."""

    size: int

    def __post_init__(self) -> None:
        if _check.positive_int("size", self.size) < 32:
            raise _check.fail("size", self.size, "at least 32")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, `(3, size, size)`."""
        return (3, self.size, self.size)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of `judge`'s kinds."""
        return KINDS

    def judge(self, x: Float[Tensor, "n 3 size size"]) -> HandJudgement:
        """What each image is, by its silhouette: see `fingers.judge`. Raises TinyhallError for images of another shape."""
        _check.floats("x", x, ndim=4, finite=False)
        if tuple(x.shape[1:]) != self.shape:
            raise _check.fail("x", x, f"shape [n, 3, {self.size}, {self.size}]")
        return judge(x)

    def in_support(self, x: Float[Tensor, "n 3 size size"]) -> Bool[Tensor, " n"]:
        """True for a hand with five fingers, none merged, none detached."""
        return self.judge(x).kind == IN_SUPPORT


@dataclass(frozen=True)
class Hands(CountedHands):
    """Drawings of open hands, left and right, from the front or the back, RGB in -1..1: arm, palm, a thumb and four fingers.

    What varies: side, rotation (30 degrees to either side), place, scale, spread, each finger's length, width, direction and
    bend, skin tone, light, nails, and the background, which is light and plain. Every hand has exactly five fingers, apart
    enough to be counted; `sample(..., fingers=6)` makes wrong ones, to test a counter with.

    Args:
        size: height and width in pixels, at least 32.
    """

    size: int = 64

    def sample(self, n: int, generator: torch.Generator, fingers: int = 5) -> Float[Tensor, "n 3 size size"]:
        """n hands, float32 in -1..1, on the generator's device; with `fingers` of them, the thumb included.

        Raises:
            TinyhallError: fewer than 2 or more than 7 fingers: more could not be told apart; n below 1, or no generator.
        """
        _check.positive_int("n", n)
        _check.generator("generator", generator)
        if isinstance(fingers, bool) or not isinstance(fingers, int) or not 2 <= fingers <= 7:
            raise _check.fail("fingers", fingers, "a whole number from 2 to 7")
        cuts = [min(_CHUNK, n - low) for low in range(0, n, _CHUNK)]
        return torch.cat([self._draw(_Random(k, generator), fingers - 1) for k in cuts])

    def _draw(self, u: _Random, long: int) -> Tensor:
        n, size = u.n, self.size
        where = (torch.arange(size, device=u.device) + 0.5) / size * _FRAME - _FRAME / 2
        y, x = torch.meshgrid(-where, where, indexing="ij")
        # From the picture to the hand's own frame, in which it points up, thumb to the right: move, turn, scale, mirror.
        turn, scale = u(-0.5, 0.5)[:, None, None], u(0.88, 1.08)[:, None, None]
        side = torch.where(u(0, 1) < 0.5, 1.0, -1.0)[:, None, None]
        dx, dy = x - u(-0.1, 0.1)[:, None, None], y - u(-0.2, -0.05)[:, None, None]
        hx = side * (turn.cos() * dx + turn.sin() * dy) / scale
        hy = (turn.cos() * dy - turn.sin() * dx) / scale
        parts, tips = _bones(u, long)
        near = torch.full((n, size, size), math.inf, device=u.device)
        for part in parts:
            near = torch.minimum(near, _capsule(hx, hy, *part))
        pixel = _FRAME / size / scale
        cover = (0.5 - near / pixel).clamp(0, 1)[:, None]  # half a pixel of soft edge on either side
        light = _light(u, hx, hy, near)
        nails = torch.zeros_like(near)
        for tip, towards, thick in tips:
            bed = tip - 0.35 * thick[:, None] * towards
            gap = ((hx - bed[:, :1, None]).square() + (hy - bed[:, 1:, None]).square()).sqrt() - 0.62 * thick[:, None, None]
            nails = torch.maximum(nails, (0.5 - gap / pixel).clamp(0, 1))
        nails = nails * (u(0, 1) < 0.5)[:, None, None] * u(0.05, 0.16)[:, None, None]
        skin = _tones(u)[:, :, None, None] * light[:, None] + nails[:, None]
        back = (u(0.86, 1.0)[:, None, None, None] + u(-0.03, 0.03, 3)[:, :, None, None]) * torch.ones_like(skin)
        back = back + (u(-0.03, 0.03)[:, None, None] * x + u(-0.03, 0.03)[:, None, None] * y)[:, None]
        return (2 * (cover * skin + (1 - cover) * back).clamp(0, 1) - 1).float()


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
        """n photographs, float32 in -1..1, none twice.

        Raises:
            TinyhallError: more than there are, or no generator.
        """
        _check.generator("generator", generator)
        _check.positive_int("n", n)
        x = self._bytes[0]
        if n > len(x):
            raise _check.fail("n", n, f"at most {len(x)}, the number of photographs")
        rows = torch.randperm(len(x), generator=generator, device=generator.device)[:n].cpu()
        return x[rows].float() / 127.5 - 1


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
    import numpy as np
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
    import numpy as np
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


def _bones(u: _Random, long: int) -> tuple[list[Any], list[Any]]:
    """Capsules of a hand in its own frame (from, to, thickness at either end), and of each finger tip, direction, thickness."""
    n = u.n

    def point(x: Tensor | float, y: Tensor | float) -> Tensor:
        return torch.stack([torch.as_tensor(v, device=u.device) + torch.zeros(n, device=u.device) for v in (x, y)], 1)

    wide = u(0.92, 1.08)
    parts: list[Any] = []
    tips: list[Any] = []
    # The palm: a fan of capsules from the wrist to the knuckles.
    for side in (-0.17, 0.0, 0.17):
        top = u(0.0, 0.03) + 0.05 * (side == 0)
        parts.append((point(0.75 * side * wide, -0.42), point(side * wide, top), 0.15 * wide, 0.14 * wide))
    parts.append((point(0.0, -0.45), point(u(-0.08, 0.08), -1.8), 0.19 * wide, 0.19 * wide))
    more = max(long - 4, 0)  # make room: wider apart, and thinner
    spread, row = u(0.28, 0.42) * (1 + 0.4 * more), 0.46 * (1 + 0.25 * more)
    stretch, thick = u(0.88, 1.10), u(0.068, 0.086) * (4 / max(long, 4)) ** 1.1
    for i in range(long):
        share = i / (long - 1) if long > 1 else 0.5
        at = share * 3
        low = min(int(at), 2)
        length = (_LENGTHS[low] + (at - low) * (_LENGTHS[low + 1] - _LENGTHS[low])) * stretch * u(0.94, 1.06)
        angle = (0.5 - share) * 2 * spread + u(-0.03, 0.03)  # to the thumb's side first
        base = point((0.5 - share) * row * wide, 0.02 + 0.05 * math.sin(math.pi * share))
        _finger(u, parts, tips, base, angle=angle, length=length, thick=thick * u(0.95, 1.05))
    _finger(
        u,
        parts,
        tips,
        point(0.20 * wide, -0.30),
        angle=u(0.80, 1.05) + 0.14 * more,
        length=u(0.42, 0.50) * stretch,
        thick=thick * u(1.05, 1.2),
    )
    return parts, tips


def _finger(
    u: _Random, parts: list[Any], tips: list[Any], base: Tensor, *, angle: Tensor, length: Tensor, thick: Tensor
) -> None:
    """Three joints, bent a little and all to one side, thinner to the tip."""
    bend, at = u(-0.07, 0.07), base
    widths = [thick * w for w in (1.08, 1.0, 0.93, 0.82)]
    for k, share in enumerate((0.45, 0.31, 0.24)):
        towards = torch.stack([angle.sin(), angle.cos()], 1)
        end = at + (share * length)[:, None] * towards
        parts.append((at, end, widths[k], widths[k + 1]))
        at, angle = end, angle + bend
    tips.append((at, towards, widths[-1]))


def _capsule(x: Tensor, y: Tensor, a: Tensor, b: Tensor, thick_a: Tensor, thick_b: Tensor) -> Tensor:
    """Signed distance `[n, size, size]`, negative inside, to a segment as thick as said at either end."""
    px, py = x - a[:, :1, None], y - a[:, 1:, None]
    dx, dy = (b - a)[:, :1, None], (b - a)[:, 1:, None]
    along = ((px * dx + py * dy) / (dx.square() + dy.square())).clamp(0, 1)
    thick = thick_a[:, None, None] + along * (thick_b - thick_a)[:, None, None]
    return ((px - along * dx).square() + (py - along * dy).square()).sqrt() - thick


def _light(u: _Random, x: Tensor, y: Tensor, near: Tensor) -> Tensor:
    """Brightness of the skin: round at the edges, one side in the light, the palm with a soft hollow."""
    edge = u(0.10, 0.28)[:, None, None] * (-(near.clamp(max=0) / 0.05).square()).exp()
    angle = u(0, 2 * math.pi)[:, None, None]
    slope = u(0.0, 0.12)[:, None, None] * (angle.cos() * x + angle.sin() * y)
    hollow = u(0.0, 0.10)[:, None, None] * (-((x + 0.02).square() + (y + 0.22).square()) / 0.03).exp()
    return 1 - edge + slope - hollow


def _tones(u: _Random) -> Tensor:
    """A skin tone for each hand, `[n, 3]`: between two of the palette, and a little off it."""
    palette = torch.tensor(_TONES, device=u.device)
    at = u(0, len(_TONES) - 1.001)
    low = at.long()
    return palette[low] + (at - low)[:, None] * (palette[low + 1] - palette[low]) + u(-0.025, 0.025, 3)
