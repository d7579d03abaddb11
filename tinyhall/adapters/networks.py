"""A diffusers network under the call of this package's own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..core.schedule import Schedule
from .levels import implied, prediction


class DiffusersNet(nn.Module):
    """A diffusers network under the call of this package's networks: `net(x, t, label=None) -> eps`.

    `shape` is that of one sample, None where the network does not say it; `classes` the number of its classes, None for none.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, net: nn.Module, schedule: Schedule, kind: str, null: int | None, extra: dict[str, Any]) -> None:
        super().__init__()
        config: Any = net.config
        self.unet, self.schedule, self.prediction, self.extra = net, schedule, kind, extra
        self.channels = config.in_channels
        size = getattr(config, "sample_size", None)
        sides = 1 if "1D" in type(net).__name__ else 2
        self.shape = None if size is None else (self.channels, *([size] * sides if isinstance(size, int) else size))
        transformer = getattr(config, "num_embeds_ada_norm", None)  # DiT keeps the row behind its classes for none of them
        self.classes = transformer or getattr(config, "num_class_embeds", None)
        self.null = transformer if null is None else null
        # Worked out in float64 on the processor: next to data 1 - alpha_bar is small.
        self.register_buffer("signal", schedule.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (-torch.expm1(schedule.log_alpha_bar)).sqrt().float(), persistent=False)

    def forward(
        self, x: Float[Tensor, "n channels *size"], t: Int[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channels *size"]:
        """The predicted noise, float32. Labels are 0 to classes - 1; -1 and None stand for "no class".

        Raises:
            TinyhallError: a label that the network does not know, or none where it asks for one.
        """
        dtype = next(self.unet.parameters(), x).dtype  # one in half precision takes nothing else
        said = self.unet(x.to(dtype), t, **self._classes(label, x), **self.extra).sample.float()
        if said.shape[1] not in (len(x[0]), 2 * len(x[0])):  # the other half is a variance
            raise _check.fail("net", said, f"{len(x[0])} channels, or twice as many")
        signal, noise = (table.to(x.device)[t].view(-1, *[1] * (x.ndim - 1)) for table in (self.signal, self.noise))
        return implied(self.prediction, signal, noise, said[:, : x.shape[1]], x)[1]

    def _classes(self, label: Tensor | None, x: Tensor) -> dict[str, Tensor]:
        if self.classes is None:
            if label is not None:
                raise _check.fail("label", label, "None: this network knows no classes")
            return {}
        if label is None:
            label = torch.full((len(x),), -1, device=x.device)
        _check.labels("label", label, len(x))
        _check.classes(label, self.classes)
        if self.null is None and bool((label < 0).any()):
            raise _check.fail(
                "label", "no class", f"0 to {self.classes - 1}; without null=, this network has no row for none, nor guidance"
            )
        return {"class_labels": label if self.null is None else label.where(label >= 0, self.null)}


def from_diffusers(unet: nn.Module, scheduler: Any, *, null: int | None = None, **extra: Any) -> tuple[DiffusersNet, Schedule]:
    """The network and the schedule of a diffusers pipeline, for all of this package's samplers and metrics:

        net, schedule = th.from_diffusers(pipeline.unet, pipeline.scheduler)
        out = th.sample(net, schedule, 64, metrics=[th.TrajectoryVariance((0, 100))], generator=g)

    Args:
        unet: `pipeline.unet`, or the transformer of DiT.
        scheduler: read for its betas and its prediction_type; its sampler is not used.
        null: the row of the class embedding that stands for "no class", for guidance; DiT's is known.
        extra: what the network asks for at every call beside x, t and a class, such as `encoder_hidden_states`.

    Raises:
        TinyhallError: a whole pipeline, or a network that asks for more than `extra` has; a scheduler without betas (of flow
            matching or of EDM, for which `watch` is meant), or with a prediction_type that is none of `PREDICTIONS`; a schedule
            that does not end in noise, such as that of Stable Diffusion, or in nothing but noise (zero terminal SNR).
    """
    if not isinstance(unet, nn.Module):
        raise _check.fail("unet", type(unet).__name__, "a network, such as pipeline.unet")
    asked = [
        name
        for name, value in list(inspect.signature(getattr(unet, "_orig_mod", unet).forward).parameters.items())[2:]
        if value.default is value.empty and value.kind is value.POSITIONAL_OR_KEYWORD and name not in extra
    ]
    if asked:
        raise _check.fail("unet", type(unet).__name__, f"one of x, t and a class alone, or {', '.join(asked)}= beside it")
    betas = getattr(scheduler, "betas", None)
    continuous = getattr(getattr(scheduler, "config", None), "timestep_type", "discrete") == "continuous"
    if not isinstance(betas, Tensor) or continuous:
        raise _check.fail("scheduler", type(scheduler).__name__, "one with betas at t = 0 to T - 1, such as DDPM or DDIM")
    if float(betas[-1]) == 1:
        raise _check.fail("scheduler", "zero terminal SNR", "a last state that holds some signal; th.watch takes this one")
    schedule = Schedule(betas.cpu().double(), f"{type(scheduler).__name__}({len(betas)})")
    return DiffusersNet(unet, schedule, prediction(scheduler), null, extra), schedule
