"""The bench: detectors and cures of several works on one footing, judged by data that knows its own.

A detector scores finished samples, higher for what it holds to be hallucinated; a cure samples otherwise. Each has settings,
tuned on one draw of a model's samples and measured on another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _check, cards, stats
from . import device as _device
from ._typing import Bool, Float, Net, Tensor
from .artifacts import read_json, write_json
from .cards import Card, Dataset, DigitsCard, ImageCard
from .datasets import MNIST, GaussianMixture
from .experiments import Artifact, describe_device, load, revision
from .filtering import Filter
from .images import parts_bar
from .metrics import TrajectoryVariance, denoising_error
from .nets import Tabulated
from .notebook import locate
from .quality import coverage
from .sampling import Sampler, ddim, ddpm, hybrid, predict, quadratic, reverse
from .schedule import Schedule

# Shares of noise, 1 - alpha_bar, at which detectors are tried: t itself means another thing on another schedule.
LEVELS = (2e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 4e-2, 0.1, 0.2, 0.4, 0.7, 0.95)
COMPARED = 4_000  # samples whose coverage is measured, which takes the square of their number


class Seen(NamedTuple):
    """Finished samples, and what was seen of them on the way: all that a detector may look at."""

    net: Net  # as it drew them: with their labels and guidance, if any
    schedule: Schedule
    other: Sampler  # with noise, where the one that drew them has none; and the reverse
    data: Dataset
    real: Tensor  # `[m, *shape]`, what the network was trained on
    x: Tensor  # `[n, *shape]`
    states: dict[int, Tensor]  # t: the state `[n, *shape]` at which the network was asked
    stretches: list[TrajectoryVariance]  # over windows that adjoin


# Detectors, all under one call: (seen, setting, generator) -> score [n]


def trajectory_variance(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """That of Aithal et al. 2024; the setting is its window."""
    a, b = setting
    return TrajectoryVariance.joined([s for s in seen.stretches if a <= s.window[0] and s.window[1] <= b]).score()


def intrinsic_dimension(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How much of the noise at t, the setting, the network cannot tell from the sample (arXiv 2605.05026): near the data, in
    proportion to the number of dimensions in which the sample may move."""
    return denoising_error(seen.net, seen.schedule, seen.x, [setting], generator=generator)[:, 0]


def curvature(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How fast the predicted noise turns along the step that is taken at t, the setting: the probe of RODS (arXiv 2507.12201)
    as we read it, a difference over a tenth of the noise at t."""
    x = seen.states[setting]
    t = _expanded(setting, x)
    eps = seen.net(x, t)
    reach = 0.1 * float(seen.schedule._one_minus_alpha_bar[setting].sqrt())
    along = eps / eps.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1)) * x[0].numel() ** 0.5
    return ((seen.net(x - reach * along, t) - eps) / reach).flatten(1).square().mean(1)


def ends_apart(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """How far from the sample the *other* kind of sampler ends, from the state at t, the setting: the one without noise where
    the sampler has noise, and the reverse (after arXiv 2605.06831)."""
    moves = [move for move in seen.other(seen.schedule) if move.t <= setting]
    start = seen.states[setting]
    for step in reverse(  # noqa: B007 (the last one is used)
        seen.net, seen.schedule, tuple(start.shape), sampler=lambda _: moves, generator=generator, x=start, device=start.device
    ):
        pass
    return (step.x - seen.x).flatten(1).square().mean(1)


def unlikely(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
    """A baseline with the answer in hand: minus the logarithm of the data's exact density."""
    assert isinstance(seen.data, GaussianMixture)
    return -seen.data.log_density(seen.x.cpu())


def unseen(seen: Seen, setting: Any, generator: torch.Generator) -> Float[Tensor, " n"]:
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


def _windows(levels: list[int], visited: list[int]) -> list[Any]:
    return [(a, b) for a, b in combinations(sorted({0, *levels}), 2) if sum(a <= t < b for t in visited) >= 2]


def _levels(levels: list[int], visited: list[int]) -> list[Any]:
    return levels


def _none(levels: list[int], visited: list[int]) -> list[Any]:
    return [None]


DETECTORS: dict[str, Detector] = {
    "trajectory variance": Detector(trajectory_variance, "arXiv 2406.09358", _windows, lambda s, visited: 0),
    "intrinsic dimension": Detector(intrinsic_dimension, "arXiv 2605.05026", _levels, lambda s, visited: 4),
    "curvature": Detector(curvature, "arXiv 2507.12201", _levels, lambda s, visited: 2),
    "ends apart": Detector(ends_apart, "arXiv 2605.06831", _levels, lambda s, visited: sum(t <= s for t in visited)),
    "exact density": Detector(unlikely, "baseline", _none, lambda s, visited: 0),
    "nearest training sample": Detector(unseen, "baseline", _none, lambda s, visited: 0),
}


# Cures: another sampler, or a network that answers otherwise


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
            near = _expanded(at, x)
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
        return eps - strength * float(schedule._one_minus_alpha_bar[int(t[0])].sqrt()) * slope

    return steered


def _log_classes(model: Model) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Of a mixture the exact posterior of its modes; of digits the classifier's of x0_hat, from where half of x_t is signal."""
    data, schedule = model.data, model.schedule
    if isinstance(data, GaussianMixture):
        return lambda x, t, eps: data.log_modes(schedule, x, t[:1])
    if not isinstance(data, MNIST):
        return None
    half = int((schedule.alpha_bar >= 0.5).sum())
    classifier = copy.deepcopy(data.classifier).to(model.device)  # a copy: the data judge on the processor

    def digits(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        logits = classifier(schedule.predict_x0(x, t[:1], eps)).log_softmax(1)
        return logits if int(t[0]) < half else 0 * logits

    return digits


class Cure(NamedTuple):
    """A way to sample, under one of its settings."""

    steer: Callable[[Net], Net]
    sampler: Sampler
    extra: int = 0  # calls of the network, beside the one (or with guidance two) of each step


# The bench itself


@dataclass(frozen=True)
class Task:
    """A stored model, the sampler that is to be cured, and how many samples tune and how many measure."""

    card: str
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

    def __init__(self, made: Artifact, device: torch.device) -> None:
        card, seed = made.card, made.info["seed"]
        self.card, self.data, self.schedule, self.device = card, card.data(), card.schedule(), device
        net: Net = made.net.to(device)
        self.net = Tabulated(net, self.schedule.steps, device=device) if self.data.shape == (1,) else net
        self.steps = card.respace if isinstance(card, ImageCard) else None
        self.guidance = card.guidance if isinstance(card, DigitsCard) else None
        self.real = self.data.sample(card.n, cards.stream(seed, "data"))
        # Points and shapes are compared as they are, digits by what the classifier sees in them.
        self.features: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)
        if isinstance(self.data, MNIST):
            classifier = self.data.classifier
            self.features = lambda x: classifier.read(x).features

    def sampler(self, noiseless: bool) -> Sampler:
        """The one that the paper takes: DDPM, for points with the large variance; or DDIM with as many steps."""
        return ddim(steps=self.steps) if noiseless else ddpm("small", self.steps) if self.steps else ddpm("large")

    def cures(self, at: int, seed: int) -> dict[str, dict[str, Cure]]:
        """By name and setting. `at` is the t at which the intrinsic dimension was found to tell most."""

        def plain(net: Net) -> Net:
            return net

        out: dict[str, dict[str, Cure]] = {
            "DDIM": {"": Cure(plain, ddim(steps=self.steps))},
            "DDIM, then noise": {f"{k} steps": Cure(plain, hybrid(k, "small", self.steps)) for k in (2, 4, 8)},
            "eta": {f"{eta:g}": Cure(plain, ddim(eta, self.steps)) for eta in (0.25, 0.5, 0.75)},
        }
        if not self.steps:  # images are drawn with the small variance to begin with
            out["fixed-small variance"] = {"": Cure(plain, ddpm("small"))}
        if not self.steps and self.schedule.steps >= 1000:
            times = quadratic(self.schedule, 50)
            out["DDIM, 50 quadratic steps"] = {"": Cure(plain, ddim(steps=times))}
            out["the same, then noise"] = {f"{k} steps": Cure(plain, hybrid(k, "small", times)) for k in (2, 4, 8)}
        base = self.sampler(False)
        below = int((self.schedule.alpha_bar >= 0.9).sum())
        late = sum(move.t < below for move in base(self.schedule))

        def quench(strength: float) -> Callable[[Net], Net]:
            g = cards.stream(seed, f"bench/quench/{strength}", self.device)
            return lambda net: quenched(net, self.schedule, at=at, below=below, strength=strength, generator=g)

        out["intrinsic quenching"] = {f"{s:g}": Cure(quench(s), base, 3 * late) for s in (0.03, 0.1, 0.3, 1.0)}
        classes = _log_classes(self)
        if classes is not None:
            known = classes  # for the closure below: not None

            def guide(strength: float) -> Callable[[Net], Net]:
                return lambda net: guided(net, self.schedule, known, strength=strength)

            out["dynamic guidance"] = {f"{s:g}": Cure(guide(s), base) for s in (0.25, 0.5, 1.0, 2.0)}
        return out


def _expanded(t: int, x: Tensor) -> Tensor:
    return torch.tensor([t], device=x.device).expand(len(x))


def levels(schedule: Schedule, sampler: Sampler) -> list[int]:
    """Of the values of t that a sampler visits, those nearest to `LEVELS`, falling."""
    visited = torch.tensor([move.t for move in sampler(schedule)])
    noise = schedule._one_minus_alpha_bar[visited].log()
    nearest = {int(visited[(noise - torch.tensor(level).log()).abs().argmin()]) for level in LEVELS}
    return sorted(nearest, reverse=True)


class Drawn(NamedTuple):
    """Samples of one sampler, and each detector's scores under each of its settings."""

    x: Tensor  # `[n, *shape]`
    bad: Bool[Tensor, " n"]
    scores: dict[str, dict[Any, Tensor]]


def draw(
    model: Model, sampler: Sampler, n: int, seed: int, purpose: str, *, steer: Callable[[Net], Net] | None = None,
    detect: dict[str, list[Any]] | None = None, other: Sampler | None = None, progress: bool = False,
) -> Drawn:  # fmt: skip
    """n samples in parts, judged, and scored by the settings of `detect`."""
    generator = cards.stream(seed, f"bench/{purpose}", model.device)
    probes = cards.stream(seed, f"bench/{purpose}/probes", model.device)
    at = levels(model.schedule, sampler)
    edges = sorted({0, *at})
    parts: list[Tensor] = []
    scores: dict[str, dict[Any, list[Tensor]]] = {name: {s: [] for s in settings} for name, settings in (detect or {}).items()}
    for low in parts_bar(range(0, n, part := 50_000 if len(model.data.shape) == 1 else 125), progress):
        size = min(part, n - low)
        net = labelled(model, size, generator)
        stretches = [TrajectoryVariance((a, b)) for a, b in pairwise(edges)] if detect else []
        states: dict[int, Tensor] = {}
        before: Tensor | None = None
        for step in reverse(
            net if steer is None else steer(net), model.schedule, (size, *model.data.shape), sampler=sampler,
            generator=generator, device=model.device,
        ):  # fmt: skip
            for stretch in stretches:
                stretch.update(step)
            if detect and before is not None and step.t in at:
                states[step.t] = before
            before = step.x
        parts.append(step.x.cpu())
        if detect:
            assert other is not None
            seen = Seen(net, model.schedule, other, model.data, model.real, step.x, states, stretches)
            with torch.no_grad():
                for name, settings in detect.items():
                    for setting in settings:
                        scores[name][setting].append(DETECTORS[name].score(seen, setting, probes).cpu())
    x = torch.cat(parts)
    joined = {name: {s: torch.cat(v).float() for s, v in by.items()} for name, by in scores.items()}
    return Drawn(x, ~model.data.in_support(x), joined)


def labelled(model: Model, n: int, generator: torch.Generator) -> Net:
    """The network; a conditional one with n labels of its own and the card's guidance, under the call of one without."""
    if model.guidance is None:
        return model.net
    label = torch.randint(10, (n,), generator=generator, device=generator.device).to(model.device)
    return lambda x, t, _=None: predict(model.net, x, t, label, model.guidance)


def quality(model: Model, x: Tensor, reference: Tensor, floor: float = 1.0) -> dict[str, float]:
    """Variety and likeness: coverage of real samples, and the sliced Wasserstein distance to them over `floor`."""
    a, b = model.features(reference[:COMPARED]), model.features(x[:COMPARED])
    m = min(len(a), len(b))
    return {
        "coverage": coverage(a[:m], b[:m]).coverage,
        "distance": stats.sliced_wasserstein(a[:m], b[:m]) / floor,
    }


def run(
    name: str, scale: str | None = None, seed: int = 0, *, root: str | Path = "artifacts", device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Tunes and measures all detectors and cures on one task, and writes `bench-<scale>/seed<seed>/<task>.json` under root.

    Raises:
        TinyhallError: an unknown task, or no artifact of its card.
    """
    what, place, began = task(name), _device.pick(device), time.perf_counter()
    scale = cards.get(what.card, scale).scale
    model = Model(load(what.card, scale, seed, root), place)
    tune, measure = (k if scale != "smoke" else min(k, 400) for k in (what.tune, what.measure))
    sampler, other = model.sampler(what.noiseless), model.sampler(not what.noiseless)
    visited = [move.t for move in sampler(model.schedule)]
    at = [t for t in levels(model.schedule, sampler) if t < visited[0]]  # the start is no state that a sampler has made
    settings = {
        key: detector.settings(at, visited)
        for key, detector in DETECTORS.items()
        if key != "exact density" or isinstance(model.data, GaussianMixture)
    }
    tuned = draw(model, sampler, tune, seed, "tune", detect=settings, other=other, progress=progress)
    bad = int(tuned.bad.sum())
    if not 0 < bad < tune:
        raise _check.TinyhallError(f"task: expected a model whose samples are of both kinds, got {bad} of {tune} hallucinated")
    areas = {key: {s: stats.auroc(score, tuned.bad).value for s, score in by.items()} for key, by in tuned.scores.items()}
    best = {key: max(by, key=by.__getitem__) for key, by in areas.items()}
    one = {key: [setting] for key, setting in best.items()}
    held = draw(model, sampler, measure, seed, "measure", detect=one, other=other, progress=progress)

    some, more = (model.data.sample(min(COMPARED, measure), cards.stream(seed, f"bench/{k}")) for k in ("some", "more"))
    real = quality(model, more, some)
    passes = 1 if model.guidance in (None, 0, 1) else 2  # of the network at each step
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
        tried = {str(s): area for s, area in areas[key].items()}
        return {"setting": setting, "calls": extra, "tried": tried, "filtered": filtered} | rule.report(
            score, held.bad
        )._asdict()

    def cured(by: dict[str, Cure]) -> dict[str, Any]:
        tried = {}
        for setting, cure in by.items():
            each = draw(model, cure.sampler, tune, seed, "tune", steer=cure.steer, progress=progress)
            tried[setting] = figures(each.x, each.bad, cure.extra)
        setting = _choose(tried, figures(tuned.x, tuned.bad, 0)["coverage"])
        cure = by[setting]
        each = draw(model, cure.sampler, measure, seed, "measure", steer=cure.steer, progress=progress)
        cost = (len(cure.sampler(model.schedule)) + cure.extra) * passes
        return {"setting": setting, "tried": tried} | figures(each.x, each.bad, cost)

    cures = {} if what.noiseless else model.cures(best["intrinsic dimension"], seed)
    result = {
        "card": model.card.name, "hash": _stands_by(model.card), "scale": scale, "seed": seed, "n": [tune, measure],
        "before": figures(held.x, held.bad, calls), "real": real,
        "detectors": {key: detected(key) for key in best}, "cures": {key: cured(by) for key, by in cures.items()},
        "device": describe_device(place), "revision": revision(), "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    _device.once(write_json, _file(root, scale, seed, name), result)
    return result


def _choose(tried: dict[str, dict[str, Any]], before: float) -> str:
    """The setting with the fewest hallucinated of those that keep 95% of the coverage; where none does, that of the largest."""
    keeps = [s for s in tried if tried[s]["coverage"] >= 0.95 * before]
    return min(keeps, key=lambda s: tried[s]["fraction"][0]) if keeps else max(tried, key=lambda s: tried[s]["coverage"])


def _stands_by(card: Card) -> str:
    """What a result rests on: weights and the sampler's steps, and not how many samples or generations an artifact has."""
    return card.training_hash + (f"-{card.respace}" if isinstance(card, ImageCard) else "")


def _file(root: str | Path, scale: str, seed: int, task: str) -> Path:
    return Path(root) / f"bench-{scale}" / f"seed{seed}" / f"{task.replace(', ', '-').replace(' ', '-')}.json"


def results(scale: str = "paper", seed: int = 0, root: str | Path = "artifacts") -> dict[str, dict[str, Any]]:
    """What `run` has written, by task, in the order of `TASKS`.

    Raises:
        TinyhallError: nothing there, or a result of a model that its card no longer stands by.
    """
    root = locate(root)
    found = {name: read_json(_file(root, scale, seed, name)) for name in TASKS if _file(root, scale, seed, name).is_file()}
    if not found:
        raise _check.TinyhallError(
            f"bench: expected results at {scale} scale, seed {seed}, under {root}, got none; make them with "
            f"`python -m tinyhall bench --scale {scale} --seed {seed} --root {root}`"
        )
    for name, result in found.items():
        hash_ = _stands_by(cards.get(TASKS[name].card, scale))
        if result.get("hash") != hash_:
            raise _check.TinyhallError(f"bench: expected a result of card {hash_} for {name}, got one of {result.get('hash')}")
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
