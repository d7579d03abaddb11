"""Scores of finished samples: noise them anew, and ask the network what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..core import _check
from ..core._typing import Float, Int, Net, Tensor
from ..core.metrics import Moments, Step, Walk, spelled
from ..core.network import conditioned, where
from ..core.noise import Supply
from ..core.schedule import Schedule

IN_FLIGHT = 2**18  # numbers of a state that are sent through a network at a time


class PostHocVariance:
    """The paper's second form of its measure (section 5.2), as its filter for MNIST takes it (appendix A.3): the *finished*
    sample is noised to k values of t in the window, x_0 is predicted at each, and the variance is over those predictions.

    It costs k calls of the network, or 2 k under guidance, and needs nothing of how the sample was drawn. The paper leaves open
    how the values of t are spaced (here evenly, ends included) and whether each gets a noise of its own (here it does, unless
    `one_noise` is set). As a metric of `sample` it takes network, labels and guidance from there: `recurse` may filter by it.

    Args:
        window: (a, b) in the schedule's t, a <= t < b.
        k: values of t, at least 2.
        one_noise: the same noise at all of them.
    """

    def __init__(self, window: tuple[int, int] = (100, 150), k: int = 10, *, one_noise: bool = False) -> None:
        self.window, self.k, self.one_noise = _check.window(window), _check.positive_int("k", k), one_noise
        if not 2 <= k <= self.window[1] - self.window[0]:
            raise _check.fail("k", k, f"2 to {self.window[1] - self.window[0]}, as many as t in {spelled(self.window)}")
        self.name = f"post-hoc variance{spelled(self.window)} at {k}" + (", one noise" if one_noise else "")
        self.reset()

    def times(self) -> list[int]:
        """The k values of t, rising."""
        return torch.linspace(self.window[0], self.window[1] - 1, self.k, dtype=torch.float64).round().long().tolist()

    def check(self, schedule: Schedule, times: Sequence[int]) -> None:
        """Raises TinyhallError for a window outside the schedule."""
        _check.window(self.window, schedule.timesteps)

    def reset(self) -> None:
        """Forgets everything seen."""
        self._last: Step | None = None

    def update(self, step: Step) -> None:
        self._last = step

    def score(self) -> Float[Tensor, " n"]:
        """float32 `[n]`, in squared units of x.

        Raises:
            TinyhallError: no step was seen, or steps that do not know their network, as those of another program.
        """
        if self._last is None or self._last.walk is None:
            came = "none" if self._last is None else "steps without one"
            raise _check.TinyhallError(f"post-hoc variance: expected steps that know their network, got {came}")
        return self._of(self._last.walk, self._last.x)

    def of(
        self,
        net: Net,
        schedule: Schedule,
        x: Float[Tensor, "n *shape"],
        *,
        generator: torch.Generator,
        label: Int[Tensor, " n"] | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, " n"]:
        """The score of samples that lie there, whoever drew them.

        Args:
            net: predicts eps. Where it has parameters, x is moved to them, a part at a time; the answer is on the processor.
            x: samples, float32 `[n, *shape]`.
            generator: for the noises; which one a sample gets does not depend on the parts.
            label, guidance: as in `sample`.

        Returns:
            float32 `[n]`, in squared units of x.

        Raises:
            TinyhallError: bad arguments, or a window outside the schedule.
        """
        _check.floats("x", x)
        _check.generator("generator", generator)
        self.check(schedule, ())
        if label is not None:
            _check.labels("label", label, len(x))
        place = where(net) if isinstance(net, torch.nn.Module) else x.device
        supply, scores = Supply(len(x), x[0].numel(), generator, place), []
        for rows in _parts(x):
            eps_at = conditioned(net, None if label is None else label[rows].to(place), guidance)
            walk = Walk(eps_at, schedule.to(place), supply.of(rows.start, rows.stop))
            scores.append(self._of(walk, x[rows].to(place)).cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def _of(self, walk: Walk, x: Tensor) -> Tensor:
        seen, noise = Moments(), None
        for t in self.times():
            at = torch.tensor([t], device=x.device).expand(len(x))
            if noise is None or not self.one_noise:
                noise = walk.noise.randn(x.shape)
            noisy = walk.schedule.q_sample(x, at[:1], noise)
            seen.add(walk.schedule.predict_x0(noisy, at[:1], _check.eps(walk.eps_at(noisy, at), noisy)))
        return seen.variance("").flatten(1).mean(1).float()


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
    if any(type(t) is not int or not 0 <= t < schedule.timesteps for t in times):
        raise _check.fail("times", times, f"values of t in 0..{schedule.timesteps - 1}")
    _check.positive_int("repeats", repeats)
    out = torch.zeros(len(x), len(times), dtype=torch.float64)
    place = where(net) if isinstance(net, torch.nn.Module) else x.device
    with torch.no_grad():
        for rows in _parts(x):
            part = x[rows].to(place)
            for i, t in enumerate(times):
                at = torch.tensor([t], device=part.device).expand(len(part))
                for _ in range(repeats):
                    noise = torch.randn(part.shape, generator=generator, device=generator.device).to(part.device)
                    noisy = schedule.q_sample(part, at, noise)
                    gap = schedule.predict_x0(noisy, at[:1], net(noisy, at)) - part
                    out[rows, i] += gap.cpu().double().square().flatten(1).mean(1) / repeats
    return out.float()


def _parts(x: Tensor) -> Iterator[slice]:
    size = max(IN_FLIGHT // x[0].numel(), 1)
    for low in range(0, len(x), size):
        yield slice(low, min(low + size, len(x)))
