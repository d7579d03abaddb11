"""What else watches the steps: many windows in one pass against each alone, and what is kept of the way."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from common import one_line, seeded
from torch import Tensor

from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import Metric, Step, TrajectoryVariance
from tinyhall.core.sampling import SampleConfig, chunks, ddim, ddpm, reverse, sample
from tinyhall.core.schedule import Schedule
from tinyhall.lab.recorders import Settling, StatesAt, Trace, WindowSweep

SCHEDULE = Schedule.linear(1e-4, 0.3, 60)


def net(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    return torch.sin(x + 0.01 * t.view(-1, *[1] * (x.ndim - 1)))


def steps_of(values: Tensor) -> list[Step]:
    """Steps from the last t down, whose x0_hat are the rows of values."""
    empty = torch.zeros_like(values[0])
    return [Step(t, empty, values[t], empty) for t in range(len(values) - 1, -1, -1)]


def swept(windows: list[tuple[int, int]], values: Tensor) -> WindowSweep:
    sweep = WindowSweep(windows)
    for step in steps_of(values):
        sweep.update(step)
    return sweep


@pytest.mark.parametrize("edges", [(0, 12), (0, 1, 12), (0, 3, 4, 9, 12)])
def test_any_window_between_the_ends_is_put_together(edges: tuple[int, ...]) -> None:
    values = torch.randn(12, 5, 2, 3, generator=seeded()) * 10 + 1e3
    sweep = swept(list(combinations(edges, 2)), values)
    for a, b in combinations(edges, 2):
        if b - a < 2:
            continue
        exact = values[a:b].double().var(0, unbiased=False)
        torch.testing.assert_close(sweep.variance((a, b)), exact, rtol=1e-9, atol=0)
    before = sweep.variance((0, 12))
    assert torch.equal(sweep.variance((0, 12)), before)  # putting them together leaves the parts as they are


@pytest.mark.parametrize("sampler", [ddpm(), ddim(sample_steps=30)], ids=str)
def test_a_sweep_equals_the_trajectory_variance_of_each_window(sampler) -> None:
    windows = [(0, 10), (0, 60), (5, 25), (20, 40), (0, 5), (40, 60), (3, 59)]
    metrics = [WindowSweep(windows), *map(TrajectoryVariance, windows)]
    out = sample(net, SCHEDULE, 25, shape=(1, 3, 2), generator=seeded(2), metrics=metrics, sampler=sampler, batch_size=7)
    assert out.scores["windows"].shape == (25, len(windows))
    assert out.scores["windows"].dtype == torch.float32
    for column, window in enumerate(windows):
        alone = out.scores[TrajectoryVariance(window).name]
        torch.testing.assert_close(out.scores["windows"][:, column], alone, rtol=1e-6, atol=0)


def test_stretches_between_windows_count_for_neither() -> None:
    values = torch.randn(12, 3, 2, generator=seeded())
    sweep = swept([(0, 4), (8, 12)], values)
    for a, b in ((0, 4), (8, 12), (0, 8), (4, 8)):  # what lies between two ends has been seen, too
        torch.testing.assert_close(sweep.variance((a, b)), values[a:b].double().var(0, unbiased=False))


def test_a_sweep_costs_a_pair_of_states_a_stretch() -> None:
    sweep = swept([(0, 300), (100, 200), (0, 500)], torch.ones(500, 2, 2))
    held = [v for seen in sweep._stretches.values() for v in vars(seen).values() if isinstance(v, Tensor)]
    assert sum(v.numel() for v in held) == 4 * 2 * 4


def test_a_sweep_joins_what_saw_nothing() -> None:
    values = torch.randn(4, 3, 2, generator=seeded())
    sweep = swept([(0, 4), (4, 8), (0, 8)], values)
    assert torch.equal(sweep.variance((0, 8)), sweep.variance((0, 4)))
    with pytest.raises(TinyhallError) as caught:
        sweep.variance((4, 8))
    one_line(caught.value, "window", "at least 2 steps with t in [4,8)", "got 0")
    with pytest.raises(TinyhallError):
        sweep.score()


def test_a_sweep_forgets() -> None:
    sweep = swept([(0, 4)], torch.ones(4, 2, 1))
    sweep.reset()
    values = torch.randn(4, 5, 3, generator=seeded())
    for step in steps_of(values):
        sweep.update(step)
    torch.testing.assert_close(sweep.variance((0, 4)), values.double().var(0, unbiased=False))


def test_a_sweep_refuses_other_ends_and_bad_windows() -> None:
    sweep = swept([(0, 2), (3, 5)], torch.ones(5, 2, 1))
    with pytest.raises(TinyhallError) as caught:
        sweep.variance((0, 4))
    one_line(caught.value, "window", "two of the ends [0, 2, 3, 5]", "(0, 4)")
    with pytest.raises(TinyhallError) as caught:
        WindowSweep([(0, 5), (5, 5)])
    one_line(caught.value, "window", "0 <= a < b", "(5, 5)")
    with pytest.raises(TinyhallError) as caught:
        WindowSweep([])
    one_line(caught.value, "windows", "at least one (a, b)", "[]")
    every = range(59, -1, -1)
    WindowSweep([(0, 2), (58, 60)]).check(SCHEDULE, every)
    for windows, times, parts in (
        ([(0, 2), (50, 61)], every, ("(50, 61)", "b <= 60")),
        ([(0, 9), (20, 21)], every, ("makes 2 steps", "got 1 with t in [20,21)")),
        ([(0, 9), (20, 40)], (50, 30, 5, 2), ("makes 2 steps", "got 1 with t in [20,40)")),
    ):
        with pytest.raises(TinyhallError) as caught:
            WindowSweep(windows).check(SCHEDULE, times)
        one_line(caught.value, "window", *parts)


# --- what is kept of the way


def walked(*, chunk: int, n: int = 20) -> tuple[list[Trace], list[StatesAt]]:
    """Copies of what the two recorders hold after every chunk."""
    traces, states = [], []
    trace, at = Trace({50, 30, 10, 0}), StatesAt({59, 30, 10})
    for _ in chunks(
        net, SCHEDULE, n, generator=seeded(3), metrics=[trace, at], config=SampleConfig(shape=(2,), batch_size=chunk)
    ):
        kept, seen = Trace(trace.times), StatesAt(at.times)
        kept.x0_hat, seen.states = list(trace.x0_hat), dict(at.states)
        traces.append(kept)
        states.append(seen)
    return traces, states


def all_steps(n: int = 20) -> dict[int, Step]:
    from tinyhall.core.noise import Supply

    supply = Supply(n, 2, seeded(3), torch.device("cpu"))
    return {step.t: step for step in reverse(net, SCHEDULE, (n, 2), generator=supply.of(0, n))}


@pytest.mark.parametrize("chunk", [20, 7])
def test_a_trace_holds_predictions_in_falling_t(chunk: int) -> None:
    steps = all_steps()
    expected = torch.stack([steps[t].x0_hat for t in (50, 30, 10, 0)], 1)
    traces, _ = walked(chunk=chunk)
    assert torch.equal(torch.cat([trace.of(torch.arange(len(trace.x0_hat[0]))) for trace in traces]), expected)
    assert torch.equal(traces[0].of(torch.tensor([3, 1])), expected[[3, 1]])


@pytest.mark.parametrize("chunk", [20, 7])
def test_states_are_those_in_which_the_network_was_asked(chunk: int) -> None:
    steps = all_steps()
    _, states = walked(chunk=chunk)
    assert all(set(part.states) == {30, 10} for part in states)  # no step made the first
    for t in (30, 10):
        found = torch.cat([part.states[t] for part in states])
        assert torch.equal(found, steps[t + 1].x)
        torch.testing.assert_close(net(found, torch.full((20,), t)), steps[t].eps)


def test_settling_counts_the_pixels_that_are_not_yet_what_they_become() -> None:
    # Two images of two pixels over three steps, t falling: the second image's first pixel goes out in the last step.
    values = torch.tensor([[[1.0, -1], [-1, 1]], [[0.6, -1], [0, 1]], [[-1, 0.4], [1, 1]]]).view(3, 2, 1, 1, 2)
    settling = Settling(2)
    for step in steps_of(values):
        settling.update(step)
    assert settling.t == [2, 1, 0]
    assert settling.changed().tolist() == [[1, 0, 0], [0.5, 0.5, 0]]
    first = Settling(1)
    for step in steps_of(values):
        first.update(step)
    assert torch.equal(first.changed(), settling.changed()[:1])
    first.reset()
    assert first.t == []


@pytest.mark.parametrize("recorder", [Trace({5}), StatesAt({5}), Settling(1)], ids=["trace", "states", "settling"])
def test_a_record_is_a_metric_that_does_not_score(recorder: Trace | StatesAt | Settling) -> None:
    assert isinstance(recorder, Metric)
    recorder.check(SCHEDULE, (3, 2))
    with pytest.raises(TinyhallError) as caught:
        recorder.score()
    one_line(caught.value, recorder.name, "a metric that scores", "a record")


def test_a_sweep_is_a_metric() -> None:
    assert isinstance(WindowSweep([(0, 2)]), Metric)
