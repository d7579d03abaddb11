"""Detectors of several works under one call: each scores finished samples, higher for what it holds to be hallucinated.

`(seen, setting, generator) -> score [n]`; the setting is tuned on one draw and read on another.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import torch

from ..core._typing import Float, Net, Tensor
from ..core.sampling import Sampler, reverse, watched
from ..core.schedule import Schedule
from ..measure.denoising import PostHocVariance, denoising_error
from .recorders import WindowSweep

# Shares of noise, 1 - alpha_bar, at which detectors are tried: t itself means another thing on another schedule.
LEVELS = (2e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 4e-2, 0.1, 0.2, 0.4, 0.7, 0.95)


def levels(schedule: Schedule, sampler: Sampler) -> list[int]:
    """Of the values of t that a sampler visits, those nearest to `LEVELS`, falling."""
    visited = torch.tensor([c.t for c in sampler(schedule)])
    noise = schedule.noise_variance[visited].log()
    nearest = {int(visited[(noise - torch.tensor(level).log()).abs().argmin()]) for level in LEVELS}
    return sorted(nearest, reverse=True)


def expanded(t: int, x: Tensor) -> Tensor:
    """t as a sampler passes it: one number, for every x."""
    return torch.tensor([t], device=x.device).expand(len(x))


class Seen(NamedTuple):
    """Finished samples, and what was seen of them on the way: all that a detector may look at."""

    net: Net  # as it drew them: with their labels and guidance, if any
    schedule: Schedule
    other: Sampler  # with noise, where the one that drew them has none; and the reverse
    data: Any
    real: Tensor  # `[m, *shape]`, what the network was trained on
    x: Tensor  # `[n, *shape]`
    states: dict[int, Tensor]  # t: the state `[n, *shape]` at which the network was asked
    sweep: WindowSweep  # of the windows that are tried


def trajectory_variance(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """That of Aithal et al. 2024; the setting is its window."""
    return seen.sweep.variance(setting).flatten(1).mean(1).float()


def post_hoc_variance(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """The other form of Aithal et al. 2024, of the finished sample: noised to ten values of t in the window, the setting."""
    return PostHocVariance(setting, _values(setting)).of(seen.net, seen.schedule, seen.x, generator=generator)


def _values(window: tuple[int, int]) -> int:
    """How many values of t the post hoc form takes: the paper's ten, or all there are."""
    return min(10, window[1] - window[0])


def intrinsic_dimension(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How much of the noise at t, the setting, the network cannot tell from the sample (arXiv 2605.05026): near the data, in
    proportion to the number of dimensions in which the sample may move."""
    return denoising_error(seen.net, seen.schedule, seen.x, [setting], generator=generator)[:, 0]


def curvature(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How fast the predicted noise turns along the step that is taken at t, the setting: the probe of RODS (arXiv 2507.12201)
    as we read it, a difference over a tenth of the noise at t."""
    x = seen.states[setting]
    t = expanded(setting, x)
    eps = seen.net(x, t)
    reach = 0.1 * float(seen.schedule.noise_variance[setting].sqrt())
    along = eps / eps.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1)) * x[0].numel() ** 0.5
    return ((seen.net(x - reach * along, t) - eps) / reach).flatten(1).square().mean(1)


def ends_apart(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How far from the sample the *other* kind of sampler ends, from the state at t, the setting: the one without noise where
    the sampler has noise, and the reverse (after arXiv 2605.06831)."""
    steps = [c for c in seen.other(seen.schedule) if c.t <= setting]
    start = seen.states[setting]
    on = reverse(
        seen.net, seen.schedule, tuple(start.shape), sampler=lambda _: steps, generator=generator, x=start, device=start.device
    )
    return (watched(on).x - seen.x).flatten(1).square().mean(1)


def negative_log_density(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """A baseline with the answer in hand: minus the logarithm of the data's exact density."""
    return -seen.data.log_density(seen.x.cpu())


def nearest_train_distance(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """A baseline without a network: the distance to the nearest training sample."""
    real, x = seen.real.flatten(1), seen.x.cpu().flatten(1)
    # Through a matrix product squares cancel, and points near each other read 0; images, which are far apart, need its speed.
    mode = "donot_use_mm_for_euclid_dist" if seen.x.ndim == 2 else "use_mm_for_euclid_dist_if_necessary"
    return torch.cat([torch.cdist(part, real, compute_mode=mode).amin(1) for part in x.split(500)])


class Detector(NamedTuple):
    """A detector, and what it may be set to."""

    score: Callable[[Seen, Any, torch.Generator], Tensor]
    source: str
    settings: Callable[[list[int], list[int]], list[Any]]  # of those values of t that are `levels`, and of all that are visited
    calls: Callable[[Any, list[int]], int]  # of the network, under a setting, where those values of t are visited
    fits: Callable[[Any], bool] = lambda data: True


def _windows(levels: list[int], visited: list[int]) -> list[Any]:
    return [(a, b) for a, b in combinations(sorted({0, *levels}), 2) if sum(a <= t < b for t in visited) >= 2]


def _spans(levels: list[int], visited: list[int]) -> list[Any]:
    """Windows over one stretch between levels or two: the post hoc form pays for each that is tried."""
    ends = sorted({0, *levels})
    return [(a, b) for i, a in enumerate(ends) for b in ends[i + 1 : i + 3] if b - a >= 2]


def _levels(levels: list[int], visited: list[int]) -> list[Any]:
    return levels


def _none(levels: list[int], visited: list[int]) -> list[Any]:
    return [None]


DETECTORS: dict[str, Detector] = {
    "trajectory variance": Detector(trajectory_variance, "arXiv 2406.09358", _windows, lambda s, visited: 0),
    "post hoc variance": Detector(post_hoc_variance, "arXiv 2406.09358", _spans, lambda s, visited: _values(s)),
    "intrinsic dimension": Detector(intrinsic_dimension, "arXiv 2605.05026", _levels, lambda s, visited: 4),
    "curvature": Detector(curvature, "arXiv 2507.12201", _levels, lambda s, visited: 2),
    "ends apart": Detector(ends_apart, "arXiv 2605.06831", _levels, lambda s, visited: sum(t <= s for t in visited)),
    "exact density": Detector(
        negative_log_density, "baseline", _none, lambda s, visited: 0, lambda data: hasattr(data, "log_density")
    ),
    "nearest training sample": Detector(nearest_train_distance, "baseline", _none, lambda s, visited: 0),
}
