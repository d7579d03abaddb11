"""Data whose support is known, so that a sample outside it is a fact and not an opinion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from . import _check
from . import device as _device
from ._typing import Bool, Float, Int, Tensor
from .hands import HandPhotos as HandPhotos
from .hands import Hands as Hands
from .mnist import MNIST as MNIST
from .schedule import Schedule
from .shapes import SimpleShapes as SimpleShapes

_CHUNK = 131_072  # rows of points against modes at a time: distances to 25 modes stay under 30 MB

IN_SUPPORT, INTERPOLATED, ELSEWHERE = 0, 1, 2


class Judgement(NamedTuple):
    """What a mixture says of samples, each field of length n."""

    mode: Int[Tensor, " n"]  # index of the nearest mode
    distance: Float[Tensor, " n"]  # to it, in the mixture's std
    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, INTERPOLATED 1, ELSEWHERE 2
    pair: Int[Tensor, "n 2"]  # the two modes between which it lies, lower index first; (-1, -1) in support


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Equal round Gaussians, drawn in turn as in the paper's code: sample i comes from mode i mod k.

    Args:
        means: float64 `[k, dim]`, in the units of the data.
        std: standard deviation of every mode, same units.
        name: for cards and plots.
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
    def line(cls, means: Sequence[float] = (1, 2, 3), std: float = 0.05) -> GaussianMixture:
        """The paper's 1D data: modes at `means`, not normalised."""
        label = ",".join(f"{m:g}" for m in means)
        return cls(torch.tensor(list(means), dtype=torch.float64).reshape(-1, 1), std, f"line({label})")

    @classmethod
    def grid(cls, side: int = 5, spacing: float = 2.0, std: float = 0.05) -> GaussianMixture:
        """The paper's square: side x side modes `spacing` apart, everything divided by the whole's standard deviation.

        With the defaults that divisor is sqrt(0.05^2 + 8) = 2.829, so modes lie 0.707, or 40 std, apart.
        """
        return cls._lattice(side, spacing, std, diamond=False, scale=None)

    @classmethod
    def diamond(cls, side: int = 5, spacing: float = 2.0, std: float = 0.05, *, same_spacing: bool = False) -> GaussianMixture:
        """The paper's "rotated" square, its corners on the axes, divided by the *square's* standard deviation.

        In the paper's code the rotation also shrinks: modes lie spacing/sqrt(2) apart, 0.500 or 28 std with the defaults.
        `same_spacing=True` rotates without shrinking, so that the two effects can be told apart.
        """
        return cls._lattice(side, spacing, std, diamond=True, scale=math.sqrt(2) if same_spacing else None)

    @classmethod
    def _lattice(cls, side: int, spacing: float, std: float, *, diamond: bool, scale: float | None) -> GaussianMixture:
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

    def in_support(self, x: Float[Tensor, "n dim"], width: float = 5.0) -> Bool[Tensor, " n"]:
        """Within `width` std of some mode. The paper gives no rule; 5 std loses 6e-7 of true 1D data and 4e-6 of 2D."""
        return self._nearest(x, width)[1] <= width

    def judge(self, x: Float[Tensor, "n dim"], width: float = 5.0) -> Judgement:
        """Where each point lies: in support; *interpolated*, out of it yet within `width` std of a segment that joins two
        modes (the rule of arXiv 2605.06831); or elsewhere.

        In the plane many segments pass near a point, and the long ones nearly everywhere. `pair` is therefore the *closest
        pair of modes* with a segment within `width` std (of equally close pairs, the one whose segment is nearest); for a
        point elsewhere, the pair whose segment is nearest.
        """
        mode, distance = self._nearest(x, width)
        kind = torch.full_like(mode, IN_SUPPORT)
        pair = torch.full((len(x), 2), -1, dtype=torch.int64, device=x.device)
        out = (distance > width).nonzero()[:, 0]
        # Rows against all pairs of modes at a time: their distances take some 30 MB a step.
        pairs = len(self.means) * (len(self.means) - 1) // 2
        for rows in out.split(max(2**22 // max(pairs * self.dim, 1), 1)):
            gap, joined = self._nearest_segment(x[rows], width * self.std)
            kind[rows] = torch.where(gap <= width * self.std, INTERPOLATED, ELSEWHERE).to(x.device)
            pair[rows] = joined
        return Judgement(mode, distance, kind, pair)

    def _nearest(self, x: Tensor, width: float) -> tuple[Tensor, Tensor]:
        _check.floats("x", x, ndim=2, finite=False)
        _check.positive("width", width)
        self._fits(x)
        modes, distances = [], []
        for part in x.split(_CHUNK):
            part = _device.exact(part)
            gap = torch.cdist(part, self.means.to(part.device), compute_mode="donot_use_mm_for_euclid_dist")
            d, m = gap.min(dim=1)
            modes.append(m.to(x.device))
            d = (d / self.std).float().nan_to_num(nan=math.inf, posinf=math.inf)  # NaN lies nowhere
            distances.append(d.to(x.device))
        return torch.cat(modes), torch.cat(distances)

    def _nearest_segment(self, x: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """The distance `[n]` of each point to the segment of the pair of modes `[n, 2]` that `judge` names for it. It stays
        where there is float64."""
        if len(self.means) < 2:
            return torch.full((len(x),), math.inf, device=x.device), torch.full((len(x), 2), -1, device=x.device)
        place, x = x.device, _device.exact(x)
        ends, order = self._pairs
        ends, order = ends.to(x.device), order.to(x.device)
        means = self.means.to(x.device)
        start, along = means[ends[:, 0]], means[ends[:, 1]] - means[ends[:, 0]]  # [pairs, dim]
        x = x.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9)
        away = x[:, None] - start  # [n, pairs, dim]
        share = ((away * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
        gap = (away - share[..., None] * along).norm(dim=-1)
        # Within reach, pairs are ranked by their order and then by the gap; out of it by the gap alone. On a lattice many
        # segments overlap, and rounding must not decide: a longer one out of reach has to be nearer by a real margin.
        near = gap <= reach
        least = torch.where(near, order, len(ends) + 1).amin(1, keepdim=True)
        candidates = torch.where(near.any(1, keepdim=True), near & (order == least), True)
        closest = gap.masked_fill(~candidates, math.inf)
        best = (closest <= closest.amin(1, keepdim=True) + 1e-6 * self.std).float().argmax(dim=1)
        return gap.gather(1, best[:, None])[:, 0], ends[best].to(place)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """All pairs of modes `[pairs, 2]`, the closest first, and the order of each (see `neighbour_order`)."""
        ends = torch.combinations(torch.arange(len(self.means)), 2)
        lengths = (self.means[ends[:, 1]] - self.means[ends[:, 0]]).norm(dim=1)
        lengths, index = lengths.sort(stable=True)
        apart = lengths.diff() > 1e-9 * lengths[1:]
        return ends[index], torch.cat([torch.ones(1, dtype=torch.int64), 1 + apart.long().cumsum(0)])

    def neighbour_order(self, pair: Int[Tensor, "n 2"]) -> Int[Tensor, " n"]:
        """How near the two modes of each pair are among all pairs: 1 for nearest neighbours, 2 for second-nearest (on a square
        lattice the diagonal), and so on; 0 for (-1, -1).

        Raises:
            TinyhallError: a pair that is not two distinct modes.
        """
        ends, order = self._pairs
        k = len(self.means)
        table = torch.zeros(k + 1, k + 1, dtype=torch.int64)  # the last row and column are those of -1
        table[ends[:, 0], ends[:, 1]] = table[ends[:, 1], ends[:, 0]] = order
        inside = (pair >= -1) & (pair < k)
        out = table[tuple(pair.cpu().clamp(-1, k - 1).T)] if len(pair) else torch.empty(0, dtype=torch.int64)
        if not bool(inside.all()) or bool((out == 0).logical_and(pair.cpu().amax(1) >= 0).any()):
            raise _check.fail("pair", pair, f"pairs of two distinct modes of 0..{k - 1}, or (-1, -1)")
        return out

    def log_density(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """log p(x), natural logarithm, float64 inside. Raises TinyhallError for x of another dimension."""
        self._fits(x)
        z = _device.exact(x)
        return self._components(z, torch.ones_like(z[:1, 0]), self.std**2)[0].float().to(x.device)

    def _fits(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.dim:
            raise _check.fail("x", x, f"shape [n, {self.dim}]")

    def _components(self, x: Tensor, scale: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor]:
        """log-density `[n]` of the mixture with means scale * means and this variance, and the modes' shares `[n, k]`."""
        variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
        gap = (x[:, None] - scale.reshape(-1, 1, 1) * self.means.to(x)).square().sum(-1)
        log_w = -0.5 * gap / variance.reshape(-1, 1)
        norm = 0.5 * self.dim * torch.log(2 * math.pi * variance) + math.log(len(self.means))
        return torch.logsumexp(log_w, 1) - norm.reshape(-1), torch.softmax(log_w, 1)

    def log_modes(self, schedule: Schedule, x: Float[Tensor, "n dim"], t: Int[Tensor, " m"]) -> Float[Tensor, "n modes"]:
        """log p(mode | x_t), float64: which mode a noised point comes from. t is one for all `[1]`, or one each `[n]`. From a
        device without float64 the answer comes on the processor. Raises TinyhallError for x of another dimension."""
        self._fits(x)
        x = _device.exact(x)
        log_bar = schedule.log_alpha_bar.to(x.device)[t.to(x.device)]
        variance = (log_bar.exp() * self.std**2 - torch.expm1(log_bar)).reshape(-1, 1)
        gap = (x[:, None] - (0.5 * log_bar).exp().reshape(-1, 1, 1) * self.means.to(x.device)).square().sum(-1)
        return (-0.5 * gap / variance).log_softmax(1)

    def denoiser(self, schedule: Schedule) -> Callable[..., Tensor]:
        """The exact noise prediction E[eps | x_t], under the same call as a network; float64 inside.

        It is what a network trained for ever on unlimited data would learn: the score of the noised mixture, times
        -sqrt(1 - alpha_bar_t). Raises TinyhallError for x of another dimension.
        """

        def exact(x: Float[Tensor, "n dim"], t: Int[Tensor, " n"], label: Tensor | None = None) -> Float[Tensor, "n dim"]:
            return self._exact_eps(schedule, x, t)

        return exact

    def _exact_eps(self, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
        self._fits(x)
        z = _device.exact(x)
        one = (t[:1] if t.stride(0) == 0 else t).to(z.device)
        log_bar = schedule.log_alpha_bar.to(z.device)[one]
        bar, noise = log_bar.exp(), -torch.expm1(log_bar)  # [n] or [1]
        total = bar * self.std**2 + noise  # variance of one noised mode
        share = self._components(z, bar.sqrt(), total)[1]
        # Within mode k, E[eps | x_t] = sqrt(1 - abar) (x - sqrt(abar) mu_k) / total; then average over modes.
        centre = bar.sqrt()[:, None] * (share @ self.means.to(z))
        return ((noise.sqrt() / total)[:, None] * (z - centre)).to(x.dtype).to(x.device)
