"""Hands that can be counted: drawn from a few dozen numbers each, always with five fingers unless asked for others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..core import _check
from ..core._typing import Float, Tensor
from .fingers import CountedHands
from .photos import HandPhotos as HandPhotos

_CHUNK = 256  # hands at a time: their distances to two dozen shapes take 100 MB at 64 pixels
_FRAME = 2.0  # the picture's height in the units of the hand, whose middle finger is 0.6 long
_TONES = ((0.35, 0.22, 0.16), (0.55, 0.36, 0.26), (0.76, 0.55, 0.42), (0.88, 0.69, 0.56), (0.93, 0.76, 0.64))
_LENGTHS = (0.50, 0.60, 0.56, 0.42)  # of the long fingers, index to little


class _Random:
    """Uniform numbers for n hands from one generator."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator, self.device = n, generator, generator.device

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.n, *shape, generator=self.generator, device=self.device)


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
