"""The reverse process: one generator that puts every step in the open, and `sample`, which drives it in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from . import _check
from . import device as _device
from ._typing import Float, Int, Net, Tensor
from .metrics import Metric, TrajectoryVariance
from .schedule import Schedule


class Step(NamedTuple):
    """One reverse step, from x_t to the next state."""

    t: int
    x: Float[Tensor, "n *shape"]  # the state reached; after the last step, the sample
    x0_hat: Float[Tensor, "n *shape"]  # the x_0 that the network predicts at x_t
    eps: Float[Tensor, "n *shape"]  # the noise that it predicts at x_t
    noise: float | None = None  # the share of noise in x_t: sigma / (1 + sigma), with sigma = noise / signal
    left: int | None = None  # steps still to come


class Move(NamedTuple):
    """How a sampler leaves t: x <- keep * x + push * eps + noise * z, z standard normal."""

    t: int
    keep: float
    push: float
    noise: float


Sampler = Callable[[Schedule], list[Move]]
"""A sampler is the list of its moves. Whatever is linear in x, eps and noise fits: DDPM, DDIM and what lies between."""


def _move(schedule: Schedule, t: int, to: int, sigma2: Callable[[float, float], float]) -> Move:
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
    keep = math.exp(0.5 * (log_to - log_t))
    # A variance above the posterior's (fixed large) keeps the posterior's mean.
    push = math.sqrt(max(rest_to - min(variance, small), 0.0)) - keep * math.sqrt(rest_t)
    return Move(t, keep, push, math.sqrt(variance))


def quadratic(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """`steps` falling values of t up to 0.8 T whose roots are evenly spaced, so that most of them are near the data; for the
    `steps` of a sampler (Song et al. 2021, appendix D.3)."""
    if not 2 <= _check.positive_int("steps", steps) <= 0.8 * schedule.steps:
        raise _check.fail("steps", steps, f"2 to {int(0.8 * schedule.steps)}")
    times: list[int] = []
    for root in torch.linspace(0, math.sqrt(0.8 * schedule.steps), steps, dtype=torch.float64).tolist():
        times.append(max(round(root**2), times[-1] + 1) if times else 0)
    return tuple(min(t, schedule.steps - 1) for t in reversed(times))


def _times(schedule: Schedule, steps: int | Sequence[int] | None) -> list[int]:
    """The values of t themselves, or `steps` of them, falling, evenly spaced over the part of the schedule that holds signal.

    The paper's schedule is noise from t = 363 on (alpha_bar < 1e-6): a short sampler that visited the rest would waste most of
    its steps, and multiply x by thousands in each. A schedule that never falls so low is spaced over all of it.
    """
    if steps is None or (isinstance(steps, Integral) and steps == schedule.steps):
        return list(range(schedule.steps - 1, -1, -1))
    if isinstance(steps, Sequence):
        whole = bool(steps) and all(isinstance(t, Integral) for t in steps)
        if not whole or any(a <= b for a, b in pairwise(steps)) or not 0 <= steps[-1] <= steps[0] < schedule.steps:
            raise _check.fail("steps", steps, f"falling values of t in 0..{schedule.steps - 1}")
        return [int(t) for t in steps]
    if not isinstance(steps, int):
        raise _check.fail("steps", steps, "a whole number, a list of falling values of t, or None")
    if _check.positive_int("steps", steps) > schedule.steps:
        raise _check.fail("steps", steps, f"at most {schedule.steps}, the schedule's number of steps")
    last = min(int((schedule.alpha_bar >= 1e-6).sum()), schedule.steps - 1)
    if steps > last + 1:
        last = schedule.steps - 1
    spaced = torch.linspace(0, last, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([last])
    return spaced.flip(0).tolist()


@dataclass(frozen=True)
class ddpm:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); no noise in the last step.

    Args:
        variance: "large" (beta_t, the paper's choice) or "small" (that of the posterior).
        steps: fewer than T to skip some, or the falling values of t to visit; None for all.
    """

    variance: str = "large"
    steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.variance not in ("large", "small"):
            raise _check.fail("variance", self.variance, "'large' or 'small'")

    def __call__(self, schedule: Schedule) -> list[Move]:
        times = _times(schedule, self.steps)
        large = self.variance == "large"
        return [
            _move(schedule, t, to, lambda beta, small: beta if large else small)
            for t, to in zip(times, [*times[1:], -1], strict=True)
        ]


@dataclass(frozen=True)
class ddim:
    """Song et al. 2021, eq. 12 and 16: eta = 0 adds no noise, eta = 1 as much as `ddpm("small")`."""

    eta: float = 0.0
    steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.eta, bool) or not isinstance(self.eta, (int, float)) or not 0 <= self.eta <= 1:
            raise _check.fail("eta", self.eta, "a number from 0 to 1")

    def __call__(self, schedule: Schedule) -> list[Move]:
        times = _times(schedule, self.steps)
        return [
            _move(schedule, t, to, lambda beta, small: self.eta**2 * small)
            for t, to in zip(times, [*times[1:], -1], strict=True)
        ]


@dataclass(frozen=True)
class hybrid:
    """DDIM, then ancestral steps for the last `stochastic`, of which the very last adds no noise (the remedy of arXiv
    2605.06831)."""

    stochastic: int = 4
    variance: str = "small"
    steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check.positive_int("stochastic", self.stochastic)

    def __call__(self, schedule: Schedule) -> list[Move]:
        first, last = ddim(steps=self.steps)(schedule), ddpm(self.variance, self.steps)(schedule)
        cut = max(len(first) - self.stochastic, 0)
        return first[:cut] + last[cut:]


@runtime_checkable
class Noise(Protocol):
    """Where a sampler's normal numbers come from."""

    def randn(self, shape: Sequence[int]) -> Tensor: ...


class _Stream:
    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.generator.device).to(self.device)


class _Blocks:
    """Noise for samples [start, stop) of a larger set, in blocks that each have a generator of their own.

    Which numbers a sample gets then depends on the seed and its index alone, not on how the set is cut into chunks or shared
    among processes.
    """

    def __init__(self, seeds: list[int], block: int, start: int, stop: int, total: int, device: torch.device) -> None:
        self.spans = []
        for b in range(start // block, (stop - 1) // block + 1):
            rows = min(block, total - b * block)
            low, high = max(start - b * block, 0), min(stop - b * block, rows)
            self.spans.append((torch.Generator(device).manual_seed(seeds[b]), rows, low, high))
        self.device = device

    def randn(self, shape: Sequence[int]) -> Tensor:
        parts = [torch.randn(rows, *shape[1:], generator=g, device=self.device)[low:high] for g, rows, low, high in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def reverse(
    net: Net,
    schedule: Schedule,
    shape: Sequence[int],
    *,
    sampler: Sampler = ddpm(),
    generator: torch.Generator | Noise,
    x: Tensor | None = None,
    label: Tensor | None = None,
    guidance: float | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Step]:
    """Walks from noise to data, one `Step` per reverse step.

    Args:
        net: predicts eps.
        schedule: the forward process that it was trained on.
        shape: `(n, *shape)` of the states.
        sampler: `ddpm()`, `ddim()`, `hybrid()` or any function from a schedule to a list of `Move`.
        generator: draws the start and the noise; the global generator is not touched.
        x: a start of one's own, float32 `[n, *shape]`, instead of N(0, I).
        label: int64 `[n]`, for a class-conditional network.
        guidance: w of classifier-free guidance, eps(none) + w (eps(label) - eps(none)) (Ho and Salimans 2022, in the form where
            w = 1 is the conditional model and w = 0 the unconditional one). Both call the network once a step, others twice;
            None is 1.
        device: where to run; without one, the network's.

    Raises:
        TinyhallError: at once for bad arguments; in mid-run if the network returns another shape; after the last step if a
            sample is not finite.
    """
    if not isinstance(shape, Sequence) or len(shape) < 2 or any(not isinstance(s, int) or s < 1 for s in shape):
        raise _check.fail("shape", shape, "(n, *shape), each at least 1")
    if guidance is not None and label is None:
        raise _check.TinyhallError("guidance: expected a label beside it, got none")
    if guidance is not None:
        _check.number("guidance", guidance, "a finite number", math.isfinite)
    if label is not None:
        _check.labels("label", label, shape[0])
    place = _device.pick(device if device is not None else where(net))
    label = None if label is None else label.to(place)
    noise = generator if isinstance(generator, Noise) else _Stream(_check.generator("generator", generator), place)
    if x is not None:
        _check.floats("x", x)
        if tuple(x.shape) != tuple(shape):
            raise _check.fail("x", x, f"shape {tuple(shape)}")
    return _walk(net, schedule, tuple(shape), _moves(sampler, schedule), noise, x, label, guidance, place)


def _moves(sampler: Any, schedule: Schedule) -> list[Move]:
    if not callable(sampler) or isinstance(sampler, type):  # ddim instead of ddim()
        raise _check.fail("sampler", sampler, "ddpm(), ddim(), hybrid() or a function from a schedule to a list of Move")
    moves = sampler(schedule)
    if not isinstance(moves, Sequence) or not moves or not all(isinstance(move, Move) for move in moves):
        raise _check.fail("sampler", moves, "a function that returns a list of at least one Move")
    return list(moves)


def _walk(
    net: Net,
    schedule: Schedule,
    shape: tuple[int, ...],
    moves: list[Move],
    noise: Noise,
    start: Tensor | None,
    label: Tensor | None,
    guidance: float | None,
    device: torch.device,
) -> Iterator[Step]:
    _device.keep_freed_memory()
    x = noise.randn(shape) if start is None else start.to(device)
    schedule._hold(x.device)
    for left, move in zip(reversed(range(len(moves))), moves, strict=True):
        # An expanded scalar, not n copies: a network may notice and work its time features out once.
        t = torch.tensor([move.t], device=device).expand(shape[0])
        with torch.no_grad():
            eps = _check.eps(predict(net, x, t, label, guidance), x)
            x0_hat = schedule.predict_x0(x, t[:1], eps)
            x = move.keep * x + move.push * eps
            if move.noise > 0:
                x += move.noise * noise.randn(shape)
        yield Step(move.t, x, x0_hat, eps, schedule.noise_share(move.t), left)
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise _check.TinyhallError(f"samples: expected finite values, got {bad} of {shape[0]} that are not")


def predict(net: Net, x: Tensor, t: Tensor, label: Tensor | None, guidance: float | None) -> Tensor:
    """eps at x `[n, *shape]` and t `[n]` under a label and classifier-free guidance, as `reverse` takes them."""
    if label is None or guidance == 0:
        return net(x, t)
    if guidance is None or guidance == 1:
        return net(x, t, label)
    without = net(x, t)
    return without + guidance * (net(x, t, label) - without)


def where(net: Any) -> torch.device:
    """The device of a network's first parameter; the processor for what has none."""
    if isinstance(net, torch.nn.Module):
        first = next(net.parameters(), None)
        if first is not None:
            return first.device
    return torch.device("cpu")


@dataclass
class Samples:
    """What `sample` returns: the points, and for each metric a score per point, all on the processor."""

    x: Float[Tensor, "n *shape"]
    scores: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)
    label: Int[Tensor, " n"] | None = None  # the classes that were asked for

    def __len__(self) -> int:
        return len(self.x)


def sample(
    net: Net,
    schedule: Schedule,
    n: int,
    *,
    shape: Sequence[int] | None = None,
    metrics: Sequence[Metric] = (),
    batch_size: int | None = None,
    sampler: Sampler = ddpm(),
    generator: torch.Generator,
    label: Tensor | None = None,
    guidance: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Samples:
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
    n = _check.positive_int("n", n)
    _check.generator("generator", generator)
    one = _sample_shape(net, shape)
    numbers = math.prod(one)
    place = _device.pick(device if device is not None else where(net))
    block = max(1, 65_536 // numbers)
    usual = 2**18 if place.type == "cpu" and len(one) > 1 else 2**20
    if batch_size is None:
        # At most a process's share, in whole blocks of noise: else one chunk would hold all, and the others wait.
        batch = max(block, min(usual // numbers, math.ceil(n / _device.processes() / block) * block))
    else:
        batch = _check.positive_int("batch_size", batch_size)
    if label is not None:
        _check.labels("label", label, n)
    if not isinstance(metrics, Sequence):
        raise _check.fail("metrics", metrics, "a list of metrics")
    moves = _moves(sampler, schedule)
    ahead = [(move.t, schedule.noise_share(move.t), len(moves) - 1 - i) for i, move in enumerate(moves)]
    for metric in metrics:
        metric.check(schedule)
        if isinstance(metric, TrajectoryVariance):
            metric.expect(ahead)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise _check.fail("metrics", names, "a different name for each")
    seeds = torch.randint(2**63 - 1, (math.ceil(n / block),), generator=generator, device=generator.device).tolist()

    cuts = [(low, min(low + batch, n)) for low in range(0, n, batch)]
    mine = cuts[_device.rank() :: _device.processes()]
    if progress:
        from tqdm.auto import tqdm

        mine = tqdm(mine, desc="sampling", unit="chunk", leave=False)
    done: list[tuple[int, Tensor, list[Tensor]]] = []
    for low, high in mine:
        for metric in metrics:
            metric.reset()
        noise = _Blocks(seeds, block, low, high, n, place)
        part = None if label is None else label[low:high]
        for step in reverse(
            net, schedule, (high - low, *one), sampler=sampler, generator=noise, label=part, guidance=guidance, device=place
        ):
            for metric in metrics:
                metric.update(step)
        done.append((low, step.x.cpu(), [metric.score().cpu() for metric in metrics]))
    done = sorted(_device.gather_rows(done), key=lambda item: item[0])
    x = torch.cat([item[1] for item in done])
    scores = {metric.name: torch.cat([item[2][i] for item in done]) for i, metric in enumerate(metrics)}
    return Samples(x, scores, None if label is None else label.cpu())


def _sample_shape(net: Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        shape = getattr(net, "shape", None) or ((net.dim,) if isinstance(getattr(net, "dim", None), int) else None)
    if not isinstance(shape, Sequence) or not len(shape) or any(not isinstance(s, int) or s < 1 for s in shape):
        raise _check.fail("shape", shape, "the shape of one sample, such as (2,)")
    return tuple(shape)
