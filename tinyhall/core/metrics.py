"""Scores of a sample's trajectory. A metric sees steps and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from . import _check
from . import device as _device
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
    noise: float | None = None  # the share of noise in x_t: sigma / (1 + sigma), with sigma = noise / signal
    left: int | None = None  # steps still to come
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
        value = value.detach().to(_device.widest(value.device))
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

    For every step of the window that the sampler visits, `update` takes its x0_hat; `score` is

        mean over dimensions of  1/|T| sum_t (x0_hat_t - mean_t x0_hat_t)^2

    (section 5.2 of the paper, which divides by T2 - T1, one less than the terms it sums; its windows are the last 15 steps in
    1D, the last 8 or 20 in 2D, and t = 700 to 850 of a cosine schedule for shapes, its code's the last ten).

    Args:
        window: (a, b) in the schedule's t, a <= t < b; (0, 10) where nothing is given.
        noise: in its place (a, b) of the noise share, a <= sigma / (1 + sigma) < b, with sigma the ratio of noise to signal. It
            is the time of flow matching, and means the same for every model; below 1/3 the signal is twice as much.
        alpha_bar: the same as low <= alpha_bar <= high.
        last: in its place the last `last` steps of the sampler.

    Raises:
        TinyhallError: bad arguments, or more than one of the four.
    """

    def __init__(
        self, window: tuple[int, int] | None = None, *, noise: tuple[float, float] | None = None,
        alpha_bar: tuple[float, float] | None = None, last: int | None = None,
    ) -> None:  # fmt: skip
        asked = {"window": window, "noise": noise, "alpha_bar": alpha_bar, "last": last}
        given = {key: value for key, value in asked.items() if value is not None} or {"window": (0, 10)}
        if len(given) > 1:
            raise _check.fail("window", given, f"one of {', '.join(asked)}")
        ((self.kind, self.given),) = given.items()
        self.window = _check.window(self.given) if self.kind == "window" else None
        self.last = _check.positive_int("last", self.given) if self.kind == "last" else None
        self.noise = None if self.kind in ("window", "last") else _check.shares(self.kind, self.given)
        if self.window is not None:
            self.name, self.where = f"variance{spelled(self.window)}", f"with t in {spelled(self.window)}"
        elif self.noise is not None:
            a, b = self.noise
            self.name, self.where = f"variance {self.kind}[{a:.3g},{b:.3g})", f"with a noise share in [{a:.3g},{b:.3g})"
        else:
            self.name, self.where = f"variance last {last}", f"among the last {last}"
        if self.noise is not None and alpha_bar is not None:
            # Both ends are in; one that was read off a schedule, and rounded on the way, is met by the t that it was read at.
            self.noise = (noise_share(self.noise[1]) * (1 - 1e-9), noise_share(self.noise[0]) * (1 + 1e-9))
            self.name = f"variance(alpha_bar {a:g} to {b:g})"
        self.reset()

    def __repr__(self) -> str:
        return f"TrajectoryVariance({self.kind}={self.given})"

    @property
    def count(self) -> int:
        """Steps seen."""
        return self.seen.count

    def check(self, schedule: Schedule, times: Sequence[int]) -> None:
        """Raises TinyhallError for a window outside the schedule, or one that the sampler visits fewer than twice."""
        if self.window is not None:
            _check.window(self.window, schedule.timesteps)
        self.expect([(t, schedule.noise_share(t), len(times) - 1 - i) for i, t in enumerate(times)])

    def expect(self, steps: Sequence[tuple[int, float, int]]) -> None:
        """Raises TinyhallError where fewer than two of the coming steps, (t, noise share, steps left), will be seen: one
        prediction has no variance."""
        if (held := sum(self.sees(*step) for step in steps)) < 2:
            ends = " and ".join(f"{noise:.2f}" for _, noise, _ in steps[-2:])
            raise _check.TinyhallError(
                f"window: expected one in which the sampler makes 2 steps, got {held} {self.where}; the last of {len(steps)} "
                f"have a noise share of {ends or 'none'}"
            )

    def sees(self, t: int, noise: float | None, left: int | None) -> bool:
        """Whether a step at t, of this noise share, with so many to come, lies in the window.

        Raises:
            TinyhallError: the window asks for what the step does not say.
        """
        if self.window is not None:
            return self.window[0] <= t < self.window[1]
        said = left if self.noise is None else noise
        if said is None:
            raise _check.fail("step", None, f"one that says its {'left' if self.noise is None else 'noise'}")
        return said < (self.last or 0) if self.noise is None else self.noise[0] <= said < self.noise[1]

    def reset(self) -> None:
        """Forgets everything seen."""
        self.seen = Moments()

    def update(self, step: Step) -> None:
        if self.sees(step.t, step.noise, step.left):
            self.seen.add(step.x0_hat)

    def per_dimension(self) -> Float[Tensor, "n *shape"]:
        """The variance of each dimension, float32 `[n, *shape]`: where in an image x0_hat moved. Raises as `score`."""
        return self.seen.variance(self.where).float()

    def score(self) -> Float[Tensor, " n"]:
        """float32 `[n]`, in squared units of x. Beyond 3e38 it is inf, as in a window far from the data, where x0_hat reaches
        1e23; `lowest_k` refuses to choose among such scores.

        Raises:
            TinyhallError: fewer than two steps fell into the window.
        """
        return self.seen.variance(self.where).flatten(1).mean(1).float()


def noise_share(alpha_bar: float) -> float:
    """sigma / (1 + sigma), with sigma = sqrt((1 - alpha_bar) / alpha_bar)."""
    return (1 - alpha_bar) ** 0.5 / (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5)
