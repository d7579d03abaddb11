"""Simple Shapes: at most one triangle, one square and one pentagon, each in its own column, so that every legal image is known.

The sprites and their ranges are those that the paper's generator draws (github.com/locuslab/diffusion-model-hallucination,
shapes/gen_simple_shapes_dataset.py), pixel for pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional as F

from ..core import _check
from ..core import device as _device
from ..core._typing import Bool, Float, Int, Tensor
from ..core.schedule import Schedule
from .images import Squares

SHAPES = ("triangle", "square", "pentagon")  # the columns, left to right

IN_SUPPORT, DOUBLE, MISPLACED, BLANK, MALFORMED, FAINT = range(6)
KINDS = ("in support", "two of a shape", "misplaced", "blank", "malformed", "faint")

_SPRITES = (
    """
    ############
    .##########.
    .##########.
    ..########..
    ..#######...
    ...######...
    ...#####....
    ....###.....
    ....###.....
    .....#......
    """,
    8 * "########\n",
    """
    ......#....
    ...#####...
    #########..
    #########..
    ##########.
    ###########
    ##########.
    #########..
    ...#####...
    ......#....
    """,
)
_CORNERS = ((0, 10, 0, 52), (1, 7, 1, 49), (0, 11, 0, 53))  # first and last x, first and last y of a sprite's top left corner
_COLUMN = (63, 21)  # height, width

_CHUNK = 512  # images at a time: the matches of three sprites anywhere in them take 13 MB
_MOST = 12  # sprites looked for in one image; what is lit beyond them counts as malformed
_NO_FIT = -10_000  # a sprite has at most 70 pixels, all of which may be dark


class ShapeJudgement(NamedTuple):
    """What Simple Shapes says of images, each field of length n."""

    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, DOUBLE 1, MISPLACED 2, BLANK 3, MALFORMED 4, FAINT 5
    counts: Int[Tensor, "n 3"]  # triangles, squares and pentagons found, anywhere, at full brightness
    off: Int[Tensor, " n"]  # pixels in which it differs from the nearest image that the recipe can make


@dataclass(frozen=True)
class SimpleShapes(Squares):
    """The paper's images: white shapes on black, each present with probability p, never none.

    At size 64 the columns are 21 wide and 63 high, so the last row and column stay black. A triangle (apex down) has 65
    pixels, a square 64, a pentagon 70; a triangle or a pentagon as far right as it goes loses one pixel to the column's edge.

    Size 32 is the same halved: columns 10 wide and 31 high; a pixel is white where most of a 2 x 2 block was, which leaves 16
    to each shape; corners lie in the halved ranges, rounded inwards, and only the triangle can lose a pixel to the edge.

    Args:
        size: height and width of an image, 64 or 32.
        p: probability of each shape, before blank images are drawn again; above 0, at most 1.
        level: how far a pixel may be from black or white, which are 2 apart, and still count as it; between 0 and 1. It lets
            through a ghost of a shape at less than level / 2 of full brightness.
        pixels: how many pixels of an image may differ from the nearest legal image, at least 0.

    Raises:
        TinyhallError: an argument out of its range.
    """

    size: int = 64
    p: float = 0.5
    level: float = 0.4
    pixels: int = 2
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or self.size not in (32, 64):
            raise _check.fail("size", self.size, "64 or 32")
        if _check.positive("p", self.p) > 1:
            raise _check.fail("p", self.p, "a probability above 0, at most 1")
        if _check.positive("level", self.level) >= 1:
            raise _check.fail("level", self.level, "a number between 0 and 1")
        if isinstance(self.pixels, bool) or not isinstance(self.pixels, int) or self.pixels < 0:
            raise _check.fail("pixels", self.pixels, "a whole number of at least 0")

    @cached_property
    def sprites(self) -> tuple[Tensor, ...]:
        """Triangle, square and pentagon, bool `[height, width]`."""
        whole = [torch.tensor([[pixel == "#" for pixel in row] for row in drawing.split()]) for drawing in _SPRITES]
        if self.size == 64:
            return tuple(whole)
        return tuple(F.avg_pool2d(sprite[None].float(), 2)[0] > 0.5 for sprite in whole)

    @cached_property
    def corners(self) -> tuple[Tensor, ...]:
        """Where the top left corner of each shape may lie in its column, int64 `[places, 2]` of y and x; all equally likely."""
        half = 64 // self.size
        return tuple(
            torch.cartesian_prod(
                torch.arange(-(-top // half), bottom // half + 1), torch.arange(-(-left // half), right // half + 1)
            )
            for left, right, top, bottom in _CORNERS
        )

    @cached_property
    def columns(self) -> tuple[Tensor, ...]:
        """All that each column can hold, left to right, bool `[1 + places, height, width]`: first nothing, then the shape at
        each place."""
        height, width = (side * self.size // 64 for side in _COLUMN)
        columns = []
        for sprite, corners in zip(self.sprites, self.corners, strict=True):
            canvas = torch.zeros(1 + len(corners), height, width + sprite.shape[1], dtype=torch.bool)
            for image, (y, x) in zip(canvas[1:], corners.tolist(), strict=True):
                image[y : y + sprite.shape[0], x : x + sprite.shape[1]] = sprite
            columns.append(canvas[:, :, :width].contiguous())
        return tuple(columns)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 1 size size"]:
        """n images, float32 of -1 and 1, on the generator's device."""
        _check.positive_int("n", n)
        device = _check.generator("generator", generator).device
        # The 7 sets of shapes that are not empty, by their probabilities: the same as to draw blank images again.
        sets = torch.cartesian_prod(*[torch.arange(2)] * 3)[1:]
        weights = self.p ** sets.sum(1).double() * (1 - self.p) ** (3 - sets.sum(1)).double()
        drawn = torch.multinomial(weights.to(_device.widest(device)).to(device), n, replacement=True, generator=generator)
        present = sets.to(device)[drawn]  # [n, 3]
        out = torch.full((n, *self.shape), -1.0, device=device)
        for c, column in enumerate(self.columns):
            place = torch.randint(1, len(column), (n,), generator=generator, device=device)
            _, height, width = column.shape
            held = column.to(device)[place * present[:, c]]
            out[:, 0, :height, c * width : (c + 1) * width].masked_fill_(held, 1.0)
        return out

    def denoiser(self, schedule: Schedule) -> Callable[..., Tensor]:
        """The exact noise prediction E[eps | x_t] over all legal images, under the same call as a network; float64 inside.

        It is what a network trained for ever on unlimited data would learn. The columns are independent but for the rule that
        not all are empty, so the sum over millions of images is three sums over what a column can hold.
        """

        def exact(
            x: Float[Tensor, "n 1 size size"], t: Int[Tensor, " n"], label: Tensor | None = None
        ) -> Float[Tensor, "n 1 size size"]:
            exactly = _device.exact(self._checked(x))
            bar = schedule.alpha_bar.to(exactly.device)[t.to(exactly.device)][:, None, None, None]
            parts = zip(exactly.split(_CHUNK), bar.split(_CHUNK), strict=True)
            mean = torch.cat([self._mean(z, b) for z, b in parts])
            return ((exactly - bar.sqrt() * mean) / (1 - bar).sqrt()).to(x.dtype).to(x.device)

        return exact

    def _mean(self, z: Tensor, bar: Tensor) -> Tensor:
        """E[x_0 | x_t = z], for `alpha_bar` of shape `[n, 1, 1, 1]`."""
        # All images have the same norm, so that log p(z | x_0) is z . x_0 sqrt(alpha_bar) / (1 - alpha_bar) and what is the
        # same for all; and x_0 is twice the lit pixels, minus a constant.
        gain = (2 * bar.sqrt() / (1 - bar))[:, 0, 0]
        logs, held = [], []
        for c, column in enumerate(self.columns):
            _, height, width = column.shape
            mask = column.to(z.device).flatten(1).double()
            prior = torch.full((len(mask),), math.log(self.p / (len(mask) - 1)), dtype=z.dtype, device=z.device)
            prior[0] = math.log1p(-self.p) if self.p < 1 else -math.inf
            here = z[:, 0, :height, c * width : (c + 1) * width].flatten(1)
            logs.append((prior + gain * (here @ mask.T)).log_softmax(1))
            held.append(mask)
        # log of 1 - P(all columns are empty). Where that is all but sure, the probability that one is not would round to 0.
        full = torch.cat([log[:, 1:].logsumexp(1, keepdim=True) for log in logs], 1)  # log P(the column is not empty)
        some = torch.log(-torch.expm1(torch.log1p(-full.exp().clamp(max=1)).sum(1, keepdim=True)))
        some = torch.where(full.amax(1, keepdim=True) < -20, full.logsumexp(1, keepdim=True), some)
        mean = torch.full_like(z, -1.0)
        for c, (log, mask) in enumerate(zip(logs, held, strict=True)):
            _, height, width = self.columns[c].shape
            lit = (log[:, 1:] - some).exp() @ mask[1:]
            mean[:, 0, :height, c * width : (c + 1) * width] += 2 * lit.unflatten(1, (height, width))
        return mean

    def in_support(self, x: Float[Tensor, "n 1 size size"]) -> Bool[Tensor, " n"]:
        """Whether the recipe can make the image, up to the tolerance: all but `pixels` of its pixels are within `level` of
        what one and the same legal image has there. Values beyond black and white count as black and white; an image that
        holds a NaN or an infinity is out.

        It is exact, not a search: the columns are independent, so the nearest legal image is found column by column.
        """
        parts = [(self._nearest(part)[0] <= self.pixels) & _finite(part) for part in self._checked(x).split(_CHUNK)]
        return torch.cat(parts)

    def judge(self, x: Float[Tensor, "n 1 size size"]) -> ShapeJudgement:
        """What each image is: in support, or else the first of these that applies.

        - DOUBLE: two or more of one shape, at full brightness, wherever they are.
        - MISPLACED: a shape at full brightness where the recipe never puts it: in another's column, across columns, or out of
          its range.
        - BLANK: at most `pixels` pixels that are not black.
        - MALFORMED: something that is no shape, or a shape with an outline too soft or too rough for the tolerance; also an
          image with a NaN or an infinity.
        - FAINT: nothing but shapes, of which at least one is on average farther than `level` from white.

        Out of support, shapes are found by explaining all that is not black as a union of sprites, the best match first. A
        sprite may be dark in at most `pixels` of its pixels, must add at least half of itself to those before it (so shapes
        may touch or overlap), and may have at most `pixels` pixels on or around it left unexplained.
        """
        kinds, counts, offs = [], [], []
        for part in self._checked(x).split(_CHUNK):
            off, present = self._nearest(part)
            kind = torch.where(off <= self.pixels, IN_SUPPORT, MALFORMED)
            finite = _finite(part)
            rows = (kind == MALFORMED).logical_and(finite).nonzero()[:, 0]
            if len(rows):
                kind[rows], present[rows] = self._explain(part[rows, 0])
            kind[~finite], present[~finite] = MALFORMED, 0
            kinds.append(kind)
            counts.append(present)
            offs.append(off)
        return ShapeJudgement(torch.cat(kinds), torch.cat(counts), torch.cat(offs))

    def places(self, x: Float[Tensor, "n 1 size size"]) -> Int[Tensor, "found 4"]:
        """Where shapes lie that together explain what is not black: image, shape, and y and x of the top left corner, a row
        for each, in that order. Of a malformed image these are guesses."""
        found = self._find(~(self._checked(x)[:, 0] <= self.level - 1))[1]
        for key in (3, 2, 1, 0):
            found = found[found[:, key].argsort(stable=True)]
        return found

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In how many pixels each image differs from the nearest legal one `[n]`, and which shapes that one has `[n, 3]`."""
        not_black = (~(x[:, 0] <= self.level - 1)).float()  # so is a NaN, which is neither
        not_white = (~(x[:, 0] >= 1 - self.level)).float()
        off = not_black.sum((1, 2))  # against a blank image; whole numbers, exact in float32
        change = not_white - not_black  # by a white pixel in place of a black one
        present, extra = [], []
        for c, column in enumerate(self.columns):
            _, height, width = column.shape
            here = change[:, :height, c * width : (c + 1) * width].flatten(1)
            by_place = here @ column.to(x).flatten(1).T  # [n, 1 + places]
            least, place = by_place.min(1)
            off += least
            present.append(place > 0)
            extra.append(by_place[:, 1:].amin(1) - least)
        shapes = torch.stack(present, 1)
        # A blank image is not legal: where it is the nearest, one shape has to be added.
        off += torch.stack(extra, 1).amin(1) * ~shapes.any(1)
        return off.long(), shapes.long()

    def _explain(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`kind` and `counts` of images `[n, size, size]` out of support."""
        lit = ~(images <= self.level - 1)
        left, found = self._find(lit)
        image, shape, y, x = found.T
        sprites = _boxed(self.sprites).to(images.device)
        _, height, width = sprites.shape
        own = sprites[shape]
        value = _cut(F.pad(images.clamp(-1, 1), (0, width, 0, height)), (image, y, x), height, width)
        faint = (value * own).sum((1, 2)) / own.sum((1, 2)) < 1 - self.level
        # The sprite and the pixels that touch it.
        around = F.max_pool2d(F.pad(sprites.float(), (1, 1, 1, 1)), 3, 1, 1)[shape] > 0
        beside = _cut(F.pad(left, (1, width + 1, 1, height + 1)), (image, y, x), height + 2, width + 2)
        clean = (beside & around).sum((1, 2)) <= self.pixels
        counted = clean & ~faint
        legal = self._overhang.to(images.device)[shape, y, x] >= 0

        def tally(which: Tensor) -> Tensor:
            return torch.zeros(len(images), dtype=torch.int64, device=images.device).index_add_(0, image, which.long())

        counts = torch.stack([tally(counted & (shape == s)) for s in range(3)], 1)
        kind = torch.full((len(images),), MALFORMED, device=images.device)
        only_shapes = (left.sum((1, 2)) <= self.pixels) & (tally(~clean) == 0)
        kind[only_shapes & (tally(faint) > 0)] = FAINT
        kind[lit.sum((1, 2)) <= self.pixels] = BLANK
        kind[tally(counted & ~legal) > 0] = MISPLACED
        kind[(counts > 1).any(1)] = DOUBLE
        return kind, counts

    def _find(self, lit: Tensor) -> tuple[Tensor, Tensor]:
        """Sprites that together explain the lit pixels of `[n, size, size]`.

        Returns the lit pixels left over, in the same shape, and image, shape, y and x of each sprite, int64 `[found, 4]`.
        """
        sprites = _boxed(self.sprites).to(lit.device)
        _, height, width = sprites.shape
        area = sprites.sum((1, 2))[:, None, None]
        # A margin of darkness, so that a smaller sprite fits up to the edge and none goes over it.
        left = F.pad(lit, (0, width, 0, height))
        dark = _match(~left, sprites)  # [n, 3, places down, places across]
        dark = (dark - self._overhang.to(dark).clamp(min=0)).clamp(min=0)
        active = torch.arange(len(lit), device=lit.device)
        found = [torch.empty(0, 4, dtype=torch.int64, device=lit.device)]
        for _ in range(_MOST):
            new = _match(left[active], sprites)
            fits = (dark[active] <= self.pixels) & (2 * new >= area)
            # Of sprites that fit the one with fewest dark pixels, then the one that explains most, then the first from the
            # top left: of two squares that touch, the ends of a row of equally good places.
            score = torch.where(fits, new - 100 * dark[active], _NO_FIT).flatten(1)
            best, index = score.max(1)
            active, index = active[best > _NO_FIT], index[best > _NO_FIT]
            if not len(active):
                break
            down, across = new.shape[2:]
            shape, y, x = index // (down * across), index // across % down, index % across
            left[_box(active, y, x, height, width)] &= ~sprites[shape]
            found.append(torch.stack([active, shape, y, x], 1))
            active = active[left[active].sum((1, 2)) > self.pixels]
        return left[:, : lit.shape[1], : lit.shape[2]], torch.cat(found)

    @cached_property
    def _overhang(self) -> Tensor:
        """How many pixels the column's edge takes from each shape with its top left corner there; -1 where none may lie.

        int64 `[3, size + 1, size + 1]`.
        """
        out = torch.full((3, self.size + 1, self.size + 1), -1)
        for c, (sprite, corners, column) in enumerate(zip(self.sprites, self.corners, self.columns, strict=True)):
            out[c, corners[:, 0], corners[:, 1] + c * column.shape[2]] = sprite.sum() - column[1:].sum((1, 2))
        return out


def _finite(x: Tensor) -> Tensor:
    return torch.isfinite(x).flatten(1).all(1)


def _boxed(sprites: tuple[Tensor, ...]) -> Tensor:
    """In boxes of one size, `[3, height, width]`, each at the top left of its own."""
    height, width = (max(sprite.shape[axis] for sprite in sprites) for axis in (0, 1))
    return torch.stack([F.pad(s, (0, width - s.shape[1], 0, height - s.shape[0])) for s in sprites])


def _match(images: Tensor, sprites: Tensor) -> Tensor:
    """How many pixels of each sprite at each place are set: bool `[n, height, width]` to int16 `[n, 3, places down, across]`.

    Every row of a sprite is one run of pixels, so that running sums along the rows do it in a third of a convolution's time.
    """
    _, height, width = sprites.shape
    down, across = images.shape[1] - height + 1, images.shape[2] - width + 1
    sums = F.pad(images.cumsum(2, dtype=torch.int16), (1, 0))
    out = sums.new_zeros(len(images), len(sprites), down, across)
    for s, row in sprites.any(2).nonzero().tolist():
        run = sprites[s, row].nonzero()[:, 0]
        first, end = int(run[0]), int(run[-1]) + 1
        band = sums[:, row : row + down]
        out[:, s] += band[:, :, end : end + across] - band[:, :, first : first + across]
    return out


def _box(image: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices into images `[n, ., .]` of boxes `[found, height, width]` with these top left corners."""
    rows = y[:, None, None] + torch.arange(height, device=y.device)[:, None]
    return image[:, None, None], rows, x[:, None, None] + torch.arange(width, device=x.device)


def _cut(images: Tensor, at: tuple[Tensor, Tensor, Tensor], height: int, width: int) -> Tensor:
    return images[_box(*at, height, width)]
