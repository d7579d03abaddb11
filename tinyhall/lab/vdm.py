"""A variational diffusion model of points: the schedule is learned with the network, on a bound of the likelihood.

Source: Kingma, Salimans, Poole and Ho, Variational Diffusion Models, arXiv 2107.00630; equations and appendices are theirs. Its
time runs from 0, the cleanest, to 1, and gamma(t) = -log SNR(t) rises: alpha_bar = sigmoid(-gamma) (eq. 4 and 5).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core import _check
from ..core import device as _device
from ..core._typing import Float, Int, Tensor
from ..core.mlp import MLP
from ..core.schedule import NOISE_AT_END, Schedule

ENDS = (-13.3, 10.0)  # of gamma: a noise of 0.0013, and an alpha_bar of 4.5e-5


class Gamma(nn.Module):
    """gamma(t), a rising network with fixed ends (appendix H): a line and sigmoids, all with positive weights.

    The ends are not learned. With the exact denoiser of points, whose density is continuous, the bound only gains as they move
    out: there the diffusion loss rises by less than reconstruction and prior fall. So `low` is a choice of what is too fine to
    matter, and `high` of what is noise. (The paper's data take one of 256 values, which gives the low end an optimum; it
    begins at -13.3 and 5.)

    Args:
        low, high: gamma(0) and gamma(1). `high` must leave no signal: alpha_bar below 1e-3.
        units: sigmoids, at first evenly spaced in t and all alike: gamma begins as nearly a line.
    """

    def __init__(self, low: float = ENDS[0], high: float = ENDS[1], units: int = 64) -> None:
        super().__init__()
        noise = -math.log(NOISE_AT_END / (1 - NOISE_AT_END))  # 6.9
        self.low = _check.number("low", low, "a number from -30 to 0", lambda v: -30 <= v <= 0)
        self.high = _check.number("high", high, f"a number above {noise:.1f}, at most 100", lambda v: noise < v <= 100)
        _check.positive_int("units", units)
        self.centre = nn.Parameter((torch.arange(units) + 0.5) / units)
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(0.5 * units)))
        self.log_weight = nn.Parameter(torch.full((units,), -math.log(units)))

    def forward(self, t: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """gamma(t) and its derivative, for t in [0, 1]."""
        steepness, weight = self.log_steepness.exp(), self.log_weight.exp()
        places = torch.cat([t.new_tensor([0.0, 1.0]), t])  # the ends first
        h = torch.sigmoid(steepness * (places[:, None] - self.centre))
        curve = places + h @ weight
        scale = (self.high - self.low) / (curve[1] - curve[0])
        slope = 1 + (h * (1 - h))[2:] @ (weight * steepness)
        return self.low + scale * (curve[2:] - curve[0]), scale * slope


class AtLevel(nn.Module):
    """`nets.MLP` with the noise level as its time: gamma, scaled from `ENDS` to 0 and 1,000, enters the sines and cosines as t
    does in a schedule of 1,000 steps. It need not be whole, nor within the ends, and has a gradient.

    Args:
        dim: dimensions of a point.
        fourier: k appends sin and cos of 2^i pi z, i = 0 to k-1, to each coordinate of z (section 3.4): 0 for none, as in our
            other models. The authors' example of points has 8.
        generator: draws the initial weights; without it, a fresh one seeded with 0.
        Others: as in `nets.MLP`.
    """

    def __init__(
        self,
        dim: int = 2,
        width: int = 128,
        blocks: int = 3,
        shared: bool = True,
        *,
        fourier: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim = _check.positive_int("dim", dim)
        self.fourier = 0 if fourier == 0 else _check.positive_int("fourier", fourier)
        self.mlp = MLP(dim * (1 + 2 * fourier), width, blocks, shared, generator)

    def forward(self, z: Float[Tensor, "n dim"], gamma: Float[Tensor, " m"]) -> Float[Tensor, "n dim"]:
        """The predicted noise at z; gamma one for each, or one for all `[1]`."""
        t = 1000 * ((gamma - ENDS[0]) / (ENDS[1] - ENDS[0]))
        waves = [math.pi * 2**i * z for i in range(self.fourier)]
        inputs = torch.cat([z, *(wave.sin() for wave in waves), *(wave.cos() for wave in waves)], 1)
        return self.mlp.trunk(inputs, self.mlp.embedded(t))[:, : self.dim]


class Terms(NamedTuple):
    """What bounds -log p(x) for each point, in nats (eq. 11); their sum is the bound."""

    prior: Float[Tensor, " n"]  # KL of the noisiest state from N(0, I)
    reconstruction: Float[Tensor, " n"]  # of x from the cleanest state
    diffusion: Float[Tensor, " n"]  # one draw of t and noise for each point: unbiased, and noisy


class VDM(nn.Module):
    """A network and its schedule, in continuous time or T steps.

    Args:
        net: predicts eps from z `[n, dim]` and gamma `[n]`, such as `AtLevel`; with a `dim`.
        gamma: the schedule.
        timesteps: T of the bound; None for continuous time.
    """

    def __init__(self, net: nn.Module, gamma: Gamma, timesteps: int | None = None) -> None:
        super().__init__()
        self.net, self.gamma = net, gamma
        self.timesteps = None if timesteps is None else _check.positive_int("timesteps", timesteps)

    def terms(self, x: Float[Tensor, "n dim"], generator: torch.Generator) -> Terms:
        """The bound for points x. Only the diffusion loss has a gradient: the ends are fixed, and what is said of x given the
        cleanest state, N(x; z_0 / alpha_0, sigma_0^2 / alpha_0^2) (the continuous form of eq. 8), has nothing to learn.

        Raises:
            TinyhallError: x that is not float32 `[n, dim]` and finite, no generator, or a network that returns another shape.
        """
        _check.floats("x", x, ndim=2)
        _check.generator("generator", generator)
        left = 1 / (1 + math.exp(self.gamma.high))  # alpha_bar of the noisiest state
        prior = 0.5 * (left * (x.square() - 1) - math.log1p(-left)).sum(1)
        reconstruction = torch.full_like(prior, 0.5 * x.shape[1] * (1 + math.log(2 * math.pi) + self.gamma.low))
        return Terms(prior, reconstruction, self._diffusion(x, *self._levels(x, generator), generator))

    def _levels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A gamma for each point, and the weight of its error: gamma' (eq. 17), or T (exp(gamma_t - gamma_s) - 1) (eq. 14)."""
        # Spread evenly over [0, 1] from one random number (appendix I.1).
        t = (torch.rand(1, generator=generator, device=x.device) + torch.arange(len(x), device=x.device) / len(x)) % 1
        if self.timesteps is None:
            return self.gamma(t)
        t = ((t * self.timesteps).floor() + 1).clamp(max=self.timesteps) / self.timesteps
        gamma = self.gamma(t)[0]
        return gamma, self.timesteps * torch.expm1(gamma - self.gamma(t - 1 / self.timesteps)[0])

    def _diffusion(self, x: Tensor, gamma: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        z = torch.sigmoid(-gamma).sqrt()[:, None] * x + torch.sigmoid(gamma).sqrt()[:, None] * eps
        return 0.5 * weight * (eps - _check.eps(self.net(z, gamma), x)).square().sum(1)

    @torch.no_grad()
    def discretize(self, sample_steps: int) -> tuple[Schedule, nn.Module]:
        """The learned schedule in any number of steps, and the network under the usual call `net(x, t)`; for `sample`.

        State t has gamma((t + 1) / sample_steps), those that the bound of as many steps is taken over; the last step goes from
        gamma(1 / sample_steps) to the predicted x_0. `ddpm("small")` is the sampler of the model itself (eq. 9).
        """
        places = torch.arange(1, _check.positive_int("sample_steps", sample_steps) + 1, dtype=torch.float64) / sample_steps
        gamma = copy.deepcopy(self.gamma).double().cpu()(places)[0]
        schedule = Schedule.from_alpha_bar(torch.sigmoid(-gamma), f"learned({sample_steps})")
        return schedule, _OnSchedule(self.net, gamma)


class _OnSchedule(nn.Module):
    def __init__(self, net: Any, gamma: Tensor) -> None:
        super().__init__()
        self.net, self.dim = net, net.dim
        self.levels: Tensor
        self.register_buffer("levels", gamma.to(next(net.parameters(), gamma).device, torch.float32))

    def forward(self, x: Float[Tensor, "n dim"], t: Int[Tensor, " n"], label: Tensor | None = None) -> Float[Tensor, "n dim"]:
        _check.unlabelled(x, t, label, (self.dim,))
        gamma = self.levels[t[:1] if t.stride(0) == 0 else t]
        rows = _device.ROWS_IN_CACHE if x.device.type == "cpu" else len(x)
        parts = gamma.split(rows) if len(gamma) == len(x) else [gamma] * math.ceil(len(x) / rows)
        return torch.cat([self.net(z, g) for z, g in zip(x.split(rows), parts, strict=True)])


def train(
    vdm: VDM, data: Float[Tensor, "n dim"], *, train_steps: int, batch_size: int, lr: float, generator: torch.Generator
) -> Iterator[Float[Tensor, ""]]:
    """Adam on the bound, one step at a time; yields each batch's mean diffusion loss, in nats a point.

    The network descends the diffusion loss; so does the schedule in T steps, on whose shape the loss depends. In continuous
    time it does not (eq. 18), and the schedule descends the square of the loss, and so its variance (appendix I.2).

    Args:
        data: on the model's device.
        train_steps: of Adam.
        batch_size: points, drawn with replacement.
        lr: of network and schedule.
        generator: draws batches, times and noise.

    Raises:
        TinyhallError: at once for bad arguments; later for a loss that is not finite, looked at every 100 steps.
    """
    _check.floats("data", data, ndim=2)
    _check.generator("generator", generator)
    for name, value in (("train_steps", train_steps), ("batch_size", batch_size)):
        _check.positive_int(name, value)
    adam = torch.optim.Adam(vdm.parameters(), _check.positive("lr", lr))
    return _steps(vdm, data, adam, generator, batch_size=batch_size, end=train_steps)


def _steps(
    vdm: VDM, data: Tensor, adam: torch.optim.Adam, generator: torch.Generator, *, batch_size: int, end: int
) -> Iterator[Tensor]:
    weights = list(vdm.net.parameters())
    for step in range(1, end + 1):
        x = data[torch.randint(len(data), (batch_size,), generator=generator, device=data.device)]
        levels = torch.stack(vdm._levels(x, generator))  # [2, n]
        # The schedule is cut off, so that one way back through the network serves its weights and both aims of the schedule.
        gamma, weight = cut = levels.detach().requires_grad_()
        each = vdm._diffusion(x, gamma, weight, generator)
        loss = each.mean()
        adam.zero_grad()
        of_levels, *of_weights = torch.autograd.grad(loss, [cut, *weights])
        for parameter, gradient in zip(weights, of_weights, strict=True):
            parameter.grad = gradient
        levels.backward(of_levels if vdm.timesteps is not None else 2 * each.detach() * of_levels)
        adam.step()
        loss = loss.detach()
        if step % 100 == 0 and not math.isfinite(float(loss)):
            raise _check.TinyhallError(f"loss: expected a finite number, got {float(loss)} by step {step}; lower lr")
        yield loss
