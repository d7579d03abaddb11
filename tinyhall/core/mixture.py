"""A mixture of Gaussians: data whose support is known, so that a sample outside it is a fact and not an opinion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch

from . import _check
from . import device as _device
from ._typing import Bool, Float, Int, Tensor
from .schedule import Schedule

_CHUNK = 131_072  # rows of points against modes at a time: distances to 25 modes stay under 30 MB

M = TypeVar("M", bound="Mixture")


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equal round Gaussians, drawn in turn as in the paper's code: sample i comes from mode i mod k. `tinyhall.data` has the
    one that says of a point between which modes it lies.

    Args:
        means: float64 `[k, dim]`, in the units of the data.
        std: standard deviation of every mode, same units.
        name: for experiments and plots.
    """

    means: Float[Tensor, "k dim"]
    std: float
    name: str = field(default="mixture")

    def __post_init__(self) -> None:
        m = self.means
        if not isinstance(m, Tensor) or m.ndim != 2 or 0 in m.shape or not bool(torch.isfinite(m).all()):
            raise _check.fail("means", m, "a finite tensor of shape [k, dim]")
        object.__setattr__(self, "means", m.double().cpu())
        _check.positive("std", self.std)

    @classmethod
    def line(cls: type[M], means: Sequence[float] = (1, 2, 3), std: float = 0.05) -> M:
        """The paper's 1D data: modes at `means`, not normalised."""
        label = ",".join(f"{m:g}" for m in means)
        return cls(torch.tensor(list(means), dtype=torch.float64).reshape(-1, 1), std, f"line({label})")

    @classmethod
    def grid(cls: type[M], side: int = 5, spacing: float = 2.0, std: float = 0.05) -> M:
        """The paper's square: side x side modes `spacing` apart, everything divided by the whole's standard deviation.

        With the defaults that divisor is sqrt(0.05^2 + 8) = 2.829, so modes lie 0.707, or 40 std, apart.
        """
        return cls._lattice(side, spacing, std, diamond=False, scale=None)

    @classmethod
    def diamond(cls: type[M], side: int = 5, spacing: float = 2.0, std: float = 0.05, *, same_spacing: bool = False) -> M:
        """The paper's "rotated" square, its corners on the axes, divided by the *square's* standard deviation.

        In the paper's code the rotation also shrinks: modes lie spacing/sqrt(2) apart, 0.500 or 28 std with the defaults.
        `same_spacing=True` rotates without shrinking, so that the two effects can be told apart.
        """
        return cls._lattice(side, spacing, std, diamond=True, scale=math.sqrt(2) if same_spacing else None)

    @classmethod
    def _lattice(cls: type[M], side: int, spacing: float, std: float, *, diamond: bool, scale: float | None) -> M:
        _check.positive_int("side", side)
        _check.positive("spacing", spacing)
        _check.positive("std", std)
        axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        means = spacing * torch.cartesian_prod(axis, axis)
        divisor = math.sqrt(std**2 + float(means.square().mean()))
        if diamond:  # a rotation by 45 degrees, and the paper's shrinking by sqrt(2)
            means = torch.stack([means[:, 0] + means[:, 1], means[:, 1] - means[:, 0]], dim=1) / 2 * (scale or 1.0)
        name = f"{'diamond' if diamond else 'grid'}({side}x{side}{', same spacing' if scale else ''})"
        return cls(means / divisor, std / divisor, name)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, `(dim,)`."""
        return (self.dim,)

    @cached_property
    def nearest_spacing(self) -> float:
        """Distance between the two nearest modes, in the units of the data."""
        gaps = torch.cdist(self.means, self.means).fill_diagonal_(math.inf)
        return float(gaps.min())

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """n points, float32, on the generator's device. Raises TinyhallError for n below 1, or no generator."""
        _check.positive_int("n", n)
        _check.generator("generator", generator)
        noise = torch.randn(n, self.dim, generator=generator, device=generator.device)
        mode = torch.arange(n, device=generator.device) % len(self.means)
        return self.means.to(noise.dtype).to(noise.device)[mode] + self.std * noise

    def in_support(self, x: Float[Tensor, "n dim"], width: float = 6.0) -> Bool[Tensor, " n"]:
        """Within `width` std of some mode: 6 is the paper's number (section 5.2). It loses 2e-9 of true 1D data, 2e-8 of 2D."""
        _check.positive("width", width)
        return self.nearest(x)[1] <= width

    def nearest(self, x: Float[Tensor, "n dim"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The nearest mode of each point, and how many std away it is; infinitely many for what is not finite."""
        _check.floats("x", x, ndim=2, finite=False)
        _check.shaped(x, self.shape)
        modes, distances = [], []
        for part in x.split(_CHUNK):
            part = _device.exact(part)
            gap = torch.cdist(part, self.means.to(part.device), compute_mode="donot_use_mm_for_euclid_dist")
            d, m = gap.min(dim=1)
            modes.append(m.to(x.device))
            d = (d / self.std).float().nan_to_num(nan=math.inf, posinf=math.inf)  # NaN lies nowhere
            distances.append(d.to(x.device))
        return torch.cat(modes), torch.cat(distances)

    def log_density(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """log p(x), natural logarithm, float64 inside. Raises TinyhallError for x of another dimension."""
        z = _device.exact(_check.shaped(x, self.shape))
        return self._components(z, torch.ones_like(z[:1, 0]), self.std**2)[0].float().to(x.device)

    def _components(self, x: Tensor, scale: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor]:
        """log-density `[n]` of the mixture with means scale * means and this variance, and the modes' shares `[n, k]`."""
        variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
        gap = (x[:, None] - scale.reshape(-1, 1, 1) * self.means.to(x)).square().sum(-1)
        log_w = -0.5 * gap / variance.reshape(-1, 1)
        norm = 0.5 * self.dim * torch.log(2 * math.pi * variance) + math.log(len(self.means))
        return torch.logsumexp(log_w, 1) - norm.reshape(-1), torch.softmax(log_w, 1)

    def denoiser(self, schedule: Schedule) -> Callable[..., Tensor]:
        """The exact noise prediction E[eps | x_t], under the same call as a network; float64 inside.

        It is what a network trained for ever on unlimited data would learn: the score of the noised mixture, times
        -sqrt(1 - alpha_bar_t). Raises TinyhallError for x of another dimension.
        """

        def exact(x: Float[Tensor, "n dim"], t: Int[Tensor, " n"], label: Tensor | None = None) -> Float[Tensor, "n dim"]:
            z = _device.exact(_check.shaped(x, self.shape))
            log_bar = schedule.log_alpha_bar.to(z.device)[(t[:1] if t.stride(0) == 0 else t).to(z.device)]
            bar, noise = log_bar.exp(), -torch.expm1(log_bar)  # [n] or [1]
            total = bar * self.std**2 + noise  # variance of one noised mode
            share = self._components(z, bar.sqrt(), total)[1]
            # Within mode k, E[eps | x_t] = sqrt(1 - abar) (x - sqrt(abar) mu_k) / total; then average over modes.
            centre = bar.sqrt()[:, None] * (share @ self.means.to(z))
            return ((noise.sqrt() / total)[:, None] * (z - centre)).to(x.dtype).to(x.device)

        return exact
