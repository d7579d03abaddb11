"""The network for points, the paper's: `net(x, t, label=None) -> eps`, eps of x's shape."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _check
from . import device as _device
from ._typing import Float, Int, Tensor


def sinusoidal(t: Int[Tensor, " n"] | Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Sines, then cosines, of t at width/2 frequencies from 1 to 1/10,000 (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    rate = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Block(nn.Module):
    """A residual block: norm, activation, linear, plus time; norm, activation, linear, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width, bias=False)
        self.time = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.linear2 = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        out = self.linear1(F.leaky_relu_(self.norm1(h), 0.02)) + time
        return h + self.linear2(F.leaky_relu_(self.norm2(out), 0.02))


class MLP(nn.Module):
    """The paper's network for Gaussians, with its defaults: 67,074 parameters at dim=2.

    The paper's code builds its three blocks as one block used three times, so they share weights. That is the default here;
    `shared=False` gives each its own.

    Args:
        dim: dimensions of x.
        width: hidden features, even.
        blocks: residual blocks passed through.
        shared: one block used `blocks` times, or `blocks` separate ones.
        generator: draws the initial weights; without it, a fresh one seeded with 0, so that the global state stays untouched.
    """

    def __init__(
        self, dim: int = 2, width: int = 128, blocks: int = 3, shared: bool = True, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.dim = _check.positive_int("dim", dim)
        if _check.positive_int("width", width) % 2 or width < 4:
            raise _check.fail("width", width, "an even number of at least 4")
        self.width, self.blocks, self.shared = width, _check.positive_int("blocks", blocks), shared
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global state before we overwrite it
            self.project_in = nn.Linear(dim, width, bias=False)
            self.time = nn.Linear(width, width)
            self.body = nn.ModuleList(Block(width) for _ in range(1 if shared else blocks))
            self.norm = nn.LayerNorm(width)
            self.project_out = nn.Linear(width, dim)
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "n dim"], t: Int[Tensor, " n"], label: Tensor | None = None) -> Float[Tensor, "n dim"]:
        """The predicted noise. `label` is taken for the common signature and must be None.

        Raises:
            TinyhallError: x of other dimensions than the network's, not one t for each x, or a label.
        """
        _check.unlabelled(x, t, label, (self.dim,))
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.trunk(x, self.time_features(t))
        # A sampler sends up to a million rows. In slices that fit the caches they take a third of the time, and a few MB.
        rows = _device.ROWS_IN_CACHE
        slices = zip(x.split(rows), t.split(rows), strict=True)
        return torch.cat([self.trunk(xs, self.time_features(ts)) for xs, ts in slices])

    def time_features(self, t: Int[Tensor, " n"]) -> list[Tensor]:
        """What each distinct block adds for t: `[n, width]`, or `[1, width]` where every t is the same.

        These depend on t alone. A sampler asks for one t at a time (it passes an expanded scalar, of stride 0), and a training
        batch of 10,000 holds at most 1,000 distinct ones: computed once each, they spare most of 4 in 10 matrix
        products in training, and all of them in sampling.
        """
        index = None
        if t.stride(0) == 0:
            t = t[:1]
        elif t.device.type == "cpu" and int(t.max() - t.min()) + 1 < len(t):  # elsewhere min and max would stall the device
            low = t.min()
            index, t = t - low, torch.arange(int(low), int(t.max()) + 1)
        features = self.embedded(t)
        return features if index is None else [F.embedding(index, f) for f in features]

    def embedded(self, t: Tensor) -> list[Tensor]:
        """`time_features`, worked out anew for each t, which need not be whole."""
        hidden = F.leaky_relu(self.time(sinusoidal(t, self.width)), 0.02)
        return [block.time(hidden) for block in self.body]  # type: ignore[operator]

    def trunk(self, x: Tensor, time: list[Tensor]) -> Tensor:
        # Sampling multiplies whatever the network fails to predict by up to 1e23, and LayerNorm squares: an untrained network
        # would overflow to NaN. No x that training shows comes near 1e15, so the bits of a trained network stay as they are.
        h = self.project_in(x.clamp(-1e15, 1e15))
        for i in range(self.blocks):
            j = 0 if self.shared else i
            h = self.body[j](h, time[j])
        return self.project_out(self.norm(h))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        # The look-up in time_features stays outside: compiled for a CPU, its gradient is summed in no fixed order.
        self.trunk = torch.compile(self.trunk, *args, **kwargs)  # type: ignore[method-assign]
