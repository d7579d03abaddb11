"""The forward process: how much signal and how much noise there is at each t."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from . import _check, _renamed
from ._typing import Float, Int, Tensor

# Above this, x_T still carries data, and sampling that starts from N(0, I) starts in the wrong place.
NOISE_AT_END = 1e-3


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule of T steps; t = 0 is the cleanest state, t = T-1 pure noise.

    Args:
        betas: float64 `[T]`, each in (0, 1): the share of variance that step t replaces by noise (Ho et al. 2020, eq. 2).

    Raises:
        TinyhallError: betas of another shape, dtype or range, or a schedule whose last state is not noise
            (`alpha_bar[-1] >= 1e-3`).
    """

    betas: Float[Tensor, " T"]
    name: str = field(default="custom")

    def __post_init__(self) -> None:
        b = self.betas
        if not isinstance(b, Tensor) or b.dtype != torch.float64 or b.ndim != 1 or len(b) == 0:
            raise _check.fail("betas", b, "a float64 tensor of shape [T], T >= 1")
        if not bool(((b > 0) & (b < 1)).all()):
            raise _check.TinyhallError(f"betas: expected values in (0, 1), got {float(b.min())} to {float(b.max())}")
        if float(self.alpha_bar[-1]) >= NOISE_AT_END:
            raise _check.TinyhallError(
                f"schedule: expected to end in noise, alpha_bar[-1] < {NOISE_AT_END}, got {float(self.alpha_bar[-1]):.3g} "
                f"after {len(b)} steps; use more timesteps or a larger beta_end"
            )

    @classmethod
    @_renamed.keywords(steps="timesteps")
    def linear(cls, beta_start: float = 1e-3, beta_end: float = 0.2, timesteps: int = 1000) -> Schedule:
        """beta grows linearly from beta_start to beta_end. The defaults are those of the paper's Gaussians."""
        timesteps = _check.positive_int("timesteps", timesteps)
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            _check.number(name, value, "a number in (0, 1)", lambda v: 0 < v < 1)
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        return cls(betas, f"linear({beta_start:g}, {beta_end:g}, {timesteps})")

    @classmethod
    @_renamed.keywords(steps="timesteps")
    def cosine(cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alpha_bar follows a squared cosine (Nichol and Dhariwal 2021, eq. 17), each beta at most max_beta."""
        timesteps = _check.positive_int("timesteps", timesteps)
        _check.number("offset", offset, "a number of at least 0", lambda v: 0 <= v < math.inf)
        _check.number("max_beta", max_beta, "a number in (0, 1)", lambda v: 0 < v < 1)
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=max_beta), f"cosine({timesteps})")

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Float[Tensor, " T"], name: str = "custom") -> Schedule:
        """The schedule that has these shares of signal left, t = 0 first: falling values in (0, 1), any float dtype.

        Raises:
            TinyhallError: values that do not fall or leave (0, 1), or that do not end in noise.
        """
        if not isinstance(alpha_bar, Tensor) or alpha_bar.ndim != 1:
            raise _check.fail("alpha_bar", alpha_bar, "falling values in (0, 1), shape [T]")
        a = alpha_bar.double()
        before = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
        if not len(a) or not bool(((a > 0) & (a < before)).all()):
            raise _check.fail("alpha_bar", alpha_bar, "falling values in (0, 1), shape [T]")
        return cls(1 - a / before, name)

    @property
    def timesteps(self) -> int:
        """The number of steps, T."""
        return len(self.betas)

    @property
    def steps(self) -> int:
        _renamed.warn("Schedule.steps", "Schedule.timesteps")
        return self.timesteps

    @cached_property
    def log_alpha_bar(self) -> Float[Tensor, " T"]:
        # alpha_bar reaches 1e-47 on the paper's schedule: ratios of it are taken as differences of logarithms.
        return torch.cumsum(torch.log1p(-self.betas), 0)

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " T"]:
        """The share of the data's variance that is left at t (Ho et al. 2020, eq. 4)."""
        return self.log_alpha_bar.exp()

    @cached_property
    def noise_variance(self) -> Float[Tensor, " T"]:
        """1 - alpha_bar, to full precision also where little noise has been added."""
        return -torch.expm1(self.log_alpha_bar)

    @cached_property
    def _tables(self) -> Float[Tensor, "3 T"]:
        """What x_0 and the noise are multiplied by, and 1 over the former."""
        return torch.stack([self.alpha_bar.sqrt(), self.noise_variance.sqrt(), (-0.5 * self.log_alpha_bar).exp()])

    def to(self, device: torch.device | str) -> Schedule:
        """The schedule with what `q_sample` and `predict_x0` look up on a GPU, in float32: a copy at every step would make its
        launches wait, and cannot be captured. A processor looks up in float64."""
        if torch.device(device).type == self._tables.device.type == "cpu":
            return self
        other = Schedule(self.betas, self.name)
        other.__dict__["_tables"] = other._tables if torch.device(device).type == "cpu" else other._tables.float().to(device)
        return other

    def window(self, low: float, high: float) -> tuple[int, int]:
        """The window (a, b) of all t, a <= t < b, at which low <= alpha_bar <= high: t means another noise on another schedule.

        Raises:
            TinyhallError: bounds that are not 0 <= low <= high <= 1, or between which no t lies.
        """
        if not all(isinstance(v, int | float) for v in (low, high)) or not 0 <= low <= high <= 1:
            raise _check.TinyhallError(f"low, high: expected 0 <= low <= high <= 1, got {low} and {high}")
        # A bound that was read off the schedule, and rounded on the way, is met by the t that it was read at.
        inside = ((self.alpha_bar >= low * (1 - 1e-9)) & (self.alpha_bar <= high * (1 + 1e-9))).nonzero()[:, 0]
        if not len(inside):
            raise _check.fail("low, high", (low, high), f"bounds with a t of {self.name} between them")
        return int(inside[0]), int(inside[-1]) + 1

    def alpha_bars(self, window: tuple[int, int]) -> tuple[float, float]:
        """The lowest and the highest alpha_bar in a window, what `window` takes: of its last t and of its first."""
        a, b = _check.window(window, self.timesteps)
        return float(self.alpha_bar[b - 1]), float(self.alpha_bar[a])

    def noise_share(self, t: int) -> float:
        """sigma / (1 + sigma) at t, where sigma is the ratio of noise to signal: 0 for data, 1 for noise. It is the time of
        flow matching, and means the same under every schedule."""
        log = float(self.log_alpha_bar[t])
        return 1 / (1 + math.exp(0.5 * log) / math.sqrt(-math.expm1(log)))

    def _at(self, table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """table[t] in x's dtype and on its device, shaped to multiply x."""
        # Python would take -1 for the last step. Elsewhere than on a processor a look at t would stall the device.
        if t.device.type == "cpu" and len(t):
            low, high = (int(end) for end in t.aminmax())
            if low < 0 or high >= self.timesteps:
                raise _check.TinyhallError(f"t: expected values in 0..{self.timesteps - 1}, got {low} to {high}")
        out = table.to(x.dtype).to(x.device)[t]
        return out.view(-1, *[1] * (x.ndim - 1))

    def q_sample(self, x0: Tensor, t: Int[Tensor, " n"], eps: Tensor) -> Tensor:
        """x_t given x_0 and the noise, all `[n, *shape]` (Ho et al. 2020, eq. 4).

        Raises:
            TinyhallError: a t outside 0..T-1, on a processor.
        """
        return self._at(self._tables[0], t, x0) * x0 + self._at(self._tables[1], t, x0) * eps

    def predict_x0(self, x: Tensor, t: Int[Tensor, " n"], eps: Tensor) -> Tensor:
        """The x_0 that x_t and eps imply, `[n, *shape]`: q_sample solved for x_0.

        Finite in float32 over the paper's schedule, yet about 1e23 near t = T-1: a quantity to look at, not to step through.
        """
        return (x - self._at(self._tables[1], t, x) * eps) * self._at(self._tables[2], t, x)

    def posterior(self, x0: Tensor, x: Tensor, t: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Mean `[n, *shape]` and variance `[n, 1, ...]` of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).

        At t = 0 they are x_0 and 0.
        """
        log_prev = torch.cat([torch.zeros(1, dtype=torch.float64), self.log_alpha_bar[:-1]])
        one_minus_prev = -torch.expm1(log_prev)
        of_x0 = self.betas * (0.5 * log_prev).exp() / self.noise_variance
        of_x = (1 - self.betas).sqrt() * one_minus_prev / self.noise_variance
        variance = self.betas * one_minus_prev / self.noise_variance
        return self._at(of_x0, t, x) * x0 + self._at(of_x, t, x) * x, self._at(variance, t, x)
