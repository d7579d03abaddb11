"""Experiments on generations: models that learn from what models drew, of points, shapes and digits."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..core.metrics import Metric, Step, TrajectoryVariance
from ..core.mlp import MLP
from ..core.noise import stream
from ..core.recursion import needed
from ..core.sampling import Sampler, Samples, ddpm
from ..core.schedule import Schedule
from ..core.unet import UNet
from ..data.images import Dataset, quantised
from ..data.mnist import MNIST
from ..measure import stats
from ..measure.denoising import PostHocVariance
from ..store.files import once, read_tensors, write_json, write_tensors
from ..store.generations import Generation, recurse
from .experiment import Experiment, Lab, folder
from .pictures import ImageExperiment, ShapesExperiment, SimpleShapesExperiment
from .points import GaussianExperiment
from .summary import DigitReference, of_digits, of_points, of_shapes

_SCATTER = 2_000  # points of each generation that an artifact keeps
_SHOWN = 60  # images of each generation that an artifact keeps
_WORST = 40  # and of those that the filter dropped, the highest scores

Describe = Callable[[Samples], dict[str, Any]]

if TYPE_CHECKING:
    _Experiment = Experiment
else:
    _Experiment = object  # a dataclass that inherited fields would put their defaults over those of what it is mixed into


class Oracle:
    """Scores 1 what the data calls hallucinated and 0 the rest; of equal scores a filter keeps the earlier."""

    name = "oracle"

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def check(self, schedule: Schedule, times: Sequence[int]) -> None: ...

    def reset(self) -> None: ...

    def update(self, step: Step) -> None:
        self.x = step.x

    def score(self) -> Tensor:
        return (~self.data.in_support(self.x)).float()


@dataclass(frozen=True)
class Generations(_Experiment):
    """Generations of models, each trained on what the last one drew. `n` samples are kept every time."""

    generations: int = 5
    # (arm, share dropped): the paper's code drops 2,500 of 102,500.
    arms: tuple[tuple[str, float], ...] = (("none", 0.0), ("random", 2_500 / 102_500), ("variance", 2_500 / 102_500))
    draw: int = 102_500
    score: str = "variance"  # what the arm of that name drops by; "oracle" knows the hallucinated and drops no others
    late: ClassVar[frozenset[str]] = frozenset({"samples", "generations", "arms", "draw"})  # the window filters what is learned

    def _drawn(self, n: int) -> int:
        """How many the arm that drops most must draw to keep n."""
        return max(needed(n, drop) for _, drop in self.arms)

    def metric(self) -> Metric:
        return Oracle(self.data()) if self.score == "oracle" else TrajectoryVariance(self.window)

    def recursion(self) -> dict[str, Any]:
        """What `recurse` is told beside what every experiment says."""
        return {}

    @abstractmethod
    def describing(self, lab: Lab) -> tuple[Describe, dict[str, Any]]:
        """What is said of a generation's samples, and the least that chance leaves of it."""

    def shown(self, made: Generation, drawn: Samples) -> dict[str, Tensor]:
        """What an artifact keeps of a generation's samples, by a suffix of its name."""
        return {"": quantised(drawn.x[:_SHOWN])}

    def last(
        self, out: Path, learn: Callable[..., MLP | UNet], real: Sequence[Tensor | None], place: Path
    ) -> dict[str, Tensor]:
        """What an artifact keeps beside."""
        return {}

    def training(self, lab: Lab, ends: Sequence[int]) -> NoReturn:
        raise _check.fail("experiment", self.name, "one of a single model; a recursion trains several, under `reproduce`")

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        data, place, out = self.data(), folder(lab.runs, self, lab.seed), folder(lab.root, self, lab.seed)
        real, label = self.real_data(lab.seed)
        describe, floor = self.describing(lab)

        def learn(data: Tensor, generation: int, checkpoint: Path, label: Tensor | None = None) -> MLP | UNet:
            net = self.net(lab.seed, f"weights/{generation}").to(lab.device)
            generator = lab.stream(f"training/{generation}", lab.device)
            self.fitted(net, data, generator, checkpoint, label=label, progress=lab.progress)
            return net

        def evaluate(drawn: Samples) -> dict[str, Any]:
            bad = ~data.in_support(drawn.x)
            score = next(iter(drawn.scores.values()))
            both = 2 <= int(bad.sum()) <= len(bad) - 2
            return describe(drawn) | {"auroc": stats.auroc(score, bad) if both else None}

        began, kept = time.perf_counter(), dict[str, Tensor]()
        metrics: dict[str, Any] = {**floor, "arms": {}}
        for arm, drop in self.arms:
            name = arm if arm == "none" else f"{arm if arm == 'random' else self.score}-{drop:.3f}"
            metrics["arms"][name] = []
            for made in recurse(
                real, learn, self.schedule(), folder=place, arm=arm, drop=drop, draw=self.draw, generations=self.generations,
                metric=self.metric(), sampler=self.sampler(), label=label, evaluate=evaluate, seed=lab.seed,
                note=f"card {self.training_hash}", progress=lab.progress, **self.recursion(),
            ):  # fmt: skip
                drawn = made.samples()
                passed = stats.fraction(int((~data.in_support(drawn.x[made.kept])).sum()), self.n)
                metrics["arms"][name].append(made.metrics | {"passed_on": passed})
                kept |= {f"{name}.{made.number}{end}": x for end, x in self.shown(made, drawn).items()}
        kept |= self.last(out, learn, (real, label), place)
        once(write_tensors, out / "samples-arms.safetensors", kept, {"card": self.hash})
        once(write_json, out / "metrics.json", metrics)
        # Of all its trainings, also those of calls that were broken off; this call's own time may be that of reading them.
        notes = [read_tensors(path)[1] for path in place.glob("**/checkpoint.safetensors")]
        return {
            "train_seconds": round(sum(float(note["seconds"]) for note in notes), 1),
            # A generation that another machine trained may have been trained otherwise: bfloat16 in one is said of all.
            "precision": "bfloat16" if any(note.get("bf16") == "1" for note in notes) else "float32",
            "seconds": round(time.perf_counter() - began, 1),
        }


@dataclass(frozen=True)
class RecursionExperiment(Generations, GaussianExperiment):
    """Generations of models of a mixture.

    Expected at the paper's scale: 13 trainings of 100,000 steps, so a GPU. The laptop's card is another, smaller experiment
    of the same shape: 9 modes, n = 10,000, and half an hour a seed on one core.
    """

    def _smaller(self, scale: str) -> dict[str, Any]:
        by_scale: dict[str, dict[str, Any]] = {
            "smoke": {"n": 500, "steps": 60, "batch_size": 250, "generations": 3, "timesteps": 100, "beta_end": 0.2},
            "laptop": {"n": 10_000, "steps": 8_000, "batch_size": 500, "layout": "grid3"},
        }
        smaller = super()._smaller(scale) | by_scale[scale]
        return smaller | {"draw": self._drawn(smaller["n"])}

    def differences(self) -> list[str]:
        modes = len(self.data().means)
        return super().differences() + ([] if modes == 25 else [f"{modes} modes instead of 25"])

    def describing(self, lab: Lab) -> tuple[Describe, dict[str, Any]]:
        mixture = self.data()
        reference = mixture.sample(self.draw, lab.stream("reference"))

        def distance(x: Tensor) -> float:
            return stats.sliced_wasserstein(x, reference) / mixture.std

        floor = distance(mixture.sample(self.draw, lab.stream("floor")))
        return lambda drawn: of_points(mixture, drawn.x) | {"distance": distance(drawn.x)}, {"distance_floor": floor}

    def shown(self, made: Generation, drawn: Samples) -> dict[str, Tensor]:
        return {"": drawn.x[:_SCATTER].half()}


@dataclass(frozen=True)
class GridRecursionExperiment(RecursionExperiment):
    """Figures 8a and 9 of the paper: the square with T = 500, to generation 20. The laptop's keeps modes, schedule and
    generations, on a fifth of the points: four and a half minutes a generation on one core. It trains on the first 260 steps,
    the others lead from noise to noise, and for long enough: an under-trained first generation decides all that follow."""

    timesteps: int = 500
    generations: int = 20
    window: tuple[int, int] = (0, 6)
    ema: float | None = field(default=None, metadata={"added": True})

    def _smaller(self, scale: str) -> dict[str, Any]:
        if scale == "smoke":
            return super()._smaller(scale) | {"window": (0, 10)}
        head = 260
        end = self.beta_start + (self.beta_end - self.beta_start) * (head - 1) / (self.timesteps - 1)
        smaller = {"n": 20_000, "steps": 14_000, "batch_size": 2_500, "ema": 0.999, "timesteps": head, "beta_end": end}
        return smaller | {"draw": self._drawn(20_000)}

    def fit_options(self) -> dict[str, Any]:
        return super().fit_options() | {"ema": self.ema}


@dataclass(frozen=True)
class ShapesRecursionExperiment(Generations, ShapesExperiment):
    """Generations of models of Simple Shapes; the paper has none such, so the share dropped is ours: a tenth, about what such a
    model hallucinates. On a laptop three generations, of 10,000 steps: 20 minutes each."""

    arms: tuple[tuple[str, float], ...] = (("none", 0.0), ("random", 0.1), ("variance", 0.1))

    def _smaller(self, scale: str) -> dict[str, Any]:
        by_scale: dict[str, dict[str, Any]] = {
            "smoke": {"n": 60, "steps": 10, "generations": 2, "respace": 100},  # fewer would step over the window
            "laptop": {"n": 2_000, "steps": 10_000, "generations": 3},
        }
        smaller = super()._smaller(scale) | {"samples": 0} | by_scale[scale]
        return smaller | {"draw": self._drawn(smaller["n"])}

    def describing(self, lab: Lab) -> tuple[Describe, dict[str, Any]]:
        data = self.data()
        return lambda drawn: of_shapes(data, drawn.x), {}


@dataclass(frozen=True)
class SimpleShapesRecursionExperiment(Generations, SimpleShapesExperiment):
    """Figure 8b of the paper: Simple Shapes in its own setting, four generations after the first. How many it drops is not
    said; here a twentieth, about what such a model hallucinates."""

    generations: int = 5
    arms: tuple[tuple[str, float], ...] = (("none", 0.0), ("random", 0.05), ("variance", 0.05))
    draw: int = 5_263
    samples: int = 0

    def _smaller(self, scale: str) -> dict[str, Any]:
        smaller = super()._smaller(scale) | {"samples": 0}
        if scale == "smoke":
            smaller |= {"n": 60, "steps": 10, "generations": 2}
        return smaller | {"draw": self._drawn(smaller.get("n", self.n))}

    def describing(self, lab: Lab) -> tuple[Describe, dict[str, Any]]:
        data = self.data()
        return lambda drawn: of_shapes(data, drawn.x), {}


@dataclass(frozen=True)
class DigitsExperiment(Generations, ImageExperiment):
    """Generations of class-conditional models of MNIST, with classifier-free guidance: the paper's last experiment.

    At "paper" what the paper says (T = 500, 50 epochs at 1e-4, 65,000 drawn and 60,000 kept), and a network and a guidance of
    ours, on which it is silent: 16 trainings, for a GPU. The laptop's keeps the ratio and has fewer digits, a smaller network
    and a twentieth of the sampler's steps: about 8 minutes a model on one core.
    """

    classes: ClassVar[int | None] = 10
    keeps_first: ClassVar[bool] = True  # the model of the real data, beside the samples
    n: int = 60_000
    steps: int = 23_450
    timesteps: int = 500
    beta_end: float = 0.04  # so that half the usual steps end in noise, too
    size: int = 28
    widths: tuple[int, ...] = (64, 128, 128)
    attention: tuple[int, ...] = (7,)
    respace: int = 500
    samples: int = 0
    window: tuple[int, int] = (0, 300)  # the best on a first generation, trained for 5,000 steps
    generations: int = 6  # the first learns real digits, and five follow
    arms: tuple[tuple[str, float], ...] = (("none", 0.0), ("random", 5_000 / 65_000), ("variance", 5_000 / 65_000))
    draw: int = 65_000
    label_dropout: float = 0.1
    guidance: float = 1.5

    def _smaller(self, scale: str) -> dict[str, Any]:
        small: dict[str, Any] = {"widths": (32, 64), "blocks": 1, "stem": 2, "batch_size": 32, "lr": 2e-3, "ema": 0.999}
        by_scale: dict[str, dict[str, Any]] = {
            "smoke": {"n": 60, "steps": 10, "generations": 2, "respace": 10, "widths": (8, 8)},
            "laptop": {"n": 3_000, "steps": 3_000, "respace": 25},
        }
        smaller = small | by_scale[scale]
        return smaller | {"draw": self.draw * smaller["n"] // self.n}

    def data(self) -> MNIST:
        return MNIST(size=self.size)

    def samplers(self) -> dict[str, Sampler]:
        return {"small": ddpm("small", self.respace)}

    def real_data(self, seed: int) -> tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"] | None]:
        return self.data().draw(self.n, stream(seed, "data"))

    def fit_options(self) -> dict[str, Any]:
        return super().fit_options() | {"label_dropout": self.label_dropout}

    def recursion(self) -> dict[str, Any]:
        return {"guidance": self.guidance}

    def features(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n d"]:
        return self.data().classifier.read(x).features

    def describing(self, lab: Lab) -> tuple[Describe, dict[str, Any]]:
        data, n = self.data(), min(self.n, 10_000)
        test = DigitReference(data, n, stream(0, "reference"))

        def describe(drawn: Samples) -> dict[str, Any]:
            assert drawn.label is not None
            return of_digits(data, drawn.x, drawn.label) | test.against(drawn.x, drawn.label)

        return describe, {"floor": test.against(*data.draw(n, stream(0, "floor")))}

    def shown(self, made: Generation, drawn: Samples) -> dict[str, Tensor]:
        shown = super().shown(made, drawn)
        if made.arm == "variance":
            worst = next(iter(drawn.scores.values())).argsort(descending=True)[:_WORST]
            shown[".worst"] = quantised(drawn.x[worst])
        return shown

    def last(
        self, out: Path, learn: Callable[..., MLP | UNet], real: Sequence[Tensor | None], place: Path
    ) -> dict[str, Tensor]:
        """The labels of the digits shown; and the model of the real data, for a chapter to draw from: its checkpoint is there,
        so nothing is trained again."""
        if self.keeps_first:
            first = learn(real[0], 1, place / "1" / "checkpoint.safetensors", real[1])
            weights = {k: v.half() for k, v in first.state_dict().items()}
            once(write_tensors, out / "model.safetensors", weights, {"card": self.hash})
        assert real[1] is not None
        return {"label": real[1][:_SHOWN]}


@dataclass(frozen=True)
class PostHocDigitsExperiment(DigitsExperiment):
    """Figures 8c and 16 of the paper: digits, filtered by the post hoc form of the measure over t = 100 to 150 of 500. The
    laptop's has a fifth of the digits and a tenth of the sampler's steps."""

    window: tuple[int, int] = (100, 150)
    generations: int = 5
    values: int = field(default=10, metadata={"added": True})  # of t

    def _smaller(self, scale: str) -> dict[str, Any]:
        smaller = super()._smaller(scale)
        if scale == "laptop":
            smaller |= {"n": 12_000, "steps": 7_500, "respace": 50}
        return smaller | {"draw": self.draw * smaller["n"] // self.n}

    def metric(self) -> Metric:
        return PostHocVariance(self.window, self.values)


@dataclass(frozen=True)
class CuredDigitsExperiment(DigitsExperiment):
    """The same generations with nothing dropped, of which one thing is changed: the sampler's steps or variance, the guidance,
    or what stands beside samples in what a generation learns from (see `recurse`). They draw as many, so that they share the
    first generation's luck, and end sooner: by the fourth the plain chain has lost nearly all of its variety."""

    keeps_first: ClassVar[bool] = False  # it is that of `mnist`
    generations: int = 4
    arms: tuple[tuple[str, float], ...] = (("none", 0.0),)
    finer: int = 1  # so many times as many steps; the paper's card takes all of them anyway
    variance: str = "small"
    real: float = 0.0
    accumulate: bool = False

    def _smaller(self, scale: str) -> dict[str, Any]:
        smaller = super()._smaller(scale)
        return smaller | {"respace": smaller["respace"] * self.finer}

    def samplers(self) -> dict[str, Sampler]:
        return {self.variance: ddpm(self.variance, self.respace)}

    def recursion(self) -> dict[str, Any]:
        return super().recursion() | {"real": self.real, "accumulate": self.accumulate}
