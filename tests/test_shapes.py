"""Simple Shapes: every sprite against Pillow's drawing of the recipe, the oracle on images made right and made wrong."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from common import one_line, same_t, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.sampling import ddpm, reverse
from tinyhall.core.schedule import Schedule
from tinyhall.data.shapes import BLANK, DOUBLE, FAINT, IN_SUPPORT, KINDS, MALFORMED, MISPLACED, SHAPES, SimpleShapes

TRIANGLE, SQUARE, PENTAGON = range(3)
LEGAL = {TRIANGLE: ((0, 10), (0, 52)), SQUARE: ((1, 7), (1, 49)), PENTAGON: ((0, 11), (0, 53))}  # x and y of corners
BOX = {TRIANGLE: (12, 10), SQUARE: (8, 8), PENTAGON: (11, 10)}  # width, height
N = 600  # none of so many passing bounds the rate at 0.5%, with 95% confidence


def drawn(shape: int, x: int, y: int, width: int = 64, height: int = 64) -> np.ndarray:
    """Pillow's drawing with its top left corner there, by the recipe's formulas; bool."""
    drawing = pytest.importorskip("PIL.ImageDraw")
    image = pytest.importorskip("PIL.Image").new("L", (width, height))
    draw = drawing.Draw(image)
    if shape == SQUARE:
        draw.rectangle((x, y, x + 7, y + 7), fill=255, outline=255)
    else:
        turns = [2 * math.pi * k / 5 for k in range(1, 6)]
        corners = (
            [(x, y), (x + 11, y), (x + 5, y + 9)]
            if shape == TRIANGLE
            else [(x + 5 + 5 * math.cos(a), y + 5 - 5 * math.sin(a)) for a in turns]
        )
        draw.polygon(corners, fill=255, outline=255)
    return np.array(image) == 255


class Draw:
    """Random choices for images made wrong, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def to(self, low: int, high: int) -> int:
        """A whole number of low..high, both included."""
        return int(self.random.integers(low, high + 1))

    def corner(self, shape: int) -> tuple[int, int]:
        """A legal one, in the whole image."""
        (x0, x1), (y0, y1) = LEGAL[shape]
        return 21 * shape + self.to(x0, x1), self.to(y0, y1)

    def rest(self, *without: int) -> np.ndarray:
        """A legal image, or a blank, that leaves these columns empty; brightness of 0 and 1."""
        out = np.zeros((64, 64))
        for shape in {0, 1, 2} - set(without):
            if self.random.random() < 0.5:
                x, y = self.corner(shape)
                out[:, 21 * shape : 21 * shape + 21] += drawn(shape, x, y)[:, 21 * shape : 21 * shape + 21]
        return out


def apart(r: Draw, shape: int) -> np.ndarray:
    """Two of a shape in its column, with black between them."""
    (_, bottom), rows = LEGAL[shape][1], BOX[shape][1]
    x, _ = r.corner(shape)
    y = r.to(1, bottom - rows - 1)
    return np.maximum(drawn(shape, x, y), drawn(shape, r.corner(shape)[0], r.to(y + rows + 1, bottom)))


def touching(r: Draw, shape: int) -> np.ndarray:
    """Two of a shape, the second below the first or up to half its height over it."""
    (left, right), (_, bottom) = LEGAL[shape]
    rows = BOX[shape][1]
    x, y = r.to(left, right), r.to(1, bottom - rows)
    aside = min(max(x + r.to(-3, 3), left), right)
    return np.maximum(drawn(shape, 21 * shape + x, y), drawn(shape, 21 * shape + aside, y + r.to(rows // 2 + 1, rows)))


def straying(r: Draw, shape: int) -> np.ndarray:
    """A shape where it may not be: another column, across two, or out of its range."""
    width, height = BOX[shape]
    while True:
        x, y = r.to(0, 64 - width), r.to(0, 64 - height)
        (x0, x1), (y0, y1) = LEGAL[shape]
        if not (21 * shape + x0 <= x <= 21 * shape + x1 and y0 <= y <= y1):
            return drawn(shape, x, y)


def bitten(r: Draw, side: int) -> np.ndarray:
    """A shape without `side` x `side` of its pixels."""
    shape = r.to(0, 2)
    whole = drawn(shape, *r.corner(shape)).astype(float)
    fits = [(y, x) for y, x in np.argwhere(whole) if whole[y : y + side, x : x + side].sum() == side**2]
    y, x = fits[r.to(0, len(fits) - 1)]
    whole[y : y + side, x : x + side] = 0
    return whole


def disc(r: Draw, outer: float, inner: float = -1.0) -> np.ndarray:
    rows, columns = np.mgrid[:64, :64]
    gap = np.hypot(rows - r.random.uniform(8, 54), columns - 21 * r.to(0, 2) - r.random.uniform(8, 12))
    return (gap <= outer) & (gap > inner)


def half_way(r: Draw) -> np.ndarray:
    """A square half a pixel off: two of its edges at half brightness."""
    x, y = 21 + r.to(1, 6), r.to(1, 49)
    return (drawn(SQUARE, x, y) + drawn(SQUARE, x + 1, y).astype(float)) / 2


WRONG = {
    "two triangles": (lambda r: r.rest(0) + apart(r, 0), DOUBLE),
    "two squares": (lambda r: r.rest(1) + apart(r, 1), DOUBLE),
    "two pentagons": (lambda r: r.rest(2) + apart(r, 2), DOUBLE),
    "triangles that touch": (lambda r: touching(r, 0), DOUBLE),
    "squares that touch": (lambda r: touching(r, 1), DOUBLE),
    "pentagons that touch": (lambda r: touching(r, 2), DOUBLE),
    "a square more, in the triangle's column": (
        lambda r: r.rest(0, 1) + drawn(1, *r.corner(1)) + drawn(1, r.to(0, 13), r.to(1, 49)),
        DOUBLE,
    ),
    "a square in the triangle's column": (lambda r: r.rest(0, 1) + drawn(1, r.to(0, 13), r.to(0, 55)), MISPLACED),
    "a square one pixel out of its range": (lambda r: r.rest(1) + drawn(1, 21 + 8 * r.to(0, 1), r.to(1, 49)), MISPLACED),
    "a stray triangle": (lambda r: straying(r, 0), MISPLACED),
    "a stray square": (lambda r: straying(r, 1), MISPLACED),
    "a stray pentagon": (lambda r: straying(r, 2), MISPLACED),
    "nothing": (lambda r: np.zeros((64, 64)), BLANK),
    "a bite of 4 pixels": (lambda r: bitten(r, 2), MALFORMED),
    "a bite of 9 pixels": (lambda r: bitten(r, 3), MALFORMED),
    "a disc": (lambda r: disc(r, 4.6), MALFORMED),
    "a ring": (lambda r: disc(r, 5.5, 2.9), MALFORMED),
    "half a pixel off": (lambda r: r.rest(1) + half_way(r), MALFORMED),
    "a faint triangle": (lambda r: r.rest(0) + r.random.uniform(0.3, 0.6) * drawn(0, *r.corner(0)), FAINT),
    "a faint square": (lambda r: r.rest(1) + r.random.uniform(0.3, 0.6) * drawn(1, *r.corner(1)), FAINT),
    "a faint pentagon": (lambda r: r.rest(2) + r.random.uniform(0.3, 0.6) * drawn(2, *r.corner(2)), FAINT),
}


def images(*brightness: np.ndarray) -> torch.Tensor:
    """float32 `[n, 1, 64, 64]` from brightness of 0 to 1; what is added beyond white is white."""
    return torch.from_numpy(2 * np.minimum(np.stack(brightness), 1) - 1).float()[:, None]


def noised(x: torch.Tensor, std: float = 0.06) -> torch.Tensor:
    return x + std * torch.randn(x.shape, generator=seeded(99))


def test_every_image_of_a_column_is_the_recipe_s() -> None:
    data = SimpleShapes()
    for shape, ((x0, x1), (y0, y1)) in LEGAL.items():
        blank, *ours = data.columns[shape]
        assert not bool(blank.any())
        expected = [drawn(shape, x, y, 21, 63) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
        assert np.array_equal(torch.stack(ours).numpy(), np.stack(expected))
        assert len({image.tobytes() for image in expected}) == len(expected)


def test_areas() -> None:
    assert SHAPES == ("triangle", "square", "pentagon")
    areas = [set(column[1:].sum((1, 2)).tolist()) for column in SimpleShapes().columns]
    assert areas == [{64, 65}, {64}, {69, 70}]
    assert [len(column) - 1 for column in SimpleShapes().columns] == [11 * 53, 7 * 49, 12 * 54]


def test_half_size() -> None:
    data = SimpleShapes(size=32)
    assert data.shape == (1, 32, 32)
    assert [int(sprite.sum()) for sprite in data.sprites] == [16, 16, 16]
    assert [tuple(sprite.shape) for sprite in data.sprites] == [(5, 6), (4, 4), (5, 5)]
    spans = [(c.amin(0).tolist(), c.amax(0).tolist()) for c in data.corners]
    assert spans == [([0, 0], [26, 5]), ([1, 1], [24, 3]), ([0, 0], [26, 5])]  # y, x
    areas = [set(column[1:].sum((1, 2)).tolist()) for column in data.columns]
    assert areas == [{15, 16}, {16}, {16}]


@pytest.mark.parametrize("size", [64, 32])
def test_samples(size: int) -> None:
    data = SimpleShapes(size)
    x = data.sample(5000, seeded())
    assert x.dtype == torch.float32
    assert x.shape == (5000, 1, size, size)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert bool((x[:, :, -1] == -1).all() and (x[:, :, :, -1] == -1).all())
    said = data.judge(x)
    assert bool((said.kind == IN_SUPPORT).all() and (said.off == 0).all())
    assert bool((said.counts <= 1).all())
    held = torch.bincount(said.counts.sum(1), minlength=4)
    assert held[0] == 0
    assert chisquare(held[1:].tolist(), [5000 * 3 / 7, 5000 * 3 / 7, 5000 / 7]).pvalue > 1e-3
    assert chisquare(said.counts.sum(0).tolist(), [int(said.counts.sum()) / 3] * 3).pvalue > 1e-3


def test_places_are_those_of_the_recipe() -> None:
    data = SimpleShapes()
    x = data.sample(20, seeded())
    found, present = data.places(x), data.judge(x).counts > 0
    assert found[:, :2].tolist() == present.nonzero().tolist()  # a shape each, image by image
    assert bool((data._overhang[tuple(found[:, 1:].T)] >= 0).all())
    again = torch.full_like(x, -1.0)
    for image, shape, top, left in found.tolist():
        sprite = data.sprites[shape]
        spot = again[image, 0, top : top + sprite.shape[0], left : left + sprite.shape[1]]
        spot[sprite[:, : spot.shape[1]]] = 1.0
    assert int((again != x).flatten(1).sum(1).max()) <= 2  # what the edges of two columns take
    two = torch.full((1, 1, 64, 64), -1.0)
    two[..., 4:12, 28:36] = two[..., 30:38, 24:32] = 1.0
    assert data.places(two).tolist() == [[0, SQUARE, 4, 28], [0, SQUARE, 30, 24]]
    assert data.places(two.neg() * 0 - 1).shape == (0, 4)


def test_places_are_equally_likely() -> None:
    data = SimpleShapes(32, p=1.0)
    x = data.sample(20_000, seeded(3))[:, 0] > 0
    key = torch.rand(310, generator=seeded(4), dtype=torch.float64)  # a number to each image of a column
    for c, column in enumerate(data.columns):
        _, counts = (x[:, :31, 10 * c : 10 * c + 10].flatten(1).double() @ key).unique(return_counts=True)
        assert len(counts) == len(column) - 1
        assert chisquare(counts.tolist()).pvalue > 1e-3


def test_probability() -> None:
    assert SimpleShapes(p=1.0).judge(SimpleShapes(p=1.0).sample(50, seeded())).counts.tolist() == [[1, 1, 1]] * 50
    data = SimpleShapes(32, p=1e-9)
    assert bool((data.judge(data.sample(50, seeded())).counts.sum(1) == 1).all())
    data = SimpleShapes(32, p=0.8)
    held = torch.bincount(data.judge(data.sample(4000, seeded())).counts.sum(1), minlength=4)[1:]
    expected = np.array([3 * 0.8 * 0.04, 3 * 0.64 * 0.2, 0.512]) / (1 - 0.008)
    assert chisquare(held.tolist(), 4000 * expected).pvalue > 1e-3


def test_sampling_is_the_generator_s() -> None:
    data = th.datasets.SimpleShapes()
    assert torch.equal(data.sample(100, seeded(1)), data.sample(100, seeded(1)))
    assert not torch.equal(data.sample(100, seeded(1)), data.sample(100, seeded(2)))
    g = seeded(1)
    assert not torch.equal(data.sample(100, g), data.sample(100, g))


@pytest.mark.parametrize("size", [64, 32])
def test_noise_and_overshoot_pass(size: int) -> None:
    data = SimpleShapes(size)
    x = data.sample(5000, seeded(5))
    assert float(data.in_support(noised(x)).float().mean()) >= 0.999
    assert bool(data.in_support(1.5 * x[:100]).all())
    assert torch.equal(data.judge(noised(x[:200])).counts, data.judge(x[:200]).counts)


def test_a_soft_edge_passes() -> None:
    data = SimpleShapes()
    x = data.sample(500, seeded(6))
    white = x > 0
    rim = white & (torch.nn.functional.max_pool2d(-x, 3, 1, 1) > 0)
    pixel = (rim.flatten(1) * torch.rand(500, 64 * 64, generator=seeded(7))).argmax(1)
    for value in (0.0, -1.0, 0.5):  # half brightness, gone, and a grey
        soft = x.flatten(1).scatter(1, pixel[:, None], value).reshape(x.shape)
        assert bool(data.in_support(soft).all())
        assert bool(data.in_support(noised(soft)).all())
    assert not bool(SimpleShapes(pixels=0).in_support(soft.clamp(-1, 0.5)).any())


@pytest.mark.parametrize("name", WRONG)
def test_images_made_wrong_are_named(name: str) -> None:
    make, kind = WRONG[name]
    r = Draw(1 + list(WRONG).index(name))
    clean = images(*(make(r) for _ in range(N)))
    x = torch.cat([clean[::2], noised(clean[1::2])])
    data = SimpleShapes()
    passed = data.in_support(x)
    assert float(passed.float().mean()) < 0.005
    said = data.judge(x[::4])
    assert torch.equal(said.kind == IN_SUPPORT, passed[::4])
    assert bool(((said.off <= data.pixels) == passed[::4]).all())
    shares = torch.bincount(said.kind, minlength=len(KINDS)) / len(said.kind)
    assert shares[kind] >= 0.99, dict(zip(KINDS, shares.tolist(), strict=True))


def test_the_first_kind_that_applies() -> None:
    square, second = drawn(SQUARE, 24, 5), drawn(SQUARE, 24, 30)
    triangle, pentagon = drawn(TRIANGLE, 3, 3), drawn(PENTAGON, 48, 30)
    stray = drawn(PENTAGON, 3, 30)
    blob = np.zeros((64, 64))
    blob[50:54, 50:60] = 1
    for image, kind, counts in [
        (square + triangle + pentagon, IN_SUPPORT, [1, 1, 1]),
        (square + second, DOUBLE, [0, 2, 0]),
        (square + second + stray + blob, DOUBLE, [0, 2, 1]),
        (square + stray + blob, MISPLACED, [0, 1, 1]),
        (triangle + square + blob, MALFORMED, [1, 1, 0]),
        (triangle + 0.5 * square + blob, MALFORMED, [1, 0, 0]),
        (triangle + 0.5 * square, FAINT, [1, 0, 0]),
        (square + 0.5 * second, FAINT, [0, 1, 0]),  # the second is not one at full brightness
        (0.5 * stray, FAINT, [0, 0, 0]),
        (0.1 * square, BLANK, [0, 0, 0]),
        (np.ones((64, 64)), MALFORMED, [0, 0, 0]),
    ]:
        said = SimpleShapes().judge(images(image.astype(float)))
        assert (said.kind.tolist(), said.counts.tolist()) == ([kind], [counts])


def test_noise_is_malformed() -> None:
    x = torch.randn(50, 1, 64, 64, generator=seeded())
    said = SimpleShapes().judge(x)
    assert bool((said.kind == MALFORMED).all())
    assert not bool(said.counts.any())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_out(value: float) -> None:
    data = SimpleShapes(pixels=5)
    x = data.sample(3, seeded())
    x[1, 0, 63, 63] = value
    assert data.in_support(x).tolist() == [True, False, True]
    said = data.judge(x)
    assert said.kind.tolist() == [IN_SUPPORT, MALFORMED, IN_SUPPORT]
    assert said.counts[1].tolist() == [0, 0, 0]


def test_half_size_kinds() -> None:
    data = SimpleShapes(32)
    x = torch.full((6, 1, 32, 32), -1.0)
    x[0, 0, 2:6, 12:16] = x[0, 0, 20:24, 12:16] = 1.0
    x[1, 0, 2:6, 2:6] = 1.0
    x[3, 0, 2:7, 12:17] = 1.0
    x[4, 0, 2:6, 12:16] = 0.0
    x[5, 0, 2:6, 12:16] = 1.0
    said = data.judge(x)
    assert said.kind.tolist() == [DOUBLE, MISPLACED, BLANK, MALFORMED, FAINT, IN_SUPPORT]
    assert said.counts[:, SQUARE].tolist() == [2, 1, 0, 0, 0, 1]


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), wrong=st.sampled_from([0, 1, 5, 300, 2000]), blank=st.booleans())
def test_off_is_the_distance_to_the_nearest_legal_image(seed: int, wrong: int, blank: bool) -> None:
    """By brute force over all pictures of each column, nothing among them, without the empty image."""
    r = Draw(seed)
    image = np.zeros((64, 64), dtype=bool) if blank else r.rest() > 0
    rows, columns = r.random.integers(0, 64, (2, wrong))
    image[rows, columns] ^= True
    total, least = int(image[63].sum() + image[:63, 63].sum()), []
    for c, held in enumerate(SimpleShapes().columns):
        gaps = (held.numpy() ^ image[:63, 21 * c : 21 * c + 21]).sum((1, 2))
        least.append((int(gaps[0]), int(gaps[1:].min())))
    choices = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)][1:]
    expected = total + min(sum(pair[i] for pair, i in zip(least, chosen, strict=True)) for chosen in choices)
    assert SimpleShapes().judge(images(image.astype(float))).off.tolist() == [expected]


def test_a_wider_tolerance_passes_more() -> None:
    r = Draw(8)
    sound = images(*(r.rest() for _ in range(400)))
    wrong = images(
        *(bitten(r, r.to(1, 3)) for _ in range(200)), *(r.random.uniform(0.3, 1) * drawn(1, 24, 9) for _ in range(200))
    )
    x = noised(torch.cat([sound, wrong]), 0.1)

    def passes(**tolerance: float) -> torch.Tensor:
        return dataclasses.replace(SimpleShapes(), **tolerance).in_support(x)

    for name, values in {"level": (0.2, 0.3, 0.4, 0.6, 0.9), "pixels": (0, 1, 2, 4, 9)}.items():
        passed = [passes(**{name: value}) for value in values]
        for narrow, wide in pairwise(passed):
            assert bool((narrow <= wide).all())
        assert int(passed[0].sum()) < int(passed[-1].sum())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: SimpleShapes(size=48), ("size", "64 or 32", "48")),
        (lambda: SimpleShapes(p=0), ("p", "above 0", "0")),
        (lambda: SimpleShapes(p=1.5), ("p", "probability above 0", "1.5")),
        (lambda: SimpleShapes(p=math.nan), ("p", "finite number", "nan")),
        (lambda: SimpleShapes(level=1.0), ("level", "between 0 and 1", "1.0")),
        (lambda: SimpleShapes(level=-0.1), ("level", "above 0", "-0.1")),
        (lambda: SimpleShapes(pixels=-1), ("pixels", "at least 0", "-1")),
        (lambda: SimpleShapes(pixels=1.5), ("pixels", "whole number", "1.5")),
        (lambda: SimpleShapes().sample(0, seeded()), ("n", "at least 1", "0")),
        (lambda: SimpleShapes().in_support(torch.zeros(2, 1, 32, 32)), ("x", "[n, 1, 64, 64]", "(2, 1, 32, 32)")),
        (lambda: SimpleShapes().judge(torch.zeros(2, 3, 64, 64)), ("x", "[n, 1, 64, 64]", "(2, 3, 64, 64)")),
        (lambda: SimpleShapes().judge(torch.zeros(64, 64)), ("x", "[n, ., ., .]", "(64, 64)")),
        (lambda: SimpleShapes().judge(torch.zeros(0, 1, 64, 64)), ("x", "n >= 1", "(0, 1, 64, 64)")),
        (lambda: SimpleShapes().in_support(torch.zeros(2, 1, 64, 64).double()), ("x", "float32", "float64")),
        (lambda: SimpleShapes().judge(np.zeros((2, 1, 64, 64))), ("x", "float32 tensor", "ndarray")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


SCHEDULE = Schedule.linear(1e-4, 0.02, 1000)


def x0_hat(net: object, x: torch.Tensor, t: int) -> torch.Tensor:
    at = same_t(t, len(x))
    return SCHEDULE.predict_x0(x, at, net(x, at))  # type: ignore[operator]


@pytest.mark.parametrize("p", [0.5, 0.1, 1.0])
@pytest.mark.parametrize("t", [950, 800])
def test_exact_denoiser_equals_a_mean_over_many_images(t: int, p: float) -> None:
    data = SimpleShapes(32, p=p)
    many = data.sample(20_000, seeded(1))
    bar = float(SCHEDULE.alpha_bar[t])
    x = SCHEDULE.q_sample(data.sample(3, seeded(2)), same_t(t, 3), torch.randn(3, 1, 32, 32, generator=seeded(3)))
    far = torch.cdist(x.flatten(1).double(), bar**0.5 * many.flatten(1).double()).square()
    weight = (-far / (2 * (1 - bar))).softmax(1)
    expected = (weight @ many.double().flatten(1)).float().reshape(x.shape)
    # The standard error of a mean of so many, pixel by pixel, is about 0.01.
    torch.testing.assert_close(x0_hat(data.denoiser(SCHEDULE), x, t), expected, rtol=0, atol=0.06)


def test_exact_denoiser_knows_that_no_image_is_blank() -> None:
    data = SimpleShapes(32, p=0.01)
    for t in (300, 600, 999):
        lit = (x0_hat(data.denoiser(SCHEDULE), torch.full((1, 1, 32, 32), -1.0), t) + 1).sum() / 2
        assert float(lit) >= 15  # pixels of the smallest shape, in expectation


def test_exact_denoiser_leaves_a_legal_image_and_no_other() -> None:
    data = SimpleShapes(64)
    x = data.sample(20, seeded())
    torch.testing.assert_close(x0_hat(data.denoiser(SCHEDULE), x, 5), x, rtol=0, atol=1e-4)
    double = torch.full((1, 1, 64, 64), -1.0)
    double[0, 0, 5:13, 25:33] = double[0, 0, 35:43, 25:33] = 1.0
    double[0, 0, 35, 25] = 0.5
    one = x0_hat(data.denoiser(SCHEDULE), double, 5)
    assert data.judge(double * (double != 0.5) + (double == 0.5)).kind.tolist() == [1]
    assert int((one > 0).sum()) == 64  # of two squares, it keeps the one that is whole


def test_sampling_with_the_exact_denoiser_does_not_hallucinate() -> None:
    data = SimpleShapes(32)
    *_, last = reverse(data.denoiser(SCHEDULE), SCHEDULE, (200, 1, 32, 32), sampler=ddpm("small", 100), generator=seeded())
    assert int((~data.in_support(last.x)).sum()) == 0
    shapes = data.judge(last.x).counts.sum(1).bincount(minlength=4)[1:] / 200
    torch.testing.assert_close(shapes, torch.tensor([3 / 7, 3 / 7, 1 / 7]), rtol=0, atol=0.1)


def test_exact_denoiser_takes_mixed_t_like_one_t() -> None:
    data = SimpleShapes(32)
    x, net = torch.randn(4, 1, 32, 32, generator=seeded()), data.denoiser(SCHEDULE)
    mixed = net(x, torch.tensor([900, 10, 900, 500]))
    torch.testing.assert_close(mixed[1:2], net(x[1:2], torch.tensor([10])), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed[::2], net(x[::2], same_t(900, 2)), rtol=1e-6, atol=1e-6)
