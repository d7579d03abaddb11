"""Experiments on images: Simple Shapes, drawn hands, photographs of hands."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from ..core import _check
from ..core._typing import Net, Tensor
from ..core.noise import stream
from ..core.sampling import Sampler, chunks, ddim, ddpm, sample
from ..core.unet import UNet
from ..data.hands import HandPhotos, Hands
from ..data.images import Images, quantised
from ..data.local import LocalDenoiser
from ..data.shapes import DOUBLE, IN_SUPPORT, SimpleShapes
from ..measure.denoising import PostHocVariance, denoising_error
from ..measure.stats import fraction_by_kind
from ..store.files import load_weights, once, read_json, write_json, write_tensors
from .draws import ImageDraw
from .experiment import Experiment, Lab, folder, spent
from .recorders import Settling

if TYPE_CHECKING:
    from .artifact import Artifact

_SETTLED = 64  # images of which is noted when their predictions settle
DENOISED = (5, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700)  # t of the denoising error


@dataclass(frozen=True)
class ImageExperiment(Experiment):
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
    stages: ClassVar[int] = 8  # of a training, at the end of each of which some images are drawn
    drawn_at_stage: ClassVar[int] = 500  # so many: an interval of nine points at one half

    def _smaller(self, scale: str) -> dict[str, Any]:
        small: dict[str, Any] = {"size": 32, "widths": (32, 64, 64), "attention": (4,), "blocks": 1, "stem": 2, "ema": 0.999}
        if scale == "smoke":
            tiny = {"widths": (8, 16), "attention": (8,), "batch_size": 16, "steps": 40, "samples": 40, "respace": 20}
            return small | tiny | {"n": min(self.n, 200)}
        return small | {"steps": 20_000, "batch_size": 32, "lr": 1.5e-3, "samples": 2_000, "respace": 100}

    @abstractmethod
    def data(self) -> Images: ...

    def net(self, seed: int, purpose: str = "weights") -> UNet:
        return UNet(
            self.channels, self.size, self.widths, self.blocks, self.attention, self.stem, self.classes,
            self.schedule() if self.velocity else None, generator=stream(seed, purpose),
        )  # fmt: skip

    def samplers(self) -> dict[str, Sampler]:
        few = self.respace
        return {"small": ddpm("small", few), "ddim": ddim(sample_steps=few), "full": ddpm("small")}

    @property
    def sample_steps(self) -> int | None:
        return self.respace

    def drawn_by(self, sampler: str) -> int:
        """How many images."""
        return self.samples if sampler == "small" else max(self.samples // 8, 1)

    def kept(self, sampler: str, keep: tuple[int, int | None]) -> tuple[int, int | None]:
        """Of how many images an artifact keeps scores, and of how many of these the picture; see `ImageDraw.tensors`."""
        return keep if sampler == "small" else (0, keep[1])

    def beside(self, lab: Lab, net: Net, draw: ImageDraw, sampler: str) -> dict[str, Tensor]:
        """What an artifact keeps of a draw beside what every experiment keeps."""
        return {}

    def fit_options(self) -> dict[str, Any]:
        return super().fit_options() | {"ema": self.ema}

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" and super().compiles(device)  # a processor gains nothing by it with images

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        data, schedule, out = self.data(), self.schedule(), folder(lab.root, self, lab.seed)
        ends = [-(-self.steps * stage // self.stages) for stage in range(1, self.stages + 1)]
        net, stages = self.training(lab, ends)
        metrics: dict[str, Any] = {"by_step": []}
        for stage, (end, run) in enumerate(zip(ends, stages, strict=True), 1):
            # A stage's draw is kept, so that a run that is resumed does not repeat it.
            runs = folder(lab.runs, self, lab.seed)
            kept = runs / f"stage-{self.training_hash}-{self.respace}-{stage}.json"
            if not kept.exists():
                if run.step != end:
                    raise _check.TinyhallError(
                        f"checkpoint: expected one of at most {end} steps, at which images are to be drawn, got {run.step} in "
                        f"{runs / 'checkpoint.safetensors'}; move it away to train anew"
                    )
                count, generator = min(self.samples, self.drawn_at_stage), lab.stream(f"stage/{stage}")
                drawn = sample(net, schedule, count, sampler=self.sampler(), generator=generator, progress=lab.progress)
                fractions = fraction_by_kind(data.judge(drawn.x).kind, data.kinds)
                once(write_json, kept, {"step": run.step, "fraction": fractions})
            metrics["by_step"].append(read_json(kept))
        metrics["losses"] = run.losses
        began = time.perf_counter()
        weights = {k: v.half() for k, v in net.eval().state_dict().items()}
        once(write_tensors, out / "model.safetensors", weights, {"card": self.hash})
        load_weights(net, out / "model.safetensors")  # what is drawn is drawn by the weights that are kept
        once(write_json, out / "metrics.json", metrics | self.drawn(lab, net, samplers, keep))
        return spent(run, began)

    def drawn(self, lab: Lab, net: Net, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        data, schedule, out, metrics = self.data(), self.schedule(), folder(lab.root, self, lab.seed), dict[str, Any]()
        for name in samplers:
            generator, config = lab.stream("samples"), lab.sampling(self.samplers()[name])
            draw = ImageDraw.make(net, data, schedule, self.drawn_by(name), generator=generator, config=config)
            metrics[name] = draw.report(self.removes)
            tensors = draw.tensors(*self.kept(name, keep)) | self.beside(lab, net, draw, name)
            if name == "small":
                error = denoising_error(net, schedule, draw.x[: keep[0]], DENOISED, generator=lab.stream("denoising"))
                tensors |= {"log10_denoising": error.log10().half(), "denoised_at": torch.tensor(DENOISED)}
            known = {"card": self.hash, "sampler": name}
            once(write_tensors, out / f"samples-{name}.safetensors", tensors, known)
        return metrics


@dataclass(frozen=True)
class ShapesExperiment(ImageExperiment):
    """A model of Simple Shapes."""

    velocity: ClassVar[bool] = False  # its stored runs were made so; another would be another model

    def data(self) -> SimpleShapes:
        return SimpleShapes(size=self.size)


@dataclass(frozen=True)
class SimpleShapesExperiment(ShapesExperiment):
    """Simple Shapes as the paper has them: 64 x 64 pixels, a cosine schedule of 1,000 steps, 250 of which are sampled, 7,500
    images scored over t in [700, 850). Of the network's size and its training the paper says nothing; the laptop's has 624,000
    parameters, trains for an hour and a half on one core in bfloat16, and draws 640 images."""

    velocity: ClassVar[bool] = True
    stages: ClassVar[int] = 6
    drawn_at_stage: ClassVar[int] = 40
    post_hoc: ClassVar[tuple[tuple[int, int], ...]] = ((0, 100), (500, 700), (600, 900), (700, 850))
    samples: int = 7_500
    respace: int = 250
    window: tuple[int, int] = (700, 850)
    curve: str = field(default="cosine", metadata={"added": True})

    def _smaller(self, scale: str) -> dict[str, Any]:
        if scale == "smoke":
            return super()._smaller(scale) | {"window": (300, 850)}
        small = {"widths": (32, 64, 128), "attention": (8,), "blocks": 1, "stem": 2, "ema": 0.999}
        return small | {"steps": 18_000, "batch_size": 32, "lr": 8e-4, "samples": 640}

    def drawn_by(self, sampler: str) -> int:
        shares = {"small": 1, "ddim": 2, "full": 20}  # an image takes the last a thousand calls
        return max(self.samples // shares[sampler], 1)

    def kept(self, sampler: str, keep: tuple[int, int | None]) -> tuple[int, int | None]:
        return self.samples, 300 if sampler == "small" else 32  # a picture has 4 kB, and a few are shown

    def beside(self, lab: Lab, net: Net, draw: ImageDraw, sampler: str) -> dict[str, Tensor]:
        """The measure's second form, by which the paper's filter of digits goes, with a noise for each t and with one; white
        pixels, the plainest detector; when predictions settle (Figs. 18 and 19); and what some doubles and others were on
        their way."""
        schedule, kind = self.schedule(), draw.verdict["kind"]
        kept = {"white": (draw.x > 0).flatten(1).sum(1).short()}
        if sampler != "small":
            return kept
        kept["post_hoc_windows"] = torch.tensor(self.post_hoc)
        for name, one in (("post_hoc", False), ("post_hoc_one", True)):
            metrics = [PostHocVariance(window, one_noise=one) for window in self.post_hoc]
            scores = [m.of(net, schedule, draw.x, generator=lab.stream("post hoc")) for m in metrics]
            kept[f"log10_{name}"] = torch.stack(scores, 1).clamp_min(1e-12).log10().half()
        settling = Settling(_SETTLED)
        config = replace(lab.sampling(self.sampler()), shape=draw.x.shape[1:], batch_size=_SETTLED)
        for _ in chunks(net, schedule, _SETTLED, metrics=[settling], generator=lab.stream("samples"), config=config):
            kept |= {"changed": settling.changed().half(), "changed_t": torch.tensor(settling.t)}
        traced = kind[draw.trace_rows]
        rows = torch.cat([(traced == k).nonzero()[:most, 0] for k, most in ((DOUBLE, 6), (IN_SUPPORT, 3))])
        return kept | {"way_of": draw.trace_rows[rows], "ways": quantised(draw.traces[rows])}


def forms(run: Artifact, window: tuple[int, int]) -> dict[str, tuple[str, Tensor]]:
    """The logarithm of the paper's measure over a window, in each form that an artifact of `SimpleShapesExperiment` holds: the
    sampler of the images, and a score for each; post hoc over the windows of `post_hoc` alone."""
    out = {}
    for sampler, name in (("small", "DDPM run"), ("ddim", "DDIM run")):
        kept = run.samples(sampler)
        out[name] = (sampler, kept["log10_mean"][:, kept["windows"].tolist().index(list(window))].double())
    kept = run.samples("small")
    for key, name in (("log10_post_hoc", "post hoc, fresh noise"), ("log10_post_hoc_one", "post hoc, one noise")):
        if list(window) in kept["post_hoc_windows"].tolist():
            out[name] = ("small", kept[key][:, kept["post_hoc_windows"].tolist().index(list(window))].double())
    return out


def fifths(white: Tensor) -> Tensor:
    """Images sorted into five groups of about equal white area, by index."""
    return torch.bucketize(white.double(), white.double().quantile(torch.arange(0.2, 0.9, 0.2, dtype=torch.float64)))


@dataclass(frozen=True)
class LocalShapesExperiment(SimpleShapesExperiment):
    """Simple Shapes drawn by near-sighted denoisers in closed form, one for each width of a patch: nothing is trained, and no
    weights are written. On a laptop a second an image and patch."""

    samples: int = 500
    patches: tuple[int, ...] = (9, 13, 17, 21, 25, 33)
    late: ClassVar[frozenset[str]] = SimpleShapesExperiment.late | {"patches"}

    def _smaller(self, scale: str) -> dict[str, Any]:
        if scale == "smoke":
            return super()._smaller(scale) | {"n": 50, "samples": 4, "patches": (7, 9)}
        return {"n": 1_000, "respace": 50, "patches": (13, 21)}

    def net(self, seed: int, purpose: str = "weights") -> NoReturn:
        raise _check.fail("experiment", self.name, "one with a network, and not a `LocalDenoiser` in its place")

    def samplers(self) -> dict[str, Sampler]:
        return {f"patch{patch}": ddpm("small", self.respace) for patch in self.patches}

    def drawn_by(self, sampler: str) -> int:
        return self.samples

    def differences(self) -> list[str]:
        return [*super().differences(), "local denoisers in closed form instead of a network"]

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        images, _ = self.real_data(lab.seed)
        began, out, metrics = time.perf_counter(), folder(lab.root, self, lab.seed), dict[str, Any]()
        for name in samplers:
            # A patch's draw is kept, so that a run that is resumed does not repeat it.
            kept = folder(lab.runs, self, lab.seed) / f"{self.training_hash}-{self.respace}-{self.samples}-{name}.json"
            if not kept.exists() or not (out / f"samples-{name}.safetensors").exists():
                local = LocalDenoiser(images.to(lab.device), self.schedule(), int(name.removeprefix("patch")))
                once(write_json, kept, self.drawn(lab, local, [name], keep)[name])
            metrics[name] = read_json(kept)
        once(write_json, out / "metrics.json", metrics)
        return {"train_seconds": 0.0, "precision": "float32", "sample_seconds": round(time.perf_counter() - began, 1)}


@dataclass(frozen=True)
class HandsExperiment(ImageExperiment):
    """A model of drawn hands. At "paper" 128 x 128 pixels, for a GPU; the laptop's 64 x 64 pixels train until the fraction of
    wrong hands no longer falls: four minutes on an H200, three to five hours, reckoned from fewer steps, on two cores."""

    channels: ClassVar[int] = 3
    size: int = 128
    widths: tuple[int, ...] = (128, 128, 256, 256, 256)

    def _smaller(self, scale: str) -> dict[str, Any]:
        wide = {"size": 64, "widths": (16, 48, 64), "attention": (8,), "steps": 48_000, "samples": 1_000}
        return super()._smaller(scale) | (wide if scale == "laptop" else {})

    @property
    def removes(self) -> float:
        return 0.8

    def data(self) -> Hands | HandPhotos:
        return Hands(self.size)


@dataclass(frozen=True)
class HandPhotosExperiment(HandsExperiment):
    """The same model of the photographs of 11k Hands, which lie where TINYHALL_HANDS says, or else in `11k-hands`."""

    def data(self) -> HandPhotos:
        return HandPhotos(os.environ.get("TINYHALL_HANDS", "11k-hands"), self.size)
