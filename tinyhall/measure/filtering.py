"""From a score to a decision: a threshold set on one split, its price read on another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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
        return cls(float(bad[math.ceil(remove * len(bad) - 1e-9) - 1]))

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
    rule = Filter.calibrate(scores, hallucinated, remove)
    bad, good = scores[hallucinated], scores[~hallucinated]
    if not len(good):
        raise _check.TinyhallError("hallucinated: expected some that are not, got none")
    generator, shares = torch.Generator().manual_seed(seed), []
    for _ in range(_check.positive_int("repeats", repeats)):
        b, g = (kind[torch.randint(len(kind), (len(kind),), generator=generator)] for kind in (bad, good))
        shares.append(float(Filter.calibrate(b, torch.ones_like(b, dtype=torch.bool), remove).keep(g).float().mean()))
    low, high = torch.tensor(shares).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Estimate(float(rule.keep(good).float().mean()), low, high, len(scores))


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
