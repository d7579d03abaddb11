"""Scoring a pipeline while it runs, unseen by it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from ..core import _check
from ..core._typing import Tensor
from ..core.metrics import Metric, Step, TrajectoryVariance
from .levels import Reader

NOISE = (0.0, 1 / 3)
"""The window of a `watch` that is given none, in the noise share: the steps whose states hold twice as much signal as noise."""


@contextmanager
def watch(scheduler: Any, *metrics: Metric, doubled: bool | None = None) -> Iterator[Any]:
    """Shows every step of a diffusers scheduler to the metrics, whatever pipeline drives it:

        with th.watch(pipeline.scheduler) as metric:
            images = pipeline(prompt, num_images_per_prompt=8).images
        metric.score()  # [8]

    The images are the same bit for bit with and without. x0_hat is worked out from what the network returned, in closed form
    and in float32, under the scheduler's parametrisation; it is never clipped, also where the scheduler clips or thresholds its
    own. For a pipeline in a latent space it lies there. Each call of `scheduler.step` is a step: a solver of second order
    (Heun, KDPM2) shows two a step. `Step.t` is the network's own t; where that is no count (EDM, consistency models, SVD), it
    is the noise share in thousandths, and a window in t is refused.

    Args:
        scheduler: of a pipeline: `pipeline.scheduler`. Copies that the pipeline makes of it are not watched.
        metrics: start afresh with the block, and score one call of the pipeline. By default one
            `TrajectoryVariance(noise=(0, 1/3))`.
        doubled: whether the rows come twice, as DiT's pipeline holds them under guidance; the first half is then scored. Needed
            only where both halves are equal, which says nothing about why.

    Yields:
        The first metric.

    Raises:
        TinyhallError: at the start, a scheduler in which x_0 has no closed form, or a bad argument; at the first step,
            a window that fewer than two steps of this sampler will fall into, noise that is to rise (RePaint, inversion), or a
            second call of the pipeline in the block.
    """
    if not hasattr(scheduler, "step"):
        inner = hasattr(scheduler, "scheduler")
        raise _check.fail("scheduler", type(scheduler).__name__, "pipeline.scheduler" if inner else "a diffusers scheduler")
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise _check.fail("metrics", metric, "metrics one by one, as in watch(scheduler, metric, other)")
    if len({id(metric) for metric in metrics}) < len(metrics):
        raise _check.fail("metrics", [metric.name for metric in metrics], "each metric once")
    metrics = metrics or (TrajectoryVariance(noise=NOISE),)
    run = _Run(Reader(scheduler), metrics, doubled)
    own, patched = type(scheduler), vars(scheduler).get("step")
    if patched is not None:  # by somebody else, as with torch.compile; it hides the class's
        scheduler.step = _shown(patched, run)
    else:
        scheduler.__class__ = _watched(scheduler, run)
    try:
        yield metrics[0]
    finally:
        if patched is not None:
            scheduler.step = patched
        else:
            scheduler.__class__ = own


def _watched(scheduler: Any, run: _Run) -> type:
    """A subclass of the scheduler's class, under its name, whose steps the run sees.

    Not a function in the instance: pipelines look into the signature of `step` before they pass `generator` or `eta`, and a
    copied instance would go on to move the original.
    """
    own = type(scheduler)

    class Watched(own):  # type: ignore[misc, valid-type]
        step = _shown(own.step, run)

        @functools.wraps(own.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
            run.restart()
            return own.set_timesteps(self, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is of the class itself
            return (_bare, (own,), *super().__reduce_ex__(max(protocol, 2))[2:])

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Watched, name, getattr(own, name))
    return Watched


def _bare(kind: type) -> Any:
    return object.__new__(kind)


def _shown(step: Callable[..., Any], run: _Run) -> Callable[..., Any]:
    """A `scheduler.step`, of the class or the instance, under its own signature, that shows the run what it does."""
    signature = inspect.signature(step)

    @functools.wraps(step)
    def shown(*args: Any, **kwargs: Any) -> Any:
        return run.step(lambda: step(*args, **kwargs), signature.bind(*args, **kwargs).arguments)

    return shown


class _Run:
    """One call of a pipeline."""

    def __init__(self, reader: Reader, metrics: tuple[Metric, ...], doubled: bool | None) -> None:
        self.reader, self.metrics, self.doubled = reader, metrics, doubled
        self.seen, self.again, self.share = 0, False, 1.0
        for metric in metrics:
            metric.reset()

    def restart(self) -> None:
        self.again = self.seen > 0
        self.reader.restart()

    def step(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        """Takes the scheduler's own step, and shows it."""
        said, x, t = given["model_output"], given["sample"], given["timestep"]
        if given.get("per_token_timesteps") is not None:
            raise _check.fail("per_token_timesteps", "a tensor", "one noise level for the whole of a state")
        if said.shape != x.shape:
            if said.shape[1] != 2 * x.shape[1]:
                raise _check.fail("model_output", said, f"the sample's shape {tuple(x.shape)}")
            said = said[:, : x.shape[1]]  # the other half is a variance
        rows = slice(len(x) // 2 if self._twice(said, x) else None)
        i = self.reader.index(t)
        second = self.reader.second()
        level = self.reader.level(t, i, second)
        if not self.seen:
            self._first(i)
        if self.again:
            raise _check.TinyhallError("watch: expected one call of the pipeline in a block, got a second; give each its own")
        if not second:
            self._falls(self.share, level.share)
            self.share = level.share
        x0_hat, eps = self.reader.read(level, said[rows], x[rows])
        out = call()
        reached = out[0] if isinstance(out, tuple) else out.prev_sample
        left = None if i is None else len(self.reader.times) - 1 - i
        shown = Step(self._count(t, level.share), reached[rows], x0_hat, eps, level.share, left)
        self.seen += 1
        for metric in self.metrics:
            metric.update(shown)
        return out

    def _count(self, t: Any, share: float) -> int:
        return int(t) if self.reader.counts else round(1000 * share)

    def _twice(self, said: Tensor, x: Tensor) -> bool:
        half, odd = divmod(len(x), 2)
        if self.doubled is None and half and not odd:
            if torch.equal(x[:half], x[half:]) and torch.equal(said[:half], said[half:]):
                raise _check.fail(
                    "doubled", None, f"True or False where both halves of {len(x)} rows are equal, as under guidance in DiT"
                )
        return bool(self.doubled)

    def _first(self, i: int | None) -> None:
        """Looks ahead over the steps to come."""
        if i is None:
            return
        plan = self.reader.plan(i)
        shares = [level.share for _, level, second in plan if not second]
        for before, after in pairwise(shares):
            self._falls(before, after)
        for metric in self.metrics:
            if not isinstance(metric, TrajectoryVariance):
                continue
            if metric.window is not None and not self.reader.counts:
                raise _check.fail("window", metric.window, f"noise=(a, b) or last=k: the t of {self.reader.name} is no count")
            ahead = [
                (self._count(t, level.share), level.share, left)
                for left, (t, level, _) in zip(reversed(range(len(plan))), plan, strict=True)
            ]
            metric.expect(ahead)

    def _falls(self, before: float, after: float) -> None:
        if after > before + 1e-6:
            raise _check.TinyhallError(
                f"watch: expected noise that falls from step to step, got a share of {after:.3f} after {before:.3f}; runs that "
                "go back up (RePaint, inversion) and second calls in one block have no one score"
            )
