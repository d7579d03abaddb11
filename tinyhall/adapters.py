"""Models that others built: score a diffusers pipeline while it runs, or take its network and schedule over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .core import _check
from .core._typing import Float, Int, Tensor
from .core.metrics import Metric, Step
from .core.schedule import Schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@contextmanager
def watch(scheduler: Any, *metrics: Metric) -> Iterator[None]:
    """Shows every step of a diffusers scheduler to the metrics, whatever pipeline drives it:

        metric = th.TrajectoryVariance((0, 100))
        with th.watch(pipeline.scheduler, metric):
            images = pipeline(batch_size=16).images
        metric.score()  # [16]

    The metrics start afresh with the block, and score one batch. x0_hat is worked out from what the network returned, under the
    scheduler's prediction_type, and never clipped, also where the scheduler clips or thresholds its own. For a pipeline in a
    latent space it lies there. t is the network's, so that a window means the same at any number of steps; a window that a
    short sampler visits fewer than twice scores 0 or raises.

    Raises:
        TinyhallError: a scheduler without alphas_cumprod, or one whose states are not variance preserving (Euler's and
            Heun's, which scale by sigma); a prediction_type that is not one of `PREDICTIONS`.
    """
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alpha_bar, Tensor) or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise _check.fail(
            "scheduler", type(scheduler).__name__, "a variance-preserving one with alphas_cumprod, such as DDPM or DDIM"
        )
    kind = _prediction(scheduler)
    own = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = own(model_output, timestep, sample, *args, **kwargs)
        a = float(alpha_bar[int(timestep)])
        said, x = model_output[:, : sample.shape[1]].float(), sample.float()  # the other half may be a variance
        eps = _eps(kind, said, x, torch.tensor(a, dtype=torch.float64))
        reached = out[0] if isinstance(out, tuple) else out.prev_sample
        shown = Step(int(timestep), reached, (x - (1 - a) ** 0.5 * eps) / a**0.5, eps)
        for metric in metrics:
            metric.update(shown)
        return out

    for metric in metrics:
        metric.reset()
    before = vars(scheduler).get("step")
    scheduler.step = step
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def _prediction(scheduler: Any) -> str:
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise _check.fail("prediction_type", kind, f"one of {', '.join(PREDICTIONS)}")
    return kind


def _eps(kind: str, said: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """The noise that a network's answer implies at `alpha_bar` a."""
    signal, noise = a.sqrt().to(x), (1 - a).sqrt().to(x)
    if kind == "epsilon":
        return said
    if kind == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022)
        return signal * said + noise * x
    return (x - signal * said) / noise


class DiffusersNet(nn.Module):
    """A diffusers UNet2DModel under the call of this package's networks: `net(x, t, label=None) -> eps`."""

    def __init__(self, unet: nn.Module, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        config: Any = unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.unet, self.schedule, self.prediction = unet, schedule, prediction
        self.shape = (config.in_channels, height, width)

    def forward(
        self, x: Float[Tensor, "n channels height width"], t: Int[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channels height width"]:
        dtype = next(self.unet.parameters(), x).dtype  # one in half precision takes nothing else
        classes = {} if label is None else {"class_labels": label}
        said = self.unet(x.to(dtype), t, **classes).sample[:, : x.shape[1]].float()
        a = self.schedule.alpha_bar.to(x.device)[t].view(-1, 1, 1, 1)
        return _eps(self.prediction, said, x, a)


def from_diffusers(unet: nn.Module, scheduler: Any) -> tuple[DiffusersNet, Schedule]:
    """The network and the schedule of a diffusers pipeline, for all of this package's samplers and metrics:

        net, schedule = th.from_diffusers(pipeline.unet, pipeline.scheduler)
        out = th.sample(net, schedule, 64, metrics=[th.TrajectoryVariance((0, 100))], generator=g)

    Raises:
        TinyhallError: a scheduler without betas (of flow matching, for one), a prediction_type that is not one of
            `PREDICTIONS`, or a schedule that does not end in noise (such as that of Stable Diffusion: use `watch`).
    """
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor):
        raise _check.fail("scheduler", type(scheduler).__name__, "one with betas, such as DDPM or DDIM")
    schedule = Schedule(betas.double(), f"{type(scheduler).__name__}({len(betas)})")
    return DiffusersNet(unet, schedule, _prediction(scheduler)), schedule
