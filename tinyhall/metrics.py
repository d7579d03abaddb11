"""Scores of a sample's trajectory. A metric sees steps and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from . import _check
from ._typing import Float, Tensor

if TYPE_CHECKING:
    from .sampling import Step
    from .schedule import Schedule


@runtime_checkable
class Metric(Protocol):
    """What `sample` asks of a metric."""

    name: str

    def check(self, schedule: Schedule) -> None: ...
    def reset(self) -> None: ...
    def update(self, step: Step) -> None: ...
    def score(self) -> Tensor: ...


class TrajectoryVariance:
    """The paper's measure: the variance over time of the predicted x_0, in a window of reverse steps, averaged over dimensions.

    For every t with a <= t < b that the sampler visits, `update` takes that step's x0_hat; `score` is

        mean over dimensions of  1/|T| sum_t (x0_hat_t - mean_t x0_hat_t)^2

    (section 4 of the paper; its code takes the last ten steps, `window=(0, 10)`). The sums are Welford's, so memory is two
    states whatever T is, and steps may come in any order.

    Args:
        window: (a, b) in the schedule's t, a <= t < b.
    """

    def __init__(self, window: tuple[int, int] = (0, 10)) -> None:
        self.window = _check.window(window)
        self.name = f"variance[{self.window[0]},{self.window[1]})"
        self.reset()

    def __repr__(self) -> str:
        return f"TrajectoryVariance(window={self.window})"

    def check(self, schedule: Schedule) -> None:
        """Raises TinyhallError for a window outside the schedule."""
        _check.window(self.window, schedule.steps)

    def reset(self) -> None:
        """Forgets everything seen."""
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, step: Step) -> None:
        if not self.window[0] <= step.t < self.window[1]:
            return
        # x0_hat reaches 1e23 early on: its square overflows float32.
        value = step.x0_hat.to(torch.float32 if step.x0_hat.device.type == "mps" else torch.float64)
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = value.clone(), torch.zeros_like(value)
            return
        if value.shape != self._mean.shape:
            raise _check.fail("step.x0_hat", step.x0_hat, f"shape {tuple(self._mean.shape)}, as in the steps before")
        delta = value - self._mean
        self._mean += delta / self.count
        self._squares += delta * (value - self._mean)

    def score(self) -> Float[Tensor, " n"]:
        """float32 `[n]`, in squared units of x; 0 where a single step was seen.

        Raises:
            TinyhallError: no step fell into the window.
        """
        if self._squares is None:
            raise _check.TinyhallError(f"window: expected steps with {self.window[0]} <= t < {self.window[1]}, got none")
        return (self._squares / self.count).flatten(1).mean(1).float()
