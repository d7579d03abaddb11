"""Experiments on points: mixtures of Gaussians on a line and in the plane."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..core import _check
from ..core._typing import Net
from ..core.mlp import MLP
from ..core.noise import stream
from ..core.sampling import Sampler, ddim, ddpm
from ..data.mixtures import GaussianMixture
from ..measure.density import Tabulated, sample_density
from ..store.files import once, write_json, write_tensors
from .draws import PointDraw
from .experiment import Experiment, Lab, folder, spent
from .summary import WIDTHS

SAMPLERS: dict[str, Sampler] = {
    "large": ddpm("large"),
    "small": ddpm("small"),
    "ddim": ddim(),
    "ddim-50": ddim(sample_steps=50),
}


@dataclass(frozen=True)
class GaussianExperiment(Experiment):
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

    def samplers(self) -> dict[str, Sampler]:
        return SAMPLERS

    @property
    def removes(self) -> float:
        return 0.95 if self.layout == "line" else 0.96

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        net, run = self.trained(lab)
        began, out = time.perf_counter(), folder(lab.root, self, lab.seed)
        once(write_tensors, out / "model.safetensors", dict(net.state_dict()), {"card": self.hash})
        metrics = {"losses": run.losses} | self.drawn(lab, net, samplers, keep)
        for name, exact in self.integrals(net, samplers).items():
            metrics[name]["integral"] = exact
        once(write_json, out / "metrics.json", metrics)
        return spent(run, began)

    def integrals(self, net: Net, samplers: Sequence[str]) -> dict[str, dict[str, float]]:
        """On a line, what lies beyond each width, as if all samples had been drawn; worth it from a hundred thousand on."""
        mixture, schedule, out = self.data(), self.schedule(), dict[str, dict[str, float]]()
        if mixture.dim == 1 and self.samples >= 100_000:
            fast = Tabulated(net, schedule.timesteps).to("cpu")  # worked out in double precision
            for name in sorted({"large", "small"} & set(samplers)):
                exact = sample_density(fast, schedule, sampler=self.samplers()[name])
                out[name] = {f"{w:g}": exact.outside(mixture.means[:, 0], w * mixture.std) for w in WIDTHS}
        return out

    def drawn(self, lab: Lab, net: Net, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        mixture, schedule, out = self.data(), self.schedule(), folder(lab.root, self, lab.seed)
        # The table costs as much as 16,000 samples: too much for a smoke run, nothing beside millions.
        tabulate = mixture.dim == 1 and self.samples >= 100_000
        fast = Tabulated(net, schedule.timesteps, device=lab.device) if tabulate else net
        metrics: dict[str, Any] = {}
        for name in samplers:
            sampler, noisy = self.samplers()[name], name in ("large", "small")
            # Without noise the rarest figures matter less, and a tenth of the samples gives them.
            count = self.samples if noisy else max(self.samples // 10, 1)
            generator, config = lab.stream("samples"), lab.sampling(sampler)
            draw = PointDraw.make(fast, mixture, schedule, count, generator=generator, config=config)
            metrics[name] = draw.report(self.removes)
            # No figure of a line needs the samples without noise, and they would be a fifth of all artifacts.
            if mixture.dim > 1 or noisy:
                known = {"card": self.hash, "sampler": name}
                once(write_tensors, out / f"samples-{name}.safetensors", draw.tensors(), known)
        return metrics


@dataclass(frozen=True)
class TightExperiment(GaussianExperiment):
    """The 25 modes on which arXiv 2605.06831 compares samplers, 100 std apart, not 40; its schedule, and a network of its size,
    64 wide. There time is added once, at the input, and the rate falls to a tenth; here it is the MLP of all other cards, and
    its rate."""

    def data(self) -> GaussianMixture:
        return GaussianMixture.grid(std=0.02)

    def net(self, seed: int, purpose: str = "weights") -> MLP:
        return MLP(2, 64, self.blocks, self.shared, stream(seed, purpose))


@dataclass(frozen=True)
class ExactExperiment(GaussianExperiment):
    """The exact denoiser of the mixture in the network's place: nothing is trained, and no weights are written."""

    samples: int = 100_000

    def net(self, seed: int, purpose: str = "weights") -> NoReturn:
        raise _check.fail("experiment", self.name, "one with a network, and not `data().denoiser(schedule())` in its place")

    def samplers(self) -> dict[str, Sampler]:
        return {"large": SAMPLERS["large"], "small": SAMPLERS["small"]}

    def differences(self) -> list[str]:
        return [*super().differences(), "the exact denoiser instead of a network"]

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        began, exact = time.perf_counter(), self.data().denoiser(self.schedule())
        metrics = self.drawn(lab, exact, samplers, keep)
        once(write_json, folder(lab.root, self, lab.seed) / "metrics.json", metrics)
        return {"train_seconds": 0.0, "precision": "float32", "sample_seconds": round(time.perf_counter() - began, 1)}
