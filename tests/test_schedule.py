"""The schedule against diffusers' tables and against values that the paper's settings imply."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from common import one_line, seeded
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tinyhall.core._check import TinyhallError
from tinyhall.core.schedule import Schedule

MILD = (1e-3, 0.2, 100)  # ends in noise, yet its alpha_bar stays far from float32's limits, where diffusers keeps its tables
ONE = torch.ones(1, 1)


def theirs(schedule: Schedule, **options: object) -> DDPMScheduler:
    return DDPMScheduler(schedule.timesteps, trained_betas=schedule.betas.numpy(), clip_sample=False, **options)


@pytest.mark.parametrize("schedule", [Schedule.linear(*MILD), Schedule.linear(1e-4, 0.02, 1000), Schedule.cosine(200)])
def test_tables_equal_diffusers(schedule: Schedule) -> None:
    other = theirs(schedule)
    torch.testing.assert_close(schedule.betas.float(), other.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alpha_bar.float(), other.alphas_cumprod, rtol=2e-4, atol=0)


def test_linear_and_cosine_betas_equal_diffusers() -> None:
    linear = DDPMScheduler(1000, beta_start=1e-3, beta_end=0.2, beta_schedule="linear")
    torch.testing.assert_close(Schedule.linear().betas.float(), linear.betas, rtol=1e-5, atol=0)
    cosine = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(Schedule.cosine(1000).betas.float(), cosine.betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("t", "value"), [(9, 0.981), (49, 0.744), (99, 0.335), (199, 0.015)])
def test_alpha_bar_of_the_paper(t: int, value: float) -> None:
    assert float(Schedule.linear().alpha_bar[t]) == pytest.approx(value, abs=6e-4)


def test_the_paper_s_schedule_falls_below_float32() -> None:
    schedule = Schedule.linear()
    assert schedule.timesteps == 1000
    assert 1e-48 < float(schedule.alpha_bar[-1]) < 1e-46
    exact = np.cumsum(np.log1p(-np.linspace(1e-3, 0.2, 1000)))
    np.testing.assert_allclose(schedule.log_alpha_bar.numpy(), exact, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4, 4)])
def test_q_sample_equals_diffusers(shape: tuple[int, ...]) -> None:
    schedule = Schedule.linear(*MILD)
    g = seeded(1)
    x0, eps = torch.randn(16, *shape, generator=g), torch.randn(16, *shape, generator=g)
    t = torch.randint(schedule.timesteps, (16,), generator=g)
    torch.testing.assert_close(schedule.q_sample(x0, t, eps), theirs(schedule).add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 17, 50, 99])
def test_predict_x0_and_posterior_equal_diffusers(t: int) -> None:
    schedule = Schedule.linear(*MILD)
    g = seeded(2)
    x, eps = torch.randn(8, 2, generator=g), torch.randn(8, 2, generator=g)
    times = torch.full((8,), t)
    out = theirs(schedule, variance_type="fixed_small").step(eps, t, x, generator=seeded(3))
    x0 = schedule.predict_x0(x, times, eps)
    torch.testing.assert_close(x0, out.pred_original_sample, rtol=1e-4, atol=1e-4)

    mean, variance = schedule.posterior(x0, x, times)
    assert variance.shape == (8, 1)
    noise = torch.randn(8, 2, generator=seeded(3)) if t > 0 else torch.zeros(8, 2)
    torch.testing.assert_close(mean + variance.sqrt() * noise, out.prev_sample, rtol=1e-4, atol=1e-4)


def test_posterior_by_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    schedule = Schedule.linear(*MILD)
    t, x0, x = 40, 0.7, -0.3
    beta, bar = float(schedule.betas[t]), float(schedule.alpha_bar[t - 1])
    precision = (1 - beta) / beta + 1 / (1 - bar)
    mean = (math.sqrt(1 - beta) * x / beta + math.sqrt(bar) * x0 / (1 - bar)) / precision
    ours = schedule.posterior(torch.tensor([[x0]]), torch.tensor([[x]]), torch.tensor([t]))
    assert float(ours[0]) == pytest.approx(mean, rel=1e-5)
    assert float(ours[1]) == pytest.approx(1 / precision, rel=1e-5)


def test_posterior_at_the_last_step_is_x0() -> None:
    schedule = Schedule.linear(*MILD)
    x0, x = torch.randn(4, 2, generator=seeded()), torch.ones(4, 2)
    mean, variance = schedule.posterior(x0, x, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(mean, x0)
    assert bool((variance == 0).all())


@given(t=st.integers(0, 330), seed=st.integers(0, 100))
def test_predict_x0_inverts_q_sample(t: int, seed: int) -> None:
    schedule = Schedule.linear()
    g = seeded(seed)
    x0, eps = torch.randn(4, 2, generator=g), torch.randn(4, 2, generator=g)
    times = torch.full((4,), t)
    back = schedule.predict_x0(schedule.q_sample(x0, times, eps), times, eps)
    # x_t is rounded to 6e-8 of itself, and the inverse multiplies that by 1/sqrt(alpha_bar).
    allowed = 2e-6 / math.sqrt(float(schedule.alpha_bar[t]))
    assert float((back - x0).abs().max()) < allowed


def test_predict_x0_is_finite_at_every_t() -> None:
    schedule = Schedule.linear()
    t = torch.arange(1000)
    x, eps = torch.randn(1000, 2, generator=seeded(5)), torch.randn(1000, 2, generator=seeded(6))
    assert bool(torch.isfinite(schedule.predict_x0(x, t, eps)).all())
    assert bool(torch.isfinite(schedule.q_sample(x, t, eps)).all())
    mean, variance = schedule.posterior(x, x, t)
    assert bool(torch.isfinite(mean).all())
    assert bool(((variance >= 0) & (variance <= 0.2)).all())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Schedule.linear(1e-4, 0.02, 100), ("schedule", "alpha_bar[-1] < 0.001", "0.36", "100 steps")),
        (lambda: Schedule.linear(1e-3, 0.2, 0), ("timesteps", "at least 1", "0 (int)")),
        (lambda: Schedule.linear(1e-3, 0.2, 2.5), ("timesteps", "whole number", "2.5 (float)")),
        (lambda: Schedule.linear(1e-3, 0.2, True), ("timesteps", "whole number", "True (bool)")),
        (lambda: Schedule.linear(0.0, 0.2), ("beta_start", "(0, 1)", "0.0")),
        (lambda: Schedule.linear(1e-3, 1.0), ("beta_end", "(0, 1)", "1.0")),
        (lambda: Schedule.linear("a", 0.2), ("beta_start", "a number in (0, 1)", "'a' (str)")),
        (lambda: Schedule.cosine(-1), ("timesteps", "at least 1", "-1")),
        (lambda: Schedule(torch.full((10,), 0.9)), ("betas", "float64", "float32")),
        (lambda: Schedule(torch.full((2, 5), 0.9, dtype=torch.float64)), ("betas", "shape [T]", "(2, 5)")),
        (lambda: Schedule(torch.zeros(0, dtype=torch.float64)), ("betas", "T >= 1", "(0,)")),
        (lambda: Schedule(torch.full((9,), 1.5, dtype=torch.float64)), ("betas", "(0, 1)", "1.5")),
        (lambda: Schedule([0.1, 0.9]), ("betas", "float64 tensor", "list")),
        (lambda: Schedule.linear().q_sample(ONE, torch.tensor([-1]), ONE), ("t", "0..999", "-1")),
        (lambda: Schedule.linear().predict_x0(ONE, torch.tensor([1000]), ONE), ("t", "0..999", "1000")),
        (lambda: Schedule.linear().posterior(ONE, ONE, torch.tensor([-2])), ("t", "0..999", "-2")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)
    assert isinstance(caught.value, ValueError)


def test_tables_are_brought_to_a_device_by_a_copy() -> None:
    schedule, place = Schedule.linear(*MILD), torch.device("meta")  # stands in for a GPU
    there = schedule.to(place)
    assert (there._tables.device, there._tables.dtype) == (place, torch.float32)
    assert (there.name, there.betas.device.type) == (schedule.name, "cpu")  # a sampler's coefficients are worked out here
    x, t = torch.zeros(3, 1, device=place), torch.arange(3, device=place)
    for where in (there, schedule):
        assert where.q_sample(x, t, x).shape == where.predict_x0(x, t, x).shape == (3, 1)
        assert where.q_sample(x.double(), t, x.double()).dtype == torch.float64
    assert schedule._tables.device.type == "cpu"  # the schedule stays where it was


def test_a_processor_looks_up_in_float64_wherever_the_schedule_has_been() -> None:
    schedule = Schedule.linear(*MILD)
    assert schedule.to("cpu") is schedule
    x, t = torch.randn(3, 1, generator=seeded(), dtype=torch.float64), torch.arange(3)
    back = Schedule.linear(*MILD)
    back.__dict__["_tables"] = back._tables.float().to("meta")  # as of a GPU, and unlike there gone for good
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), back.to("cpu")):
        assert torch.equal(copied.q_sample(x, t, x), schedule.q_sample(x, t, x))


SCHEDULES = [Schedule.linear(), Schedule.linear(*MILD), Schedule.cosine(1000)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_a_window_is_found_again_by_its_alpha_bars(schedule: Schedule) -> None:
    last = schedule.timesteps
    ends = sorted({*range(0, last, last // 20), 1, 2, 3, last - 2, last - 1, last})
    for a, b in itertools.combinations(ends, 2):
        low, high = schedule.alpha_bars((a, b))
        assert (low, high) == (float(schedule.alpha_bar[b - 1]), float(schedule.alpha_bar[a]))
        assert schedule.window(low, high) == (a, b)
        assert schedule.window(float(f"{low:.12g}"), float(f"{high:.12g}")) == (a, b)  # as a page may print them


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@given(bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_window_holds_the_t_between_its_bounds_and_no_others(schedule: Schedule, bounds: list[float]) -> None:
    low, high = bounds
    inside = [t for t, a in enumerate(schedule.alpha_bar.tolist()) if low <= a <= high]
    if not inside:
        with pytest.raises(TinyhallError) as caught:
            schedule.window(low, high)
        one_line(caught.value, "low, high", schedule.name, f"({low}, {high})")
        return
    assert schedule.window(low, high) == (inside[0], inside[-1] + 1)


def test_the_same_noise_is_another_t_on_another_schedule() -> None:
    assert Schedule.linear().window(0, 1) == (0, 1000)
    a, b = Schedule.cosine(1000).window(*Schedule.linear().alpha_bars((50, 100)))
    bars = Schedule.cosine(1000).alpha_bar
    assert float(bars[a]) <= float(Schedule.linear().alpha_bar[50]) < float(bars[a - 1])
    assert float(bars[b]) < float(Schedule.linear().alpha_bar[99]) <= float(bars[b - 1])


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda s: s.window(0.9, 0.5), ("low, high", "0 <= low <= high <= 1", "0.9 and 0.5")),
        (lambda s: s.window(-0.1, 0.5), ("low, high", "0 <= low", "-0.1")),
        (lambda s: s.window(0.5, 1.1), ("low, high", "<= 1", "1.1")),
        (lambda s: s.window(math.nan, 0.5), ("low, high", "nan")),
        (lambda s: s.window(0.9995, 1.0), ("low, high", "bounds with a t of linear(0.001, 0.2, 1000)", "0.9995")),
        (lambda s: s.alpha_bars((900, 1001)), ("window", "b <= 1000", "(900, 1001)")),
        (lambda s: s.alpha_bars((5, 5)), ("window", "0 <= a < b", "(5, 5)")),
    ],
)
def test_errors_of_windows(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make(Schedule.linear())
    one_line(caught.value, *parts)


def test_the_old_names_say_what_they_are_called_now() -> None:
    for make in (Schedule.linear, Schedule.cosine):
        with pytest.warns(FutureWarning, match=r"tinyhall: steps of Schedule\.\w+ is now timesteps"):
            old = make(steps=200)
        assert torch.equal(old.betas, make(timesteps=200).betas)
        with pytest.raises(TinyhallError) as caught:
            make(timesteps=200, steps=200)
        one_line(caught.value, "timesteps", "Schedule", "steps, its old name")
    with pytest.warns(FutureWarning, match=r"Schedule\.steps is now Schedule\.timesteps"):
        assert old.steps == 200
