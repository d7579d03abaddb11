"""The network for images: ADM's U-Net (Dhariwal and Nichol 2021), small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _check
from ._typing import Float, Int, Tensor
from .mlp import sinusoidal
from .schedule import Schedule

Images = Float[Tensor, "n channels size size"]


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // 4, width)  # ADM's 32 groups at a width of 128


class Attention(nn.Module):
    """Self-attention among the pixels, added to the input: softmax(Q K^T / sqrt(d)) V in heads of about d = 64 features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = max(width // 64, 1)
        self.heads = heads if width % heads == 0 else 1
        self.norm = norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Float[Tensor, "n width height wide"]) -> Float[Tensor, "n width height wide"]:
        pixels = self.norm(h).flatten(2).mT  # [n, pixels, width], a view: channels are last in memory
        q, k, v = self.qkv(pixels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, pixels, d] each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [n, pixels, width]
        return h + self.out(mixed).mT.unflatten(2, h.shape[2:])


class Block(nn.Module):
    """A residual block: norm, SiLU, convolution; norm scaled and shifted by the condition, SiLU, convolution; plus the input.
    Then, where asked for, attention."""

    def __init__(self, width_in: int, width: int, condition: int, attention: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * width)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        self.attention = Attention(width) if attention else nn.Identity()

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(h)))
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)  # [n or 1, width, 1, 1] each
        out = self.conv2(F.silu(self.norm2(out) * (1 + scale) + shift))
        return self.attention(self.skip(h) + out)


class Level(nn.ModuleList):
    """The blocks of one resolution, one after the other."""

    def __init__(self, width_in: int, width: int, blocks: int, condition: int, attention: bool) -> None:
        super().__init__(Block(w, width, condition, attention) for w in [width_in] + [width] * (blocks - 1))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        for block in self:
            h = block(h, condition)
        return h


class UNet(nn.Module):
    """Predicts the noise in images: 2,698,372 parameters by default.

    Blocks at ever lower resolutions, then back up; the lowest level is the middle of the U. On the way up, a level also sees
    the state that the way down left there with. The image enters with each patch of stem x stem pixels as one.

    Convolutions run with channels last in memory. The weights do not lie so: a checkpoint would bring Adam's moments back in
    the ordinary order, and its fused step pairs numbers by their place in memory.

    Args:
        channels, size: the images are `[channels, size, size]`.
        widths: features at each level, multiples of 4; every level has half the resolution of the one before.
        blocks: residual blocks a level, down and up.
        attention: resolutions, counted after the stem, at which attention follows each block; None for the lowest alone.
        stem: side of the patches; 1 for none.
        classes: labels are 0 to classes - 1, or -1 for "no class"; None for a network without labels.
        schedule: with one, what the last layer gives is v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho
            2022), and the noise follows from it. At large t the noise is nearly x: with patches, a network without this has
            to carry it through all its layers, and learns little else.
        generator: draws the initial weights; without it, a fresh one seeded with 0, so that the global state stays untouched.

    Raises:
        TinyhallError: bad arguments, or a size that stem and levels do not divide.
    """

    def __init__(
        self, channels: int = 1, size: int = 64, widths: Sequence[int] = (64, 128, 128), blocks: int = 2,
        attention: Sequence[int] | None = None, stem: int = 2, classes: int | None = None, schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in {"channels": channels, "size": size, "blocks": blocks, "stem": stem}.items():
            _check.positive_int(name, value)
        if not widths or any(_check.positive_int("widths", width) % 4 for width in widths):
            raise _check.fail("widths", widths, "multiples of 4, the size of a norm's groups")
        unit = stem * 2 ** (len(widths) - 1)
        if size % unit:
            raise _check.fail("size", size, f"a multiple of {unit}, for stem={stem} and {len(widths)} levels")
        sizes = [size // stem // 2**i for i in range(len(widths))]
        attention = sizes[-1:] if attention is None else attention
        if not set(attention) <= set(sizes):
            raise _check.fail("attention", attention, f"some of the levels' resolutions {sizes}")
        self.shape, self.stem, self.classes = (channels, size, size), stem, classes
        self.alpha_bar: Tensor | None
        # Not among the weights: whoever builds the network knows its schedule.
        self.register_buffer("alpha_bar", None if schedule is None else schedule.alpha_bar.float(), persistent=False)
        first, condition, pixels = widths[0], 2 * widths[0], channels * stem**2

        def level(i: int, width_in: int) -> Level:
            return Level(width_in, widths[i], blocks, condition, sizes[i] in attention)

        with torch.random.fork_rng(devices=[]):  # modules draw from the global state before we overwrite it
            self.time = nn.Sequential(nn.Linear(first, condition), nn.SiLU(), nn.Linear(condition, condition))
            # The last row stands for "no class".
            self.label = None if classes is None else nn.Embedding(_check.positive_int("classes", classes) + 1, condition)
            self.conv_in = nn.Conv2d(pixels, first, 3, padding=1)
            self.down = nn.ModuleList(level(i, widths[max(i - 1, 0)]) for i in range(len(widths)))
            self.up = nn.ModuleList(level(i, widths[i] + widths[i + 1]) for i in reversed(range(len(widths) - 1)))
            self.norm, self.conv_out = norm(first), nn.Conv2d(first, pixels, 3, padding=1)
        self._draw(generator or torch.Generator().manual_seed(0))

    def _draw(self, generator: torch.Generator) -> None:
        """Xavier, zero bias; zero for all that ends a residual branch or the network, so that it starts by predicting 0."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
                if name.endswith(("conv2", "attention.out", "conv_out")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)

    def forward(self, x: Images, t: Int[Tensor, " n"], label: Int[Tensor, " n"] | None = None) -> Images:
        """The predicted noise, float32. Labels are 0 to classes - 1; -1 and None stand for "no class".

        Raises:
            TinyhallError: x of another shape than the network's, or labels out of range.
        """
        out = self.trunk(_check.shaped(x, self.shape), self.condition(t, label)).float().contiguous()
        if self.alpha_bar is None:
            return out
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt() * out + (1 - a).sqrt() * x

    def features(
        self, x: Images, t: Int[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n width low low"]:
        """The state at the bottom of the U, after its last block (64 x 64 images: `[n, 128, 8, 8]`). Raises as `forward`."""
        return self.encode(_check.shaped(x, self.shape), self.condition(t, label))[-1].float().contiguous()

    def condition(self, t: Int[Tensor, " n"], label: Int[Tensor, " n"] | None = None) -> Float[Tensor, "m condition"]:
        """What t and label say to every block: one row for all where no row differs (a sampler passes an expanded t)."""
        n = len(t)
        if t.stride(0) == 0:
            t = t[:1]
        out = self.time(sinusoidal(t, self.conv_in.out_channels))
        if self.label is None:
            if label is not None:
                raise _check.fail("label", label, "None: this network knows no classes")
            return F.silu(out)
        none = self.label.num_embeddings - 1
        if label is None:
            return F.silu(out + self.label.weight[none])
        _check.labels("label", label, n)
        if not (label.is_cuda and torch.cuda.is_current_stream_capturing()):  # `train` has looked at all of them
            _check.classes(label, none)
        return F.silu(out + self.label(label.where(label >= 0, none)))

    def encode(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        """The state that each level of the way down ends with; that of the lowest is the last."""
        # An untrained network lets a sampler's states grow until a norm's squares overflow; see MLP.trunk.
        x = F.pixel_unshuffle(x.clamp(-1e15, 1e15), self.stem)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        states: list[Tensor] = []
        for level in self.down:
            h = level(F.avg_pool2d(h, 2) if states else h, condition)
            states.append(h)
        return states

    def trunk(self, x: Tensor, condition: Tensor) -> Tensor:
        *states, h = self.encode(x, condition)
        for level, state in zip(self.up, reversed(states), strict=True):
            h = level(torch.cat([F.interpolate(h, scale_factor=2), state], dim=1), condition)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm(h))), self.stem)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        # The look-up of labels stays outside: compiled for a CPU, its gradient is summed in no fixed order.
        self.trunk = torch.compile(self.trunk, *args, **kwargs)  # type: ignore[method-assign]
