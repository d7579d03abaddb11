"""The trajectory variance against numpy's, on any window, order, chunking and shape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from common import one_line, seeded
from hypothesis import given
from hypothesis import strategies as st

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import Metric, Moments, Step, TrajectoryVariance, spelled
from tinyhall.core.sampling import ddim, sample
from tinyhall.core.schedule import Schedule


def step(t: int, x0_hat: torch.Tensor) -> Step:
    return Step(t, torch.zeros_like(x0_hat), x0_hat, torch.zeros_like(x0_hat))


def scored(window: tuple[int, int], trajectory: dict[int, torch.Tensor], order: list[int]) -> torch.Tensor:
    metric = TrajectoryVariance(window)
    for t in order:
        metric.update(step(t, trajectory[t]))
    return metric.score()


@given(data=st.data())
def test_equals_numpy_on_any_window_order_stride_chunking_and_shape(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 20))
    visited = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, unique=True))  # any order, any stride
    a = data.draw(st.integers(0, steps - 1))
    b = data.draw(st.integers(a + 1, steps))
    shape = data.draw(st.sampled_from([(1,), (2,), (3,), (1, 4, 4), (2, 3, 5)]))
    n, offset = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([0.0, 1.0, 1e4]))
    g = seeded(data.draw(st.integers(0, 2**20)))
    trajectory = {t: offset + torch.randn(n, *shape, generator=g) for t in visited}
    inside = [t for t in visited if a <= t < b]
    if len(inside) < 2:
        with pytest.raises(TinyhallError) as caught:
            scored((a, b), trajectory, visited)
        one_line(caught.value, "window", "at least 2 steps", f"got {len(inside)}")
        return
    got = scored((a, b), trajectory, visited)
    stacked = np.stack([trajectory[t].double().numpy() for t in inside])
    expected = stacked.var(axis=0).reshape(n, -1).mean(axis=1)
    assert got.dtype == torch.float32
    assert got.shape == (n,)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-12)

    cut = data.draw(st.integers(0, n))
    halves = [{t: x[rows] for t, x in trajectory.items()} for rows in (slice(0, cut), slice(cut, n))]
    chunked = torch.cat([scored((a, b), half, visited) for half in halves if len(half[visited[0]])])
    assert torch.equal(chunked, got)


def test_window_is_half_open() -> None:
    trajectory = {t: torch.full((1, 1), float(t**3)) for t in range(10)}
    got = scored((3, 6), trajectory, list(range(9, -1, -1)))
    assert float(got) == pytest.approx(np.var([27, 64, 125]), rel=1e-6)


def test_default_is_the_paper_s_last_ten_steps() -> None:
    trajectory = {t: torch.randn(5, 2, generator=seeded(t)) for t in range(30)}
    metric = TrajectoryVariance()
    for t in range(29, -1, -1):
        metric.update(step(t, trajectory[t]))
    expected = np.stack([trajectory[t].double().numpy() for t in range(10)]).var(axis=0).mean(axis=1)
    np.testing.assert_allclose(metric.score().numpy(), expected, rtol=1e-5)


def test_states_near_the_end_of_float32() -> None:
    trajectory = {t: 1e17 * torch.randn(3, 2, generator=seeded(t)) for t in range(6)}
    expected = np.stack([x.double().numpy() for x in trajectory.values()]).var(axis=0).mean(axis=1)
    np.testing.assert_allclose(scored((0, 6), trajectory, list(range(6))).numpy(), expected, rtol=1e-5)


def test_one_step_has_no_variance() -> None:
    with pytest.raises(TinyhallError) as caught:
        scored((0, 1), {0: torch.ones(3, 2)}, [0])
    one_line(caught.value, "window", "expected at least 2 steps with t in [0,1)", "got 1")
    with pytest.raises(TinyhallError):
        scored((0, 5), {0: torch.ones(3, 2)}, [0])


def test_equal_predictions_score_zero() -> None:
    assert scored((0, 2), {0: torch.ones(3, 2), 1: torch.ones(3, 2)}, [1, 0]).tolist() == [0, 0, 0]


def test_per_dimension_is_what_the_score_averages() -> None:
    trajectory, metric = {t: torch.randn(3, 2, 4, generator=seeded(t)) for t in range(5)}, TrajectoryVariance((0, 5))
    for t in range(4, -1, -1):
        metric.update(step(t, trajectory[t]))
    each = metric.per_dimension()
    np.testing.assert_allclose(each.numpy(), np.stack([x.double().numpy() for x in trajectory.values()]).var(0), rtol=1e-5)
    torch.testing.assert_close(each.flatten(1).mean(1), metric.score())


def test_reset_forgets() -> None:
    metric = TrajectoryVariance((0, 2))
    for t in (0, 1):
        metric.update(step(t, torch.full((4, 1), 10.0 * t)))
    assert metric.score().tolist() == [25.0] * 4
    metric.reset()
    for t in (0, 1):
        metric.update(step(t, torch.full((2, 3), 2.0 * t)))
    assert metric.score().tolist() == [1.0] * 2


def test_update_keeps_no_reference() -> None:
    """A sampler may reuse its buffers."""
    x, metric = torch.zeros(2, 1), TrajectoryVariance((0, 3))
    for t in range(3):
        metric.update(step(t, x))
        x += 1
    np.testing.assert_allclose(metric.score().numpy(), np.var([0, 1, 2]), rtol=1e-6)


def test_update_keeps_no_graph() -> None:
    """Nor what the network computed, where a loop of others runs without no_grad."""
    weight, metric = torch.ones(2, 1, requires_grad=True), TrajectoryVariance((0, 3))
    for t in range(3):
        metric.update(step(t, t * weight))
    np.testing.assert_allclose(metric.score().numpy(), np.var([0, 1, 2]), rtol=1e-6)


def test_memory_does_not_grow_with_steps() -> None:
    metric = TrajectoryVariance((0, 500))
    for t in range(500):
        metric.update(step(t, torch.ones(2, 2)))
    assert not any(isinstance(v, torch.Tensor) for v in vars(metric).values())
    held = [v for v in vars(metric.seen).values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in held) == 2 * 4


def test_names_tell_windows_apart() -> None:
    assert isinstance(TrajectoryVariance(), Metric)
    assert TrajectoryVariance((0, 10)).name != TrajectoryVariance((0, 5)).name
    assert repr(TrajectoryVariance((2, 5))) == "TrajectoryVariance(window=(2, 5))"
    assert TrajectoryVariance((2, 5)).name == "variance[2,5)"
    assert spelled((2, 5)) == spelled([2, 5]) == "[2,5)"
    by_noise = TrajectoryVariance(alpha_bar=(0.5, 0.925))
    assert isinstance(by_noise, Metric)
    assert (by_noise.name, repr(by_noise)) == ("variance(alpha_bar 0.5 to 0.925)", "TrajectoryVariance(alpha_bar=(0.5, 0.925))")


@pytest.mark.parametrize("window", [(5, 5), (6, 5), (-1, 5), (0,), (0, 1, 2), 10, (0.0, 10.0), (True, 5), "ab", (0, None)])
def test_refuses_a_bad_window(window: object, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance(window)
    one_line(caught.value, "window", "0 <= a < b", repr(window))


def test_refuses_a_window_outside_the_schedule_or_visited_less_than_twice() -> None:
    schedule = Schedule.linear(1e-3, 0.2, 100)
    every = range(99, -1, -1)
    TrajectoryVariance((90, 100)).check(schedule, every)
    TrajectoryVariance((90, 100)).check(schedule, (99, 95, 3))
    for window, times, parts in (
        ((90, 101), every, ("(90, 101)", "b <= 100")),
        ((90, 91), every, ("the sampler makes 2 steps", "got 1 with t in [90,91)")),
        ((90, 100), (95, 89, 0), ("the sampler makes 2 steps", "got 1 with t in [90,100)")),
        ((10, 20), (95, 0), ("the sampler makes 2 steps", "got 0 with t in [10,20)")),
    ):
        with pytest.raises(TinyhallError) as caught:
            TrajectoryVariance(window).check(schedule, times)
        one_line(caught.value, "window", *parts)


def test_refuses_an_empty_score_and_another_shape() -> None:
    metric = TrajectoryVariance((0, 2))
    metric.update(step(5, torch.ones(2, 1)))
    with pytest.raises(TinyhallError) as caught:
        metric.score()
    one_line(caught.value, "window", "t in [0,2)", "got 0")
    metric.update(step(1, torch.ones(2, 1)))
    with pytest.raises(TinyhallError) as caught:
        metric.update(step(0, torch.ones(3, 1)))
    one_line(caught.value, "x0_hat", "(2, 1)", "(3, 1)")


# --- a window given by the noise in it

SHORT = Schedule.linear(1e-4, 0.3, 60)
SCHEDULES = [SHORT, Schedule.linear(1e-3, 0.2, 100), Schedule.cosine(80)]


def wavy(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    return torch.sin(x + 0.01 * t[:, None])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("bounds", [(0.5, 0.925), (0.0, 0.9), (0.9, 1.0)])
def test_a_window_in_alpha_bar_is_the_window_in_t(schedule: Schedule, bounds: tuple[float, float]) -> None:
    inside = [t for t, a in enumerate(schedule.alpha_bar.tolist()) if bounds[0] <= a <= bounds[1]]
    by_t, by_noise = TrajectoryVariance((inside[0], inside[-1] + 1)), TrajectoryVariance(alpha_bar=bounds)
    out = sample(wavy, schedule, 9, shape=(2,), generator=seeded(1), metrics=[by_t, by_noise], batch_size=4)
    assert by_noise.count == by_t.count == len(inside)
    assert list(out.scores) == [by_t.name, by_noise.name]
    assert torch.equal(out.scores[by_t.name], out.scores[by_noise.name])
    assert bool((out.scores[by_t.name] > 0).all())


def test_one_metric_finds_its_window_on_every_schedule() -> None:
    metric, counts = TrajectoryVariance(alpha_bar=(0.5, 0.9)), set()
    for schedule in SCHEDULES:
        sample(wavy, schedule, 2, shape=(2,), generator=seeded(1), metrics=[metric])
        a, b = schedule.window(0.5, 0.9)
        assert metric.count == b - a
        counts.add(b - a)
    assert len(counts) > 1


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        (lambda: TrajectoryVariance((10, 20)), ("got 1 with t in [10,20)",)),
        (lambda: TrajectoryVariance(alpha_bar=SHORT.alpha_bars((10, 20))), ("got 1 with a noise share",)),
        (lambda: TrajectoryVariance(alpha_bar=(0.99999, 1.0)), ("got 0 with a noise share",)),
        (lambda: TrajectoryVariance(alpha_bar=(0.9, 0.5)), ("alpha_bar", "(0.9, 0.5)")),
    ],
)
def test_a_window_without_two_steps_is_refused_before_anything_is_drawn(
    metric: Callable[[], TrajectoryVariance], parts: tuple[str, ...]
) -> None:
    def never(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("the network was asked")

    g = seeded(1)
    before = g.get_state()
    with pytest.raises(TinyhallError) as caught:
        sample(never, SHORT, 5, shape=(2,), generator=g, metrics=[metric()], sampler=ddim(sample_steps=[40, 25, 12, 3]))
    one_line(caught.value, *parts)
    assert torch.equal(g.get_state(), before)


def test_an_alpha_bar_asks_for_a_noise_share_and_no_window() -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance(alpha_bar=(0.5, 0.9)).update(step(3, torch.ones(2, 1)))
    one_line(caught.value, "step", "says its noise")
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance(alpha_bar=(0.5, 0.9)).score()
    one_line(caught.value, "window", "at least 2 steps", "got 0")
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance((0, 10), alpha_bar=(0.5, 0.9))
    one_line(caught.value, "window", "one of window, noise, alpha_bar, last", "(0, 10)", "(0.5, 0.9)")


# --- the sums


@pytest.mark.parametrize("edges", [(0, 12), (0, 1, 12), (0, 3, 4, 9, 12), (0, 0, 5, 5, 12)])
def test_joined_sums_are_the_sums_of_all(edges: tuple[int, ...]) -> None:
    values = torch.randn(12, 5, 2, 3, generator=seeded()) * 10 + 1e3
    whole = Moments()
    parts = []
    for a, b in pairwise(edges):
        part = Moments()
        for value in values[a:b]:
            part.add(value)
        parts.append(part)
    for part in reversed(parts):
        whole.join(part)
    assert whole.count == 12
    torch.testing.assert_close(whole.variance(""), values.double().var(0, unbiased=False), rtol=1e-9, atol=0)
    for part, (a, b) in zip(parts, pairwise(edges), strict=True):  # the parts are as they were
        assert part.count == b - a
        if b - a >= 2:
            torch.testing.assert_close(part.variance(""), values[a:b].double().var(0, unbiased=False), rtol=1e-9, atol=0)


def test_what_is_joined_to_nothing_can_go_on_alone() -> None:
    values = torch.randn(6, 4, generator=seeded())
    part, whole = Moments(), Moments()
    for value in values[:3]:
        part.add(value)
    whole.join(part)
    for value in values[3:]:
        whole.add(value)
    torch.testing.assert_close(whole.variance(""), values.double().var(0, unbiased=False))
    torch.testing.assert_close(part.variance(""), values[:3].double().var(0, unbiased=False))


def test_too_few_are_told_with_what_was_looked_for() -> None:
    seen = Moments()
    for count in range(2):
        with pytest.raises(TinyhallError) as caught:
            seen.variance("of a Tuesday")
        one_line(caught.value, "at least 2 steps of a Tuesday", f"got {count}")
        seen.add(torch.ones(2, 1))


def test_the_public_names_are_these() -> None:
    assert (th.Metric, th.Step, th.TrajectoryVariance) == (Metric, Step, TrajectoryVariance)
    assert Step._fields == ("t", "x", "x0_hat", "eps", "noise", "left", "walk")
    assert step(0, torch.ones(1, 1)).walk is None


def test_windows_by_noise_and_by_steps_left() -> None:
    """On its own schedule each names the same steps as the window in t that it stands for."""
    schedule, g = Schedule.linear(1e-3, 0.2, 100), seeded()
    share = schedule.noise_share(12)
    ratio = float((1 - schedule.alpha_bar[12]) / schedule.alpha_bar[12]) ** 0.5
    assert share == pytest.approx(ratio / (1 + ratio), rel=1e-12)
    metrics = [TrajectoryVariance((0, 12)), TrajectoryVariance(noise=(0, share)), TrajectoryVariance(last=12)]
    out = sample(lambda x, t, label=None: x / 2, schedule, 5, shape=(2,), metrics=metrics, generator=g)
    scores = list(out.scores.values())
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert list(out.scores) == ["variance[0,12)", f"variance noise[0,{share:.3g})", "variance last 12"]
    for empty in (TrajectoryVariance(noise=(0, 0.5)), TrajectoryVariance(last=2)):
        with pytest.raises(TinyhallError) as caught:
            empty.update(step(0, torch.ones(3, 2)))
        one_line(caught.value, "step")


@pytest.mark.parametrize(
    "bad", [{"noise": (0.5, 0.2)}, {"noise": 0.3}, {"noise": (0, 2)}, {"last": 0}, {"last": 2, "noise": (0, 1)}]
)
def test_refuses_bad_noise_and_last(bad: dict[str, object], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance(**bad)  # type: ignore[arg-type]
    one_line(caught.value, "window" if len(bad) > 1 else next(iter(bad)))
