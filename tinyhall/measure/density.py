"""In one dimension sampling can be replaced by an integral: the density of the samples, without a single sample."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from ..core import _check
from ..core._typing import Float, Int, Net, Tensor
from ..core.sampling import Sampler, ddpm
from ..core.schedule import Schedule


class SampleDensity:
    """The distribution that a one-dimensional sampler produces, as mass at places.

    A reverse step moves x to m(x) = c.x x + c.eps eps(x) and adds noise of a known width, so one step maps the density p of the
    states to the density of the next ones,

        p'(y) = integral of N(y; m(x), noise^2) p(x) dx,

    (the Chapman-Kolmogorov equation). On a grid much finer than the noise this is a move of mass and a convolution;
    the last step adds no noise and only moves the mass. What a rare event costs in samples, it does not cost here: a
    fraction of 1e-7 comes out as well as one of 1e-2.
    """

    def __init__(self, places: Float[Tensor, " points"], mass: Float[Tensor, " points"]) -> None:
        self.places, self.mass = places, mass

    def outside(self, centres: Tensor, radius: float) -> float:
        """The mass farther than `radius` from every centre `[k]`."""
        gap = (self.places[:, None] - centres.to(self.places)).abs().amin(1)
        return float(self.mass[gap > radius].sum())

    def density(self, edges: Float[Tensor, " bins_plus_one"]) -> Float[Tensor, " bins"]:
        """Mean density between neighbouring edges."""
        return torch.histogram(self.places, edges.to(self.places), weight=self.mass).hist / edges.diff()


class Tabulated:
    """A network over one dimension, read off a table: the same function to about 1e-4, at a thousandth of the arithmetic.

    At a fixed t, a network over one-dimensional x is a curve. Sampled at `points` places and joined by straight lines it can be
    evaluated for ten million samples in the time that the network takes for a few thousand. Outside [low, high] the network
    itself is asked.

    Args:
        net: predicts eps over `[n, 1]`.
        timesteps: T; the table holds every t, `timesteps * points` numbers in float32 (65 MB at the defaults).
        low, high: the range tabulated, in units of x.
    """

    def __init__(
        self, net: Net, timesteps: int, low: float = -7.0, high: float = 8.0, points: int = 16_384, device: Any = "cpu"
    ):
        x = _grid(low, high, points, torch.float32, device)[:, None]
        self.net, self.low, self.high = net, low, high
        self.per_unit = (points - 1) / (high - low)
        with torch.no_grad():
            rows = [net(x, torch.tensor([t], device=device).expand(points))[:, 0].float() for t in range(timesteps)]
        self.table = torch.stack(rows)  # [timesteps, points]

    def to(self, device: torch.device | str) -> Tabulated:
        """The table on another device, and the network with it, where it is a module."""
        other = copy.copy(self)
        other.table = self.table.to(device)
        if isinstance(self.net, nn.Module):
            self.net.to(device)
        return other

    def __call__(self, x: Float[Tensor, "n 1"], t: Int[Tensor, " n"], label: Tensor | None = None) -> Float[Tensor, "n 1"]:
        """eps at x; every t must be the same, as a sampler asks it."""
        if t.stride(0) != 0 and not bool((t == t[0]).all()):
            raise _check.fail("t", t, "the same t for every x")
        row = self.table[int(t[0])]
        place = (x - self.low) * self.per_unit
        left = place.floor().nan_to_num_(0.0).clamp_(0, len(row) - 2)  # NaN has no place; it comes back from the lerp
        index = left.long()
        y0, y1 = row[index], row[index + 1]
        eps = torch.lerp(y0, y1, place - left)
        outside = (place < 0) | (place > len(row) - 1)
        if bool(outside.any()):
            eps[outside] = self.net(x[outside][:, None], t[:1].expand(int(outside.sum())))[:, 0]
        return eps


@torch.no_grad()
def sample_density(
    net: Net,
    schedule: Schedule,
    *,
    sampler: Sampler = ddpm(),  # noqa: B008 (frozen)
    low: float = -7.0,
    high: float = 8.0,
    points: int = 32_768,
) -> SampleDensity:
    """The density of the samples of a one-dimensional network.

    Args:
        net: predicts eps over `[n, 1]`; `Tabulated` makes this quick.
        sampler: with noise in every step but the last: `ddpm()`, or `ddim(eta)` with eta > 0.
        low, high: the range of x that holds the mass at every t.
        points: of the grid; its spacing must be a tenth of the smallest noise or less.

    Raises:
        TinyhallError: a sampler without noise, a grid too coarse for its noise, a network whose values are not finite, or more
            than 1e-6 of the mass lost at the ends.
    """
    steps = sampler(schedule)
    x = _grid(low, high, points, torch.float64)
    spacing = (high - low) / (points - 1)
    smallest = min((c.noise for c in steps[:-1]), default=0.0)
    if spacing > smallest / 10:
        raise _check.TinyhallError(
            f"points: expected a spacing of at most a tenth of the sampler's smallest noise, {smallest:.3g}, got {spacing:.3g}"
        )
    mass = torch.exp(-0.5 * x**2)
    mass = mass / mass.sum()
    for c in steps:
        t = torch.tensor([c.t]).expand(points)
        moved = c.x * x + c.eps * net(x.float()[:, None], t)[:, 0].double()
        if bad := int((~moved.isfinite()).sum()):
            raise _check.TinyhallError(f"net: expected finite values, got {bad} of {points} that are not at t = {c.t}")
        if c.noise == 0:
            x = moved
        else:
            mass = _blur(_deposit(moved, mass, low, spacing), c.noise, spacing)
    if not abs(float(mass.sum()) - 1) <= 1e-6:
        raise _check.TinyhallError(f"low, high: expected to hold all the mass, got {float(mass.sum()):.7f} of it")
    return SampleDensity(x, mass)


def exact_std(std: float, schedule: Schedule, sampler: Sampler = ddpm()) -> float:  # noqa: B008 (frozen)
    """The width of a Gaussian mode after the reverse process with the *exact* denoiser, in closed form.

    Near a lone mode (mean 0) the exact noise prediction is linear, E[eps | x_t] = sqrt(1 - abar) x_t / (abar std^2 + 1 - abar),
    so that each step multiplies the state and adds noise: variances follow one another, v' = c^2 v + noise^2. What
    differs from `std` in the end is the error of a finite number of steps, with no network and no sample in it.

    Args:
        std: the mode's width in the data, small beside the distance to other modes.
        schedule, sampler: of the reverse process.
    """
    _check.positive("std", std)
    v = 1.0
    for c in sampler(schedule):
        log_bar = float(schedule.log_alpha_bar[c.t])
        noise = -math.expm1(log_bar)
        v *= (c.x + c.eps * math.sqrt(noise) / (math.exp(log_bar) * std**2 + noise)) ** 2
        v += c.noise**2
    return math.sqrt(v)


def _grid(low: float, high: float, points: int, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    if not low < high:
        raise _check.TinyhallError(f"low, high: expected low < high, got {low} and {high}")
    if _check.positive_int("points", points) < 2:
        raise _check.fail("points", points, "a whole number of at least 2")
    return torch.linspace(low, high, points, dtype=dtype, device=device)


def _deposit(places: Tensor, mass: Tensor, low: float, step: float) -> Tensor:
    """Mass at any places, shared between the two grid points beside each; what falls off the grid is dropped."""
    at = (places - low) / step
    mass = torch.where((at > -1) & (at < len(mass)), mass, 0.0)
    left = at.floor()
    right_share = at - left
    out = torch.zeros(len(mass) + 2, dtype=mass.dtype)  # a bin at either end for what falls off
    index = (left.long() + 1).clamp(0, len(mass))
    out.index_add_(0, index, mass * (1 - right_share))
    out.index_add_(0, index + 1, mass * right_share)
    return out[1:-1]


def _blur(mass: Tensor, noise: float, step: float) -> Tensor:
    """Convolution with N(0, noise^2) by Fourier transform; the padding keeps the ends apart."""
    n = 2 * len(mass)
    frequency = 2 * math.pi * torch.fft.rfftfreq(n, step, dtype=torch.float64)
    # Sharing mass between neighbours has already spread it by a variance of about step^2 / 6.
    kernel = torch.exp(-0.5 * (noise**2 - step**2 / 6) * frequency**2)
    return torch.fft.irfft(torch.fft.rfft(mass, n) * kernel, n)[: len(mass)]
