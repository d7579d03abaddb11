"""What else watches the steps of a sampler: many windows at once, predictions on the way, states at some t."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch

from ..core import _check
from ..core._typing import Float, Tensor, UInt8
from ..core.metrics import Moments, Step, TrajectoryVariance, spelled
from ..core.schedule import Schedule
from ..data.images import quantised, restored


class WindowSweep:
    """Trajectory variances over many windows in one pass. Sums are kept of the stretches between their ends, and any window is
    some of these put together: k ends cost one update a step, and k - 1 pairs of states.

    Args:
        windows: (a, b), a <= t < b, each; at least one.

    Raises:
        TinyhallError: no window, or what is none.
    """

    name = "windows"

    def __init__(self, windows: Sequence[tuple[int, int]]) -> None:
        self.windows = [_check.window(window) for window in windows]
        if not self.windows:
            raise _check.fail("windows", windows, "at least one (a, b)")
        self._ends = sorted({end for window in self.windows for end in window})
        self.reset()

    def check(self, schedule: Schedule, times: Sequence[int]) -> None:
        for window in self.windows:
            TrajectoryVariance(window).check(schedule, times)

    def reset(self) -> None:
        self._stretches = {pair: Moments() for pair in pairwise(self._ends)}

    def update(self, step: Step) -> None:
        for (a, b), seen in self._stretches.items():
            if a <= step.t < b:
                seen.add(step.x0_hat)

    def variance(self, window: tuple[int, int]) -> Float[Tensor, "n *shape"]:
        """Of each dimension, float64. Raises TinyhallError for a window between other ends, or with fewer than two steps."""
        if not set(window) <= set(self._ends):
            raise _check.fail("window", window, f"two of the ends {self._ends}")
        whole = Moments()
        for (a, b), seen in self._stretches.items():
            if window[0] <= a and b <= window[1]:
                whole.join(seen)
        return whole.variance(f"with t in {spelled(window)}")

    def score(self) -> Float[Tensor, "n windows"]:
        return torch.stack([self.variance(window).flatten(1).mean(1).float() for window in self.windows], 1)


class _Recorder:
    """A metric that does not score, but keeps something at some values of t, to be read when the samples are there."""

    name: str

    def __init__(self, times: Collection[int]) -> None:
        self.times = frozenset(times)
        self.reset()

    def check(self, schedule: Schedule, times: Sequence[int]) -> None: ...

    def reset(self) -> None: ...

    def score(self) -> Tensor:
        raise _check.TinyhallError(f"{self.name}: expected a metric that scores, got a record")


class Trace(_Recorder):
    """x0_hat at some values of t, on the device where they were predicted: `of` gives those of some samples."""

    name = "trace"

    def reset(self) -> None:
        self.x0_hat: list[Tensor] = []

    def update(self, step: Step) -> None:
        if step.t in self.times:
            self.x0_hat.append(step.x0_hat)

    def of(self, rows: Tensor) -> Float[Tensor, "m times *shape"]:
        """Of the samples of those rows, t falling, on the processor."""
        return torch.stack([x0_hat[rows.to(x0_hat.device)].cpu() for x0_hat in self.x0_hat], 1)


class StatesAt(_Recorder):
    """The states in which the network was asked at some values of t, in `states` by t; not the first, which no step made."""

    name = "states"

    def reset(self) -> None:
        self.states: dict[int, Tensor] = {}
        self._before: Tensor | None = None

    def update(self, step: Step) -> None:
        if self._before is not None and step.t in self.times:
            self.states[step.t] = self._before
        self._before = step.x


class Settling(_Recorder):
    """How far each prediction still is from the last one, of the first `most` samples of a batch, at all `t` that it sees."""

    name = "settling"

    def __init__(self, most: int) -> None:
        self.most = _check.positive_int("most", most)
        super().__init__(())

    def reset(self) -> None:
        self.t: list[int] = []
        self._seen: list[UInt8[Tensor, "m *shape"]] = []

    def update(self, step: Step) -> None:
        self.t.append(step.t)
        self._seen.append(quantised(step.x0_hat[: self.most]))  # 8 bits: of all steps it is a lot

    def changed(self) -> Float[Tensor, "m steps"]:
        """The share of an image's pixels that are off by more than a quarter of the way from black to white; t falls."""
        last = restored(self._seen[-1])
        far = [(restored(x) - last).abs().flatten(1).gt(0.5).float().mean(1) for x in self._seen]
        return torch.stack(far, 1).cpu()
