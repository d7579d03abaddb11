"""The reverse process: one generator that puts every step in the open, and `sample`, which drives it in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch

from . import _check, _renamed
from . import device as _device
from ._typing import Float, Int, Net, Tensor
from .metrics import Metric, Step, Walk
from .network import conditioned, where
from .noise import BLOCK, Noise, Stream, Supply
from .schedule import Schedule


class Coefficients(NamedTuple):
    """How a sampler leaves t: x <- c.x * x + c.eps * eps + c.noise * z, z standard normal."""

    t: int
    x: float
    eps: float
    noise: float


Sampler = Callable[[Schedule], list[Coefficients]]
"""A sampler is the list of its steps. Whatever is linear in x, eps and noise fits: DDPM, DDIM and what lies between."""


Variance = Callable[[float, float], float]


def _step(schedule: Schedule, t: int, to: int, sigma2: Variance) -> Coefficients:
    """The step from t to `to` (-1 is clean data), after Song et al. 2021, eq. 12, solved for x and eps.

    `sigma2(beta, small)` picks the noise: beta is the variance that the forward process adds between the two, small that of the
    exact posterior. Written through ratios of alpha_bar, which stay moderate, and never through x0_hat, which reaches 1e23.
    """
    log_t = float(schedule.log_alpha_bar[t])
    log_to = float(schedule.log_alpha_bar[to]) if to >= 0 else 0.0
    rest_t, rest_to = -math.expm1(log_t), -math.expm1(log_to)
    beta = -math.expm1(log_t - log_to)
    small = beta * rest_to / rest_t
    variance = sigma2(beta, small) if to >= 0 else 0.0
    of_x = math.exp(0.5 * (log_to - log_t))
    # A variance above the posterior's (fixed large) keeps the posterior's mean.
    of_eps = math.sqrt(max(rest_to - min(variance, small), 0.0)) - of_x * math.sqrt(rest_t)
    return Coefficients(t, of_x, of_eps, math.sqrt(variance))


def _times(schedule: Schedule, steps: int | Sequence[int] | None) -> list[int]:
    """The values of t themselves, or `steps` of them, falling, evenly spaced over the part of the schedule that holds signal.

    The paper's schedule is noise from t = 363 on (alpha_bar < 1e-6): a short sampler that visited the rest would waste most of
    its steps, and multiply x by thousands in each. A schedule that never falls so low is spaced over all of it.
    """
    last = schedule.timesteps - 1
    if steps is None or (isinstance(steps, Integral) and steps == schedule.timesteps):
        return list(range(last, -1, -1))
    if isinstance(steps, Sequence):
        whole = bool(steps) and all(isinstance(t, Integral) for t in steps)
        if not whole or any(a <= b for a, b in pairwise(steps)) or not 0 <= steps[-1] <= steps[0] <= last:
            raise _check.fail("sample_steps", steps, f"falling values of t in 0..{last}")
        return [int(t) for t in steps]
    if not isinstance(steps, int):
        raise _check.fail("sample_steps", steps, "a whole number, a list of falling values of t, or None")
    if _check.positive_int("sample_steps", steps) > schedule.timesteps:
        raise _check.fail("sample_steps", steps, f"at most {schedule.timesteps}, the schedule's number of steps")
    holds = min(int((schedule.alpha_bar >= 1e-6).sum()), last)
    end = holds if steps <= holds + 1 else last
    spaced = torch.linspace(0, end, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([end])
    return spaced.flip(0).tolist()


def _steps(schedule: Schedule, steps: int | Sequence[int] | None, sigma2: Variance) -> list[Coefficients]:
    times = _times(schedule, steps)
    return [_step(schedule, t, to, sigma2) for t, to in zip(times, [*times[1:], -1], strict=True)]


@_renamed.keywords(steps="sample_steps")
@dataclass(frozen=True)
class ddpm:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); no noise in the last step.

    Args:
        variance: "large" (beta_t, what the paper's code takes; its text does not say) or "small" (that of the posterior).
        sample_steps: fewer than T to skip some, or the falling values of t to visit; None for all.
    """

    variance: str = "large"
    sample_steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.variance not in ("large", "small"):
            raise _check.fail("variance", self.variance, "'large' or 'small'")

    def __call__(self, schedule: Schedule) -> list[Coefficients]:
        large = self.variance == "large"
        return _steps(schedule, self.sample_steps, lambda beta, small: beta if large else small)


@_renamed.keywords(steps="sample_steps")
@dataclass(frozen=True)
class ddim:
    """Song et al. 2021, eq. 12 and 16: eta = 0 adds no noise, eta = 1 as much as `ddpm("small")`."""

    eta: float = 0.0
    sample_steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check.number("eta", self.eta, "a number from 0 to 1", lambda v: 0 <= v <= 1)

    def __call__(self, schedule: Schedule) -> list[Coefficients]:
        return _steps(schedule, self.sample_steps, lambda beta, small: self.eta**2 * small)


def reverse(
    net: Net, schedule: Schedule, shape: Sequence[int], *, sampler: Sampler = ddpm(), generator: torch.Generator | Noise,
    x: Tensor | None = None, label: Tensor | None = None, guidance: float | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Walks from noise to data, one `Step` per reverse step.

    Args:
        net: predicts eps.
        schedule: the forward process that it was trained on.
        shape: `(n, *shape)` of the states.
        sampler: `ddpm()`, `ddim()` or any function from a schedule to a list of `Coefficients`.
        generator: draws the start and the noise; the global generator is not touched.
        x: a start of one's own, float32 `[n, *shape]`, instead of N(0, I).
        label: int64 `[n]`, for a class-conditional network.
        guidance: weight of classifier-free guidance; see `conditioned`.
        device: where to run; without one, the network's.

    Raises:
        TinyhallError: at once for bad arguments; in mid-run if the network returns another shape; after the last step if a
            sample is not finite.
    """
    if not isinstance(shape, Sequence) or len(shape) < 2 or any(not isinstance(s, int) or s < 1 for s in shape):
        raise _check.fail("shape", shape, "(n, *shape), each at least 1")
    if label is not None:
        _check.labels("label", label, shape[0])
    place = _device.pick(device if device is not None else where(net))
    eps_at = conditioned(net, None if label is None else label.to(place), guidance)
    noise = generator if isinstance(generator, Noise) else Stream(_check.generator("generator", generator), place)
    steps = coefficients(sampler, schedule)
    if x is not None:
        _check.floats("x", x)
        if tuple(x.shape) != tuple(shape):
            raise _check.fail("x", x, f"shape {tuple(shape)}")
    x = noise.randn(shape) if x is None else x.to(place)
    return _walk(Walk(eps_at, schedule.to(place), noise), steps, x)


def watched(steps: Iterator[Step], metrics: Sequence[Metric] = ()) -> Step:
    """Takes all steps, shows each to the metrics, which start afresh, and returns the last."""
    for metric in metrics:
        metric.reset()
    for step in steps:
        for metric in metrics:
            metric.update(step)
    return step


def coefficients(sampler: Any, schedule: Schedule) -> list[Coefficients]:
    """What a sampler does on a schedule.

    Raises:
        TinyhallError: what is no sampler.
    """
    if not callable(sampler) or isinstance(sampler, type):  # ddim instead of ddim()
        raise _check.fail("sampler", sampler, "ddpm(), ddim() or a function from a schedule to a list of Coefficients")
    steps = sampler(schedule)
    if not isinstance(steps, Sequence) or not steps or not all(isinstance(c, Coefficients) for c in steps):
        raise _check.fail("sampler", steps, "a function that returns a list of at least one Coefficients")
    return list(steps)


def _walk(walk: Walk, steps: list[Coefficients], x: Tensor) -> Iterator[Step]:
    _device.keep_freed_memory()
    for left, c in zip(reversed(range(len(steps))), steps, strict=True):
        # An expanded scalar, not n copies: a network may notice and work its time features out once.
        t = torch.tensor([c.t], device=x.device).expand(len(x))
        with torch.no_grad():
            eps = _check.eps(walk.eps_at(x, t), x)
            x0_hat = walk.schedule.predict_x0(x, t[:1], eps)
            x = c.x * x + c.eps * eps
            if c.noise > 0:
                x += c.noise * walk.noise.randn(x.shape)
        yield Step(c.t, x, x0_hat, eps, walk.schedule.noise_share(c.t), left, walk)
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise _check.TinyhallError(f"samples: expected finite values, got {bad} of {len(x)} that are not")


@dataclass
class Samples:
    """What `sample` returns: the points, and for each metric a score per point, all on the processor."""

    x: Float[Tensor, "n *shape"]
    scores: dict[str, Float[Tensor, "n ..."]] = field(default_factory=dict)
    label: Int[Tensor, " n"] | None = None  # the classes that were asked for

    def __len__(self) -> int:
        return len(self.x)


def sample(
    net: Net, schedule: Schedule, n: int, *, shape: Sequence[int] | None = None, metrics: Sequence[Metric] = (),
    batch_size: int | None = None, sampler: Sampler = ddpm(), generator: torch.Generator, label: Tensor | None = None,
    guidance: float | None = None, device: torch.device | str | None = None, progress: bool = False,
) -> Samples:  # fmt: skip
    """n samples, drawn in chunks and scored on the way: memory does not grow with T, nor beyond the result with n.

    The samples depend on the generator and n, not on `batch_size` or on the number of processes (up to the rounding of the
    network itself, whose matrix products may depend on the rows beside a row).

    Args:
        shape: of one sample; a network with a `dim` or a `shape` attribute needs none.
        metrics: each sees every step, and scores each sample, under a name of its own; see `TrajectoryVariance`.
        batch_size: samples in flight at a time; by default about 4 MB of them, or 1 MB of images on a processor, from whose
            caches the states of more would fall out.
        label: int64 `[n]`.
        progress: show a bar.

    Raises:
        TinyhallError: bad arguments, or what `reverse` raises.
    """
    config = SampleConfig(shape, batch_size, sampler, label, guidance, device, progress)
    parts = chunks(net, schedule, n, metrics=metrics, generator=generator, config=config)
    done = [(part.start, part.x.cpu(), [metric.score().cpu() for metric in metrics]) for part in parts]
    done = sorted(_device.gather_rows(done), key=lambda item: item[0])
    x = torch.cat([item[1] for item in done])
    scores = {metric.name: torch.cat([item[2][i] for item in done]) for i, metric in enumerate(metrics)}
    return Samples(x, scores, None if label is None else label.cpu())


class Chunk(NamedTuple):
    """Some of the samples, just drawn: the metrics hold what they have seen of them until the next are asked for."""

    start: int  # the first one's index
    x: Float[Tensor, "n *shape"]  # on the device


@dataclass(frozen=True)
class SampleConfig:
    """The arguments of `sample` beside network, schedule, number, metrics and generator, and their defaults."""

    shape: Sequence[int] | None = None
    batch_size: int | None = None
    sampler: Sampler = ddpm()
    label: Tensor | None = None
    guidance: float | None = None
    device: torch.device | str | None = None
    progress: bool = False


def chunks(
    net: Net, schedule: Schedule, n: int, *, generator: torch.Generator, metrics: Sequence[Metric] = (),
    config: SampleConfig = SampleConfig(),
) -> Iterator[Chunk]:  # fmt: skip
    """What `sample` gathers, a chunk at a time; of several processes each draws its own. Whatever watches the steps is a
    metric: here it need not score, and may be read in between."""
    n = _check.positive_int("n", n)
    _check.generator("generator", generator)
    one, label = _sample_shape(net, config.shape), config.label
    numbers = math.prod(one)
    place = _device.pick(config.device if config.device is not None else where(net))
    if config.batch_size is None:
        # At most a process's share, in whole blocks of noise: else one chunk would hold all, and the others wait.
        block, usual = max(1, BLOCK // numbers), 2**18 if place.type == "cpu" and len(one) > 1 else 2**20
        batch = max(block, min(usual // numbers, math.ceil(n / _device.processes() / block) * block))
    else:
        batch = _check.positive_int("batch_size", config.batch_size)
    if label is not None:
        _check.labels("label", label, n)
    if not isinstance(metrics, Sequence):
        raise _check.fail("metrics", metrics, "a list of metrics")
    times = [c.t for c in coefficients(config.sampler, schedule)]
    for metric in metrics:
        metric.check(schedule, times)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise _check.fail("metrics", names, "a different name for each")
    supply = Supply(n, numbers, generator, place)

    def drawn() -> Iterator[Chunk]:  # below the checks, which are made at once
        mine = range(0, n, batch)[_device.rank() :: _device.processes()]
        for low in _device.bar(mine, "sampling", "chunk", config.progress):
            high = min(low + batch, n)
            part = None if label is None else label[low:high]
            steps = reverse(
                net, schedule, (high - low, *one), sampler=config.sampler, generator=supply.of(low, high), label=part,
                guidance=config.guidance, device=place,
            )  # fmt: skip
            yield Chunk(low, watched(steps, metrics).x)

    return drawn()


def _sample_shape(net: Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        shape = getattr(net, "shape", None) or ((net.dim,) if isinstance(getattr(net, "dim", None), int) else None)
    if not isinstance(shape, Sequence) or not len(shape) or any(not isinstance(s, int) or s < 1 for s in shape):
        raise _check.fail("shape", shape, "the shape of one sample, such as (2,)")
    return tuple(shape)
