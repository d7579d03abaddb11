"""Models trained on models: the loop, and what a generation hands on to the next. `tinyhall.store` keeps it on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import _check
from ._typing import Float, Int, Tensor
from .sampling import Samples

ARMS = ("none", "random", "variance")


def lowest_k(scores: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
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


def select(samples: Samples, arm: str, keep: int, drop: float, generator: torch.Generator) -> Int[Tensor, " keep"]:
    """Which samples the next generation learns from: rising indices, `keep` of the first keep/(1-drop).

    Args:
        samples: with one score each; what scores highest is dropped by "variance".
        arm: "none" keeps the first `keep`; "random" and "variance" drop the same share, by lot or by score.
        drop: that share; the paper draws 65,000 digits and drops 5,000, its code 102,500 points and drops 2,500.
        generator: for the lot.

    Raises:
        TinyhallError: an unknown arm, a share outside [0, 1), too few samples, or a lot without a generator.
    """
    if arm not in ARMS:
        raise _check.fail("arm", arm, f"one of {', '.join(ARMS)}")
    of = needed(keep, 0.0 if arm == "none" else drop)
    if of > len(samples):
        raise _check.TinyhallError(f"draw: expected at least {of}, to keep {keep} and drop {drop:.2%}, got {len(samples)}")
    if arm == "none":
        return torch.arange(keep)
    if arm == "random":
        _check.generator("generator", generator)
        return torch.randperm(of, generator=generator, device=generator.device)[:keep].cpu().sort().values
    return lowest_k(next(iter(samples.scores.values()))[:of], keep)


class Lesson(NamedTuple):
    """What a generation learns from."""

    number: int  # 1 learns from the real data
    data: Float[Tensor, "n *shape"]
    label: Int[Tensor, " n"] | None
    kept: Int[Tensor, " keep"] | None  # which samples of the generation before are in it; None for the first


def generations(
    first: Lesson, draw: Callable[[Lesson], Samples], choose: Callable[[Lesson, Samples], Int[Tensor, " keep"]], *,
    real: int = 0, accumulate: bool = False,
) -> Iterator[tuple[Lesson, Samples, Int[Tensor, " keep"]]]:  # fmt: skip
    """The loop, without end: a model learns and draws, some of what it drew is chosen, and the next one learns from that.

    Args:
        first: the real data.
        draw: trains a model of a lesson and samples from it, with labels where the lesson has them.
        choose: which of the samples are handed on.
        real: so many of the real data stand in the place of as many samples, in every later lesson.
        accumulate: a lesson holds all that came before, too (Gerstgrasser et al. 2024).
    """
    lesson = first
    while True:
        drawn = draw(lesson)
        kept = choose(lesson, drawn)
        yield lesson, drawn, kept
        real_label = None if first.label is None else first.label[:real]
        old = lesson if accumulate else Lesson(0, first.data[:real], real_label, None)
        new = kept if accumulate else kept[: len(kept) - real]
        label = None if old.label is None or drawn.label is None else torch.cat([old.label, drawn.label[new]])
        lesson = Lesson(lesson.number + 1, torch.cat([old.data, drawn.x[new]]), label, kept)
