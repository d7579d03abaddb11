"""Many samples of one model by one sampler, judged and scored over many windows, and reduced to what an artifact keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from ..core import device as _device
from ..core._typing import Net, Tensor
from ..core.metrics import spelled
from ..core.sampling import SampleConfig, chunks, coefficients
from ..core.schedule import Schedule
from ..data.images import Images, local_maximum, quantised
from ..data.mixtures import GaussianMixture, Judgement
from ..measure.filtering import detection
from ..measure.stats import fraction_by_kind
from .recorders import Trace, WindowSweep
from .summary import WIDTHS, of_points

# Of points: the paper's last 15 steps in 1D, its 8 (or 9, if t = 8 is in) and 20 in 2D, its code's 10, and others.
WINDOWS = (
    *((0, end) for end in (2, 3, 5, 8, 9, 10, 15, 20, 50, 100, 200)),
    *((10, 20), (20, 60), (60, 100), (100, 200)),
)
TRACE = 60  # last values of t for which an artifact keeps x0_hat of points
EDGES = (0, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 850, 1000)  # windows of images run from one to another
TRACED = (0, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)  # t for which an artifact keeps x0_hat of images
_POINTS = 250_000  # in flight: their traces take 60 MB
_IMAGES, _CACHED = 256, 2**17  # at a time, on a GPU; numbers of as many as a processor's cache holds the network's answers to
_TRACED_POINTS = 300  # hallucinated ones, and as many others
_KEPT = 10_000  # of either kind, whose scores an artifact keeps
_TRACES = 24  # hallucinated images with a trace, and as many others; fewer of images that take more than _TRACED_SIZE together
_TRACED_SIZE = 50_000  # numbers


def visited(windows: Sequence[tuple[int, int]], times: Sequence[int]) -> list[tuple[int, int]]:
    """Those windows in which two of the times lie at least."""
    return [(a, b) for a, b in windows if sum(a <= t < b for t in times) >= 2]


def detected(score: Tensor, bad: Tensor, remove: float) -> dict[str, Any] | None:
    """A detection as JSON, of all that are hallucinated and the first half a million others, beyond which nothing gets surer;
    None where there are fewer than twenty of a kind, which would say nothing."""
    if min(int(bad.sum()), int((~bad).sum())) < 20:
        return None
    rows = bad | ((~bad).cumsum(0) <= 500_000)
    return detection(score[rows], bad[rows], remove)._asdict()


@dataclass
class PointDraw:
    """Points of a model, and what is known of them."""

    mixture: GaussianMixture
    n: int
    x: Tensor  # [n, dim]
    verdict: Judgement
    scores: Tensor  # [n, windows]
    windows: list[tuple[int, int]]
    trace_rows: Tensor  # [m], which samples have a trace: hallucinated ones first
    traces: Tensor  # [m, times, dim], x0_hat, the last step last

    @classmethod
    def make(
        cls, net: Net, mixture: GaussianMixture, schedule: Schedule, n: int, *, generator: torch.Generator, config: SampleConfig
    ) -> PointDraw:
        """Draws and judges n samples in parts, and scores every window on the way."""
        times = [c.t for c in coefficients(config.sampler, schedule)]
        windows = visited([w for w in WINDOWS if w[1] <= schedule.timesteps], times)
        sweep, trace = WindowSweep(windows), Trace([t for t in times if t < TRACE])
        config = replace(config, shape=mixture.shape, batch_size=_POINTS)
        parts: list[tuple[Any, ...]] = []
        for part in chunks(net, schedule, n, metrics=[sweep, trace], generator=generator, config=config):
            x = part.x.cpu()
            verdict = mixture.judge(x)
            bad = (verdict.kind != 0).nonzero()[:_TRACED_POINTS, 0]
            good = (verdict.kind == 0).nonzero()[: _TRACED_POINTS if part.start == 0 else 0, 0]
            traced = [(rows + part.start, trace.of(rows)) for rows in (bad, good)]
            parts.append((part.start, (x, sweep.score().cpu(), *verdict), *traced))
        parts = sorted(_device.gather_rows(parts), key=lambda part: part[0])
        x, scores, *told = (torch.cat(column) for column in zip(*(part[1] for part in parts), strict=True))
        bad_traces, good_traces = (_joined([part[i] for part in parts], _TRACED_POINTS) for i in (2, 3))
        rows, traces = (torch.cat(pair) for pair in zip(bad_traces, good_traces, strict=True))
        return cls(mixture, n, x, Judgement(*told), scores, windows, rows, traces)

    def report(self, remove: float) -> dict[str, Any]:
        """Figures as JSON: fractions at each width, where hallucinations lie, mode widths, and what each window detects at the
        share that is to be removed."""
        out = of_points(self.mixture, self.x, self.verdict) | {"windows": {}}
        for window, score in zip(self.windows, self.scores.T, strict=True):
            found = {f"{w:g}": detected(score, self.verdict.distance > w, remove) for w in WIDTHS}
            out["windows"][spelled(window)] = {rule: entry for rule, entry in found.items() if entry}
        return out

    def tensors(self) -> dict[str, Tensor]:
        """What an artifact keeps: a histogram (1D), the flagged samples and an equal number or more of others, traces."""
        bad = (self.verdict.kind != 0).nonzero()[:, 0][:_KEPT]
        good = (self.verdict.kind == 0).nonzero()[:, 0][:_KEPT]  # samples are exchangeable: the first are as good as any
        rows = torch.cat([bad, good])
        where = {int(r): k for k, r in enumerate(rows)}
        kept = {
            "x": self.x[rows],
            "distance": self.verdict.distance[rows].half(),
            "kind": self.verdict.kind[rows].to(torch.int8),
            "pair": self.verdict.pair[rows].to(torch.int8),
            # Half precision holds a logarithm to 3 digits; the scores themselves span ten decades.
            "log10_scores": self.scores[rows].clamp_min(1e-12).log10().half(),
            "windows": torch.tensor(self.windows),
            "trace_of": torch.tensor([where.get(int(r), -1) for r in self.trace_rows]),
            "traces": self.traces.half(),
        }
        if self.mixture.dim == 1:
            edges = torch.linspace(float(self.mixture.means.min()) - 0.5, float(self.mixture.means.max()) + 0.5, 601)
            kept["edges"] = edges
            kept["counts"] = torch.histc(self.x[:, 0], 600, float(edges[0]), float(edges[-1])).long()
        return kept


def _joined(parts: Sequence[tuple[Tensor, Tensor]], most: int) -> tuple[Tensor, Tensor]:
    rows, traces = (torch.cat(column)[:most] for column in zip(*parts, strict=True))
    return rows, traces


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
        cls, net: Net, data: Images, schedule: Schedule, n: int, *, generator: torch.Generator, config: SampleConfig
    ) -> ImageDraw:
        """Draws and judges n images in parts, and scores every window on the way."""
        times = [c.t for c in coefficients(config.sampler, schedule)]
        edges = [e for e in EDGES if e < schedule.timesteps] + [schedule.timesteps]
        windows = visited(list(combinations(edges, 2)), times)
        trace_t = sorted({min(times, key=lambda at: abs(at - t)) for t in TRACED if t < schedule.timesteps}, reverse=True)
        sweep, trace = WindowSweep(windows), Trace(trace_t)
        most, patch = min(_TRACES, max(_TRACED_SIZE // math.prod(data.shape), 1)), data.shape[-1] // 4
        on_processor = _device.pick(config.device).type == "cpu"
        size = max(_CACHED // math.prod(data.shape), 1) if on_processor else _IMAGES
        config = replace(config, shape=data.shape, batch_size=size)
        parts: list[tuple[Any, ...]] = []
        for part in chunks(net, schedule, n, metrics=[sweep, trace], generator=generator, config=config):
            x = part.x.cpu()
            verdict = data.judge(x)
            variances = (sweep.variance(window) for window in windows)
            both = [(v.flatten(1).mean(1).cpu(), local_maximum(v.float(), patch).cpu()) for v in variances]
            mean, local = (torch.stack(column, 1).float() for column in zip(*both, strict=True))
            kinds = [(verdict.kind != 0) == bad for bad in (True, False)]
            traced = [(rows + part.start, trace.of(rows)) for rows in (kind.nonzero()[:most, 0] for kind in kinds)]
            parts.append((part.start, (x, mean, local, *verdict), *traced, verdict._fields))
        parts = sorted(_device.gather_rows(parts), key=lambda part: part[0])
        x, mean, local, *told = (torch.cat(column) for column in zip(*(part[1] for part in parts), strict=True))
        bad_traces, good_traces = (_joined([part[i] for part in parts], most) for i in (2, 3))
        rows, traces = (torch.cat(pair) for pair in zip(bad_traces, good_traces, strict=True))
        verdicts = dict(zip(parts[0][-1], told, strict=True))  # this process may have drawn none itself
        return cls(data.kinds, x, verdicts, windows, mean, local, rows, torch.tensor(trace_t), traces)

    def report(self, remove: float) -> dict[str, Any]:
        """Figures as JSON: fractions by kind, and what each window detects at the share that is to be removed."""
        kind, windows = self.verdict["kind"], {}
        for i, window in enumerate(self.windows):
            found = {
                name: detected(scores[:, i], kind != 0, remove) for name, scores in (("mean", self.mean), ("local", self.local))
            }
            if any(found.values()):
                windows[spelled(window)] = found
        return {"n": len(kind), "fraction": fraction_by_kind(kind, self.kinds), "windows": windows}

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
