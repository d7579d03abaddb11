"""Mixtures: geometry of the paper's code, judgement on points made by hand, density and denoiser against other ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import one_line, same_t, seeded
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from tinyhall.core._check import TinyhallError
from tinyhall.core.schedule import Schedule
from tinyhall.data.mixtures import ELSEWHERE, IN_SUPPORT, INTERPOLATED, GaussianMixture
from tinyhall.lab.mitigations import log_modes


def points(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_line() -> None:
    mixture = GaussianMixture.line()
    assert mixture.means.tolist() == [[1], [2], [3]]
    assert (mixture.std, mixture.dim, mixture.shape, mixture.nearest_spacing) == (0.05, 1, (1,), 1.0)


def test_grid_is_that_of_the_paper() -> None:
    mixture = GaussianMixture.grid()
    divisor = math.sqrt(0.05**2 + 8)
    expected = {(round(2 * i / divisor, 9), round(2 * j / divisor, 9)) for i in range(-2, 3) for j in range(-2, 3)}
    assert {tuple(round(v, 9) for v in row) for row in mixture.means.tolist()} == expected
    assert mixture.std == pytest.approx(0.05 / divisor)
    assert mixture.nearest_spacing == pytest.approx(0.707, abs=5e-4)
    assert mixture.nearest_spacing / mixture.std == pytest.approx(40)


def test_diamond_is_that_of_the_paper() -> None:
    mixture = GaussianMixture.diamond()
    divisor = math.sqrt(0.05**2 + 8)
    # The 45-degree lattice: points (i + j, i - j), one unit of each sum, spacing sqrt(2) before division.
    expected = {(round((i + j) / divisor, 9), round((j - i) / divisor, 9)) for i in range(-2, 3) for j in range(-2, 3)}
    assert {tuple(round(v, 9) + 0.0 for v in row) for row in mixture.means.tolist()} == {
        (a + 0.0, b + 0.0) for a, b in expected
    }
    assert len(mixture.means) == 25
    assert mixture.std == pytest.approx(0.05 / divisor)
    assert mixture.nearest_spacing == pytest.approx(0.500, abs=5e-4)
    assert mixture.nearest_spacing / mixture.std == pytest.approx(28.28, abs=0.01)
    corner = mixture.means[mixture.means[:, 0].argmax()]
    assert float(corner[1]) == pytest.approx(0, abs=1e-12)  # its corners lie on the axes


def test_diamond_with_the_grid_s_spacing_is_a_rotation() -> None:
    grid, diamond = GaussianMixture.grid(), GaussianMixture.diamond(same_spacing=True)
    assert diamond.nearest_spacing == pytest.approx(grid.nearest_spacing)
    assert diamond.std == grid.std
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(grid.means @ turn.T, diamond.means)
    assert diamond.name != GaussianMixture.diamond().name


def test_modes_in_turn() -> None:
    mixture = GaussianMixture.line((1, 2, 4, 5))
    x = mixture.sample(4001, seeded())
    assert x.dtype == torch.float32
    assert x.shape == (4001, 1)
    nearest = (x - mixture.means.float().T).abs().argmin(1)
    assert torch.equal(nearest, torch.arange(4001) % 4)


@pytest.mark.parametrize("mixture", [GaussianMixture.line(), GaussianMixture.grid(), GaussianMixture.diamond()])
def test_samples_have_the_std(mixture: GaussianMixture) -> None:
    n = 400 * len(mixture.means)
    x = mixture.sample(n, seeded(3)).double()
    gap = x - mixture.means[torch.arange(n) % len(mixture.means)]
    count = gap.numel()
    assert float(gap.std()) == pytest.approx(mixture.std, rel=5 / math.sqrt(2 * count))
    assert float(gap.mean()) == pytest.approx(0, abs=5 * mixture.std / math.sqrt(count))
    assert bool(mixture.in_support(x.float()).all())


def test_sampling_is_the_generator_s() -> None:
    mixture = GaussianMixture.grid()
    assert torch.equal(mixture.sample(100, seeded(1)), mixture.sample(100, seeded(1)))
    assert not torch.equal(mixture.sample(100, seeded(1)), mixture.sample(100, seeded(2)))
    g = seeded(1)
    assert not torch.equal(mixture.sample(100, g), mixture.sample(100, g))


@pytest.mark.parametrize(
    ("x", "kind", "mode", "pair", "distance"),
    [
        (1.0, IN_SUPPORT, 0, (-1, -1), 0.0),
        (1.299, IN_SUPPORT, 0, (-1, -1), 5.98),
        (1.301, INTERPOLATED, 0, (0, 1), 6.02),
        (1.5 + 1e-3, INTERPOLATED, 1, (0, 1), 9.98),
        (2.6, INTERPOLATED, 2, (1, 2), 8.0),
        (3.0, IN_SUPPORT, 2, (-1, -1), 0.0),
        (0.701, IN_SUPPORT, 0, (-1, -1), 5.98),
        (0.69, ELSEWHERE, 0, (0, 1), 6.2),
        (3.5, ELSEWHERE, 2, (1, 2), 10.0),
        (-1e20, ELSEWHERE, 0, None, None),
        (math.nan, ELSEWHERE, None, None, math.inf),
        (math.inf, ELSEWHERE, None, None, math.inf),
        (-math.inf, ELSEWHERE, None, None, math.inf),
    ],
)
def test_judge_on_a_line(x, kind, mode, pair, distance) -> None:
    mixture = GaussianMixture.line()
    said = mixture.judge(points((x,)))
    assert int(said.kind) == kind
    assert bool(mixture.in_support(points((x,)))) == (kind == IN_SUPPORT)
    if mode is not None:
        assert int(said.mode) == mode
    if pair is not None:
        assert tuple(said.pair[0].tolist()) == pair
    if distance is not None:
        assert float(said.distance) == pytest.approx(distance, abs=1e-2)


def square() -> GaussianMixture:
    """Four modes on a unit square: 0 (0,0), 1 (0,1), 2 (1,0), 3 (1,1)."""
    return GaussianMixture(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), 0.01)


@pytest.mark.parametrize(
    ("x", "kind", "pair"),
    [
        ((0.03, 0.03), IN_SUPPORT, (-1, -1)),  # 4.2 std along the diagonal
        ((0.0, 0.5), INTERPOLATED, (0, 1)),  # on a side
        ((0.04, 0.04), IN_SUPPORT, (-1, -1)),  # 5.7 std
        ((0.05, 0.5), INTERPOLATED, (0, 1)),  # 5 std off it
        ((0.07, 0.5), ELSEWHERE, (0, 1)),  # 7 std off it, 30 off the diagonals
        ((0.3, 0.3), INTERPOLATED, (0, 3)),  # on a diagonal
        ((0.3, 0.7), INTERPOLATED, (1, 2)),  # on the other
        ((0.5, -0.07), ELSEWHERE, (0, 2)),  # below the lowest side
        ((-0.07, 0.0), ELSEWHERE, (0, 1)),  # beyond an end, where the segments' line would still pass near
        ((0.0, 1.2), ELSEWHERE, None),
    ],
)
def test_judge_in_a_square(x: tuple[float, float], kind: int, pair: tuple[int, int] | None) -> None:
    said = square().judge(points(x))
    assert int(said.kind) == kind
    if pair is not None:
        assert tuple(said.pair[0].tolist()) == pair


def test_of_overlapping_segments_the_shortest_is_named() -> None:
    mixture = GaussianMixture.line((1, 2, 3, 4))
    assert mixture.judge(points((2.5,))).pair.tolist() == [[1, 2]]  # and not (0, 3), which covers it too
    grid = GaussianMixture.grid()
    between = (grid.means[12] + grid.means[13]) / 2
    assert grid.judge(between.float()[None]).pair.tolist() == [[12, 13]]


def test_width_moves_the_border() -> None:
    mixture = GaussianMixture.line()
    x = points((1.35,))  # 7 std
    assert not bool(mixture.in_support(x))
    assert not bool(mixture.in_support(x, width=6))
    assert bool(mixture.in_support(x, width=8))
    side = points((0.0, 0.5), (0.06, 0.5))
    assert square().judge(side, width=8).kind.tolist() == [INTERPOLATED, INTERPOLATED]
    assert square().judge(side, width=4).kind.tolist() == [INTERPOLATED, ELSEWHERE]


def test_a_single_mode_has_no_segments() -> None:
    said = GaussianMixture.line((1,)).judge(points((1.0,), (2.0,)))
    assert said.kind.tolist() == [IN_SUPPORT, ELSEWHERE]
    assert said.pair.tolist() == [[-1, -1], [-1, -1]]


@given(seed=st.integers(0, 1000), dim=st.integers(1, 3), k=st.integers(2, 5))
def test_judge_equals_brute_force(seed: int, dim: int, k: int) -> None:
    g = seeded(seed)
    mixture = GaussianMixture(torch.randn(k, dim, generator=g, dtype=torch.float64), 0.05)
    x = torch.randn(20, dim, generator=g)
    said = mixture.judge(x)
    means, share = mixture.means.numpy(), np.linspace(0, 1, 2001)[:, None]
    for i, row in enumerate(x.double().numpy()):
        to_modes = np.linalg.norm(means - row, axis=1)
        assert int(said.mode[i]) == to_modes.argmin()
        assert float(said.distance[i]) == pytest.approx(to_modes.min() / 0.05, rel=1e-5)
        gaps = {
            (a, b): np.linalg.norm(means[a] + share * (means[b] - means[a]) - row, axis=1).min()
            for a in range(k)
            for b in range(a + 1, k)
        }
        nearest = min(gaps.values())
        if to_modes.min() <= 0.3:
            assert int(said.kind[i]) == IN_SUPPORT
        elif abs(nearest - 0.3) > 1e-3:  # the brute force walks in steps
            assert int(said.kind[i]) == (INTERPOLATED if nearest < 0.3 else ELSEWHERE)
            reached = [pair for pair, gap in gaps.items() if gap < 0.3 - 1e-3]
            borderline = any(abs(gap - 0.3) <= 1e-3 for gap in gaps.values())
            if reached and not borderline:
                closest = min(reached, key=lambda ends: np.linalg.norm(means[ends[0]] - means[ends[1]]))
                assert tuple(said.pair[i].tolist()) == closest
            elif not reached and not borderline:
                assert gaps[tuple(said.pair[i].tolist())] <= nearest + 1e-3


def test_the_pair_is_the_closest_that_explains_the_point() -> None:
    grid = GaussianMixture.grid()
    cell = grid.means[[0, 1, 5, 6]]  # one cell's corners
    centre = cell.mean(0)
    beside = centre + torch.tensor([0.0, 2.0]) * grid.std  # 1.4 std off a diagonal, 2 std off a segment of five cells' length
    said = grid.judge(torch.stack([centre, beside]).float())
    assert grid.neighbour_order(said.pair).tolist() == [2, 2]
    edge = (cell[0] + cell[1]) / 2 + torch.tensor([5.9, 0.0]) * grid.std
    assert grid.judge(edge.float()[None]).pair.tolist() == [[0, 1]]


def test_neighbour_order() -> None:
    line = GaussianMixture.line((1, 2, 4, 5))
    pairs = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 2], [0, 3], [-1, -1]])
    assert line.neighbour_order(pairs).tolist() == [1, 1, 2, 1, 4, 0]
    assert line.neighbour_order(pairs[:0]).tolist() == []
    for mixture in (GaussianMixture.grid(), GaussianMixture.diamond(), GaussianMixture.diamond(same_spacing=True)):
        ends = torch.combinations(torch.arange(25), 2)
        counts = torch.bincount(mixture.neighbour_order(ends)).tolist()
        assert counts[:4] == [0, 40, 32, 30]  # along the axes, along diagonals, two apart


@pytest.mark.parametrize("pair", [[0, 0], [0, 4], [-2, 1], [1, -1]])
def test_neighbour_order_refuses_what_is_no_pair(pair: list[int]) -> None:
    with pytest.raises(TinyhallError) as caught:
        GaussianMixture.line((1, 2, 4, 5)).neighbour_order(torch.tensor([pair]))
    one_line(caught.value, "pair", "0..3")


@pytest.mark.parametrize("mixture", [GaussianMixture.line((1, 2, 4)), GaussianMixture.grid(side=3)])
def test_log_density_equals_scipy(mixture: GaussianMixture) -> None:
    x = torch.cat([mixture.sample(50, seeded(1)), 3 * torch.randn(50, mixture.dim, generator=seeded(2))])
    parts = [
        multivariate_normal(m, mixture.std**2 * np.eye(mixture.dim)).logpdf(x.double().numpy()) for m in mixture.means.numpy()
    ]
    expected = np.logaddexp.reduce(parts, axis=0) - math.log(len(parts))
    np.testing.assert_allclose(mixture.log_density(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_log_density_is_worked_out_where_x_is() -> None:
    """A device that only keeps shapes stands for a GPU."""
    assert GaussianMixture.grid().log_density(torch.zeros(4, 2, device="meta")).device.type == "meta"


def test_many_modes_are_judged_in_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 x 20 modes are 79,800 pairs: a table of 8,192 points against all of them would take 10 GB."""
    rows: list[int] = []

    def nearest(self: GaussianMixture, x: torch.Tensor, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(x))
        return torch.zeros(len(x)), torch.zeros(len(x), 2, dtype=torch.int64)

    monkeypatch.setattr(GaussianMixture, "_nearest_segment", nearest)
    GaussianMixture.grid(side=20).judge(torch.full((100, 2), 9.0))
    assert sum(rows) == 100
    assert max(rows) * 79_800 * 2 <= 2**22


@pytest.mark.parametrize("t", [0, 1, 9, 60, 150, 300])
def test_exact_denoiser_equals_quadrature_in_1d(t: int) -> None:
    """E[eps | x_t] by integrating over x_0 and Bayes' rule, in float64, without the mixture's closed form."""
    mixture, schedule = GaussianMixture.line((1, 2, 4, 5)), Schedule.linear()
    bar = float(np.cumprod(1 - np.linspace(1e-3, 0.2, 1000))[t])
    x0 = np.linspace(-4, 10, 140_001)
    log_prior = np.logaddexp.reduce([norm(m, 0.05).logpdf(x0) for m in (1, 2, 4, 5)])
    x = np.concatenate([np.linspace(0.3, 5.7, 23) * math.sqrt(bar), [-2.0, 2.0]]).astype(np.float32).astype(np.float64)
    log_w = log_prior + norm(math.sqrt(bar) * x0, math.sqrt(1 - bar)).logpdf(x[:, None])
    weight = np.exp(log_w - log_w.max(1, keepdims=True))
    eps = (x[:, None] - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    expected = (weight * eps).sum(1) / weight.sum(1)
    ours = mixture.denoiser(schedule)(torch.tensor(x, dtype=torch.float32)[:, None], same_t(t, len(x)))[:, 0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [5, 60, 150])
def test_exact_denoiser_equals_quadrature_in_2d(t: int) -> None:
    mixture, schedule = GaussianMixture.diamond(), Schedule.linear()
    bar = float(np.cumprod(1 - np.linspace(1e-3, 0.2, 1000))[t])
    axis = np.linspace(-2.2, 2.2, 501)
    x0 = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    gaps = ((x0[:, None] - mixture.means.numpy()) ** 2).sum(-1)
    prior = np.exp(-gaps / (2 * mixture.std**2)).sum(1)
    x = (math.sqrt(bar) * torch.randn(6, 2, generator=seeded(4), dtype=torch.float64) * 0.6).float()
    ours = mixture.denoiser(schedule)(x, torch.full((6,), t))
    for row, got in zip(x.double().numpy(), ours.numpy(), strict=True):
        eps = (row - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        log_w = -0.5 * (eps**2).sum(1)
        weight = prior * np.exp(log_w - log_w.max())
        np.testing.assert_allclose(got, (weight[:, None] * eps).sum(0) / weight.sum(), rtol=2e-3, atol=2e-3)


def test_denoiser_takes_mixed_t_like_one_t() -> None:
    mixture, schedule = GaussianMixture.grid(), Schedule.linear()
    x, t = torch.randn(40, 2, generator=seeded()), torch.arange(40) * 25
    net = mixture.denoiser(schedule)
    mixed = net(x, t)
    one = torch.cat([net(x[i : i + 1], same_t(int(t[i]), 1)) for i in range(40)])
    torch.testing.assert_close(mixed, one)
    assert mixed.dtype == torch.float32
    assert bool(torch.isfinite(mixed).all())


def test_denoiser_is_the_score_of_the_noised_density() -> None:
    """eps = -sqrt(1 - abar) grad log p_t, the gradient by automatic differentiation of another mixture's density."""
    mixture, schedule, t = GaussianMixture.line((1, 2)), Schedule.linear(), 30
    bar = float(schedule.alpha_bar[t])
    noised = GaussianMixture(math.sqrt(bar) * mixture.means, math.sqrt(bar * 0.05**2 + 1 - bar))
    x = torch.linspace(0, 3, 30)[:, None].requires_grad_()
    noised.log_density(x).sum().backward()
    expected = -math.sqrt(1 - bar) * x.grad
    torch.testing.assert_close(mixture.denoiser(schedule)(x.detach(), same_t(t, 30)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GaussianMixture.line().sample(0, seeded()), ("n", "at least 1", "0")),
        (lambda: GaussianMixture.line().sample(-3, seeded()), ("n", "at least 1", "-3")),
        (lambda: GaussianMixture.line().sample(3, None), ("generator", "torch.Generator", "None")),
        (lambda: GaussianMixture.line(std=0), ("std", "above 0", "0")),
        (lambda: GaussianMixture.line(std=math.nan), ("std", "finite number", "nan")),
        (lambda: GaussianMixture.line([]), ("means", "shape [k, dim]", "(0, 1)")),
        (lambda: GaussianMixture.line([1, math.inf]), ("means", "finite", "(2, 1)")),
        (lambda: GaussianMixture(torch.zeros(3), 0.1), ("means", "[k, dim]", "(3,)")),
        (lambda: GaussianMixture.grid(side=0), ("side", "at least 1", "0")),
        (lambda: GaussianMixture.grid(spacing=-1.0), ("spacing", "above 0", "-1.0")),
        (lambda: GaussianMixture.line().in_support(torch.zeros(5)), ("x", "[n, .]", "(5,)")),
        (lambda: GaussianMixture.line().in_support(torch.zeros(5, 2)), ("x", "[n, 1]", "(5, 2)")),
        (lambda: GaussianMixture.line().in_support(torch.zeros(0, 1)), ("x", "n >= 1", "(0, 1)")),
        (lambda: GaussianMixture.line().judge(torch.zeros(5, 1).double()), ("x", "float32", "float64")),
        (lambda: GaussianMixture.line().judge(torch.zeros(5, 1), width=0), ("width", "above 0", "0")),
        (lambda: GaussianMixture.line().judge([1.0]), ("x", "float32 tensor", "list")),
        (lambda: GaussianMixture.line().log_density(torch.zeros(5, 2)), ("x", "[n, 1]", "(5, 2)")),
        (lambda: GaussianMixture.grid().log_density(torch.zeros(5, 1)), ("x", "[n, 2]", "(5, 1)")),
        (
            lambda: GaussianMixture.grid().denoiser(Schedule.linear())(torch.zeros(5, 1), same_t(3, 5)),
            ("x", "[n, 2]", "(5, 1)"),
        ),
        (
            lambda: log_modes(GaussianMixture.grid(), Schedule.linear(), torch.zeros(5, 1), same_t(3, 5)),
            ("x", "[n, 2]", "(5, 1)"),
        ),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)
