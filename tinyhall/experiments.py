"""A card, run from end to end: train, draw, judge, score, and keep what a chapter needs."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import _check, cards, stats
from . import device as _device
from ._typing import Net, Tensor
from .artifacts import load_weights, read_json, read_tensors, write_json, write_tensors
from .cards import Card, CuredDigitsCard, Dataset, DigitsCard, GaussianCard, Generations, ImageCard
from .datasets import INTERPOLATED, MNIST, GaussianMixture, Judgement, SimpleShapes
from .density import law
from .filtering import Filter
from .images import DENOISED, ImageDraw, parts_bar, quantised, tally
from .metrics import TrajectoryVariance, denoising_error
from .nets import MLP, Tabulated, UNet
from .notebook import locate
from .quality import class_width, coverage, fid, imbalance
from .recursion import recurse
from .sampling import Sampler, Samples, Step, ddim, ddpm, reverse, sample
from .schedule import Schedule
from .training import Run, fit

WIDTHS = (4.0, 5.0, 6.0, 8.0)  # std from the nearest mode beyond which a sample counts as hallucinated
WINDOWS = ((0, 2), (0, 3), (0, 5), (0, 10), (0, 20), (0, 50), (0, 100), (0, 200), (10, 20), (20, 60), (60, 100), (100, 200))
SAMPLERS: dict[str, Sampler] = {
    "large": ddpm("large"),
    "small": ddpm("small"),
    "ddim": ddim(),
    "ddim-50": ddim(steps=50),
}
TRACE = 60  # last values of t for which an artifact keeps x0_hat
_PART = 250_000  # samples in flight: their traces take 60 MB
_SCATTER = 2_000  # samples of each generation that an artifact keeps
_SHOWN = 60  # images of each generation that an artifact keeps
_WORST = 40  # and of those that the filter dropped, the highest scores
_OF_DIGITS = ("agreement", "fid", "precision", "recall", "density", "coverage", "width")  # figures of digits alone
STAGES = 8  # of a training of images, at the end of each of which some are drawn
_DRAWN_AT_STAGE = 500  # so many: an interval of nine points at one half
_KEPT = 10_000  # in-support samples whose scores an artifact keeps


@dataclass(frozen=True)
class Artifact:
    """What one run of a card left behind, as a chapter loads it."""

    folder: Path
    card: Card
    info: dict[str, Any]  # seed, device, revision, wall seconds, versions
    metrics: dict[str, Any]

    @functools.cached_property
    def net(self) -> MLP | UNet:
        """The trained network, on the processor; of images, the moving average of its weights."""
        net = self.card.net(self.info["seed"])
        load_weights(net, self.folder / "model.safetensors", self._tensors("model"))
        return net.eval()

    def samples(self, sampler: str) -> dict[str, Tensor]:
        """The tensors kept of one sampler's draw; see `Draw.tensors`."""
        return self._tensors(f"samples-{sampler}")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        tensors, note = read_tensors(self.folder / f"{name}.safetensors")
        if note.get("card") != self.card.hash:  # networks of many cards have the same shapes
            raise _check.TinyhallError(
                f"artifact: expected {name} of card {self.card.hash}, got that of {note.get('card')} in {self.folder}"
            )
        return tensors

    def fraction(self, sampler: str, width: str = "5") -> stats.Estimate:
        """The fraction of a sampler's draw that lies beyond `width` std of every mode; of images, of the kind `width`.

        Raises:
            TinyhallError: a sampler that is none of the artifact's, or a width that was not counted.
        """
        found = {key: m["fraction"] for key, m in self.metrics.items() if isinstance(m, dict) and "fraction" in m}
        if sampler not in found:
            raise _check.fail("sampler", sampler, f"one of {', '.join(found) or 'none, in a recursion'}")
        if width not in found[sampler]:
            raise _check.fail("width", width, f"one of {', '.join(found[sampler])}")
        return stats.Estimate(*found[sampler][width])

    @property
    def measured(self) -> str:
        """How this was measured, in a phrase for captions. It names T and the modes where they are not the paper's."""
        c, reduced = self.card, ""
        if c.timesteps != type(c).timesteps:
            reduced += f", T = {c.timesteps:,} instead of {type(c).timesteps:,}"
        if isinstance(c, GaussianCard):
            paper = cards.CARDS.get(c.name)
            if isinstance(paper, GaussianCard) and paper.layout != c.layout:
                reduced += f", {len(c.data().means)} modes instead of {len(paper.data().means)}"
        return (
            f"{c.name}, {c.scale} scale, seed {self.info['seed']}, n = {c.n:,}, {c.steps:,} steps of "
            f"{min(c.batch_size, c.n):,}{reduced}, on {self.info['device']}"
        )


def folder(root: str | Path, card: Card, seed: int) -> Path:
    return Path(root) / f"{card.name}-{card.scale}" / f"seed{seed}"


def load(name: str, scale: str = "paper", seed: int = 0, root: str | Path = "artifacts") -> Artifact:
    """Opens the artifact of a card.

    Raises:
        TinyhallError: nothing there, a damaged file, or one that another card made.
    """
    card = cards.get(name, scale)
    place = folder(locate(root), card, seed)
    if not place.is_dir():
        raise _check.TinyhallError(
            f"artifact: expected {place}, got nothing there; make it with "
            f"`python -m tinyhall reproduce {name} --scale {scale} --seed {seed} --root {root}`"
        )
    info, metrics = read_json(place / "card.json"), read_json(place / "metrics.json")
    if not isinstance(info, dict) or info.get("hash") != card.hash:
        got = info.get("hash") if isinstance(info, dict) else type(info).__name__
        raise _check.TinyhallError(f"artifact: expected one of card {card.name}-{scale} ({card.hash}), got {got} in {place}")
    if info.get("seed") != seed or not isinstance(info.get("device"), str) or not isinstance(metrics, dict) or not metrics:
        raise _check.TinyhallError(f"artifact: expected seed {seed}, a device and metrics, got something else in {place}")
    return Artifact(place, card, info, metrics)


def available(root: str | Path = "artifacts") -> list[tuple[str, str, int]]:
    """(card, scale, seed) of every artifact under root that its card still stands by."""
    found: list[Any] = []
    for file in sorted(locate(root).glob("*/seed*/card.json")):
        info = read_json(file)
        if not isinstance(info, dict) or not isinstance(info.get("card"), dict):
            raise _check.TinyhallError(f"artifact: expected what a card left, got something else in {file}")
        card, scale, seed = info["card"].get("name"), info["card"].get("scale"), info.get("seed")
        if card in cards.CARDS and info.get("hash") == cards.get(card, scale).hash:
            found.append((card, scale, seed))
    return found


def train_card(
    card: Card, seed: int, *, runs: str | Path = "runs", device: str | None = None, progress: bool = True
) -> tuple[MLP | UNet, dict[str, Any]]:
    """Trains a card's network, or goes on from its checkpoint in `runs`. Returns it with losses, seconds and precision."""
    net, stages = _train(card, seed, runs, device, progress, [card.steps])
    run = next(stages)
    return net, {"losses": run.losses, **_spent(run.seconds, bool(run.bf16))}


def _spent(seconds: float, bf16: bool) -> dict[str, Any]:
    return {"train_seconds": round(seconds, 1), "precision": "bfloat16" if bf16 else "float32"}


def _train(
    card: Card, seed: int, runs: str | Path, device: str | None, progress: bool, ends: Sequence[int]
) -> tuple[MLP | UNet, Iterator[Run]]:
    """The network, and its training in stages that end at those steps: at each end it holds the weights to sample with."""
    if isinstance(card, Generations):
        raise _check.fail("card", card.name, "one of a single model; a recursion trains several, under `reproduce`")
    place = _device.pick(device)
    data = card.data().sample(card.n, cards.stream(seed, "data"))
    net = card.net(seed).to(place)
    checkpoint = folder(runs, card, seed) / "checkpoint.safetensors"

    def run() -> Iterator[Run]:
        for steps in ends:
            generator = cards.stream(seed, "training", place)
            yield _fit(card, net, data, generator, checkpoint, progress, steps=steps)

    return net, run()


def _fit(
    card: Card,
    net: MLP | UNet,
    data: Tensor,
    generator: torch.Generator,
    checkpoint: Path,
    progress: bool,
    steps: int | None = None,
    label: Tensor | None = None,
) -> Run:
    return fit(
        net,
        data,
        card.schedule(),
        steps=steps or card.steps,
        batch_size=card.batch_size,
        lr=card.lr,
        generator=generator,
        label=label,
        label_dropout=card.label_dropout if isinstance(card, DigitsCard) else 0.0,
        ema=card.ema if isinstance(card, ImageCard) else None,
        # Compiling takes half a minute: worth it from some thousand steps on. A processor gains nothing by it with images.
        compile=card.steps >= 5000 and _can_compile(generator.device, images=isinstance(card, ImageCard)),
        checkpoint=checkpoint,
        every=min(500, card.steps),
        note=card.training_hash,
        progress=progress,
    )


def _can_compile(device: torch.device, images: bool) -> bool:
    from shutil import which

    on_processor = device.type == "cpu" and not images and any(which(c) for c in ("c++", "g++", "clang++"))
    return device.type == "cuda" or on_processor


def samplers_of(card: Card) -> dict[str, Sampler]:
    """The samplers whose draws a card's artifact holds, by name."""
    if not isinstance(card, ImageCard):
        return SAMPLERS
    return {"small": ddpm("small", card.respace), "ddim": ddim(steps=card.respace), "full": ddpm("small")}


def reproduce(
    card: Card,
    seed: int = 0,
    *,
    root: str | Path = "artifacts",
    runs: str | Path = "runs",
    device: str | None = None,
    samplers: Sequence[str] | None = None,
    keep: int = 2_000,
    pictures: int | None = None,
    progress: bool = True,
) -> Artifact:
    """Trains, draws with each sampler, judges, scores, writes the artifact. A second call resumes an unfinished training.

    A recursion's card is run arm by arm instead; `samplers` is not for it. Of models of images, `keep` is how many an artifact
    keeps verdicts, scores and pictures of, with traces of a few; `pictures`, where it is given, how many pictures, and no
    traces. What `metrics` says rests on all that were drawn.

    Raises:
        TinyhallError: a card that is not, field by field, the one of its name and scale, whose artifact this would replace; a
            sampler that is none of the card's; or what training and drawing raise.
    """
    if card != cards.get(card.name, card.scale):
        raise _check.fail("card", card, f"{card.name} at {card.scale} scale as `tinyhall.cards` has it")
    known = samplers_of(card)
    samplers = list(known) if samplers is None else samplers
    for name in samplers:
        if name not in known:
            raise _check.fail("samplers", name, f"some of {', '.join(known)}")
    if isinstance(card, Generations):
        return _reproduce_recursion(card, seed, root, runs, device, progress)
    if isinstance(card, ImageCard):
        return _reproduce_images(card, seed, root, runs, device, samplers, keep, pictures, progress)
    assert isinstance(card, GaussianCard)
    place = _device.pick(device)
    net, history = train_card(card, seed, runs=runs, device=device, progress=progress)
    assert isinstance(net, MLP)
    out = folder(root, card, seed)
    _device.once(write_tensors, out / "model.safetensors", dict(net.state_dict()), {"card": card.hash})
    mixture, schedule = card.data(), card.schedule()
    # The table costs as much as 16,000 samples: too much for a smoke run, nothing beside millions.
    tabulate = mixture.dim == 1 and card.samples >= 100_000
    fast = Tabulated(net, schedule.steps, device=place) if tabulate else net
    metrics: dict[str, Any] = {"losses": history.pop("losses")}
    began = time.perf_counter()
    for name in samplers:
        # Without noise the rarest figures matter less, and a tenth of the samples gives them.
        count = card.samples if name in ("large", "small") else max(card.samples // 10, 1)
        draw = Draw.make(fast, mixture, schedule, SAMPLERS[name], count, seed, device=place, progress=progress)
        metrics[name] = draw.report()
        # No figure of a line needs the samples without noise, and they would be a fifth of all artifacts.
        if mixture.dim > 1 or name in ("large", "small"):
            _device.once(
                write_tensors, out / f"samples-{name}.safetensors", draw.tensors(), {"card": card.hash, "sampler": name}
            )
    if isinstance(fast, Tabulated):
        fast = fast.to("cpu")  # the law is worked out in double precision there
        for name in {"large", "small"} & set(samplers):
            exact = law(fast, schedule, sampler=SAMPLERS[name])
            metrics[name]["integral"] = {f"{w:g}": exact.outside(mixture.means[:, 0], w * mixture.std) for w in WIDTHS}
    _device.once(write_json, out / "metrics.json", metrics)
    return _finish(card, seed, root, place, history | {"sample_seconds": round(time.perf_counter() - began, 1)})


def _reproduce_images(
    card: ImageCard,
    seed: int,
    root: str | Path,
    runs: str | Path,
    device: str | None,
    samplers: Sequence[str],
    keep: int,
    pictures: int | None,
    progress: bool,
) -> Artifact:
    place, known = _device.pick(device), samplers_of(card)
    data, schedule, out = card.data(), card.schedule(), folder(root, card, seed)
    ends = [-(-card.steps * stage // STAGES) for stage in range(1, STAGES + 1)]
    net, stages = _train(card, seed, runs, device, progress, ends)
    metrics: dict[str, Any] = {"by_step": []}
    for stage, (end, run) in enumerate(zip(ends, stages, strict=True), 1):
        # A stage's draw is kept, so that a run that is resumed does not repeat it.
        kept = folder(runs, card, seed) / f"stage-{card.training_hash}-{card.respace}-{stage}.json"
        if not kept.exists():
            if run.step != end:
                raise _check.TinyhallError(
                    f"checkpoint: expected one of at most {end} steps, at which images are to be drawn, got {run.step} in "
                    f"{folder(runs, card, seed) / 'checkpoint.safetensors'}; move it away to train anew"
                )
            draw = sample(
                net, schedule, min(card.samples, _DRAWN_AT_STAGE), sampler=ddpm("small", card.respace),
                generator=cards.stream(seed, f"stage/{stage}"), progress=progress,
            )  # fmt: skip
            _device.once(write_json, kept, {"step": run.step, "fraction": tally(data.judge(draw.x).kind, data.kinds)})
        metrics["by_step"].append(read_json(kept))
    metrics["losses"] = run.losses
    began = time.perf_counter()
    net.eval()
    weights = {k: v.half() for k, v in net.state_dict().items()}
    _device.once(write_tensors, out / "model.safetensors", weights, {"card": card.hash})
    load_weights(net, out / "model.safetensors")  # what is drawn is drawn by the weights that are kept
    for name in samplers:
        count = card.samples if name == "small" else max(card.samples // 8, 1)
        drawn = ImageDraw.make(net, data, schedule, known[name], count, seed, progress=progress)
        metrics[name] = drawn.report()
        tensors = drawn.tensors(keep if name == "small" else 0, pictures)
        if name == "small":
            x = drawn.x[:keep].to(place)
            error = denoising_error(net, schedule, x, DENOISED, generator=cards.stream(seed, "denoising"))
            tensors |= {"log10_denoising": error.log10().half(), "denoised_at": torch.tensor(DENOISED)}
        _device.once(write_tensors, out / f"samples-{name}.safetensors", tensors, {"card": card.hash, "sampler": name})
    _device.once(write_json, out / "metrics.json", metrics)
    spent = _spent(run.seconds, bool(run.bf16))
    return _finish(card, seed, root, place, spent | {"sample_seconds": round(time.perf_counter() - began, 1)})


def _finish(card: Card, seed: int, root: str | Path, place: torch.device, spent: dict[str, Any]) -> Artifact:
    info = {
        "card": asdict(card),
        "hash": card.hash,
        "seed": seed,
        "device": describe_device(place),
        "revision": revision(),
        "torch": torch.__version__,
    } | spent
    _device.once(write_json, folder(root, card, seed) / "card.json", info)  # last: an artifact without it is not one
    return load(card.name, card.scale, seed, root)


def _reproduce_recursion(
    card: Generations, seed: int, root: str | Path, runs: str | Path, device: str | None, progress: bool
) -> Artifact:
    assert isinstance(card, Card)
    place = _device.pick(device)
    data, schedule = card.data(), card.schedule()
    sampler = ddpm("small", card.respace) if isinstance(card, ImageCard) else ddpm()
    generator, label, guidance = cards.stream(seed, "data"), None, None
    describe: Callable[[Samples], dict[str, Any]]
    if isinstance(data, GaussianMixture):
        real = data.sample(card.n, generator)
        describe, floor = _of_points(data, card.draw, seed)
    elif isinstance(data, MNIST):
        assert isinstance(card, DigitsCard)
        (real, label), guidance = data.draw(card.n, generator), card.guidance
        describe, floor = _of_digits(data, min(card.n, 10_000))
    else:
        assert isinstance(data, SimpleShapes)
        real = data.sample(card.n, generator)
        describe, floor = functools.partial(_of_images, data), {}

    def learn(data: Tensor, generation: int, checkpoint: Path, label: Tensor | None = None) -> MLP | UNet:
        net = card.net(seed, f"weights/{generation}").to(place)
        _fit(card, net, data, cards.stream(seed, f"training/{generation}", place), checkpoint, progress, label=label)
        return net

    def evaluate(drawn: Samples) -> dict[str, Any]:
        bad = ~data.in_support(drawn.x)
        score = next(iter(drawn.scores.values()))
        both = 2 <= int(bad.sum()) <= len(bad) - 2
        return describe(drawn) | {"auroc": stats.auroc(score, bad) if both else None}

    cure: dict[str, Any] = {}
    if isinstance(card, CuredDigitsCard):
        cure, sampler = {"real": card.real, "accumulate": card.accumulate}, ddpm(card.variance, card.respace)
    metric = _Oracle(data) if card.score == "oracle" else TrajectoryVariance(card.window)
    began = time.perf_counter()
    metrics: dict[str, Any] = {**floor, "arms": {}}
    kept: dict[str, Tensor] = {}
    for arm, drop in card.arms:
        name = arm if arm == "none" else f"{arm if arm == 'random' else card.score}-{drop:.3f}"
        metrics["arms"][name] = []
        for made in recurse(
            real, learn, schedule, folder=folder(runs, card, seed), arm=arm, drop=drop, draw=card.draw,
            generations=card.generations, metric=metric, sampler=sampler, label=label, guidance=guidance,
            evaluate=evaluate, seed=seed, note=f"card {card.training_hash}", progress=progress, **cure,
        ):  # fmt: skip
            drawn = made.samples()
            x = drawn.x
            passed = stats.fraction(int((~data.in_support(x[made.kept])).sum()), card.n)
            metrics["arms"][name].append(made.metrics | {"passed_on": passed})
            kept[f"{name}.{made.number}"] = x[:_SCATTER].half() if x.ndim == 2 else quantised(x[:_SHOWN])
            if isinstance(data, MNIST) and arm == "variance":
                worst = next(iter(drawn.scores.values())).argsort(descending=True)[:_WORST]
                kept[f"{name}.{made.number}.worst"] = quantised(x[worst])
    out = folder(root, card, seed)
    if isinstance(card, DigitsCard):
        assert label is not None
        kept["label"] = label[:_SHOWN]
    if isinstance(card, DigitsCard) and not isinstance(card, CuredDigitsCard):  # whose first model is the same
        # The model of the real data, for a chapter to draw from; its checkpoint is there, so nothing is trained again.
        first = learn(real, 1, folder(runs, card, seed) / "1" / "checkpoint.safetensors", label)
        weights = {k: v.half() for k, v in first.state_dict().items()}
        _device.once(write_tensors, out / "model.safetensors", weights, {"card": card.hash})
    _device.once(write_tensors, out / "samples-arms.safetensors", kept, {"card": card.hash})
    _device.once(write_json, out / "metrics.json", metrics)
    # Of all its trainings, also those of calls that were broken off; this call's own time may be that of reading them.
    checkpoints = folder(runs, card, seed).glob("**/checkpoint.safetensors")
    notes = [read_tensors(path)[1] for path in checkpoints]
    # A generation that another machine trained may have been trained otherwise: bfloat16 in one is said of all.
    spent = _spent(sum(float(note["seconds"]) for note in notes), any(note.get("bf16") == "1" for note in notes))
    return _finish(card, seed, root, place, spent | {"seconds": round(time.perf_counter() - began, 1)})


def _of_points(mixture: GaussianMixture, draw: int, seed: int) -> tuple[Callable[[Samples], dict[str, Any]], dict[str, Any]]:
    """What a generation says of points, and the least distance that chance leaves between two such sets."""
    reference = mixture.sample(draw, cards.stream(seed, "reference"))

    def distance(x: Tensor) -> float:
        return stats.sliced_wasserstein(x, reference) / mixture.std

    floor = distance(mixture.sample(draw, cards.stream(seed, "floor")))
    return lambda drawn: figures(mixture, drawn.x) | {"distance": distance(drawn.x)}, {"distance_floor": floor}


def _of_digits(data: MNIST, n: int) -> tuple[Callable[[Samples], dict[str, Any]], dict[str, Any]]:
    """What a generation says of digits, the first n of them against as many test digits, which no model has seen; and the same
    of real training digits, as the least that chance leaves."""
    test, digit = MNIST(data.root, train=False, size=data.size).draw(n, cards.stream(0, "reference"))
    real, width = data.classifier.read(test).features, class_width(test, digit)

    def against(x: Tensor, digit: Tensor) -> dict[str, float]:
        features = data.classifier.read(x).features
        near = coverage(real[:2_000], features[:2_000])
        return {"fid": fid(real, features), **near._asdict(), "width": class_width(x, digit) / width}

    def describe(drawn: Samples) -> dict[str, Any]:
        verdict = data.judge(drawn.x)
        assert drawn.label is not None
        return {
            "n": len(drawn.x),
            "fraction": tally(verdict.kind, data.kinds),
            "share": torch.bincount(verdict.digit, minlength=10).tolist(),
            "agreement": float((verdict.digit == drawn.label).double().mean()),
            "distinct": len(quantised(drawn.x).flatten(1).unique(dim=0)),
            **against(drawn.x[:n], drawn.label[:n]),
        }

    return describe, {"floor": against(*data.draw(n, cards.stream(0, "floor")))}


def _of_images(data: SimpleShapes, drawn: Samples) -> dict[str, Any]:
    """What a generation says of images: fractions by kind, and how the sets of shapes are shared among those in support."""
    x = drawn.x
    verdict = data.judge(x)
    good = (verdict.counts[verdict.kind == 0] > 0).long() @ torch.tensor([1, 2, 4])
    return {
        "n": len(x),
        "fraction": tally(verdict.kind, data.kinds),
        "share": torch.bincount(good, minlength=8)[1:].tolist(),
        "distinct": len(quantised(x).flatten(1).unique(dim=0)),
    }


class _Oracle:
    """Scores 1 what the data calls hallucinated and 0 the rest; of equal scores a filter keeps the earlier."""

    name = "oracle"

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def check(self, schedule: Schedule) -> None: ...

    def reset(self) -> None: ...

    def update(self, step: Step) -> None:
        self.x = step.x

    def score(self) -> Tensor:
        return (~self.data.in_support(self.x)).float()


def refit(mixture: GaussianMixture, x: Tensor) -> GaussianMixture:
    """The mixture that points `[n, dim]` look like: for each mode the mean of the points nearest to it and within 5 std, and
    one std for all. A mode with fewer than two points is gone.

    Raises:
        TinyhallError: no mode is left.
    """
    mode, distance = mixture._nearest(x, 5.0)
    means, squares, count = [], 0.0, 0
    for k in range(len(mixture.means)):
        at = x[(mode == k) & (distance <= 5)].double()
        if len(at) < 2:
            continue
        means.append(at.mean(0))
        squares += float((at - means[-1]).square().sum())
        count += at.numel() - at.shape[1]
    if not means:
        raise _check.fail("x", x, "points near the modes")
    return GaussianMixture(torch.stack(means), max((squares / count) ** 0.5, 1e-9), f"refit of {mixture.name}")


def read(m: dict[str, Any]) -> dict[str, float]:
    """One generation's figures, a number each; NaN for what was not measured.

    Of points: fractions beyond 5 and 8 std, of those handed on, the score's AUROC, how many modes hold a tenth of their share
    or more, the total variation of the shares from equal ones, the modes' width over the true one, and the sliced Wasserstein
    distance to true data in std. Of images: the fraction of each kind, of those handed on, the AUROC, the total variation of
    the shares of the seven sets of shapes, or ten digits, from equal ones, and the share of images that are not repeated. Of
    digits also how often the classifier reads the one that was asked for, and the measures of `tinyhall.quality`, the width of
    a class over that of test digits.
    """
    counts = torch.tensor(m["share"])
    classes = torch.arange(len(counts))
    share = counts.double() / counts.sum()
    shared = {
        "handed on": (m.get("passed_on") or [math.nan])[0],
        "AUROC": (m.get("auroc") or [math.nan])[0],
    }
    uneven = imbalance(classes.repeat_interleave(counts), classes, len(counts)) if bool(counts.any()) else math.nan
    if "any" in m["fraction"]:
        kinds = {"hallucinated" if kind == "any" else kind: e[0] for kind, e in m["fraction"].items()}
        rest = {key: m[key] for key in _OF_DIGITS if key in m}
        return kinds | shared | {"imbalance": uneven, "distinct": m["distinct"] / m["n"]} | rest
    widths = [w for w in m["std_ratio"] if w is not None]
    return {
        "hallucinated": m["fraction"]["5"][0],
        "beyond 8 std": m["fraction"]["8"][0],
        **shared,
        "modes alive": float((share >= 0.1 / len(share)).sum()),
        "imbalance": uneven,
        "width": sum(widths) / len(widths) if widths else math.nan,
        "distance": m.get("distance", math.nan),
    }


def histories(name: str, scale: str = "paper", root: str | Path = "artifacts") -> dict[str, dict[str, Tensor]]:
    """What became of each arm of a recursion's card, over all seeds that have an artifact: for each figure of `read`, float64
    `[seeds, generations]`.

    Raises:
        TinyhallError: no artifact of that card.
    """
    arms: dict[str, list[list[dict[str, float]]]] = {}
    for seed in sorted(seed for card, at, seed in available(root) if (card, at) == (name, scale)):
        for arm, history in load(name, scale, seed, root).metrics["arms"].items():
            arms.setdefault(arm, []).append([read(m) for m in history])
    if not arms:
        raise _check.TinyhallError(f"artifact: expected one of {name} at {scale} scale, got none under {root}")
    return {
        arm: {key: torch.tensor([[m[key] for m in h] for h in seeds], dtype=torch.float64) for key in seeds[0][0]}
        for arm, seeds in arms.items()
    }


def figures(mixture: GaussianMixture, x: Tensor, verdict: Judgement | None = None) -> dict[str, Any]:
    """What samples `[n, dim]` say of the model that drew them, as JSON: fractions beyond each width, where the hallucinations
    lie, how the modes are shared, and their width and place in units of the mixture's std. Those two are of the points
    within 4 std of a mode: in the plane, points spread evenly over that disc read a width of 2, however far they go beyond it.
    `verdict` is the mixture's, where it has been asked for already."""
    verdict = verdict or mixture.judge(x)
    near = verdict.distance <= 4
    at_mode = [x[near & (verdict.mode == m)].double() for m in range(len(mixture.means))]
    pairs, counts = verdict.pair[verdict.kind == INTERPOLATED].unique(dim=0, return_counts=True)
    centres = mixture.means.to(x.device)
    return {
        "n": len(x),
        "fraction": {f"{w:g}": stats.fraction(int((verdict.distance > w).sum()), len(x)) for w in WIDTHS},
        "interpolated": stats.fraction(int((verdict.kind == INTERPOLATED).sum()), len(x)),
        "pairs": {f"{a}-{b}": int(c) for (a, b), c in zip(pairs.tolist(), counts.tolist(), strict=True)},
        "share": [int(c) for c in torch.bincount(verdict.mode, minlength=len(mixture.means))],
        "std_ratio": [float(p.std(0).mean()) / mixture.std if len(p) > 1 else None for p in at_mode],
        "offset": [
            float((p.mean(0) - c).norm()) / mixture.std if len(p) else None for p, c in zip(at_mode, centres, strict=True)
        ],
    }


@dataclass
class Draw:
    """Many samples of one model by one sampler, reduced to what the figures need."""

    mixture: GaussianMixture
    n: int
    x: Tensor  # [n, dim]
    verdict: Judgement  # at 5 std
    scores: Tensor  # [n, windows]
    windows: tuple[tuple[int, int], ...]
    trace_rows: Tensor  # [m], which samples have a trace: hallucinated ones of each part, and after the first part's the others
    traces: Tensor  # [m, TRACE, dim], x0_hat, the last step last

    @classmethod
    def make(
        cls,
        net: Net,
        mixture: GaussianMixture,
        schedule: Schedule,
        sampler: Sampler,
        n: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Draw:
        """Draws n samples in parts, each with a generator of its own, and scores every window on the way."""
        visited = {move.t for move in sampler(schedule)}
        windows = tuple(w for w in WINDOWS if sum(w[0] <= t < w[1] for t in visited) >= 2)
        parts, traced, at = [], [], 0
        bad_budget, good_budget = 300, 300
        for i, low in enumerate(parts_bar(range(0, n, _PART), progress)):
            size = min(_PART, n - low)
            meters = [TrajectoryVariance(w) for w in windows]
            recent: list[Tensor] = []
            noise = cards.stream(seed, f"samples/{i}", device)
            for step in reverse(net, schedule, (size, mixture.dim), sampler=sampler, generator=noise, device=device):
                for meter in meters:
                    meter.update(step)
                if step.t < TRACE:
                    recent.append(step.x0_hat)
            x = step.x.cpu()
            verdict = mixture.judge(x)
            scores = torch.stack([m.score() for m in meters], dim=1).cpu()
            parts.append((x, scores, *verdict))
            bad = (verdict.kind != 0).nonzero()[:, 0][:bad_budget]
            good = (verdict.kind == 0).nonzero()[:, 0][: good_budget if i == 0 else 0]
            rows = torch.cat([bad, good])
            traced.append((rows + at, torch.stack([x0_hat[rows.to(device)].cpu() for x0_hat in recent], dim=1)))
            bad_budget -= len(bad)
            at += size
        x, scores, *told = (torch.cat(column) for column in zip(*parts, strict=True))
        rows, traces = (torch.cat(column) for column in zip(*traced, strict=True))
        return cls(mixture, n, x, Judgement(*told), scores, windows, rows, traces)

    def report(self) -> dict[str, Any]:
        """Figures as JSON: fractions at each width, where hallucinations lie, mode widths, and what each window detects."""
        half = torch.arange(self.n) < self.n // 2  # parts are independent, so the first half calibrates for the second
        out = figures(self.mixture, self.x, self.verdict) | {"windows": {}}
        for i, (a, b) in enumerate(self.windows):
            entry: dict[str, Any] = {}
            for w in WIDTHS:
                bad = self.verdict.distance > w
                if min(int(part.sum()) for part in (bad[half], bad[~half], ~bad[half], ~bad[~half])) < 10:
                    continue  # a threshold set by fewer says nothing
                score = self.scores[:, i]
                r = Filter.calibrate(score[half], bad[half]).report(score[~half], bad[~half])
                entry[f"{w:g}"] = {"removed": r.removed, "kept": r.kept, "auroc": r.auroc}
            out["windows"][f"{a}-{b}"] = entry
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


def describe_device(device: torch.device) -> str:
    """A name a reader can place: the card's, or the processor's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{device.type}: {name}, {os.cpu_count()} cores"


def revision() -> str:
    """The project's git revision, "+" where files differ from it; "unknown" outside a checkout, as in a site-packages that lies
    in the checkout of something else."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails where the repository around is not ours
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
