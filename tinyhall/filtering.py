"""From a score to a decision: a threshold set on one split, its price read on another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import _check, stats
from ._typing import Bool, Float, Int, Tensor
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
        stats._labelled(scores, hallucinated, "hallucinated")
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
        stats._labelled(scores, hallucinated, "hallucinated", both=True)
        area = stats.auroc(scores, hallucinated)
        keep = self.keep(scores)
        bad, good = int(hallucinated.sum()), int((~hallucinated).sum())
        removed = int((~keep & hallucinated).sum())
        kept = int((keep & ~hallucinated).sum())
        return Report(stats.fraction(removed, bad), stats.fraction(kept, good), area)


def kept_at(
    scores: Float[Tensor, " n"], hallucinated: Bool[Tensor, " n"], remove: float = 0.95, repeats: int = 200, seed: int = 0
) -> Estimate:
    """The share of the others that a threshold keeps which removes just the share `remove` of these hallucinated samples.

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


def keep_k(scores: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Indices, rising, of the k lowest scores: the paper's filter between generations. Of equal scores the earlier stays.

    Raises:
        TinyhallError: fewer than k scores, or fewer that are finite: which of the others to keep, they do not tell.
    """
    if not isinstance(scores, torch.Tensor) or scores.ndim != 1:
        raise _check.fail("scores", scores, "a tensor of shape [n]")
    if _check.positive_int("k", k) > len(scores):
        raise _check.fail("k", k, f"at most {len(scores)}, the number of scores")
    kept = scores.argsort(stable=True)[:k].sort().values
    if bad := int((~torch.isfinite(scores[kept])).sum()):
        raise _check.TinyhallError(f"scores: expected {k} finite ones to keep, got {bad} among the lowest that are not")
    return kept


def needed(keep: int, drop: float) -> int:
    """How many samples leave `keep` when the share `drop` of them goes."""
    _check.positive_int("keep", keep)
    _check.number("drop", drop, "a share in [0, 1)", lambda v: 0 <= v < 1)
    return round(keep / (1 - drop))


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
