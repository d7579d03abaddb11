"""How like the real data a set of samples is, in the space of a classifier's features."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core import _check
from ..core._typing import Float, Int, Tensor

_CHUNK = 500  # rows of a distance matrix at a time


def fid(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Frechet distance of two Gaussians with the means and covariances of the two sets (Heusel et al. 2017), in float64:

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    It grows as the sets get smaller: compare at equal n, and with the distance of real against real beside it.

    Raises:
        TinyhallError: a value that is not finite, or features of two kinds.
    """
    x, y = _features(a=a, b=b)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    s, t = (v.T.cov().reshape(v.shape[1], v.shape[1]) for v in (x, y))  # of one feature, `cov` is a bare number
    # The trace of (S T)^(1/2) is the sum of roots of the eigenvalues of S^(1/2) T S^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return max(float(mean + s.trace() + t.trace() - 2 * shared), 0.0)


class Coverage(NamedTuple):
    """Four numbers from balls around samples, each reaching to its k-th nearest neighbour."""

    precision: float  # generated samples in some real ball (Kynkaanniemi et al. 2019)
    recall: float  # real samples in some generated ball
    density: float  # real balls that a generated sample lies in, over k (Naeem et al. 2020)
    coverage: float  # real balls with a generated sample in them


def coverage(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k: int = 5) -> Coverage:
    """Fidelity and variety apart: precision and density say whether what is generated looks real, recall and coverage whether
    all that is real is generated.

    Raises:
        TinyhallError: k of at least the size of either set, a value that is not finite, or features of two kinds.
    """
    x, y = _features(real=real, fake=fake)
    if _check.positive_int("k", k) >= min(len(x), len(y)):
        raise _check.fail("k", k, f"less than {min(len(x), len(y))}, the size of the smaller set")
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    in_real = torch.zeros(len(y), dtype=torch.int64)
    covered = torch.zeros(len(x), dtype=torch.bool)
    recalled = torch.zeros(len(x), dtype=torch.bool)
    for low in range(0, len(x), _CHUNK):
        rows = slice(low, low + _CHUNK)
        far = torch.cdist(x[rows], y)
        inside = far <= reach_x[rows, None]
        in_real += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (far <= reach_y).any(1)
    shares = ((in_real > 0), recalled, in_real.double() / k, covered)
    return Coverage(*(float(share.double().mean()) for share in shares))


def _reach(x: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th nearest other."""
    parts = [torch.cdist(x[low : low + _CHUNK], x).kthvalue(k + 1, 1).values for low in range(0, len(x), _CHUNK)]
    return torch.cat(parts)  # the nearest of all is the point itself


def imbalance(labels: Int[Tensor, " n"], expected: Int[Tensor, " m"], classes: int = 10) -> float:
    """Total variation of two sets' shares of the classes: 0 for equal shares, 1 where no class is in both.

    Raises:
        TinyhallError: no labels, or one that is not of 0..classes - 1.
    """
    for name, value in (("labels", labels), ("expected", expected)):
        if len(value) == 0 or int(value.min()) < 0 or int(value.max()) >= classes:
            raise _check.fail(name, value, f"at least one label, each of 0..{classes - 1}")
    shares = [torch.bincount(each, minlength=classes).double() / len(each) for each in (labels, expected)]
    return 0.5 * float((shares[0] - shares[1]).abs().sum())


def class_width(x: Float[Tensor, "n *shape"], labels: Int[Tensor, " n"]) -> float:
    """How various the samples of a class are: the root mean square distance of samples from the mean of their class, over the
    classes that have two samples or more, each counted alike.

    Raises:
        TinyhallError: not a label for each sample, no class with two samples, or a value that is not finite.
    """
    if labels.shape != x.shape[:1]:
        raise _check.fail("labels", labels, f"shape [{len(x)}], one for each sample")
    _check.all_finite("x", x)
    values, counts = labels.unique(return_counts=True)
    if not bool((counts > 1).any()):
        raise _check.fail("labels", labels, "a class with two samples or more")
    spread = [x[labels == label].double().flatten(1).var(0).sum() for label in values[counts > 1]]
    return float(torch.stack(spread).mean().sqrt())


def _features(**sets: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets, under the names that the caller knows them by."""
    for name, value in sets.items():
        if value.ndim != 2 or len(value) < 2:
            raise _check.fail(name, value, "shape [n, d], n >= 2")
        _check.all_finite(name, value)
    (first, x), (second, y) = sets.items()
    if x.shape[1] != y.shape[1]:
        raise _check.fail(second, y, f"shape [m, {x.shape[1]}], as many features as {first}")
    return x.double().cpu(), y.double().cpu()
