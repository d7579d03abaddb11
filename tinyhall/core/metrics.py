"""Scores of a sample's trajectory. A metric sees steps and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from . import _check
from ._typing import Float, Tensor
from .network import EpsAt
from .noise import Noise
from .schedule import Schedule


@dataclass(frozen=True, eq=False)
class Walk:
    """What draws a set of samples: a metric that asks the network itself finds it here."""

    eps_at: EpsAt  # with its labels and guidance, if any
    schedule: Schedule
    noise: Noise  # these samples' own


class Step(NamedTuple):
    """One reverse step, from x_t to the next state."""

    t: int
    x: Float[Tensor, "n *shape"]  # the state reached; after the last step, the sample
    x0_hat: Float[Tensor, "n *shape"]  # the x_0 that the network predicts at x_t
    eps: Float[Tensor, "n *shape"]  # the noise that it predicts at x_t
    walk: Walk | None = None  # None where another program drives the steps


@runtime_checkable
class Metric(Protocol):
    """What `sample` asks of a metric. `check` is shown the schedule and the falling values of t that will be visited, before
    anything is drawn; `score` gives a row for each sample."""

    name: str

    def check(self, schedule: Schedule, times: Sequence[int]) -> None: ...
    def reset(self) -> None: ...
    def update(self, step: Step) -> None: ...
    def score(self) -> Tensor: ...


def spelled(window: Sequence[int]) -> str:
    """The one spelling of a window, in code, files and pages: [a,b) is all t with a <= t < b."""
    a, b = _check.window(window)
    return f"[{a},{b})"


def parsed(window: str) -> tuple[int, int]:
    """The window (a, b) that `spelled` wrote. Raises TinyhallError for other text."""
    ends = window[1:-1].split(",") if window[:1] + window[-1:] == "[)" else []
    if len(ends) != 2 or not all(end.isdecimal() for end in ends):
        raise _check.fail("window", window, "[a,b)")
    return _check.window([int(end) for end in ends])


class Moments:
    """Mean and variance over time of what comes by, `[n, *shape]`, by Welford's sums: memory is two states, however many
    come, in whatever order."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, value: Tensor) -> None:
        # x0_hat reaches 1e23 early on: its square overflows float32.
        # Detached: what a network returned outside of no_grad would hold on to every step's graph.
        value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = value.clone(), torch.zeros_like(value)
            return
        if value.shape != self._mean.shape:
            raise _check.fail("x0_hat", value, f"shape {tuple(self._mean.shape)}, as in the steps before")
        delta = value - self._mean
        self._mean += delta / self.count
        self._squares += delta * (value - self._mean)

    def join(self, other: Moments) -> None:
        """As if all that `other` has seen had come by here, too (Chan et al. 1979)."""
        if other._mean is None or other._squares is None:
            return
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = other.count, other._mean.clone(), other._squares.clone()
            return
        total = self.count + other.count
        delta = other._mean - self._mean
        self._mean += delta * (other.count / total)
        self._squares += other._squares + delta.square() * (self.count * other.count / total)
        self.count = total

    def variance(self, what: str) -> Tensor:
        """`[n, *shape]`; `what` says in an error which steps were looked for."""
        if self._squares is None or self.count < 2:
            raise _check.TinyhallError(f"window: expected at least 2 steps {what}, got {self.count}")
        return self._squares / self.count


class TrajectoryVariance:
    """The paper's measure: the variance over time of the predicted x_0, in a window of reverse steps, averaged over dimensions.

    For every t with a <= t < b that the sampler visits, `update` takes that step's x0_hat; `score` is

        mean over dimensions of  1/|T| sum_t (x0_hat_t - mean_t x0_hat_t)^2

    (section 5.2 of the paper, which divides by T2 - T1, one less than the terms it sums; its windows are the last 15 steps in
    1D, the last 8 or 20 in 2D, and t = 700 to 850 of a cosine schedule for shapes, its code's the last ten).

    Args:
        window: (a, b) in the schedule's t, a <= t < b.
        alpha_bar: (low, high) in its place: all t with low <= alpha_bar <= high, on whatever schedule it is that samples.
    """

    def __init__(self, window: tuple[int, int] | None = None, *, alpha_bar: tuple[float, float] | None = None) -> None:
        if window is not None and alpha_bar is not None:
            raise _check.TinyhallError(f"window, alpha_bar: expected one of them, got {window} and {alpha_bar}")
        self.alpha_bar = alpha_bar
        self.window: tuple[int, int] | None = None
        if alpha_bar is None:
            self.window = _check.window((0, 10) if window is None else window)
            self.name = f"variance{spelled(self.window)}"
        else:
            try:
                low, high = alpha_bar
                self.name = f"variance(alpha_bar {low:g} to {high:g})"
            except (TypeError, ValueError):
                raise _check.fail("alpha_bar", alpha_bar, "two numbers (low, high)") from None
        self.reset()

    def __repr__(self) -> str:
        return f"TrajectoryVariance({f'alpha_bar={self.alpha_bar}' if self.alpha_bar else f'window={self.window}'})"

    def check(self, schedule: Schedule, times: Sequence[int]) -> None:
        """Finds the window of an alpha_bar.

        Raises:
            TinyhallError: a window outside the schedule, or one that the sampler visits fewer than twice.
        """
        if self.alpha_bar is not None:
            self.window = schedule.window(*self.alpha_bar)
        visited_twice(self.window, schedule, times)

    def reset(self) -> None:
        """Forgets everything seen."""
        self.seen = Moments()

    def update(self, step: Step) -> None:
        if self.window is None:
            raise _check.TinyhallError("alpha_bar: expected a schedule to find the window on, by `check`, got none")
        if self.window[0] <= step.t < self.window[1]:
            self.seen.add(step.x0_hat)

    def per_dimension(self) -> Float[Tensor, "n *shape"]:
        """The variance of each dimension, float32 `[n, *shape]`: where in an image x0_hat moved. Raises as `score`."""
        return self._variance().float()

    def score(self) -> Float[Tensor, " n"]:
        """float32 `[n]`, in squared units of x. Beyond 3e38 it is inf, as in a window far from the data, where x0_hat reaches
        1e23; `lowest_k` refuses to choose among such scores.

        Raises:
            TinyhallError: fewer than two steps fell into the window.
        """
        return self._variance().flatten(1).mean(1).float()

    def _variance(self) -> Tensor:
        return self.seen.variance(f"with t in {spelled(self.window)}" if self.window else "in it")


def visited_twice(window: tuple[int, int] | None, schedule: Schedule, times: Sequence[int]) -> None:
    """Raises TinyhallError for a window outside the schedule, or in which fewer than two of `times` lie: one prediction has no
    variance."""
    a, b = _check.window(window, schedule.timesteps)
    seen = sum(a <= t < b for t in times)
    if seen < 2:
        raise _check.TinyhallError(f"window: expected one in which the sampler makes 2 steps, got {seen} in {spelled((a, b))}")
