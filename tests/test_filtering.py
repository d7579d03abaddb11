"""The filter and the figures about it, against counting by hand, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import one_line, seeded
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, sem, t
from sklearn.metrics import roc_auc_score, roc_curve

from tinyhall.core._check import TinyhallError
from tinyhall.core.recursion import lowest_k
from tinyhall.measure.filtering import Filter, split, tnr_at_tpr
from tinyhall.measure.stats import auroc, fraction, mean, roc, sliced_wasserstein


def labelled(seed: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(seed)
    bad = torch.rand(n, generator=g) < 0.3
    bad[0], bad[1] = True, False
    scores = torch.randn(n, generator=g) + bad
    return (scores * 4).round() / 4, bad  # rounded: ties


@given(seed=st.integers(0, 200), share=st.floats(0.01, 1.0))
def test_calibration_removes_the_share_and_no_more_than_it_must(seed: int, share: float) -> None:
    scores, bad = labelled(seed)
    chosen = Filter.calibrate(scores, bad, remove=share)
    assert float((~chosen.keep(scores))[bad].float().mean()) >= share - 1e-6
    higher = scores[bad & (scores > chosen.threshold)]
    if len(higher):  # the next threshold up would remove too few
        less = Filter(float(higher.min()))
        assert float((~less.keep(scores))[bad].float().mean()) < share


def test_calibration_by_hand() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.35])
    bad = torch.tensor([False, False, True, True, True, False])
    chosen = Filter.calibrate(scores, bad, remove=2 / 3)
    assert chosen.threshold == pytest.approx(0.4)
    assert chosen.keep(scores).tolist() == [True, True, True, False, False, True]
    report = chosen.report(scores, bad)
    assert (report.removed.value, report.removed.n) == (2 / 3, 3)
    assert (report.kept.value, report.kept.n) == (1.0, 3)
    assert report.auroc.value == pytest.approx(8 / 9)


def test_keep_drops_what_is_no_number() -> None:
    assert Filter(1.0).keep(torch.tensor([0.5, 1.0, math.nan, math.inf])).tolist() == [True, False, False, False]


def test_tnr_at_tpr_is_the_curve_s_point() -> None:
    g = seeded(3)
    bad = torch.arange(3_000) < 1_000
    scores = torch.randn(3_000, generator=g) + 2 * bad
    threshold = scores[bad].sort().values[50]  # 950 of 1,000 at or above it
    found = tnr_at_tpr(scores, bad)
    assert found.value == pytest.approx(float((scores[~bad] < threshold).float().mean()))
    # On the normal curve: P(z < 2 - 1.645). The interval holds the threshold's chance, and so is wider than Wilson's.
    assert found.low < 0.6388 < found.high
    alone = fraction(round(found.value * 2_000), 2_000)
    assert found.high - found.low > 1.3 * (alone.high - alone.low)
    assert tnr_at_tpr(scores, bad) == found
    assert tnr_at_tpr(scores, bad, remove=0.5).value > found.value
    with pytest.raises(TinyhallError) as caught:
        tnr_at_tpr(scores, torch.ones_like(bad))
    one_line(caught.value, "hallucinated", "none")


def test_lowest_k() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 2.0])
    assert lowest_k(scores, 3).tolist() == [1, 2, 3]
    assert lowest_k(scores, 5).tolist() == [0, 1, 2, 3, 4]
    scores[0] = math.inf  # what goes need not be finite
    assert lowest_k(scores, 3).tolist() == [1, 2, 3]


@given(n=st.integers(2, 50), share=st.floats(0.01, 0.99), seed=st.integers(0, 20))
def test_split_parts_everything_once(n: int, share: float, seed: int) -> None:
    a, b = split(n, seeded(seed), share)
    assert torch.equal(torch.cat([a, b]).sort().values, torch.arange(n))
    assert min(len(a), len(b)) >= 1
    assert abs(len(a) - n * share) <= 1
    assert torch.equal(split(n, seeded(seed), share)[0], a)


@given(seed=st.integers(0, 100))
def test_auroc_and_roc_equal_scikit_learn(seed: int) -> None:
    scores, bad = labelled(seed)
    got = auroc(scores, bad)
    assert got.value == pytest.approx(roc_auc_score(bad, scores), abs=1e-9)
    u = mannwhitneyu(scores[bad], scores[~bad]).statistic / (int(bad.sum()) * int((~bad).sum()))
    assert got.value == pytest.approx(u, abs=1e-9)
    assert 0 <= got.low <= got.value <= got.high <= 1
    assert got.n == 200
    fpr, tpr = roc(scores, bad)
    expected = roc_curve(bad, scores, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0], atol=1e-12)
    np.testing.assert_allclose(tpr, expected[1], atol=1e-12)


def test_auroc_within_strata_is_a_count_of_pairs() -> None:
    g = seeded(5)
    scores, positive = torch.randint(0, 6, (60,), generator=g).float(), torch.rand(60, generator=g) < 0.4
    strata = torch.randint(0, 4, (60,), generator=g)
    strata[:3], positive[:3] = 9, True  # a stratum without negatives has no pairs
    won = pairs = 0.0
    for i in positive.nonzero()[:, 0].tolist():
        for j in (~positive).nonzero()[:, 0].tolist():
            if strata[i] == strata[j]:
                pairs += 1
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    told = auroc(scores, positive, strata)
    assert told.value == pytest.approx(won / pairs)
    assert told.low < told.value < told.high


def test_strata_take_away_what_they_explain() -> None:
    g = seeded(6)
    strata = torch.randint(0, 3, (3000,), generator=g)
    positive = torch.rand(3000, generator=g) < torch.tensor([0.1, 0.3, 0.6])[strata]
    scores = strata + 0.1 * torch.randn(3000, generator=g)
    assert auroc(scores, positive).low > 0.65
    within = auroc(scores, positive, strata)
    assert within.low < 0.5 < within.high
    same = auroc(scores, positive, torch.zeros_like(strata))
    assert same == auroc(scores, positive)


def test_strata_without_a_pair_are_an_error() -> None:
    with pytest.raises(TinyhallError) as caught:
        auroc(torch.rand(4, generator=seeded()), torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1, 1]))
    one_line(caught.value, "positive", "both classes")


@pytest.mark.parametrize("positives", [6, 34])
@pytest.mark.parametrize("strata", [None, torch.arange(40) // 20])
def test_a_separation_without_overlap_is_bounded_by_the_smaller_class(positives: int, strata: torch.Tensor | None) -> None:
    positive = torch.arange(40) < positives
    found, mirrored = auroc(positive.float(), positive, strata), auroc(-positive.float(), positive, strata)
    assert (found.value, found.high, mirrored.value, mirrored.low) == (1, 1, 0, 0)
    # Six of either class, also in the one stratum that has both.
    assert found.low == pytest.approx(1 - 3 / 6)
    assert mirrored.high == pytest.approx(3 / 6)
    even = torch.arange(40) % 2 == 0
    assert auroc(even.float(), even).low == pytest.approx(1 - 3 / 20)
    assert auroc(-even.float(), even).high == pytest.approx(3 / 20)


class Elsewhere(torch.Tensor):
    """Stands for a tensor of another device: numpy gets it once it has been brought here, and not before."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def numpy(self) -> np.ndarray:
        raise TypeError("on another device")


def test_figures_of_tensors_of_another_device() -> None:
    scores, bad = labelled(1)
    strata = torch.arange(200) % 3
    there = scores.as_subclass(Elsewhere), bad.as_subclass(Elsewhere)
    assert auroc(*there, strata.as_subclass(Elsewhere)) == auroc(scores, bad, strata)
    assert all(type(rates) is torch.Tensor for rates in roc(*there))


def test_figures_of_scores_with_a_gradient() -> None:
    scores, bad = labelled(2)
    grown = scores.clone().requires_grad_()
    assert auroc(grown, bad) == auroc(scores, bad)
    assert Filter.calibrate(grown, bad) == (rule := Filter.calibrate(scores, bad))
    assert rule.report(grown, bad) == rule.report(scores, bad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(roc(grown, bad), roc(scores, bad), strict=True))
    assert sliced_wasserstein(grown[:, None], scores[:, None]) == 0


def test_auroc_interval_covers() -> None:
    """Two normals one std apart: the true value is Phi(1 / sqrt 2) = 0.7602; 95% of intervals hold it."""
    hit = 0
    for seed in range(200):
        g = seeded(seed)
        bad = torch.arange(120) < 40
        found = auroc(torch.randn(120, generator=g) + bad, bad)
        hit += found.low <= 0.7602 <= found.high
    assert 180 <= hit <= 199


def test_fraction_has_wilson_s_interval() -> None:
    found = fraction(3, 50)
    z, p, n = 1.959964, 3 / 50, 50
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)
    none = fraction(0, 50)
    assert none.low == 0
    assert 0.05 < none.high < 0.09
    assert f"{found:.1%}" == "6.0% [2.1%, 16.2%]"


def test_mean_has_student_s_interval() -> None:
    values = [1.0, 2.0, 4.0]
    e = mean(values)
    low, high = t.interval(0.95, 2, np.mean(values), sem(values))
    assert (e.value, e.low, e.high, e.n) == (pytest.approx(7 / 3), pytest.approx(low), pytest.approx(high), 3)
    alone = mean([2.0])
    assert (alone.value, alone.n) == (2.0, 1)
    assert np.isnan(alone.low) and np.isnan(alone.high)


def test_sliced_wasserstein_of_a_shift_is_known() -> None:
    x = torch.randn(500, 2, generator=seeded())
    shift = torch.tensor([0.3, -0.4])
    # The shadow on a line at angle a moves by 0.5 |cos(a - b)|, whose mean over all angles is 0.5 * 2 / pi.
    assert sliced_wasserstein(x, x + shift) == pytest.approx(0.5 * 2 / np.pi, rel=1e-3)
    assert sliced_wasserstein(x, x[torch.randperm(500, generator=seeded())]) == pytest.approx(0, abs=1e-7)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(sliced_wasserstein(x + shift, x))
    line = torch.tensor([[0.0], [1.0]])
    assert sliced_wasserstein(line, line + 2, directions=3) == pytest.approx(2)  # one dimension: every line is the same


def test_sliced_wasserstein_in_more_dimensions() -> None:
    x = torch.randn(300, 5, generator=seeded())
    far = sliced_wasserstein(x, x + 1.0)
    assert far == sliced_wasserstein(x, x + 1.0)  # the same lines every time
    # |v| E|u . e| for a unit u in 5 dimensions: Gamma(5/2) / (sqrt(pi) Gamma(3)) = 0.375
    assert far == pytest.approx(5**0.5 * 0.375, rel=0.2)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Filter.calibrate(torch.ones(3), torch.zeros(3).bool()), ("hallucinated", "at least one", "none")),
        (lambda: Filter.calibrate(torch.ones(3), torch.ones(3).bool(), remove=0), ("remove", "(0, 1]", "0")),
        (lambda: Filter.calibrate(torch.ones(3), torch.ones(4).bool()), ("(3,)", "(4,)")),
        (lambda: Filter.calibrate(torch.ones(3), torch.arange(3)), ("hallucinated", "bool", "int64")),
        (lambda: Filter(1.0).report(torch.ones(3), torch.ones(3)), ("hallucinated", "bool", "float32")),
        (lambda: Filter(1.0).report(torch.ones(3), torch.zeros(3).bool()), ("hallucinated", "both classes", "3 negative")),
        (lambda: auroc(torch.ones(3), torch.ones(3)), ("positive", "bool", "float32")),
        (lambda: lowest_k(torch.ones(3), 4), ("k", "at most 3", "4")),
        (lambda: lowest_k(torch.ones(3), 0), ("k", "at least 1", "0")),
        (lambda: lowest_k(torch.tensor([1.0, math.inf, math.inf]), 2), ("scores", "2 finite", "got 1")),
        (lambda: lowest_k(torch.tensor([1.0, math.nan]), 2), ("scores", "2 finite", "got 1")),
        (lambda: roc(torch.ones(2), torch.ones(2).bool()), ("both classes", "2 positive and 0 negative")),
        (lambda: roc(torch.ones(2), torch.zeros(2).bool()), ("both classes", "0 positive and 2 negative")),
        (lambda: sliced_wasserstein(torch.ones(3, 3), torch.ones(3, 3), 0), ("directions", "at least 1", "0")),
        (lambda: mean([]), ("values", "at least one")),
        (lambda: sliced_wasserstein(torch.ones(3, 2), torch.ones(3, 1)), ("y", "[m, 2]", "(3, 1)")),
        (lambda: sliced_wasserstein(torch.ones(3), torch.ones(3, 1)), ("x", "[n, .]", "(3,)")),
        (lambda: sliced_wasserstein(torch.ones(3, 2), torch.full((3, 2), math.inf)), ("y", "finite")),
        (lambda: split(1, seeded()), ("n >= 2", "1")),
        (lambda: split(5, seeded(), 1.0), ("share < 1", "1.0")),
        (lambda: split(5, 0), ("generator", "torch.Generator", "0 (int)")),
        (lambda: auroc(torch.tensor([1.0, math.nan]), torch.tensor([True, False])), ("scores", "NaN", "1")),
        (lambda: auroc(torch.ones(2), torch.ones(2).bool()), ("both classes", "2 positive and 0 negative")),
        (lambda: fraction(5, 4), ("k=5", "n=4")),
        (lambda: fraction(0, 0), ("n >= 1", "n=0")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)
