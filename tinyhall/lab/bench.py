"""The bench: detectors and mitigations of several works on one footing, judged by data that knows its own. Each has settings,
tuned on one draw of a model's samples and measured on another."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core import _check
from ..core import device as _device
from ..core._typing import Bool, Net, Tensor
from ..core.metrics import spelled
from ..core.network import conditioned
from ..core.noise import stream
from ..core.sampling import Sampler, reverse, watched
from ..data.mixtures import GaussianMixture
from ..measure import stats
from ..measure.density import Tabulated
from ..measure.filtering import Filter
from ..measure.quality import coverage
from ..notebook import locate
from ..store.files import once, read_json, write_json
from . import experiments
from .artifact import Artifact, load
from .detectors import DETECTORS, Seen, levels
from .mitigations import Mitigation, mitigations
from .provenance import describe_device, revision
from .recorders import StatesAt, WindowSweep

COMPARED = 4_000  # samples whose coverage is measured, which takes the square of their number


@dataclass(frozen=True)
class Task:
    """A stored model, the sampler that is to be cured, and how many samples tune and how many measure."""

    experiment: str
    tune: int
    measure: int
    noiseless: bool = False  # DDIM draws the samples: do detectors work without noise?


TASKS: dict[str, Task] = {
    "1D": Task("line123", 60_000, 200_000),
    "square": Task("grid", 10_000, 30_000),
    "diamond": Task("diamond", 10_000, 30_000),
    "tight square": Task("grid-tight", 10_000, 30_000),
    "Simple Shapes": Task("shapes", 500, 1_500),
    "hands": Task("hands", 200, 400),
    "MNIST": Task("mnist", 500, 1_500),
    "square, without noise": Task("grid", 10_000, 30_000, noiseless=True),
    "tight square, without noise": Task("grid-tight", 10_000, 30_000, noiseless=True),
    "Simple Shapes, without noise": Task("shapes", 500, 1_500, noiseless=True),
}


def task(name: str) -> Task:
    """Raises TinyhallError for an unknown one."""
    if name not in TASKS:
        raise _check.fail("tasks", name, f"one of {', '.join(TASKS)}")
    return TASKS[name]


class Model:
    """A stored network, and what the bench needs beside it."""

    def __init__(self, made: Artifact, device: torch.device, within: float = 6.0) -> None:
        self.within = within
        self.experiment, self.device, self.seed = made.experiment, device, made.info["seed"]
        self.data, self.schedule = made.experiment.data(), made.experiment.schedule()
        net: Net = made.net.to(device)
        self.net = Tabulated(net, self.schedule.timesteps, device=device) if self.data.shape == (1,) else net
        self.real = made.experiment.real_data(self.seed)[0]

    def bad(self, x: Tensor) -> Bool[Tensor, " n"]:
        """Which samples are hallucinated: of points, those beyond `within` std of every mode."""
        if isinstance(self.data, GaussianMixture):
            return ~self.data.in_support(x, self.within)
        return ~self.data.in_support(x)

    def labelled(self, n: int, generator: torch.Generator) -> Net:
        """The network; a conditional one with n labels of its own and the experiment's guidance."""
        guidance = self.experiment.guidance
        if guidance is None:
            return self.net
        label = torch.randint(10, (n,), generator=generator, device=generator.device).to(self.device)
        eps_at = conditioned(self.net, label, guidance)
        return lambda x, t, _=None: eps_at(x, t)


class Drawn(NamedTuple):
    """Samples of one sampler, and each detector's scores under each of its settings."""

    x: Tensor  # `[n, *shape]`
    bad: Bool[Tensor, " n"]
    scores: dict[str, dict[Any, Tensor]]


def spelling(setting: Any) -> Any:
    """A detector's setting as its result has it: a window as everywhere, and what else JSON gives back. The text of it is its
    key in `tried`. Older results have a window as a list, and as the text of a tuple."""
    if isinstance(setting, str) and setting.startswith("("):
        setting = [int(end) for end in setting[1:-1].split(",")]
    return spelled(setting) if isinstance(setting, tuple | list) else setting


def draw(
    model: Model, sampler: Sampler, n: int, purpose: str, *, steer: Callable[[Net], Net] | None = None,
    detect: dict[str, list[Any]] | None = None, other: Sampler | None = None, progress: bool = False,
) -> Drawn:  # fmt: skip
    """n samples in parts, judged, and scored by the settings of `detect`."""
    generator = stream(model.seed, f"bench/{purpose}", model.device)
    # Each detector has noise of its own: its row is the same, whichever others are asked.
    probes = {name: stream(model.seed, f"bench/{purpose}/probes/{name}", model.device) for name in detect or {}}
    at = levels(model.schedule, sampler)
    sweep, states = WindowSweep(list(pairwise(sorted({0, *at})))), StatesAt(at)
    parts: list[Tensor] = []
    scores: dict[str, dict[Any, list[Tensor]]] = {name: {s: [] for s in settings} for name, settings in (detect or {}).items()}
    part = 50_000 if len(model.data.shape) == 1 else 125
    for low in _device.bar(range(0, n, part), "drawing", "part", progress):
        size = min(part, n - low)
        net = model.labelled(size, generator)
        steps = reverse(
            net if steer is None else steer(net), model.schedule, (size, *model.data.shape), sampler=sampler,
            generator=generator, device=model.device,
        )  # fmt: skip
        x = watched(steps, [sweep, states] if detect else []).x
        parts.append(x.cpu())
        if detect:
            assert other is not None
            seen = Seen(net, model.schedule, other, model.data, model.real, x, states.states, sweep)
            with torch.no_grad():
                for name, settings in detect.items():
                    for setting in settings:
                        scores[name][setting].append(DETECTORS[name].score(seen, setting, probes[name]).cpu())
    x = torch.cat(parts)
    joined = {name: {s: torch.cat(v).float() for s, v in by.items()} for name, by in scores.items()}
    return Drawn(x, model.bad(x), joined)


def quality(model: Model, x: Tensor, reference: Tensor, floor: float = 1.0) -> dict[str, float]:
    """Variety and likeness: coverage of real samples, and the sliced Wasserstein distance to them over `floor`."""
    a, b = model.experiment.features(reference[:COMPARED]), model.experiment.features(x[:COMPARED])
    m = min(len(a), len(b))
    return {
        "coverage": coverage(a[:m], b[:m]).coverage,
        "distance": stats.sliced_wasserstein(a[:m], b[:m]) / floor,
    }


def run(
    name: str, scale: str | None = None, seed: int = 0, *, root: str | Path = "artifacts", device: str | None = None,
    progress: bool = True, only: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Tunes and measures all detectors and cures on one task, and writes `bench-<scale>/seed<seed>/<task>.json` under root.

    Args:
        only: detectors whose rows join the result that is there, which then needs no cure drawn again.

    Raises:
        TinyhallError: an unknown task or detector, no artifact of its experiment, or a row for a result that is not there or
            has another share of hallucinated samples.
    """
    what, place, began = task(name), _device.pick(device), time.perf_counter()
    scale = experiments.get(what.experiment, scale).scale
    for key in only:
        if key not in DETECTORS:
            raise _check.fail("only", key, f"one of {', '.join(DETECTORS)}")
    stored = results(scale, seed, root).get(name) if only else None
    if only and stored is None:
        raise _check.TinyhallError(f"only: expected a stored result of {name}, got none")
    model = Model(load(what.experiment, scale, seed, root), place, stored["within"] if stored else 6.0)
    tune, measure = (k if scale != "smoke" else min(k, 400) for k in (what.tune, what.measure))
    sampler, other = (model.experiment.sampler(noiseless) for noiseless in (what.noiseless, not what.noiseless))
    visited = [c.t for c in sampler(model.schedule)]
    at = [t for t in levels(model.schedule, sampler) if t < visited[0]]  # the start is no state that a sampler has made
    settings = {key: detector.settings(at, visited) for key, detector in DETECTORS.items() if detector.fits(model.data)}
    settings = {key: each for key, each in settings.items() if not only or key in only}
    tuned = draw(model, sampler, tune, "tune", detect=settings, other=other, progress=progress)
    bad = int(tuned.bad.sum())
    if not 0 < bad < tune:
        raise _check.TinyhallError(f"task: expected a model whose samples are of both kinds, got {bad} of {tune} hallucinated")
    areas = {key: {s: stats.auroc(score, tuned.bad).value for s, score in by.items()} for key, by in tuned.scores.items()}
    best = {key: max(by, key=by.__getitem__) for key, by in areas.items()}
    one = {key: [setting] for key, setting in best.items()}
    held = draw(model, sampler, measure, "measure", detect=one, other=other, progress=progress)

    some, more = (model.data.sample(min(COMPARED, measure), stream(seed, f"bench/{k}")) for k in ("some", "more"))
    real = quality(model, more, some)
    passes = 1 if model.experiment.guidance in (None, 0, 1) else 2  # of the network at each step
    calls = len(visited) * passes

    def figures(x: Tensor, bad: Tensor, calls: float) -> dict[str, Any]:
        return {"fraction": stats.fraction(int(bad.sum()), len(bad)), "calls": calls} | quality(
            model, x, some, real["distance"]
        )

    def detected(key: str) -> dict[str, Any]:
        setting, extra = best[key], DETECTORS[key].calls(best[key], visited) * passes
        rule = Filter.calibrate(tuned.scores[key][setting], tuned.bad)
        score = held.scores[key][setting]
        keep = rule.keep(score)
        left = int(keep.sum())
        # A sample that passes costs also those that do not.
        filtered = figures(held.x[keep], held.bad[keep], (calls + extra) * measure / left) if left > 10 else None
        tried = {str(spelling(s)): area for s, area in areas[key].items()}
        return {"setting": spelling(setting), "calls": extra, "tried": tried, "filtered": filtered} | rule.report(
            score, held.bad
        )._asdict()

    def cured(by: dict[str, Mitigation]) -> dict[str, Any]:
        tried = {}
        for setting, cure in by.items():
            each = draw(model, cure.sampler, tune, "tune", steer=cure.steer, progress=progress)
            tried[setting] = figures(each.x, each.bad, cure.extra)
        setting = _choose(tried, figures(tuned.x, tuned.bad, 0)["coverage"])
        cure = by[setting]
        each = draw(model, cure.sampler, measure, "measure", steer=cure.steer, progress=progress)
        cost = (len(cure.sampler(model.schedule)) + cure.extra) * passes
        return {"setting": setting, "tried": tried} | figures(each.x, each.bad, cost)

    if stored is not None:
        own, then = stats.fraction(int(held.bad.sum()), measure), stats.Estimate(*stored["before"]["fraction"])
        if own.low > then.high or own.high < then.low:
            raise _check.TinyhallError(f"only: expected the {then:.2%} hallucinated of the stored {name}, got {own:.2%}")
        rows = {key: detected(key) for key in best}
        made = {"revision": revision(), "torch": torch.__version__, "seconds": round(time.perf_counter() - began, 1)}
        made |= {"fraction": own}  # of its own draw: bits differ between machines and versions
        added = stored.get("added", {}) | dict.fromkeys(rows, made)
        result = stored | {"detectors": stored["detectors"] | rows, "added": added}
        once(write_json, _file(root, scale, seed, name), result)
        return result

    cures = {}
    if not what.noiseless:
        generator = functools.partial(stream, seed, device=place)
        cures = mitigations(model.experiment, model.data, best["intrinsic dimension"], generator, place)
    result = {
        "card": model.experiment.name, "hash": model.experiment.drawing_hash, "scale": scale, "seed": seed,
        "n": [tune, measure], "within": model.within,
        "before": figures(held.x, held.bad, calls), "real": real,
        "detectors": {key: detected(key) for key in best}, "cures": {key: cured(by) for key, by in cures.items()},
        "device": describe_device(place), "revision": revision(), "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    once(write_json, _file(root, scale, seed, name), result)
    return result


def _choose(tried: dict[str, dict[str, Any]], before: float) -> str:
    """The setting with the fewest hallucinated of those that keep 95% of the coverage; where none does, that of the largest."""
    keeps = [s for s in tried if tried[s]["coverage"] >= 0.95 * before]
    return min(keeps, key=lambda s: tried[s]["fraction"][0]) if keeps else max(tried, key=lambda s: tried[s]["coverage"])


def _file(root: str | Path, scale: str, seed: int, task: str) -> Path:
    return Path(root) / f"bench-{scale}" / f"seed{seed}" / f"{task.replace(', ', '-').replace(' ', '-')}.json"


def results(scale: str = "paper", seed: int = 0, root: str | Path = "artifacts") -> dict[str, dict[str, Any]]:
    """What `run` has written, by task, in the order of `TASKS`.

    Raises:
        TinyhallError: nothing there, or a result of a model that its experiment no longer stands by.
    """
    root = locate(root)
    found = {name: read_json(_file(root, scale, seed, name)) for name in TASKS if _file(root, scale, seed, name).is_file()}
    if not found:
        raise _check.TinyhallError(
            f"bench: expected results at {scale} scale, seed {seed}, under {root}, got none; make them with "
            f"`python -m tinyhall bench --scale {scale} --seed {seed} --root {root}`"
        )
    for name, result in found.items():
        hash_ = experiments.get(TASKS[name].experiment, scale).drawing_hash
        if result.get("hash") != hash_:
            raise _check.TinyhallError(
                f"bench: expected a result of experiment {hash_} for {name}, got one of {result.get('hash')}"
            )
        result.setdefault("within", 5.0)  # the rule for points of the first results, which do not name it
        for told in result["detectors"].values():
            told["setting"], told["tried"] = spelling(told["setting"]), {spelling(s): a for s, a in told["tried"].items()}
    return found


def table(found: dict[str, dict[str, Any]]) -> Sequence[str]:
    """The results as lines of text, for the command line."""
    lines = []
    for name, result in found.items():
        before = stats.Estimate(*result["before"]["fraction"])
        lines.append(f"{name}: {before:.2%} hallucinated of {result['n'][1]:,}; {result['before']['calls']} calls a sample")
        for key, d in ((key, result["detectors"][key]) for key in DETECTORS if key in result["detectors"]):
            auroc, removed, kept = (stats.Estimate(*d[k]) for k in ("auroc", "removed", "kept"))
            lines.append(f"  {key:26} AUROC {auroc:.3f}; removed {removed.value:.1%}, kept {kept.value:.1%}; {d['setting']}")
        for key, c in result["cures"].items():
            after = stats.Estimate(*c["fraction"])
            lines.append(
                f"  {key:26} {after:.2%}; coverage {c['coverage']:.2f} of {result['real']['coverage']:.2f}, distance "
                f"{c['distance']:.1f} x the least; {c['calls']} calls; {c['setting'] or '-'}"
            )
    return lines
