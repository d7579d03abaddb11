"""The trajectory variance against numpy's, on any window, order, chunking and shape."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from common import one_line, seeded
from hypothesis import given
from hypothesis import strategies as st

from tinyhall._check import TinyhallError
from tinyhall.metrics import Metric, TrajectoryVariance, denoising_error
from tinyhall.sampling import Step, sample
from tinyhall.schedule import Schedule


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
        with pytest.raises(TinyhallError):
            scored((a, b), trajectory, visited)
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


def test_one_step_has_no_score() -> None:
    with pytest.raises(TinyhallError) as caught:
        scored((0, 1), {0: torch.ones(3, 2)}, [0])
    one_line(caught.value, "window", "two steps of 0 <= t < 1", "got 1")
    metric = TrajectoryVariance((0, 1))
    metric.update(step(0, torch.ones(3, 2)))
    with pytest.raises(TinyhallError):
        metric.per_dimension()


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
    assert repr(metrics[2]) == "TrajectoryVariance(last=12)"
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
    held = [v for v in vars(metric).values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in held) == 2 * 4


def test_names_tell_windows_apart() -> None:
    assert isinstance(TrajectoryVariance(), Metric)
    assert TrajectoryVariance((0, 10)).name != TrajectoryVariance((0, 5)).name
    assert repr(TrajectoryVariance((2, 5))) == "TrajectoryVariance(window=(2, 5))"


@pytest.mark.parametrize("window", [(5, 5), (6, 5), (-1, 5), (0,), (0, 1, 2), 10, (0.0, 10.0), (True, 5), "ab", (0, None)])
def test_refuses_a_bad_window(window: object, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance(window)
    one_line(caught.value, "window", "0 <= a < b", repr(window))


def test_refuses_a_window_outside_the_schedule() -> None:
    schedule = Schedule.linear(1e-3, 0.2, 100)
    TrajectoryVariance((90, 100)).check(schedule)
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance((90, 101)).check(schedule)
    one_line(caught.value, "window", "(90, 101)", "b <= 100")


def test_refuses_an_empty_score_and_another_shape() -> None:
    metric = TrajectoryVariance((0, 2))
    metric.update(step(5, torch.ones(2, 1)))
    with pytest.raises(TinyhallError) as caught:
        metric.score()
    one_line(caught.value, "window", "0 <= t < 2", "none")
    metric.update(step(1, torch.ones(2, 1)))
    with pytest.raises(TinyhallError) as caught:
        metric.update(step(0, torch.ones(3, 1)))
    one_line(caught.value, "step.x0_hat", "(2, 1)", "(3, 1)")


def steps_of(values: torch.Tensor) -> list[Step]:
    """Steps from the last t down, whose x0_hat are the rows of values."""
    empty = torch.zeros_like(values[0])
    return [Step(t, empty, values[t], empty) for t in range(len(values) - 1, -1, -1)]


@pytest.mark.parametrize("edges", [(0, 12), (0, 1, 12), (0, 3, 4, 9, 12)])
def test_joined_windows_are_the_window(edges: tuple[int, ...]) -> None:
    values = torch.randn(12, 5, 2, 3, generator=seeded()) * 10 + 1e3
    parts = [TrajectoryVariance(pair) for pair in pairwise(edges)]
    for step in steps_of(values):
        for part in parts:
            part.update(step)
    whole = TrajectoryVariance.joined(parts[::-1])
    assert whole.window == (0, 12)
    exact = values.double().var(0, unbiased=False)
    torch.testing.assert_close(whole.per_dimension(), exact.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.score(), exact.flatten(1).mean(1).float(), rtol=1e-6, atol=0)
    before = parts[-1].score()
    TrajectoryVariance.joined(parts)
    assert torch.equal(parts[-1].score(), before)  # the parts are as they were


def test_joined_with_a_part_that_saw_nothing() -> None:
    parts = [TrajectoryVariance((0, 4)), TrajectoryVariance((4, 8))]
    values = torch.randn(4, 3, 2, generator=seeded())
    for step in steps_of(values):
        for part in parts:
            part.update(step)
    assert torch.equal(TrajectoryVariance.joined(parts).score(), parts[0].score())
    with pytest.raises(TinyhallError):
        TrajectoryVariance.joined(parts[1:]).per_dimension()


def test_only_windows_in_t_join() -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance.joined([TrajectoryVariance((0, 2)), TrajectoryVariance(last=3)])
    one_line(caught.value, "parts", "adjoin")


@pytest.mark.parametrize("windows", [[], [(0, 2), (3, 5)], [(0, 3), (2, 5)]])
def test_windows_with_a_gap_do_not_join(windows: list[tuple[int, int]]) -> None:
    with pytest.raises(TinyhallError) as caught:
        TrajectoryVariance.joined([TrajectoryVariance(w) for w in windows])
    one_line(caught.value, "parts", "adjoin")


SHORT = Schedule.linear(1e-4, 0.3, 60)


class Pull:
    """Stands for a network whose x0_hat is 0 everywhere."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return x / (1 - SHORT.alpha_bar[t[0]]).sqrt().float()


def test_denoising_error_of_a_known_denoiser() -> None:
    x = torch.randn(5, 2, 3, generator=seeded())
    error = denoising_error(Pull(), SHORT, x, (5, 40), generator=seeded(1))
    torch.testing.assert_close(error, x.square().flatten(1).mean(1)[:, None].expand(5, 2), rtol=1e-3, atol=1e-4)


class Far(torch.nn.Module):
    """On a device that only keeps shapes, for want of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        raise LookupError(f"{x.device} {t.device}")


def test_denoising_error_goes_where_the_network_is() -> None:
    with pytest.raises(LookupError, match="meta meta"):
        denoising_error(Far(), SHORT, torch.zeros(5, 2), [5], generator=seeded())


def test_denoising_error_needs_a_generator(unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        denoising_error(Pull(), SHORT, torch.zeros(5, 2), [5], generator=0)  # type: ignore[arg-type]
    one_line(caught.value, "generator", "torch.Generator", "0 (int)")
