"""What every experiment answers for itself, and where one is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any, ClassVar

import torch

from ..core import _check
from ..core._typing import Float, Int, Net, Tensor
from ..core.metrics import Metric, TrajectoryVariance
from ..core.mlp import MLP
from ..core.noise import stream
from ..core.sampling import SampleConfig, Sampler, ddim
from ..core.schedule import Schedule
from ..core.training import Run
from ..core.unet import UNet
from ..data.images import Dataset
from ..store.checkpoint import fit

SCALES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Lab:
    """Where an experiment is run, and by which seed."""

    seed: int
    root: Path  # of artifacts
    runs: Path  # of checkpoints
    device: torch.device
    progress: bool = True

    def stream(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        return stream(self.seed, purpose, device)

    def sampling(self, sampler: Sampler) -> SampleConfig:
        return SampleConfig(sampler=sampler, device=self.device, progress=self.progress)


def folder(root: str | Path, experiment: Experiment, seed: int) -> Path:
    """Where under a root what belongs to a seed of an experiment lies."""
    return Path(root) / f"{experiment.name}-{experiment.scale}" / f"seed{seed}"


@dataclass(frozen=True)
class Experiment(ABC):
    """One experiment: how a model is trained, how much is drawn from it, and what is said of that. Whoever runs it asks it, and
    never what kind it is: a new kind is a class, with `data`, `net`, `_smaller`, `samplers` and `make`."""

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

    def at(self, scale: str) -> Experiment:
        """The same experiment at "smoke" (seconds), "laptop" (minutes to hours on 2 CPU cores) or "paper".

        Raises:
            TinyhallError: another name.
        """
        if scale not in SCALES:
            raise _check.fail("scale", scale, f"one of {', '.join(SCALES)}")
        if self.scale == scale:
            return self
        if self.scale != "paper":
            raise _check.TinyhallError(f"scale: expected the paper's experiment, got one at {self.scale}")
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
        """Of all fields: an artifact carries that of the experiment that made it."""
        return _digest(self._fields())

    @property
    def training_hash(self) -> str:
        """Of the fields that decide the weights: a checkpoint outlives a change of what is drawn from it."""
        return _digest({k: v for k, v in self._fields().items() if k not in self.late})

    def _fields(self) -> dict[str, Any]:
        """What is hashed. A field that was added once artifacts were stored counts where it is not at its default."""
        added = {f.name: f.default for f in dataclasses.fields(self) if "added" in f.metadata}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in added or v != added[k]}

    # --- how it is run

    @abstractmethod
    def samplers(self) -> dict[str, Sampler]:
        """The samplers whose draws an artifact holds, by name; the first is the one that is meant where none is named."""

    @property
    def sample_steps(self) -> int | None:
        """Of the sampler; None for all."""
        return None

    @property
    def removes(self) -> float:
        """The share of the hallucinated that the paper removes here; what that costs is what a detection is judged by."""
        return 0.95

    @property
    def drawing_hash(self) -> str:
        """Of what decides the samples, and not how many there are: the weights, and the sampler's steps."""
        return self.training_hash + ("" if self.sample_steps is None else f"-{self.sample_steps}")

    def sampler(self, noiseless: bool = False) -> Sampler:
        """The first of `samplers`; or DDIM with as many steps."""
        return ddim(sample_steps=self.sample_steps) if noiseless else next(iter(self.samplers().values()))

    @property
    def guidance(self) -> float | None:
        """Weight of classifier-free guidance; None for networks without classes."""
        return None

    def features(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n d"]:
        """What samples are compared by: points and shapes are as they are."""
        return x.flatten(1)

    def metric(self) -> Metric:
        """The score that samples are sorted by."""
        return TrajectoryVariance(self.window)

    def real_data(self, seed: int) -> tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"] | None]:
        """What is learned, and its labels, if any."""
        return self.data().sample(self.n, stream(seed, "data")), None

    def fit_options(self) -> dict[str, Any]:
        """How `fit` is called, beside network, data, schedule and generator."""
        return {"batch_size": self.batch_size, "lr": self.lr, "every": min(500, self.steps), "note": self.training_hash}

    def compiles(self, device: torch.device) -> bool:
        """Compiling takes half a minute: worth it from some thousand steps on."""
        on_processor = device.type == "cpu" and any(which(program) for program in ("c++", "g++", "clang++"))
        return self.steps >= 5000 and (device.type == "cuda" or on_processor)

    def differences(self) -> list[str]:
        """What a caption has to name beside n, steps and batch, because it is not the paper's."""
        usual = type(self).timesteps
        return [] if self.timesteps == usual else [f"T = {self.timesteps:,} instead of {usual:,}"]

    def fitted(
        self,
        net: MLP | UNet,
        data: Tensor,
        generator: torch.Generator,
        checkpoint: Path,
        *,
        label: Tensor | None = None,
        train_steps: int | None = None,
        progress: bool = True,
    ) -> Run:
        return fit(
            net, data, self.schedule(), train_steps=train_steps or self.steps, generator=generator, label=label,
            checkpoint=checkpoint, compile=self.compiles(generator.device), progress=progress, **self.fit_options(),
        )  # fmt: skip

    def training(self, lab: Lab, ends: Sequence[int]) -> tuple[MLP | UNet, Iterator[Run]]:
        """The network, and its training in stages that end at those steps: at each end it holds the weights to sample with."""
        data, _ = self.real_data(lab.seed)
        net = self.net(lab.seed).to(lab.device)
        checkpoint = folder(lab.runs, self, lab.seed) / "checkpoint.safetensors"

        def run() -> Iterator[Run]:
            for end in ends:
                generator = lab.stream("training", lab.device)
                yield self.fitted(net, data, generator, checkpoint, train_steps=end, progress=lab.progress)

        return net, run()

    def trained(self, lab: Lab) -> tuple[MLP | UNet, Run]:
        """The network as it was trained, or goes on to be from its checkpoint."""
        net, stages = self.training(lab, [self.steps])
        return net, next(stages)

    @abstractmethod
    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        """Trains, draws with those samplers, judges and scores: writes weights, samples and `metrics.json`. Returns what was
        spent. `keep` is how many samples of images are kept, and how many of them as pictures (None for all of these)."""

    def drawn(self, lab: Lab, net: Net, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        """The second half of `make`, of a network that is there: draws, writes samples, returns the figures by sampler."""
        raise _check.fail("experiment", self.name, "one of a single model")


def spent(run: Run, began: float) -> dict[str, Any]:
    """What an artifact says of the time."""
    precision = "bfloat16" if run.config.bf16 else "float32"
    return {
        "train_seconds": round(run.seconds, 1), "precision": precision, "sample_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
