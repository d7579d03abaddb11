"""What the page on where the paper leaves room says in numbers, worked out again."""

from __future__ import annotations

import re

import pytest
from common import ROOT

from tinyhall.core.sampling import ddpm
from tinyhall.core.schedule import Schedule
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.data.mnist import MNIST
from tinyhall.lab import experiments
from tinyhall.lab.draws import WINDOWS
from tinyhall.measure.density import exact_std

PAGE = " ".join((ROOT / "book" / "room.md").read_text(encoding="utf-8").split())  # a line may end anywhere
DIGITS = {"linear": Schedule.linear(1e-4, 0.04, 500), "cosine": Schedule.cosine(500)}


def told(pattern: str) -> list[float]:
    found = re.findall(pattern, PAGE)
    assert len(found) == 1, f"{pattern!r} is {len(found)} times in book/room.md"
    return [float(number) for number in ([found[0]] if isinstance(found[0], str) else found[0])]


def narrowed(timesteps: int) -> list[float]:
    """Widths of a mode, in percent of the true one, over three generations of the exact denoiser of what the last one drew."""
    true = std = GaussianMixture.grid().std
    widths = []
    for _ in range(3):
        std = exact_std(std, Schedule.linear(1e-3, 0.2, timesteps), ddpm("large"))
        widths.append(100 * std / true)
    return widths


@pytest.mark.parametrize(
    ("pattern", "timesteps"),
    [
        (r"to (\d+)%, (\d+)% and (\d+)% of its width in three generations with T = 1,000", 1_000),
        (r"to (\d+)%, (\d+)% and (\d+)% with T = 500", 500),
    ],
)
def test_the_exact_chain_narrows_as_the_page_says(pattern: str, timesteps: int) -> None:
    assert [round(width) for width in narrowed(timesteps)] == told(pattern)


def test_the_exact_chain_is_that_of_the_experiments() -> None:
    for name, timesteps in (("recursion", 1_000), ("grid-recursion", 500)):
        experiment = experiments.get(name, "paper")
        assert experiment.schedule().name == Schedule.linear(1e-3, 0.2, timesteps).name
        assert (experiment.sampler(), experiment.data().std) == (ddpm("large"), GaussianMixture.grid().std)


def test_the_window_of_digits_on_both_schedules() -> None:
    pattern = r"an \$\\bar\\alpha\$ of (0\.\d+) to (0\.\d+) on our linear one, (0\.\d+) to (0\.\d+) on a cosine"
    ends = [round(float(DIGITS[curve].alpha_bar[t]), 2) for curve in ("linear", "cosine") for t in (100, 150)]
    assert ends == told(pattern)
    assert "t = 100 to 150 of 500" in PAGE
    digits = experiments.get("digits", "paper")
    assert digits.schedule().name == DIGITS["linear"].name
    assert digits.window == (100, 150)
    assert digits.data().shape == MNIST(size=28).shape


def test_what_t_700_leaves_of_the_signal() -> None:
    [cosine], linear = told(r"t = 700 of a cosine schedule leaves (\d+)% of the signal"), Schedule.linear(1e-4, 0.02, 1_000)
    assert round(100 * float(Schedule.cosine(1_000).alpha_bar[700])) == cosine
    [least] = told(r"t = 700 of the customary linear one less than (\d+)%")
    assert 100 * float(linear.alpha_bar[700]) < least


def test_the_windows_that_the_page_names_are_scored() -> None:
    named = {(int(a), int(b)) for a, b in re.findall(r"\[(\d+),(\d+)\)", PAGE)}
    assert named == {(0, 20), (0, 8), (0, 9), (0, 10), (0, 15)}
    assert named <= set(WINDOWS)


def test_the_pairs_of_what_is_removed_are_those_of_the_experiments() -> None:
    [line, plane, shapes] = (experiments.get(name, "paper").removes for name in ("line123", "grid", "simple-shapes"))
    pattern = r"(\d+) and 98% on the line, (\d+) and 95% in the plane, (\d+) and 95% on shapes, (\d+) and 81% on hands"
    assert [100 * share for share in (line, plane, shapes)] == pytest.approx(told(pattern)[:3])
    assert 100 * experiments.get("hands", "paper").removes == pytest.approx(told(pattern)[3])


def test_the_diamond_s_spacing_in_widths() -> None:
    [shrunk, turned] = told(r"(\d+) widths between neighbours, not (\d+)")
    for mixture, widths in (
        (GaussianMixture.diamond(), shrunk),
        (GaussianMixture.diamond(same_spacing=True), turned),
        (GaussianMixture.grid(), turned),
    ):
        assert round(mixture.nearest_spacing / mixture.std) == widths
