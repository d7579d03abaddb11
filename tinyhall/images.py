"""Images that a model drew: judged, scored over every window of the reverse process, and reduced to what a chapter needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import functional as F

from . import cards, stats
from ._typing import Float, Int, Net, Tensor, UInt8
from .filtering import Filter
from .metrics import TrajectoryVariance
from .sampling import Sampler, reverse
from .schedule import Schedule

EDGES = (0, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 850, 1000)  # windows run from one to another
DENOISED = (5, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700)  # t of the denoising error
TRACED = (0, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)  # t for which an artifact keeps x0_hat
_PART = 256  # images in flight
_TRACES = 24  # hallucinated images with a trace, and as many others; fewer of images that take more than _TRACED_SIZE together
_TRACED_SIZE = 50_000  # numbers


@runtime_checkable
class Images(Protocol):
    """What is asked of a set of images that can tell its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    def judge(self, x: Tensor) -> Any: ...


def quantised(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """-1..1 as 0..255; what lies beyond is cut off."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def restored(x: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 as -1..1, float32."""
    return x.float() / 127.5 - 1


def tally(kind: Int[Tensor, " n"], kinds: Sequence[str]) -> dict[str, stats.Estimate]:
    """The fraction of each kind but the first, "in support", and of "any" of them."""
    counts = torch.bincount(kind, minlength=len(kinds)).tolist()
    return {
        name: stats.fraction(k, len(kind))
        for name, k in zip(("any", *kinds[1:]), (len(kind) - counts[0], *counts[1:]), strict=True)
    }


def windows_of(schedule: Schedule, sampler: Sampler) -> list[tuple[int, int]]:
    """All windows between two of `EDGES` in which the sampler makes two steps at least."""
    visited = [move.t for move in sampler(schedule)]
    edges = [e for e in EDGES if e < schedule.steps] + [schedule.steps]
    return [(a, b) for a, b in combinations(edges, 2) if sum(a <= t < b for t in visited) >= 2]


def local_maximum(variance: Float[Tensor, "n channel height width"], patch: int) -> Float[Tensor, " n"]:
    """The largest mean over any `patch` x `patch` pixels, half a patch apart."""
    return F.avg_pool2d(variance, patch, max(patch // 2, 1)).flatten(1).amax(1)


@dataclass
class ImageDraw:
    """Images of one model by one sampler, and what is known of them. Scores and traces are of the drawing, so they are kept."""

    kinds: tuple[str, ...]
    x: Tensor  # [n, channel, size, size]
    verdict: dict[str, Tensor]  # what the data's judge says, each [n, ...]; "kind" is among them
    windows: list[tuple[int, int]]
    mean: Tensor  # [n, windows], the trajectory variance
    local: Tensor  # [n, windows], its largest mean over a patch
    trace_rows: Tensor  # [m], which images have a trace: of each part hallucinated ones, then others
    trace_t: Tensor  # [k], falling
    traces: Tensor  # [m, k, channel, size, size], x0_hat

    @classmethod
    def make(
        cls, net: Net, data: Images, schedule: Schedule, sampler: Sampler, n: int, seed: int, *, progress: bool = False
    ) -> ImageDraw:
        """Draws n images in parts, each with a generator of its own, and scores every window on the way."""
        visited = [move.t for move in sampler(schedule)]
        trace_t = sorted({min(visited, key=lambda at: abs(at - t)) for t in TRACED if t < schedule.steps}, reverse=True)
        windows = windows_of(schedule, sampler)
        edges = sorted({edge for window in windows for edge in window})
        patch = data.shape[-1] // 4
        parts: list[tuple[Tensor, ...]] = []
        verdicts: list[Any] = []
        traced: list[tuple[Tensor, Tensor]] = []
        most = min(_TRACES, max(_TRACED_SIZE // math.prod(data.shape), 1))
        budget = {True: most, False: most}
        for i, low in enumerate(parts_bar(range(0, n, _PART), progress)):
            size = min(_PART, n - low)
            # Sums over each stretch between two edges; any window is some of these put together.
            stretches = [TrajectoryVariance(pair) for pair in pairwise(edges)]
            recent: list[Tensor] = []
            noise = cards.stream(seed, f"samples/{i}")
            for step in reverse(net, schedule, (size, *data.shape), sampler=sampler, generator=noise):
                for stretch in stretches:
                    stretch.update(step)
                if step.t in trace_t:
                    recent.append(step.x0_hat.cpu())
            mean, local = [], []
            for a, b in windows:
                variance = TrajectoryVariance.joined(
                    [s for s in stretches if a <= s.window[0] and s.window[1] <= b]
                ).per_dimension()
                mean.append(variance.flatten(1).mean(1).cpu())
                local.append(local_maximum(variance, patch).cpu())
            x = step.x.cpu()
            verdict = data.judge(x)
            parts.append((x, torch.stack(mean, 1), torch.stack(local, 1)))
            verdicts.append(verdict._asdict())
            for bad in (True, False):
                rows = ((verdict.kind != 0) == bad).nonzero()[: budget[bad], 0]
                budget[bad] -= len(rows)
                traced.append((rows + low, torch.stack(recent, 1)[rows]))
        x, mean_, local_ = (torch.cat(column) for column in zip(*parts, strict=True))
        rows, traces = (torch.cat(column) for column in zip(*traced, strict=True))
        told = {key: torch.cat([v[key] for v in verdicts]) for key in verdicts[0]}
        return cls(data.kinds, x, told, windows, mean_, local_, rows, torch.tensor(trace_t), traces)

    def report(self) -> dict[str, Any]:
        """Figures as JSON: fractions by kind, and what each window detects, calibrated on one half and read on the other."""
        bad = self.verdict["kind"] != 0
        half = torch.arange(len(bad)) < len(bad) // 2  # parts are independent, so the first half calibrates for the second
        out: dict[str, Any] = {"n": len(bad), "fraction": tally(self.verdict["kind"], self.kinds), "windows": {}}
        if min(int(part.sum()) for part in (bad[half], bad[~half], ~bad[half], ~bad[~half])) < 10:
            return out  # a threshold set by fewer says nothing
        for i, (a, b) in enumerate(self.windows):
            entry = {}
            for name, scores in (("mean", self.mean), ("local", self.local)):
                score = scores[:, i]
                r = Filter.calibrate(score[half], bad[half]).report(score[~half], bad[~half])
                entry[name] = {"removed": r.removed, "kept": r.kept, "auroc": r.auroc}
            out["windows"][f"{a}-{b}"] = entry
        return out

    def tensors(self, keep: int = 10_000, pictures: int | None = None) -> dict[str, Tensor]:
        """What an artifact keeps of the first `keep` images: verdicts, logarithms of scores; and in 8 bits the images and the
        traces, or of the first `pictures` the images alone."""
        rows = self.trace_rows < (keep if pictures is None else 0)
        return {
            "x": quantised(self.x[: keep if pictures is None else min(pictures, keep)]),
            **{k: v[:keep].to(torch.int16) for k, v in self.verdict.items()},
            "windows": torch.tensor(self.windows).reshape(-1, 2),
            "log10_mean": self.mean[:keep].clamp_min(1e-12).log10().half(),
            "log10_local": self.local[:keep].clamp_min(1e-12).log10().half(),
            "trace_of": self.trace_rows[rows],
            "trace_t": self.trace_t,
            "traces": quantised(self.traces[rows]),
        }


def parts_bar(items: Sequence[int], show: bool) -> Any:
    """A progress bar over the parts of a draw."""
    from tqdm.auto import tqdm

    return tqdm(items, desc="drawing", unit="part", disable=not show, leave=False)
