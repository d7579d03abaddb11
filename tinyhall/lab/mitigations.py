"""Ways to draw fewer hallucinations, of several works: another sampler, or a network that answers otherwise."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..core import _check, _renamed
from ..core._typing import Float, Int, Net, Tensor
from ..core.device import exact
from ..core.sampling import Coefficients, Sampler, ddim, ddpm
from ..core.schedule import Schedule
from ..data.mixtures import GaussianMixture
from ..data.mnist import MNIST
from .detectors import expanded
from .experiment import Experiment

LogClasses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log p(class | x_t) `[n, classes]` at x, t and the predicted noise."""


def quenched(net: Net, schedule: Schedule, *, at: int, below: int, strength: float, generator: torch.Generator) -> Net:
    """Intrinsic quenching (arXiv 2605.05026) as we read it: in the steps below `below`, x0_hat goes down the gradient of its
    own intrinsic dimension, measured at `at` as `intrinsic_dimension` does.

    The length is `strength` times a Newton step for a sample beside a Gaussian mode. Each such step asks the network once more
    and goes back through it once, which takes as long as two calls: it counts as three further ones.
    """
    _check.generator("generator", generator)
    bar = float(schedule.alpha_bar[at])

    def steered(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        eps = net(x, t)
        if int(t[0]) >= below:
            return eps
        with torch.enable_grad():
            x0 = schedule.predict_x0(x, t[:1], eps).detach().requires_grad_()
            noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
            near = expanded(at, x)
            missed = net(schedule.q_sample(x0, near, noise), near) - noise
            (slope,) = torch.autograd.grad(missed.square().sum(), x0)
        moved = x0.detach() - strength * 0.5 * (1 - bar) / bar * slope
        now = float(schedule.alpha_bar[int(t[0])])
        return (x - now**0.5 * moved) / (1 - now) ** 0.5

    return steered


def guided(net: Net, schedule: Schedule, log_classes: Callable[[Tensor, Tensor, Tensor], Tensor], *, strength: float) -> Net:
    """Dynamic guidance (arXiv 2510.05356): eps - strength sqrt(1 - alpha_bar) grad log p(y | x_t), y the most probable class at
    every step. `log_classes(x, t, eps)` gives log p(y | x_t), `[n, classes]`."""

    def steered(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        eps = net(x, t)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            likely = log_classes(at, t, eps).amax(1)
            (slope,) = torch.autograd.grad(likely.sum(), at)
        return eps - strength * float(schedule.noise_variance[int(t[0])].sqrt()) * slope

    return steered


def log_modes(mixture: GaussianMixture, schedule: Schedule, x: Float[Tensor, "n dim"], t: Int[Tensor, " m"]) -> Tensor:
    """log p(mode | x_t) of a mixture, float64 `[n, modes]`: which mode a noised point comes from. t is one for all `[1]`, or
    one each `[n]`. Raises TinyhallError for x of another dimension."""
    x = exact(_check.shaped(x, mixture.shape))
    log_bar = schedule.log_alpha_bar.to(x.device)[t.to(x.device)]
    variance = (log_bar.exp() * mixture.std**2 - torch.expm1(log_bar)).reshape(-1, 1)
    gap = (x[:, None] - (0.5 * log_bar).exp().reshape(-1, 1, 1) * mixture.means.to(x.device)).square().sum(-1)
    return (-0.5 * gap / variance).log_softmax(1)


@functools.singledispatch
def log_classes(data: Any, schedule: Schedule, device: torch.device) -> LogClasses | None:
    """What dynamic guidance asks of data: of a mixture the exact posterior of its modes; of digits the classifier's of x0_hat,
    from where half of x_t is signal; None of others, which have no classes."""
    return None


@log_classes.register
def _(data: GaussianMixture, schedule: Schedule, device: torch.device) -> LogClasses | None:
    return lambda x, t, eps: log_modes(data, schedule, x, t[:1])


@log_classes.register
def _(data: MNIST, schedule: Schedule, device: torch.device) -> LogClasses | None:
    half = int((schedule.alpha_bar >= 0.5).sum())
    classifier = copy.deepcopy(data.classifier).to(device)  # a copy: the data judge on the processor

    def digits(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        logits = classifier(schedule.predict_x0(x, t[:1], eps)).log_softmax(1)
        return logits if int(t[0]) < half else 0 * logits

    return digits


@_renamed.keywords(steps="sample_steps")
@dataclass(frozen=True)
class hybrid:
    """DDIM, then ancestral steps for the last `stochastic`, of which the very last adds no noise (the remedy of arXiv
    2605.06831)."""

    stochastic: int = 4
    variance: str = "small"
    sample_steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check.positive_int("stochastic", self.stochastic)

    def __call__(self, schedule: Schedule) -> list[Coefficients]:
        first, last = ddim(sample_steps=self.sample_steps)(schedule), ddpm(self.variance, self.sample_steps)(schedule)
        cut = max(len(first) - self.stochastic, 0)
        return first[:cut] + last[cut:]


def quadratic(schedule: Schedule, sample_steps: int) -> tuple[int, ...]:
    """So many falling values of t up to 0.8 T whose roots are evenly spaced, so that most of them are near the data; for the
    `sample_steps` of a sampler (Song et al. 2021, appendix D.3)."""
    if not 2 <= _check.positive_int("sample_steps", sample_steps) <= 0.8 * schedule.timesteps:
        raise _check.fail("sample_steps", sample_steps, f"2 to {int(0.8 * schedule.timesteps)}")
    times: list[int] = []
    for root in torch.linspace(0, math.sqrt(0.8 * schedule.timesteps), sample_steps, dtype=torch.float64).tolist():
        times.append(max(round(root**2), times[-1] + 1) if times else 0)
    return tuple(min(t, schedule.timesteps - 1) for t in reversed(times))


class Mitigation(NamedTuple):
    """A way to sample, under one of its settings."""

    steer: Callable[[Net], Net]
    sampler: Sampler
    extra: int = 0  # calls of the network, beside the one (or with guidance two) of each step


def mitigations(
    experiment: Experiment, data: Any, at: int, generator: Callable[[str], torch.Generator], device: torch.device
) -> dict[str, dict[str, Mitigation]]:
    """By name and setting. `at` is the t at which the intrinsic dimension was found to tell most; `generator` makes one for a
    purpose."""
    schedule, few = experiment.schedule(), experiment.sample_steps

    def plain(net: Net) -> Net:
        return net

    out: dict[str, dict[str, Mitigation]] = {
        "DDIM": {"": Mitigation(plain, ddim(sample_steps=few))},
        "DDIM, then noise": {f"{k} steps": Mitigation(plain, hybrid(k, "small", few)) for k in (2, 4, 8)},
        "eta": {f"{eta:g}": Mitigation(plain, ddim(eta, few)) for eta in (0.25, 0.5, 0.75)},
    }
    if not few:  # images are drawn with the small variance to begin with
        out["fixed-small variance"] = {"": Mitigation(plain, ddpm("small"))}
    if not few and schedule.timesteps >= 1000:
        times = quadratic(schedule, 50)
        out["DDIM, 50 quadratic steps"] = {"": Mitigation(plain, ddim(sample_steps=times))}
        out["the same, then noise"] = {f"{k} steps": Mitigation(plain, hybrid(k, "small", times)) for k in (2, 4, 8)}
    base = experiment.sampler()
    below = int((schedule.alpha_bar >= 0.9).sum())
    late = sum(c.t < below for c in base(schedule))

    def quench(strength: float) -> Callable[[Net], Net]:
        g = generator(f"bench/quench/{strength}")
        return lambda net: quenched(net, schedule, at=at, below=below, strength=strength, generator=g)

    out["intrinsic quenching"] = {f"{s:g}": Mitigation(quench(s), base, 3 * late) for s in (0.03, 0.1, 0.3, 1.0)}
    known = log_classes(data, schedule, device)
    if known is not None:

        def guide(strength: float) -> Callable[[Net], Net]:
            return lambda net: guided(net, schedule, known, strength=strength)

        out["dynamic guidance"] = {f"{s:g}": Mitigation(guide(s), base) for s in (0.25, 0.5, 1.0, 2.0)}
    return out
