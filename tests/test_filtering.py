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
from tinyhall.measure.filtering import Detection, Filter, detection, split, tnr_at_tpr
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
    one_line(caught.value, "hallucinated", "both classes", "3000 positive and 0 negative")


def test_tnr_at_tpr_by_hand() -> None:
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0, 9.0, 0.5, 2.5, 3.0])
    bad = torch.tensor([False, True, False, True, True, False, False, False])
    for remove, kept in ((1 / 3, 5), (2 / 3, 5), (1.0, 4)):  # at 9, at 4, and at 3, where equal scores go too
        found = tnr_at_tpr(scores, bad, remove)
        assert (found.value, found.n) == (kept / 5, 8)
    assert tnr_at_tpr(scores, bad, 2 / 3 + 1e-6).value == 4 / 5
    alone = tnr_at_tpr(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert alone == (1.0, 1.0, 1.0, 2)


def test_detection_by_hand() -> None:
    # Even places of the hallucinated: 5, 7, 9; odd ones: 6, 8. Of the others 1, 3, 5.5, and 2, 6.5.
    scores = torch.tensor([5.0, 1.0, 6.0, 2.0, 3.0, 7.0, 6.5, 8.0, 5.5, 9.0])
    bad = torch.tensor([True, False, True, False, False, True, False, True, False, True])
    found = detection(scores, bad, 1.0)
    # The odd half's threshold, 6, keeps 3 of 3 even others, removes 2 of 3; the even half's, 5, keeps 1 of 2, removes both.
    assert (found.kept.value, found.kept.n) == (0.5 * (3 / 3 + 1 / 2), 10)
    assert found.removed == fraction(4, 5)
    assert (found.kept_same.value, found.kept_same.n) == (3 / 5, 10)  # all are above 5
    assert found.auroc == auroc(scores, bad)
    # At a half, by 8 (1 of 2) and 7 (2 of 3).
    half = detection(scores, bad, 0.5)
    assert (half.kept.value, half.removed) == (1.0, fraction(1 + 1, 5))


@given(seed=st.integers(0, 100), remove=st.floats(0.3, 1.0))
def test_detection_is_two_filters_each_read_on_the_other_half(seed: int, remove: float) -> None:
    scores, bad = labelled(seed)
    place = torch.where(bad, bad.cumsum(0), (~bad).cumsum(0)) - 1  # of its kind
    even = place % 2 == 0
    kept, removed = [], 0.0
    for fitted, read in ((even, ~even), (~even, even)):
        told = Filter.calibrate(scores[fitted], bad[fitted], remove).report(scores[read], bad[read])
        kept.append(told.kept.value)
        removed += told.removed.value * told.removed.n
    found = detection(scores, bad, remove)
    assert found.kept.value == pytest.approx(sum(kept) / 2)
    assert found.removed == fraction(round(removed), int(bad.sum()))
    assert found.kept_same == tnr_at_tpr(scores, bad, remove)
    for estimate in found:
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert detection(scores, bad, remove) == found
    other = detection(scores, bad, remove, seed=1)
    assert [e.value for e in other] == [e.value for e in found]


def test_another_seed_draws_another_interval() -> None:
    scores, bad = labelled(3, 2_000)
    first, other = detection(scores, bad), detection(scores, bad, seed=1)
    assert first.kept != other.kept and first.kept_same != other.kept_same
    assert (first.removed, first.auroc) == (other.removed, other.auroc)  # in closed form


def overlapping(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    bad = torch.rand(n, generator=seeded(seed)) < 0.2
    return torch.randn(n, generator=seeded(seed + 1)) + 2 * bad, bad


def test_intervals_of_a_detection_shrink_with_n() -> None:
    few, many = (detection(*overlapping(n)) for n in (400, 40_000))
    for a, b in zip(few, many, strict=True):
        assert b.low < b.value < b.high
        assert b.high - b.low == pytest.approx((a.high - a.low) / 10, rel=0.6)


@pytest.mark.parametrize("remove", [0.5, 0.95, 1.0])
def test_a_bootstrap_that_draws_nothing_agrees_with_one_that_draws(remove: float) -> None:
    scores, bad = overlapping(600)
    scores = (scores * 8).round() / 8  # ties
    chance, shares = np.random.default_rng(7), []
    for _ in range(4_000):
        b, g = (kind[chance.integers(len(kind), size=len(kind))] for kind in (scores[bad].numpy(), scores[~bad].numpy()))
        threshold = np.sort(b)[::-1][math.ceil(remove * len(b) - 1e-9) - 1]
        shares.append(float((g < threshold).mean()))
    found = tnr_at_tpr(scores, bad, remove, repeats=4_000)
    low, high = np.quantile(shares, [0.025, 0.975])
    assert low < high or remove == 1
    assert found.low == pytest.approx(low, abs=0.015)
    assert found.high == pytest.approx(max(high, found.value), abs=0.015)


def test_the_interval_of_what_is_kept_held_out_covers() -> None:
    """Two normals two std apart, whose threshold at 90% keeps Phi(2 - 1.2816) = 0.7638 of the others; and 95% of intervals hold
    it. A half's threshold is of few, so its value is a little off: by less than its interval."""
    hit = {"kept": 0, "kept_same": 0}
    for seed in range(200):
        bad = torch.arange(2_000) < 400
        found = detection(torch.randn(2_000, generator=seeded(seed)) + 2 * bad, bad, 0.9)
        for name in hit:
            hit[name] += getattr(found, name).low <= 0.7638 <= getattr(found, name).high
    assert all(178 <= count <= 199 for count in hit.values()), hit


def test_a_detection_of_tensors_with_a_gradient_or_of_half_precision() -> None:
    scores, bad = labelled(4)
    assert detection(scores.clone().requires_grad_(), bad) == detection(scores, bad)
    assert detection(scores.half(), bad).kept == detection(scores, bad).kept  # quarters are whole in either
    assert Detection._fields == ("kept", "removed", "kept_same", "auroc")


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
        (lambda: tnr_at_tpr(torch.ones(4), torch.arange(4) < 2, 0.0), ("remove", "(0, 1]", "0.0")),
        (lambda: tnr_at_tpr(torch.ones(4), torch.arange(4) < 2, repeats=0), ("repeats", "at least 1", "0")),
        (lambda: tnr_at_tpr(torch.ones(4), torch.arange(3) < 2), ("(4,)", "(3,)")),
        (lambda: tnr_at_tpr(torch.ones(4), torch.arange(4) < 0), ("hallucinated", "both classes", "0 positive")),
        (lambda: detection(torch.ones(4), torch.arange(4) < 2, 1.5), ("remove", "(0, 1]", "1.5")),
        (lambda: detection(torch.ones(4), torch.arange(4) < 2, repeats=0), ("repeats", "at least 1", "0")),
        (lambda: detection(torch.ones(4), torch.arange(3) < 2), ("(4,)", "(3,)")),
        (lambda: detection(torch.ones(4), torch.arange(4) < 1), ("hallucinated", "two samples of each kind", "1 and 3")),
        (lambda: detection(torch.ones(4), torch.arange(4) < 3), ("hallucinated", "two samples of each kind", "3 and 1")),
        (lambda: detection(torch.ones(4), torch.arange(4) < 4), ("hallucinated", "both classes", "4 positive")),
        (lambda: detection(torch.tensor([1.0, math.nan, 2, 3]), torch.arange(4) < 2), ("scores", "NaN", "1")),
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
