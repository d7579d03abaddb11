"""Scores of a sample's trajectory. A metric sees steps and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from . import _check
from . import device as _device
from ._typing import Float, Net, Tensor

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

    For every step of the window that the sampler visits, `update` takes its x0_hat; `score` is

        mean over dimensions of  1/|T| sum_t (x0_hat_t - mean_t x0_hat_t)^2

    (section 4 of the paper; its code takes the last ten steps, `window=(0, 10)`). The sums are Welford's, so memory is two
    states whatever T is, and steps may come in any order. They are float64 where the device has it (Apple's has not).

    Args:
        window: (a, b) in the schedule's t, a <= t < b; (0, 10) where nothing is given.
        noise: in its place (a, b) of the noise share, a <= sigma / (1 + sigma) < b, 0 to 1, with sigma the ratio of noise to
            signal. It is the time of flow matching, and means the same for every model; below 1/3 the signal is twice as much.
        last: in its place the last `last` steps of the sampler.

    Raises:
        TinyhallError: bad arguments, or more than one of the three.
    """

    def __init__(
        self, window: tuple[int, int] | None = None, *, noise: tuple[float, float] | None = None, last: int | None = None
    ) -> None:
        given = [value for value in (window, noise, last) if value is not None]
        if len(given) > 1:
            raise _check.fail("window", given, "one of window=(a, b), noise=(a, b) and last=k")
        # (a, b), or None where one of the others is asked for.
        self.window: Any = None if given and window is None else _check.window((0, 10) if window is None else window)
        self.noise = None if noise is None else _check.shares("noise", noise)
        self.last = None if last is None else _check.positive_int("last", last)
        if self.window is not None:
            self.name, self.where = f"variance[{self.window[0]},{self.window[1]})", f"{self.window[0]} <= t < {self.window[1]}"
        elif self.noise is not None:
            a, b = self.noise
            self.name, self.where = f"variance noise[{a:.3g},{b:.3g})", f"{a:.3g} <= noise share < {b:.3g}"
        else:
            self.name, self.where = f"variance last {last}", f"the last {last}"
        self.reset()

    def __repr__(self) -> str:
        asked = {"window": self.window, "noise": self.noise, "last": self.last}
        return f"TrajectoryVariance({', '.join(f'{key}={value}' for key, value in asked.items() if value is not None)})"

    def check(self, schedule: Schedule) -> None:
        """Raises TinyhallError for a window outside the schedule."""
        if self.window is not None:
            _check.window(self.window, schedule.steps)

    def sees(self, t: int, noise: float | None, left: int | None) -> bool:
        """Whether a step at t, of this noise share, with so many to come, lies in the window.

        Raises:
            TinyhallError: the window asks for what the step does not say.
        """
        if self.window is not None:
            return self.window[0] <= t < self.window[1]
        if (noise if self.noise is not None else left) is None:
            raise _check.fail("step", None, f"one that says its {'noise' if self.noise is not None else 'left'}")
        return self.noise[0] <= noise < self.noise[1] if self.noise is not None else left < self.last  # type: ignore[operator]

    def expect(self, steps: Sequence[tuple[int, float, int]]) -> None:
        """Raises TinyhallError where fewer than two of the coming steps, (t, noise share, steps left), will be seen."""
        if (held := sum(self.sees(*step) for step in steps)) < 2:
            ends = " and ".join(f"{noise:.2f}" for _, noise, _ in steps[-2:])
            raise _check.TinyhallError(
                f"window: expected at least two steps of {self.where}, got {held} of {len(steps)}; the last ones have a noise "
                f"share of {ends}"
            )

    def reset(self) -> None:
        """Forgets everything seen."""
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, step: Step) -> None:
        if not self.sees(step.t, step.noise, step.left):
            return
        # x0_hat reaches 1e23 early on: its square overflows float32.
        # Detached: what a network returned outside of no_grad would hold on to every step's graph.
        value = step.x0_hat.detach().to(_device.widest(step.x0_hat.device))
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = value.clone(), torch.zeros_like(value)
            return
        if value.shape != self._mean.shape:
            raise _check.fail("step.x0_hat", step.x0_hat, f"shape {tuple(self._mean.shape)}, as in the steps before")
        delta = value - self._mean
        self._mean += delta / self.count
        self._squares += delta * (value - self._mean)

    @classmethod
    def joined(cls, parts: Sequence[TrajectoryVariance]) -> TrajectoryVariance:
        """The metric over windows that adjoin, from what each has seen (Chan et al. 1979): a sweep over all windows between
        k edges so costs k - 1 updates a step. Raises TinyhallError for none, or for a gap between two."""
        windows = sorted(part.window or (-1, -1) for part in parts)
        if not parts or windows[0][0] < 0 or any(p[1] != q[0] for p, q in pairwise(windows)):
            raise _check.fail("parts", [part.window for part in parts], "metrics of windows that adjoin")
        parts = sorted(parts, key=lambda part: part.window or (-1, -1))
        whole = cls((windows[0][0], windows[-1][1]))
        for part in parts:
            if part._mean is None or part._squares is None:
                continue
            if whole._mean is None or whole._squares is None:
                whole.count, whole._mean, whole._squares = part.count, part._mean.clone(), part._squares.clone()
                continue
            total = whole.count + part.count
            delta = part._mean - whole._mean
            whole._mean += delta * (part.count / total)
            whole._squares += part._squares + delta.square() * (whole.count * part.count / total)
            whole.count = total
        return whole

    def per_dimension(self) -> Float[Tensor, "n *shape"]:
        """The variance of each dimension, float32 `[n, *shape]`: where in an image x0_hat moved. Raises as `score`."""
        return self._variance().float()

    def score(self) -> Float[Tensor, " n"]:
        """float32 `[n]`, in squared units of x. Beyond 3e38 it is inf, as in a window far from the data, where x0_hat reaches
        1e23; `keep_k` refuses to choose among such scores.

        Raises:
            TinyhallError: fewer than two steps fell into the window: one has no variance.
        """
        return self._variance().flatten(1).mean(1).float()

    def _variance(self) -> Tensor:
        if self._squares is None or self.count < 2:
            raise _check.TinyhallError(f"window: expected at least two steps of {self.where}, got {self.count or 'none'}")
        return self._squares / self.count


def denoising_error(
    net: Net,
    schedule: Schedule,
    x: Float[Tensor, "n *shape"],
    times: Sequence[int],
    *,
    generator: torch.Generator,
    repeats: int = 4,
) -> Float[Tensor, "n times"]:
    """How far x0_hat lies from x when x is noised to t anew: the mean square over dimensions and `repeats` noises.

    Unlike the trajectory variance it needs the finished sample alone. Near the data it measures the local intrinsic dimension
    that the model sees (arXiv 2605.05026).

    Args:
        net: predicts eps. Where it has parameters, x is moved to them, a part at a time; the answer is on the processor.
        x: samples, float32 `[n, *shape]`.
        times: values of t.
        generator: for the noises.
        repeats: noises for each x and t.

    Returns:
        float32, in squared units of x.

    Raises:
        TinyhallError: bad arguments.
    """
    _check.floats("x", x)
    _check.generator("generator", generator)
    if any(type(t) is not int or not 0 <= t < schedule.steps for t in times):
        raise _check.fail("times", times, f"values of t in 0..{schedule.steps - 1}")
    _check.positive_int("repeats", repeats)
    out = torch.zeros(len(x), len(times), dtype=torch.float64)
    size = max(2**18 // x[0].numel(), 1)
    place = next(net.parameters(), x).device if isinstance(net, torch.nn.Module) else x.device
    with torch.no_grad():
        for low in range(0, len(x), size):
            part = x[low : low + size].to(place)
            for i, t in enumerate(times):
                at = torch.tensor([t], device=part.device).expand(len(part))
                for _ in range(repeats):
                    noise = torch.randn(part.shape, generator=generator, device=generator.device).to(part.device)
                    noisy = schedule.q_sample(part, at, noise)
                    gap = schedule.predict_x0(noisy, at[:1], net(noisy, at)) - part
                    out[low : low + size, i] += _device.exact(gap).square().flatten(1).mean(1).cpu() / repeats
    return out.float()
