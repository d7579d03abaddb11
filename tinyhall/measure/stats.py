"""Figures with their uncertainty: fractions, AUROC, and what a filter removes and keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..core import _check
from ..core._typing import Bool, Float, Int, Tensor


class Estimate(NamedTuple):
    """A figure, its 95% interval, and how many samples it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        """`f"{e:.3f}"` writes value [low, high]; `f"{e:.1%}"` percentages, `f"{e:.1e}"` powers of ten."""
        spec = spec or ".3g"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def _scipy_stats() -> Any:
    """Imported when used, so that the package alone needs no scipy."""
    try:
        import scipy.stats
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "scipy":
            raise
        raise ModuleNotFoundError(
            "tinyhall: intervals and AUROC need scipy: pip install 'tinyhall[stats]'", name="scipy"
        ) from None
    return scipy.stats


def fraction(k: int, n: int) -> Estimate:
    """k of n, with Wilson's 95% interval (Wilson 1927): usable at k = 0 too."""
    if any(isinstance(v, bool) or not isinstance(v, Integral) for v in (k, n)) or not 0 <= k <= n or n < 1:
        raise _check.TinyhallError(f"k, n: expected 0 <= k <= n and n >= 1, got k={k}, n={n}")
    interval = _scipy_stats().binomtest(k, n).proportion_ci(0.95, method="wilson")
    return Estimate(k / n, float(interval.low), float(interval.high), n)


def fraction_by_kind(kind: Int[Tensor, " n"], kinds: Sequence[str]) -> dict[str, Estimate]:
    """The fraction of each kind but the first, "in support", and of "any" of them."""
    counts = torch.bincount(kind, minlength=len(kinds)).tolist()
    return {
        name: fraction(k, len(kind)) for name, k in zip(("any", *kinds[1:]), (len(kind) - counts[0], *counts[1:]), strict=True)
    }


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent runs, with Student's 95% interval; of a single run without one (NaN)."""
    if not len(values):
        raise _check.TinyhallError("values: expected at least one, got none")
    x = torch.tensor(list(values), dtype=torch.float64)
    middle, n = float(x.mean()), len(x)
    half = float(_scipy_stats().t.ppf(0.975, n - 1)) * float(x.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(middle, middle - half, middle + half, n)


def sliced_wasserstein(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], directions: int = 64) -> float:
    """Distance between two sets of points, in their units: the 1-Wasserstein distance of their shadows on a line, averaged
    over lines (Rabin et al. 2011). In the plane the lines fan out evenly; in more dimensions they are drawn from a fixed seed.

    Two sets drawn from one law are not at distance 0, but at about 1/sqrt(n): compare with the distance of two such sets.
    """
    for name, value in (("x", x), ("y", y)):
        _check.floats(name, value, ndim=2)
    if x.shape[1] != y.shape[1]:
        raise _check.fail("y", y, f"shape [m, {x.shape[1]}], the dimensions of x")
    _check.positive_int("directions", directions)
    distance = _scipy_stats().wasserstein_distance
    if x.shape[1] == 2:
        angle = torch.arange(directions) * math.pi / directions
        lines = torch.stack([angle.cos(), angle.sin()])
    else:
        lines = torch.randn(x.shape[1], directions, generator=torch.Generator().manual_seed(0))
        lines = lines / lines.norm(dim=0)
    a, b = (x.detach().cpu() @ lines).numpy(), (y.detach().cpu() @ lines).numpy()
    return float(sum(distance(a[:, i], b[:, i]) for i in range(directions)) / directions)


def auroc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], strata: Int[Tensor, " n"] | None = None) -> Estimate:
    """The chance that a positive scores above a negative, ties counting half; interval by DeLong et al. (1988).

    With `strata`, the chance that it scores above a negative *of its own stratum*: over all such pairs. What two classes differ
    in only because they differ in the strata then counts for nothing.

    Raises:
        TinyhallError: lengths differ, a score is NaN, or one of the two classes is empty (in every stratum).
    """
    check_labelled(scores, positive)
    if strata is None:
        strata = torch.zeros(len(scores), dtype=torch.int64)
    elif not isinstance(strata, Tensor) or strata.dtype.is_floating_point or strata.shape != scores.shape:
        raise _check.fail("strata", strata, f"shape {tuple(scores.shape)}")
    scores, positive, strata = scores.detach().cpu(), positive.cpu(), strata.cpu()
    pairs, value, variance, positives, negatives = 0, 0.0, 0.0, 0, 0
    for stratum in strata.unique():
        rows = strata == stratum
        part = _auroc(scores[rows], positive[rows])
        m, n = int(positive[rows].sum()), int((~positive[rows]).sum())
        if part is None:
            continue
        pairs, positives, negatives = pairs + m * n, positives + m, negatives + n
        value += m * n * part[0]
        variance += (m * n) ** 2 * part[1]
    if not pairs:
        raise _one_class(positive)
    value, se = value / pairs, math.sqrt(variance) / pairs
    # On a separation without overlap DeLong's variance is 0; the rule of three then bounds what the smaller class can say.
    half = 1.96 * se if se else 3 / min(positives, negatives)
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), len(scores))


def _auroc(scores: Tensor, positive: Tensor) -> tuple[float, float] | None:
    """The area and its variance, for a lone member of a class the largest possible; None without a pair."""
    rankdata = _scipy_stats().rankdata
    a, b = scores[positive].double().numpy(), scores[~positive].double().numpy()
    m, n = len(a), len(b)
    if not m or not n:
        return None
    both = rankdata(torch.cat([scores[positive], scores[~positive]]).double().numpy())
    # Placements: for each positive the share of negatives below it, and the other way round.
    above = (both[:m] - rankdata(a)) / n
    below = 1 - (both[m:] - rankdata(b)) / m
    spread = [v.var(ddof=1) / len(v) if len(v) > 1 else 0.25 for v in (above, below)]
    return float(above.mean()), float(sum(spread))


def roc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """For every threshold, falling: the share of negatives and the share of positives at or above it, float64.

    Raises:
        TinyhallError: lengths differ, a score is NaN, or one of the two classes is empty.
    """
    check_labelled(scores, positive, both=True)
    scores, positive = scores.detach().cpu(), positive.cpu()
    order = scores.argsort(descending=True, stable=True)
    ranked, hit = scores[order], positive[order].double()
    last = torch.cat([ranked[1:] != ranked[:-1], torch.tensor([True])])  # one point per distinct score
    tp, fp = hit.cumsum(0)[last], (1 - hit).cumsum(0)[last]
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, fp / fp[-1]]), torch.cat([zero, tp / tp[-1]])


def _one_class(positive: Tensor, name: str = "positive") -> _check.TinyhallError:
    m, n = int(positive.sum()), int((~positive).sum())
    return _check.TinyhallError(f"{name}: expected both classes, got {m} positive and {n} negative")


def check_labelled(scores: Any, positive: Any, name: str = "positive", *, both: bool = False) -> None:
    """`name` is what the caller calls the labels; `both` asks for some of either class."""
    if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point() or len(scores) == 0:
        raise _check.fail("scores", scores, "a float tensor of shape [n], n >= 1")
    if bool(scores.isnan().any()):
        raise _check.TinyhallError(f"scores: expected no NaN, got {int(scores.isnan().sum())}")
    if not isinstance(positive, Tensor) or positive.dtype != torch.bool or positive.shape != scores.shape:
        raise _check.fail(name, positive, f"a bool tensor of shape {tuple(scores.shape)}")
    if both and (not bool(positive.any()) or bool(positive.all())):
        raise _one_class(positive, name)
