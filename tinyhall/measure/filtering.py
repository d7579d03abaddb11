"""From a score to a decision: a threshold set on one split, its price read on another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..core import _check
from ..core._typing import Bool, Float, Int, Tensor
from . import stats
from .stats import Estimate


class Report(NamedTuple):
    """What a filter does to labelled samples."""

    removed: Estimate  # of the hallucinated, the share removed
    kept: Estimate  # of the others, the share kept
    auroc: Estimate  # of the score, whatever the threshold


@dataclass(frozen=True)
class Filter:
    """Keeps the samples that score below `threshold`."""

    threshold: float

    @classmethod
    def calibrate(cls, scores: Float[Tensor, " n"], hallucinated: Bool[Tensor, " n"], remove: float = 0.95) -> Filter:
        """The highest threshold that removes at least the share `remove` of the hallucinated.

        Raises:
            TinyhallError: lengths that differ, a score that is NaN, no hallucinated sample to set it by, or a share outside
                (0, 1].
        """
        stats.check_labelled(scores, hallucinated, "hallucinated")
        _check.number("remove", remove, "a share in (0, 1]", lambda v: 0 < v <= 1)
        bad = scores.detach()[hallucinated].sort(descending=True).values
        if not len(bad):
            raise _check.TinyhallError("hallucinated: expected at least one to set the threshold by, got none")
        return cls(float(bad[_rank(remove, len(bad)) - 1]))

    def keep(self, scores: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True where a sample stays; NaN goes."""
        return scores < self.threshold

    def report(self, scores: Float[Tensor, " n"], hallucinated: Bool[Tensor, " n"]) -> Report:
        """On samples that the threshold was not set by, unless you mean to fool yourself.

        Raises:
            TinyhallError: lengths that differ, a score that is NaN, or samples of one kind only.
        """
        stats.check_labelled(scores, hallucinated, "hallucinated", both=True)
        area = stats.auroc(scores, hallucinated)
        keep = self.keep(scores)
        bad, good = int(hallucinated.sum()), int((~hallucinated).sum())
        removed = int((~keep & hallucinated).sum())
        kept = int((keep & ~hallucinated).sum())
        return Report(stats.fraction(removed, bad), stats.fraction(kept, good), area)


class Detection(NamedTuple):
    """What a threshold that removes a given share of the hallucinated samples costs."""

    kept: Estimate  # of the others, held out: by a threshold set on one half and read on the other, both ways
    removed: Estimate  # of the hallucinated, held out
    kept_same: Estimate  # of the others, by the threshold set on the very samples, as the paper seems to have it
    auroc: Estimate


def detection(
    scores: Float[Tensor, " n"], hallucinated: Bool[Tensor, " n"], remove: float = 0.95, *, repeats: int = 200, seed: int = 0
) -> Detection:
    """How well a score tells hallucinated samples from the others, at the share of them that is to be removed.

    Halves are the even and the odd places, so that samples must lie in no order. The intervals of what is kept are of `repeats`
    bootstrap draws of both kinds: they hold the chance of the threshold, too.

    Raises:
        TinyhallError: lengths that differ, a score that is NaN, a share outside (0, 1], or fewer than two samples of a kind.
    """
    _check.positive_int("repeats", repeats)
    kinds = _both(scores, hallucinated, remove)
    if min(len(kind) for kind in kinds) < 2:
        raise _check.TinyhallError(f"hallucinated: expected two samples of each kind, got {len(kinds[0])} and {len(kinds[1])}")
    (bad0, bad1), (good0, good1) = ((kind[::2], kind[1::2]) for kind in kinds)
    rules = [Filter.calibrate(bad, torch.ones_like(bad, dtype=torch.bool), remove) for bad in (bad1, bad0)]
    out = sum(int((~rule.keep(bad)).sum()) for rule, bad in zip(rules, (bad0, bad1), strict=True))
    chance = np.random.default_rng(seed)  # one for both: each half has draws of its own
    one, two = (_kept(bad, good, remove, repeats, chance) for bad, good in ((bad1, good0), (bad0, good1)))
    kept, tried = 0.5 * (one[0] + two[0]), 0.5 * (one[1] + two[1])
    return Detection(
        _estimate(kept, tried, len(scores)), stats.fraction(out, len(kinds[0])),
        tnr_at_tpr(scores, hallucinated, remove, repeats, seed), stats.auroc(scores, hallucinated),
    )  # fmt: skip


def tnr_at_tpr(
    scores: Float[Tensor, " n"], hallucinated: Bool[Tensor, " n"], remove: float = 0.95, repeats: int = 200, seed: int = 0
) -> Estimate:
    """The true negative rate at a true positive rate: the share of the others that a threshold keeps which removes just the
    share `remove` of these hallucinated samples.

    A threshold set elsewhere removes more or fewer of them, by chance; here what it costs is asked at the same point for every
    score. The interval is of `repeats` bootstrap draws of both kinds, so that it holds the chance of the threshold, too.

    Raises:
        TinyhallError: lengths that differ, a share outside (0, 1], or samples of one kind only.
    """
    bad, good = _both(scores, hallucinated, remove)
    chance = np.random.default_rng(seed)
    return _estimate(*_kept(bad, good, remove, _check.positive_int("repeats", repeats), chance), len(scores))


def _both(scores: Tensor, hallucinated: Tensor, remove: float) -> tuple[Tensor, Tensor]:
    """The scores of the hallucinated and of the others, float64, once all arguments are what they should be."""
    stats.check_labelled(scores, hallucinated, "hallucinated", both=True)
    _check.number("remove", remove, "a share in (0, 1]", lambda v: 0 < v <= 1)
    scores, bad = scores.detach().cpu().double(), hallucinated.cpu()
    return scores[bad], scores[~bad]


def _rank(remove: float, n: int) -> int:
    """How many of n a threshold must reach to remove that share; what is but rounding above a whole number is one."""
    return math.ceil(remove * n - 1e-9)


def _kept(bad: Tensor, good: Tensor, remove: float, repeats: int, chance: np.random.Generator) -> tuple[float, Tensor]:
    """The share of good kept by the threshold that bad sets, and the same in bootstrap draws of both, none of which is made:
    the threshold is the k-th highest of n draws out of n, at place floor(n u) of the sorted, where u is the k-th least of n
    uniform numbers, a beta; and as many draws of good as there are, counted below it, are binomial."""
    bad, good = bad.sort(descending=True).values, good.sort().values
    n, rank = len(bad), _rank(remove, len(bad))
    drawn = np.minimum(n * chance.beta(rank, n - rank + 1, size=repeats), n - 1).astype(np.int64)
    at = torch.from_numpy(np.concatenate([[rank - 1], drawn]))
    share = torch.searchsorted(good, bad[at]).double() / len(good)
    return float(share[0]), torch.from_numpy(chance.binomial(len(good), share[1:].numpy()) / len(good))


def _estimate(value: float, tried: Tensor, n: int) -> Estimate:
    low, high = tried.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, min(low, value), max(high, value), n)


def split(n: int, generator: torch.Generator, share: float = 0.5) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Shuffled indices 0..n-1 in two parts: calibration, held-out.

    Raises:
        TinyhallError: n below 2, a share outside (0, 1), or no generator.
    """
    _check.generator("generator", generator)
    if _check.positive_int("n", n) < 2 or isinstance(share, bool) or not isinstance(share, float) or not 0 < share < 1:
        raise _check.TinyhallError(f"n, share: expected n >= 2 and 0 < share < 1, got {n} and {share}")
    order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    cut = min(max(round(n * share), 1), n - 1)
    return order[:cut], order[cut:]
