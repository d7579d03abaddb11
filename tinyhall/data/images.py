"""Images: what is asked of a set of them, their 8 bits on disk, and what of them stands out anywhere."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import functional as F

from ..core._typing import Float, Tensor, UInt8


@runtime_checkable
class Images(Protocol):
    """What is asked of a set of images that can tell its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    def sample(self, n: int, generator: torch.Generator) -> Tensor: ...
    def in_support(self, x: Tensor) -> Tensor: ...
    def judge(self, x: Tensor) -> Any: ...


def quantised(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """-1..1 as 0..255; what lies beyond is cut off."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def restored(x: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 as -1..1, float32."""
    return x.float() / 127.5 - 1


def local_maximum(variance: Float[Tensor, "n channel height width"], patch: int) -> Float[Tensor, " n"]:
    """The largest mean over any `patch` x `patch` pixels, half a patch apart."""
    return F.avg_pool2d(variance, patch, max(patch // 2, 1)).flatten(1).amax(1)
