"""The density of the samples by integration, against recursion, sampling and conservation of mass."""

from __future__ import annotations

import pytest
import torch
from common import one_line, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.core.sampling import ddim, ddpm, sample
from tinyhall.core.schedule import Schedule
from tinyhall.datasets import GaussianMixture
from tinyhall.measure.density import _deposit, exact_std, sample_density

SCHEDULE = Schedule.linear(1e-3, 0.2, 100)


@pytest.mark.parametrize("sampler", [ddpm(), ddpm("small"), ddim(0.5)], ids=str)
def test_of_one_gaussian_it_is_the_gaussian_of_the_affine_recursion(sampler) -> None:
    mixture = GaussianMixture.line((1,), std=0.2)
    found = sample_density(mixture.denoiser(SCHEDULE), SCHEDULE, sampler=sampler)
    mean, variance = 0.0, 1.0
    for t, of_x, of_eps, noise in sampler(SCHEDULE):
        bar = float(SCHEDULE.alpha_bar[t])
        slope = (1 - bar) ** 0.5 / (bar * 0.04 + 1 - bar)
        factor = of_x + of_eps * slope
        mean, variance = factor * mean - of_eps * slope * bar**0.5, factor**2 * variance + noise**2
    assert float(found.mass.sum()) == pytest.approx(1, abs=1e-6)
    at = float((found.places * found.mass).sum())
    assert at == pytest.approx(mean, abs=1e-5)
    assert float(((found.places - at) ** 2 * found.mass).sum()) == pytest.approx(variance, rel=1e-3)


def test_equals_the_histogram_of_samples() -> None:
    mixture = GaussianMixture.line((1, 2), std=0.1)
    net = mixture.denoiser(SCHEDULE)
    found = sample_density(net, SCHEDULE)
    x = sample(net, SCHEDULE, 20_000, shape=(1,), generator=seeded(1)).x[:, 0]
    edges = torch.linspace(0.5, 2.5, 41, dtype=torch.float64)
    counts = torch.histogram(x.double(), edges).hist / 20_000
    masses = found.density(edges) * edges.diff()
    assert float((counts - masses).abs().max()) < 5 * (0.1 / 20_000) ** 0.5
    centres = torch.tensor([1.0, 2.0])
    inside = float(((x[:, None] - centres).abs().amin(1) > 0.15).float().mean())
    assert found.outside(centres, 0.15) == pytest.approx(inside, abs=0.01)
    assert found.outside(centres, 3.0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"sampler": ddim()}, ("points", "smallest noise", "0")),
        ({"points": 50}, ("points", "smallest noise", "0.306")),
        ({"points": 0}, ("points", "at least 1", "0")),
        ({"points": 1}, ("points", "at least 2", "1")),
        ({"low": 2.0, "high": 1.0}, ("low < high", "2.0")),
        ({"low": -7.0, "high": 1.5}, ("low, high", "all the mass")),
    ],
)
def test_errors(options, parts, unchecked) -> None:
    net = GaussianMixture.line((1, 2), std=0.1).denoiser(SCHEDULE)
    with pytest.raises(TinyhallError) as caught:
        sample_density(net, SCHEDULE, **options)
    one_line(caught.value, *parts)


@pytest.mark.parametrize("at", [60, 0])  # in the middle; in the last step, which moves places alone
def test_a_network_without_values_is_named(at: int) -> None:
    exact = GaussianMixture.line((1, 2), std=0.1).denoiser(SCHEDULE)
    with pytest.raises(TinyhallError) as caught:
        sample_density(lambda x, t, label=None: exact(x, t) * (torch.nan if int(t[0]) == at else 1), SCHEDULE, points=4_096)
    one_line(caught.value, "net", "finite", "got 4096 of 4096", f"t = {at}")


def test_what_falls_off_the_grid_is_dropped() -> None:
    at = torch.tensor([-7.3, -0.25, 1.5, 3.75, 4.0, 6.5, 9.6], dtype=torch.float64)  # the grid is 0 to 6
    mass = torch.ones(7, dtype=torch.float64)
    assert _deposit(at, mass, 0.0, 1.0).tolist() == [0.75, 0.5, 0.5, 0.25, 1.75, 0, 0.5]
    far = torch.tensor([-50.3, 50.3, -1e20, 1e20], dtype=torch.float64)
    assert not bool(_deposit(far, mass[:4], 0.0, 1.0).any())


@pytest.mark.parametrize("sampler", [ddpm("large"), ddpm("small"), ddim(eta=0.5)])
def test_exact_std_equals_the_density_of_one_mode(sampler) -> None:
    schedule = Schedule.linear(1e-3, 0.2, 200)
    alone = GaussianMixture.line((0,), std=0.3)
    found = sample_density(alone.denoiser(schedule), schedule, sampler=sampler)
    std = float((found.mass * found.places**2).sum().sqrt())
    assert exact_std(0.3, schedule, sampler) == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize(("variance", "ratio"), [("large", 0.62), ("small", 0.47)])
def test_exact_std_of_the_paper_s_plane(variance: str, ratio: float) -> None:
    std = GaussianMixture.grid().std
    assert exact_std(std, Schedule.linear(), ddpm(variance)) / std == pytest.approx(ratio, abs=0.005)


def test_exact_std_tends_to_the_data_s_with_finer_steps() -> None:
    errors = []
    for steps in (1000, 4000, 16000):
        schedule = Schedule.linear(0.1 / steps, 200 / steps if steps > 1000 else 0.2, steps)
        errors.append(max(abs(exact_std(0.3, schedule, ddpm(v)) / 0.3 - 1) for v in ("large", "small")))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
