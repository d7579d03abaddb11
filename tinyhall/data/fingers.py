"""How many fingers an image of a hand shows, and whether they can be counted at all: a judge that sees the silhouette alone."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..measure import stats
from .images import Squares

IN_SUPPORT, WRONG_COUNT, MERGED, DETACHED, UNCLEAR = range(5)
KINDS = ("in support", "wrong count", "merged", "detached", "unclear")

_LEVELS = (0.14, 0.22, 0.4, 0.6)  # heights above the palm, in its radius, at which the fingers are looked at


class CountingRates(NamedTuple):
    """Can it be counted, and if so, is it miscounted: two figures, because a model may get better at one alone."""

    countable: stats.Estimate  # of all images
    miscounted: stats.Estimate | None  # of the countable ones; None where there are none: no figure is not a figure of 0


class HandJudgement(NamedTuple):
    """What a count says of images, each field of length n."""

    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, WRONG_COUNT 1, MERGED 2, DETACHED 3, UNCLEAR 4
    fingers: Int[Tensor, " n"]  # counted; -1 where there is no hand to count on

    def counting_rates(self) -> CountingRates:
        """The fraction of images that can be counted, and of these the fraction with a wrong number of fingers.

        The order is that of "Counting Hallucinations in Diffusion Models" (arXiv 2510.13080): *non-counting failures* are set
        apart first, then the rest is counted. Countable are IN_SUPPORT and WRONG_COUNT alone; of fingers that run together
        or come off, it is open how many they are. (The authors' rates are shares of all images: theirs of counting
        hallucinations is `countable * miscounted`.)

        Raises:
            TinyhallError: no images.
        """
        if not len(self.kind):
            raise _check.TinyhallError("kind: expected at least one image, got none")
        wrong = int((self.kind == WRONG_COUNT).sum())
        countable = wrong + int((self.kind == IN_SUPPORT).sum())
        miscounted = stats.fraction(wrong, countable) if countable else None
        return CountingRates(stats.fraction(countable, len(self.kind)), miscounted)


class CountedHands(Squares):
    """Images of hands, `size` pixels wide and high, judged by their silhouettes."""

    channels: ClassVar[int] = 3
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        if _check.positive_int("size", self.size) < 32:
            raise _check.fail("size", self.size, "at least 32")

    def judge(self, x: Float[Tensor, "n 3 size size"]) -> HandJudgement:
        """What each image is, by its silhouette: see `fingers.judge`. Raises TinyhallError for images of another shape."""
        return judge(self._checked(x))


def judge(x: Float[Tensor, "n 3 size size"]) -> HandJudgement:
    """What each image is, by the silhouette (see `count_fingers`): the first of these that applies.

    - UNCLEAR: no hand, or more than one, or an outline so rough that it has a dozen ends.
    - DETACHED: a piece of at least a third of a finger's size, apart from the hand.
    - MERGED: a finger at least 1.75 times as wide as the median one, or a web of half the palm's radius squared.
    - WRONG_COUNT: not five fingers.
    """
    seen = [_look(image) for image in x.detach().cpu()]
    return HandJudgement(torch.tensor([_kind(look) for look in seen]), torch.tensor([look["fingers"] for look in seen]))


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


def _look(image: Tensor) -> dict[str, Any]:
    """What there is of a hand in one image: fingers counted (-1 for no hand), their widths and tips, pieces apart."""
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
    return bool(a @ b > 0.5 * np.linalg.norm(a) * np.linalg.norm(b))


def _ahead(mask: Any, centre: Any, forward: Any) -> int:
    """The mask's area where it lies on the fingers' side of the palm, 0 elsewhere: the arm is no web."""
    away = np.argwhere(mask).mean(0) - centre
    return int(mask.sum()) if away @ forward > 0.3 * np.linalg.norm(away) * np.linalg.norm(forward) else 0


def _background(pixels: Any) -> Any:
    """A plane of colour through the rim of the picture, fitted again without what lies off it: there the arm leaves."""
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
