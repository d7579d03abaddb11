"""Experiments as cards: one frozen dataclass each, its defaults the paper's, smaller ones by `.at(scale)`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from . import _check
from .datasets import MNIST, GaussianMixture, HandPhotos, Hands, SimpleShapes
from .filtering import needed
from .nets import MLP, UNet
from .schedule import Schedule

C = TypeVar("C", bound="Card")
Dataset = GaussianMixture | SimpleShapes | Hands | HandPhotos | MNIST
SCALES = ("smoke", "laptop", "paper")


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose ("data", "weights", "training", "samples") of a run, independent of the others."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


@dataclass(frozen=True)
class Card(ABC):
    """What every experiment says: how a model is trained, and how much is drawn from it."""

    name: str
    n: int = 50_000
    steps: int = 50_000
    batch_size: int = 10_000  # the whole set where n is smaller
    lr: float = 1e-3
    timesteps: int = 1000
    beta_start: float = 1e-3
    beta_end: float = 0.2
    samples: int = 10_000_000  # by each sampler
    window: tuple[int, int] = (0, 10)  # the paper's; the report sweeps others beside it
    scale: str = "paper"
    curve: str = field(default="linear", metadata={"added": True})  # of alpha_bar: "linear" in beta, or "cosine", without betas
    late: ClassVar[frozenset[str]] = frozenset({"samples", "window"})  # fields that decide nothing about the weights

    def at(self: C, scale: str) -> C:
        """The same experiment at "smoke" (seconds), "laptop" (minutes to hours on 2 CPU cores) or "paper".

        Raises:
            TinyhallError: another name.
        """
        if scale not in SCALES:
            raise _check.fail("scale", scale, f"one of {', '.join(SCALES)}")
        if self.scale == scale:
            return self
        if self.scale != "paper":
            raise _check.TinyhallError(f"scale: expected the paper's card, got one at {self.scale}")
        return dataclasses.replace(self, scale=scale, **self._smaller(scale))

    @abstractmethod
    def _smaller(self, scale: str) -> dict[str, Any]:
        """The fields in which "smoke" or "laptop" differs."""

    @abstractmethod
    def data(self) -> Dataset:
        """What is learned."""

    @abstractmethod
    def net(self, seed: int, purpose: str = "weights") -> MLP | UNet:
        """The network as a run of that seed starts with it."""

    def schedule(self) -> Schedule:
        if self.curve == "cosine":
            return Schedule.cosine(self.timesteps)
        return Schedule.linear(self.beta_start, self.beta_end, self.timesteps)

    @property
    def hash(self) -> str:
        """Of all fields: an artifact carries that of the card that made it."""
        return _digest(self._fields())

    @property
    def training_hash(self) -> str:
        """Of the fields that decide the weights: a checkpoint outlives a change of what is drawn from it."""
        return _digest({k: v for k, v in self._fields().items() if k not in self.late})

    def _fields(self) -> dict[str, Any]:
        """What is hashed. A field that was added once artifacts were stored counts where it is not at its default."""
        added = {f.name: f.default for f in dataclasses.fields(self) if "added" in f.metadata}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in added or v != added[k]}


@dataclass(frozen=True)
class GaussianCard(Card):
    """A model of a Gaussian mixture. `samples` are drawn for fixed large and for fixed small variance, a tenth without noise.

    Expected at the paper's scale, on 2 CPU cores: one to one and a half hours of training at 80 ms a step and batch 10,000.
    """

    layout: str = "line"  # or "grid", "grid3" (of 9 modes), "diamond", "diamond-spaced"
    means: tuple[float, ...] = ()  # of a line
    blocks: int = 3
    shared: bool = True

    def _smaller(self, scale: str) -> dict[str, Any]:
        if scale == "smoke":
            return {"n": min(self.n, 2_000), "steps": 400, "batch_size": 500, "samples": min(self.samples, 2_000)}
        smaller = {"steps": self.steps // 5, "batch_size": 2_500}
        if self.layout == "line":
            return smaller | {"samples": self.samples // 10}
        return smaller | {"samples": self.samples // 4} | self._head()

    def _head(self) -> dict[str, Any]:
        """The first hundreds of steps that hold all but 1e-4 of the signal, unchanged.

        Of the paper's 1000 these are 300; the others lead from noise to noise, and take 7 in 10 of all training and sampling.
        """
        signal = int((self.schedule().alpha_bar >= 1e-4).sum())
        steps = min(-(-(signal + 1) // 100) * 100, self.timesteps)
        slope = (self.beta_end - self.beta_start) / (self.timesteps - 1)
        return {"timesteps": steps, "beta_end": self.beta_start + slope * (steps - 1)}

    def data(self) -> GaussianMixture:
        if self.layout == "line":
            return GaussianMixture.line(self.means)
        if self.layout.startswith("grid"):
            return GaussianMixture.grid(side=3 if self.layout == "grid3" else 5)
        return GaussianMixture.diamond(same_spacing=self.layout == "diamond-spaced")

    def net(self, seed: int, purpose: str = "weights") -> MLP:
        return MLP(self.data().dim, blocks=self.blocks, shared=self.shared, generator=stream(seed, purpose))


@dataclass(frozen=True)
class TightCard(GaussianCard):
    """The 25 modes on which arXiv 2605.06831 compares samplers, 100 std apart, not 40; its schedule, and a network of its size,
    64 wide. There time is added once, at the input, and the rate falls to a tenth; here it is the MLP of all other cards, and
    its rate."""

    def data(self) -> GaussianMixture:
        return GaussianMixture.grid(std=0.02)

    def net(self, seed: int, purpose: str = "weights") -> MLP:
        return MLP(2, 64, self.blocks, self.shared, stream(seed, purpose))


@dataclass(frozen=True)
class ImageCard(Card):
    """A U-Net's model of images. The weights kept are their moving average.

    The paper does not say how its networks for images were trained. At "paper" this is a U-Net of ADM's proportions (18 M
    parameters), for a GPU; the laptop's is small and works on 32 x 32 pixels.
    """

    n: int = 5_000
    steps: int = 100_000
    batch_size: int = 128
    lr: float = 1e-4
    beta_start: float = 1e-4
    beta_end: float = 0.02
    samples: int = 10_000
    size: int = 64
    widths: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2
    attention: tuple[int, ...] = (16, 8)
    stem: int = 1
    ema: float = 0.9999
    respace: int = 1000  # steps of the sampler
    late: ClassVar[frozenset[str]] = frozenset({"samples", "window", "respace"})
    velocity: ClassVar[bool] = True  # the last layer predicts v; see `UNet`
    channels: ClassVar[int] = 1
    classes: ClassVar[int | None] = None

    def _smaller(self, scale: str) -> dict[str, Any]:
        small: dict[str, Any] = {"size": 32, "widths": (32, 64, 64), "attention": (4,), "blocks": 1, "stem": 2, "ema": 0.999}
        if scale == "smoke":
            tiny = {"widths": (8, 16), "attention": (8,), "batch_size": 16, "steps": 40, "samples": 40, "respace": 20}
            return small | tiny | {"n": min(self.n, 200)}
        return small | {"steps": 20_000, "batch_size": 32, "lr": 1.5e-3, "samples": 2_000, "respace": 100}

    @abstractmethod
    def data(self) -> SimpleShapes | Hands | HandPhotos | MNIST: ...

    def net(self, seed: int, purpose: str = "weights") -> UNet:
        return UNet(
            self.channels, self.size, self.widths, self.blocks, self.attention, self.stem, self.classes,
            self.schedule() if self.velocity else None, generator=stream(seed, purpose),
        )  # fmt: skip


@dataclass(frozen=True)
class ShapesCard(ImageCard):
    """A model of Simple Shapes."""

    velocity: ClassVar[bool] = False  # its stored runs were made so; another would be another model

    def data(self) -> SimpleShapes:
        return SimpleShapes(size=self.size)


@dataclass(frozen=True)
class SimpleShapesCard(ShapesCard):
    """Simple Shapes as the paper has them: 64 x 64 pixels, a cosine schedule of 1,000 steps, 250 of which are sampled, 7,500
    images scored over t in [700, 850). Of the network's size and its training the paper says nothing; the laptop's has 624,000
    parameters and trains for two hours on one core in bfloat16."""

    velocity: ClassVar[bool] = True
    samples: int = 7_500
    respace: int = 250
    window: tuple[int, int] = (700, 850)
    curve: str = field(default="cosine", metadata={"added": True})

    def _smaller(self, scale: str) -> dict[str, Any]:
        if scale == "smoke":
            return super()._smaller(scale) | {"window": (300, 850)}
        small = {"widths": (32, 64, 128), "attention": (8,), "blocks": 1, "stem": 2, "ema": 0.999}
        return small | {"steps": 24_000, "batch_size": 32, "lr": 8e-4}


@dataclass(frozen=True)
class HandsCard(ImageCard):
    """A model of drawn hands. At "paper" 128 x 128 pixels, for a GPU; the laptop's 64 x 64 pixels train until the fraction of
    wrong hands no longer falls: four minutes on an H200, three to five hours, reckoned from fewer steps, on two cores."""

    channels: ClassVar[int] = 3
    size: int = 128
    widths: tuple[int, ...] = (128, 128, 256, 256, 256)

    def _smaller(self, scale: str) -> dict[str, Any]:
        wide = {"size": 64, "widths": (16, 48, 64), "attention": (8,), "steps": 48_000, "samples": 1_000}
        return super()._smaller(scale) | (wide if scale == "laptop" else {})

    def data(self) -> Hands | HandPhotos:
        return Hands(self.size)


@dataclass(frozen=True)
class HandPhotosCard(HandsCard):
    """The same model of the photographs of 11k Hands, which lie where TINYHALL_HANDS says, or else in `11k-hands`."""

    def data(self) -> HandPhotos:
        return HandPhotos(os.environ.get("TINYHALL_HANDS", "11k-hands"), self.size)


@dataclass(frozen=True)
class Generations:
    """Generations of models, each trained on what the last one drew. `n` samples are kept every time."""

    generations: int = 5
    # (arm, share dropped): the paper drops 2,500 of 102,500.
    arms: tuple[tuple[str, float], ...] = (("none", 0.0), ("random", 2_500 / 102_500), ("variance", 2_500 / 102_500))
    draw: int = 102_500
    score: str = "variance"  # what the arm of that name drops by; "oracle" knows the hallucinated and drops no others
    late: ClassVar[frozenset[str]] = frozenset({"samples", "generations", "arms", "draw"})  # the window filters what is learned

    def _drawn(self, n: int) -> int:
        """How many the arm that drops most must draw to keep n."""
        return max(needed(n, drop) for _, drop in self.arms)


@dataclass(frozen=True)
class RecursionCard(Generations, GaussianCard):
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


@dataclass(frozen=True)
class ShapesRecursionCard(Generations, ShapesCard):
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


@dataclass(frozen=True)
class DigitsCard(Generations, ImageCard):
    """Generations of class-conditional models of MNIST, with classifier-free guidance: the paper's last experiment.

    At "paper" what the paper says (T = 500, 50 epochs at 1e-4, 65,000 drawn and 60,000 kept), and a network and a guidance of
    ours, on which it is silent: 16 trainings, for a GPU. The laptop's keeps the ratio and has fewer digits, a smaller network
    and a twentieth of the sampler's steps: about 8 minutes a model on one core.
    """

    classes: ClassVar[int | None] = 10
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


@dataclass(frozen=True)
class CuredDigitsCard(DigitsCard):
    """The same generations with nothing dropped, of which one thing is changed: the sampler's steps or variance, the guidance,
    or what stands beside samples in what a generation learns from (see `recurse`). They draw as many, so that they share the
    first generation's luck, and end sooner: by the fourth the plain chain has lost nearly all of its variety."""

    generations: int = 4
    arms: tuple[tuple[str, float], ...] = (("none", 0.0),)
    finer: int = 1  # so many times as many steps; the paper's card takes all of them anyway
    variance: str = "small"
    real: float = 0.0
    accumulate: bool = False

    def _smaller(self, scale: str) -> dict[str, Any]:
        smaller = super()._smaller(scale)
        return smaller | {"respace": smaller["respace"] * self.finer}


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _line(name: str, means: Sequence[float], **fields: Any) -> GaussianCard:
    return GaussianCard(name, layout="line", means=tuple(float(m) for m in means), **fields)


def _plane(layout: str, **fields: Any) -> GaussianCard:
    """The paper's 25 modes: n = 100,000 for 10,000 epochs of 10 batches."""
    return GaussianCard(layout, layout=layout, n=100_000, steps=100_000, samples=200_000, **fields)


def _shapes(name: str, **fields: Any) -> ShapesCard:
    return ShapesCard(name, window=(0, 200), **fields)


def _recursion(name: str, **fields: Any) -> RecursionCard:
    return RecursionCard(name, layout="grid", n=100_000, steps=100_000, samples=0, **fields)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        # The paper's main figure: n = 50,000 for 10,000 epochs of 5 batches.
        _line("line123", (1, 2, 3)),
        # The same steps at other n: the paper keeps epochs, so that its n = 20,000 sees 20,000 steps.
        _line("line123-n20000", (1, 2, 3), n=20_000),
        _line("line123-n5000", (1, 2, 3), n=5_000),
        _line("line123-n1000", (1, 2, 3), n=1_000),
        # Modes at two distances: 1-2 and 4-5 are neighbours, 2-4 are not.
        _line("line1245", (1, 2, 4, 5)),
        # Two neighbours, and one apart (Fig. 2c, d).
        _line("line124", (1, 2, 4)),
        # What the paper's code does by accident of `[block] * n`, undone.
        _line("line123-separate", (1, 2, 3), shared=False),
        _line("line123-T250", (1, 2, 3), timesteps=250, beta_start=4e-3, beta_end=0.8),
        _plane("grid"),
        _plane("diamond"),
        # The paper's rotation also shrinks: this one does not.
        _plane("diamond-spaced"),
        TightCard(
            "grid-tight", layout="grid", n=100_000, steps=100_000, samples=200_000, beta_start=1e-4, beta_end=0.02, shared=False
        ),
        _shapes("shapes"),
        # The same steps at other n.
        _shapes("shapes-n500", n=500),
        _shapes("shapes-n2000", n=2_000),
        _shapes("shapes-n20000", n=20_000),
        SimpleShapesCard("simple-shapes"),
        HandsCard("hands", window=(0, 100)),
        HandsCard("hands-n500", n=500, window=(0, 100)),  # the same steps
        HandPhotosCard("hand-photos", window=(0, 100)),
        ShapesRecursionCard("shapes-recursion", n=5_000, draw=5_556, samples=0, window=(0, 20)),  # chapter 3 chose it
        DigitsCard("mnist"),
        CuredDigitsCard("mnist-fine", finer=4),
        CuredDigitsCard("mnist-wide", variance="large"),
        CuredDigitsCard("mnist-unguided", guidance=1.0),
        CuredDigitsCard("mnist-real50", real=0.5),
        CuredDigitsCard("mnist-accumulated", accumulate=True),
        _recursion("recursion"),
        # How much must the filter drop? The 10% arm needs more samples than the paper draws.
        _recursion("recursion-sweep", arms=(("variance", 0.01), ("variance", 0.05), ("variance", 0.1)), draw=111_111),
        # What a perfect filter would do: its share only has to exceed the hallucinated.
        _recursion("recursion-oracle", arms=(("variance", 0.2),), draw=125_000, score="oracle"),
        # On this schedule the exact denoiser keeps the width of a mode to 1%, where on the paper's it keeps 62%.
        _recursion("recursion-fine", arms=(("none", 0.0),), beta_start=5e-5, beta_end=0.02),
    )
}


def get(name: str, scale: str | None = None) -> Card:
    """The card of that name; without a scale, at TINYHALL_SCALE, or else the paper's.

    Raises:
        TinyhallError: an unknown name or scale.
    """
    if name not in CARDS:
        raise _check.fail("card", name, f"one of {', '.join(CARDS)}")
    return CARDS[name].at(scale or os.environ.get("TINYHALL_SCALE", "paper"))
