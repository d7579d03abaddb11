"""Measures of sets against closed forms, brute force and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import one_line, seeded
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from tinyhall.core._check import TinyhallError
from tinyhall.measure.quality import class_width, coverage, fid, imbalance

LABELS = torch.tensor([0, 1, 2, 3])


def points(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    g = seeded(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + torch.randn(d, generator=g)


def reference(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


@pytest.mark.parametrize("seed", range(4))
def test_fid_equals_scipy_s_root(seed: int) -> None:
    a, b = points(200, seed=seed), points(150, seed=seed + 10)
    assert fid(a, b) == pytest.approx(reference(a, b), rel=1e-9)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)


def test_fid_of_known_gaussians() -> None:
    x = points(500).double()
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    assert fid(x, x + 3) == pytest.approx(9 * 6, rel=1e-9)
    # Twice as wide: tr S (2 - 1)^2.
    centred = x - x.mean(0)
    assert fid(centred, 2 * centred) == pytest.approx(float(centred.T.cov().trace()), rel=1e-9)
    one = centred[:, :1]  # a single feature
    assert fid(one, 2 * one + 3) == pytest.approx(9 + float(one.var()), rel=1e-9)


def test_fid_where_features_are_fewer_than_dimensions() -> None:
    flat = torch.cat([points(40, 3), torch.zeros(40, 4)], 1)  # a covariance without an inverse
    assert fid(flat, flat + 1) == pytest.approx(7, rel=1e-6)


def test_fid_equals_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    a, b = points(300), points(300, seed=3)
    ours = fid(a, b)
    theirs = image._compute_fid(a.mean(0).double(), a.double().T.cov(), b.mean(0).double(), b.double().T.cov())
    assert ours == pytest.approx(float(theirs), rel=1e-6)


def brute(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    far = np.linalg.norm(real[:, None] - fake[None], axis=2)
    reach = [NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k] for x in (real, fake)]
    inside = far <= reach[0][:, None]
    return inside.any(0).mean(), (far <= reach[1][None]).any(1).mean(), inside.sum(0).mean() / k, inside.any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_coverage_equals_brute_force(k: int) -> None:
    real, fake = points(700), points(600, seed=0) * 1.3 + 0.4
    told = coverage(real, fake, k)
    np.testing.assert_allclose(told, brute(real.double().numpy(), fake.double().numpy(), k), rtol=1e-9)


def test_coverage_of_known_cases() -> None:
    x = points(300)
    same = coverage(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    away = coverage(x, x + 1000)
    assert away == (0, 0, 0, 0)
    two = torch.cat([torch.randn(200, 2, generator=seeded(1)), torch.randn(200, 2, generator=seeded(2)) + 50])
    half = coverage(two, torch.randn(400, 2, generator=seeded(3)))  # one mode of two
    assert half.precision > 0.9
    assert half.recall == pytest.approx(0.5, abs=0.05)
    assert half.coverage == pytest.approx(0.5, abs=0.05)


def test_coverage_where_samples_repeat() -> None:
    """A collapsed set: balls of radius 0, on which rounding must not decide."""
    real, few = points(300), points(300)[:30].repeat(10, 1)
    for a, b in ((real, few), (few, real), (real, real[:1].repeat(300, 1))):
        np.testing.assert_allclose(coverage(a, b), brute(a.double().numpy(), b.double().numpy(), 5), rtol=1e-9)


def test_imbalance() -> None:
    a = torch.tensor([0, 0, 1, 1])
    assert imbalance(a, a) == 0
    assert imbalance(a, torch.tensor([2, 3])) == 1
    assert imbalance(a, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


def test_width_of_classes() -> None:
    """One class spread by 3 in one direction and by 4 in another, one by 12 in all, one of a single sample, which has none."""
    x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x * torch.tensor([3.0, 4.0, 0.0]) + 7, x * torch.tensor([12.0, 0.0, 0.0]) - 9, torch.full((1, 3), 1e3)])
    labels = torch.tensor([4] * 40_000 + [2] * 40_000 + [0])
    assert class_width(x, labels) == pytest.approx(((25 + 144) / 2) ** 0.5, rel=0.01)
    assert class_width(x[:, :, None], labels) == class_width(x, labels)
    assert class_width(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])) == pytest.approx(2**0.5)  # not of the population


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: class_width(points(4), LABELS), ("labels", "two samples")),
        (lambda: class_width(points(5), LABELS), ("labels", "[5]")),
        (lambda: class_width(points(4) * torch.nan, LABELS // 2), ("x:", "finite", "24")),
        (lambda: fid(points(5), points(5, 4)), ("b", "[m, 6]")),
        (lambda: fid(points(1), points(5)), ("a", "n >= 2")),
        (lambda: coverage(points(5), points(9)), ("k", "less than 5")),
        (lambda: coverage(points(9), points(9), k=0), ("k", "at least 1")),
        (lambda: fid(points(9), points(9) * torch.nan), ("b", "finite", "54")),
        (lambda: coverage(points(9) * torch.inf, points(9)), ("real:", "finite", "54")),
        (lambda: coverage(points(9), points(9, 4)), ("fake:", "[m, 6]", "as real")),
        (lambda: imbalance(LABELS[:0], LABELS), ("labels", "at least one")),
        (lambda: imbalance(LABELS, LABELS + 7), ("expected", "0..9")),
        (lambda: imbalance(LABELS - 1, LABELS), ("labels", "0..9")),
    ],
)
def test_errors(call, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        call()
    one_line(caught.value, *parts)
