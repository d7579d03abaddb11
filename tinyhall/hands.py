"""Hands that can be counted: drawn from a few dozen numbers each, always with five fingers unless asked for others. And the
photographs of 11k Hands, where a reader has them."""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _check
from ._typing import Bool, Float, Int, Tensor, UInt8
from .artifacts import read_tensors, write_tensors

IN_SUPPORT, WRONG_COUNT, MERGED, DETACHED, UNCLEAR = range(5)
KINDS = ("in support", "wrong count", "merged", "detached", "unclear")

_CHUNK = 256  # hands at a time: their distances to two dozen shapes take 100 MB at 64 pixels
_FRAME = 2.0  # the picture's height in the units of the hand, whose middle finger is 0.6 long
_TONES = ((0.35, 0.22, 0.16), (0.55, 0.36, 0.26), (0.76, 0.55, 0.42), (0.88, 0.69, 0.56), (0.93, 0.76, 0.64))
_LEVELS = (0.14, 0.22, 0.4, 0.6)  # heights above the palm, in its radius, at which the fingers are looked at
_LENGTHS = (0.50, 0.60, 0.56, 0.42)  # of the long fingers, index to little


class HandJudgement(NamedTuple):
    """What a count says of images, each field of length n."""

    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, WRONG_COUNT 1, MERGED 2, DETACHED 3, UNCLEAR 4
    fingers: Int[Tensor, " n"]  # counted; -1 where there is no hand to count on


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
        """What each image is, by the silhouette (see `count_fingers`): the first of these that applies.

        - UNCLEAR: no hand, or more than one, or an outline so rough that it has a dozen ends.
        - DETACHED: a piece of at least a third of a finger's size, apart from the hand.
        - MERGED: a finger at least 1.75 times as wide as the median one, or a web of half the palm's radius squared.
        - WRONG_COUNT: not five fingers.
        """
        _check.floats("x", x, ndim=4, finite=False)
        if tuple(x.shape[1:]) != self.shape:
            raise _check.fail("x", x, f"shape [n, 3, {self.size}, {self.size}]")
        seen = [_look(image) for image in x.detach().cpu()]
        return HandJudgement(torch.tensor([_kind(look) for look in seen]), torch.tensor([look["fingers"] for look in seen]))

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
        for a, b, thick_a, thick_b in parts:
            near = torch.minimum(near, _capsule(hx, hy, a, b, thick_a, thick_b))
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

    They are read once, cut to the square in their middle, and kept, made small, in one file, as long as the same ones are
    there. `judge` is that of drawn hands and was never tried on photographs, whose fingers may lie side by side: a first
    sorting, to be checked with `tinyhall.labels`.

    Args:
        folder: holds `HandInfo.csv`, and the photographs beside it or under `Hands/`.
        size: height and width in pixels that the photographs are made.
        aspect: "dorsal" or "palmar"; None for both.
        side: "left" or "right"; None for both.
        accessories: whether hands with rings and the like are taken, too.
        cache: a folder for the small copy; None for `folder`.

    Raises:
        TinyhallError: an argument that is none of these; on first use, a folder without the data, and photographs of which
            none is left or can be read.
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
        table = Path(self.folder) / "HandInfo.csv"
        if not table.is_file():
            raise _check.TinyhallError(
                f"folder: expected HandInfo.csv and the photographs of 11k Hands, got no such file in {self.folder}; the data "
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
        missing = {"imageName", "aspectOfHand", "accessories"} - set(rows[0] if rows else ())
        if missing:
            raise _check.TinyhallError(f"folder: expected a column {', '.join(sorted(missing))} in {table}, got none")
        asked = [word for word in (self.aspect, self.side) if word]
        names = [
            row["imageName"]
            for row in rows
            if all(word in row["aspectOfHand"].split() for word in asked)
            and (self.accessories or row["accessories"].strip() == "0")
        ]
        if not names:
            raise _check.TinyhallError(
                f"folder: expected photographs of the kind asked for, got none of {len(rows)} in {table}"
            )
        for name in names:
            if Path(name).name != name:
                raise _check.TinyhallError(f"folder: expected file names under imageName, got {name!r} in {table}")
        return names

    @cached_property
    def _bytes(self) -> tuple[Tensor, int]:
        """The photographs, uint8 `[n, 3, size, size]`, and how many could not be read."""
        places = [Path(self.folder), Path(self.folder) / "Hands"]
        found = [next((p / name for p in places if (p / name).is_file()), None) for name in self.names]
        # With sizes: a photograph that is added later, or whole at last, makes another file.
        seen = [f"{name} {path.stat().st_size if path else 'missing'}" for name, path in zip(self.names, found, strict=True)]
        digest = hashlib.sha256("\n".join([str(self.size), *seen]).encode()).hexdigest()[:12]
        kept = Path(self.cache or self.folder) / f"hands-{self.size}-{digest}.safetensors"
        if kept.is_file():
            tensors, note = read_tensors(kept)
            return tensors["x"], int(note["skipped"])
        pictures = [_photograph(path, self.size) for path in found if path is not None]
        good = [picture for picture in pictures if picture is not None]
        if not good:
            raise _check.TinyhallError(
                f"folder: expected photographs, got none of {len(self.names)} that can be read in {self.folder}"
            )
        x, skipped = torch.stack(good), len(self.names) - len(good)
        write_tensors(kept, {"x": x}, {"skipped": str(skipped)})
        return x, skipped

    @property
    def skipped(self) -> int:
        """How many of the photographs asked for are missing or damaged, and left out."""
        return self._bytes[1]

    def __len__(self) -> int:
        return len(self._bytes[0])

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 3 size size"]:
        """n photographs, float32 in -1..1, none twice.

        Raises:
            TinyhallError: more than there are, or no generator.
        """
        _check.generator("generator", generator)
        if _check.positive_int("n", n) > len(self):
            raise _check.fail("n", n, f"at most {len(self)}, the number of photographs")
        rows = torch.randperm(len(self), generator=generator, device=generator.device)[:n].cpu()
        return self._bytes[0][rows].float() / 127.5 - 1


def _photograph(path: Path, size: int) -> UInt8[Tensor, "3 size size"] | None:
    """The square in the middle of a picture, made small; None for a file that is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (4 * size, 4 * size))  # a JPEG can be opened at an eighth of its size, and sooner
            whole = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises over files that are none
        return None
    edge = min(whole.size)
    left, top = (whole.width - edge) // 2, (whole.height - edge) // 2
    small = whole.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def count_fingers(x: Float[Tensor, "n 3 size size"]) -> Int[Tensor, " n"]:
    """How many fingers stand out of each silhouette; -1 where there is no hand.

    The silhouette is what differs from the background, which is a plane of colour through the picture's rim. A disc half as
    wide as the palm fits into palm and arm and into no finger: what is left where it does not fit are the fingers, looked at
    at several heights, because neighbours may touch at their roots.
    """
    return torch.tensor([_look(image)["fingers"] for image in x.detach().cpu()])


def finger_tips(image: Float[Tensor, "3 size size"]) -> Float[Tensor, "k 2"]:
    """The end of each finger found, x and y in pixels."""
    return torch.tensor(_look(image.detach().cpu())["tips"]).reshape(-1, 2)


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
        _finger(u, parts, tips, base, angle, length, thick * u(0.95, 1.05))
    _finger(
        u, parts, tips, point(0.20 * wide, -0.30), u(0.80, 1.05) + 0.14 * more, u(0.42, 0.50) * stretch, thick * u(1.05, 1.2)
    )
    return parts, tips


def _finger(u: _Random, parts: list[Any], tips: list[Any], base: Tensor, angle: Tensor, length: Tensor, thick: Tensor) -> None:
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


def _look(image: Tensor) -> dict[str, Any]:
    """What there is of a hand in one image: fingers counted (-1 for no hand), their widths and tips, pieces apart."""
    import numpy as np
    from scipy import ndimage

    nothing = {"fingers": -1, "widths": [], "tips": [], "apart": 0.0, "rough": False, "web": 0.0}
    pixels = image.numpy().astype(np.float64)
    if not np.isfinite(pixels).all():
        return nothing
    size = pixels.shape[-1]
    far = ndimage.gaussian_filter(np.abs(pixels - _background(pixels)).max(0), 0.5 * size / 64)
    contrast = float(np.quantile(far, 0.9))
    mask = ndimage.binary_fill_holes(far > max(0.45 * contrast, 0.15))
    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return nothing
    areas = ndimage.sum_labels(mask, pieces, range(1, count + 1))
    hand = pieces == 1 + int(np.argmax(areas))
    # The arm goes on beyond the picture: cut off at its edge, its corners would stand out like fingers.
    margin = size // 4
    wide = np.pad(hand, margin, mode="edge")
    inside = (slice(margin, -margin),) * 2
    deep = ndimage.distance_transform_edt(wide)
    depth = deep[inside]
    palm = float(depth.max())
    if palm < 0.07 * size or areas.max() > 0.8 * size**2:
        return nothing

    def opened(radius: float) -> Any:  # by a disc: eroded, then dilated, both by distance
        return (ndimage.distance_transform_edt(deep <= radius) <= radius + 0.75)[inside]

    core = opened(0.55 * palm)
    centre = np.array(np.unravel_index(int(np.argmax(depth)), depth.shape))
    above = ndimage.distance_transform_edt(~core) / palm
    rest, ends = ndimage.label(hand & (above > _LEVELS[0]), np.ones((3, 3)))
    fingers: list[tuple[Any, Any]] = []
    for k in range(1, ends + 1):
        # Neighbours may touch at their roots: what parts higher up counts as its parts.
        looks = [_fingers((rest == k) & (above > level), centre, palm) for level in _LEVELS]
        most = max(looks, key=len)
        fingers += most
    # A ragged arm has corners, too. No finger points its way.
    below = np.argwhere(hand[-2:]) + np.array([size - 2, 0])
    arm = below.mean(0) - centre if len(below) else np.zeros(2)
    fingers = [found for found in fingers if not _along(np.array(found[0])[::-1] - centre, arm)]
    tips, widths = [tip for tip, _ in fingers], [width for _, width in fingers]
    # Where fingers have run together, a disc fits that fits into none of them, and a larger one does not.
    webs, count = ndimage.label(hand & core & ~opened(0.7 * palm), np.ones((3, 3)))
    forward = np.mean(tips, 0)[::-1] - centre if tips else np.zeros(2)
    web = max((_ahead(webs == k, centre, forward) for k in range(1, count + 1)), default=0) / palm**2
    others = np.sort(areas)[:-1]
    return {
        "fingers": len(tips), "widths": widths, "tips": tips, "apart": float(others[-1] / palm**2) if len(others) else 0.0,
        "rough": ends > 12, "web": web,
    }  # fmt: skip


def _fingers(mask: Any, centre: Any, palm: float) -> list[tuple[list[float], float]]:
    """Tip and width of each piece of the mask that reaches out like a finger."""
    import numpy as np
    from scipy import ndimage

    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    found = []
    for k in range(1, count + 1):
        rows, columns = np.nonzero(pieces == k)
        reach = np.hypot(rows - centre[0], columns - centre[1])
        if reach.max() < 1.3 * palm or len(rows) < 0.05 * palm**2 or np.ptp(reach) < 0.2 * palm:
            continue
        tip = int(np.argmax(reach))
        found.append(([float(columns[tip]), float(rows[tip])], len(rows) / max(float(np.ptp(reach)), 1.0)))
    return found


def _along(a: Any, b: Any) -> bool:
    """True for directions within 60 degrees of each other."""
    import numpy as np

    return bool(a @ b > 0.5 * np.linalg.norm(a) * np.linalg.norm(b))


def _ahead(mask: Any, centre: Any, forward: Any) -> int:
    """The mask's area where it lies on the fingers' side of the palm, 0 elsewhere: the arm is no web."""
    import numpy as np

    away = np.argwhere(mask).mean(0) - centre
    return int(mask.sum()) if away @ forward > 0.3 * np.linalg.norm(away) * np.linalg.norm(forward) else 0


def _background(pixels: Any) -> Any:
    """A plane of colour through the rim of the picture, fitted again without what lies off it: there the arm leaves."""
    import numpy as np

    size = pixels.shape[-1]
    y, x = np.mgrid[:size, :size] / size - 0.5
    terms = np.stack([np.ones_like(x), x, y], -1)
    rim = np.zeros((size, size), bool)
    band = max(size // 16, 2)
    rim[:band], rim[:, :band], rim[:, -band:] = True, True, True
    use = rim
    for _ in range(4):
        plane = np.stack([terms @ np.linalg.lstsq(terms[use], channel[use], rcond=None)[0] for channel in pixels])
        off = np.abs(pixels - plane).max(0)
        use = rim & (off <= max(2 * float(np.median(off[rim])), 0.05))
        if use.sum() < size:
            break
    return plane


def _kind(look: dict[str, Any]) -> int:
    if look["fingers"] < 0 or look["rough"] or look["apart"] > 3:
        return UNCLEAR
    if look["apart"] > 0.25:
        return DETACHED
    widths = sorted(look["widths"])
    if look["web"] > 0.5:
        return MERGED
    if len(widths) > 1 and widths[-1] > 1.75 * widths[len(widths) // 2 - (len(widths) % 2 == 0)]:
        return MERGED
    return IN_SUPPORT if look["fingers"] == 5 else WRONG_COUNT
