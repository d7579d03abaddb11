"""Images: what is asked of a set of them, their 8 bits on disk, and what of them stands out anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch.nn import functional as F

from ..core import _check
from ..core._typing import Bool, Float, Int, Tensor, UInt8


@runtime_checkable
class Dataset(Protocol):
    """What is asked of data: samples, and which samples of a model are none of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def sample(self, n: int, generator: torch.Generator) -> Tensor: ...
    def in_support(self, x: Tensor) -> Tensor: ...
    def judge(self, x: Tensor) -> Any: ...


@runtime_checkable
class Images(Dataset, Protocol):
    """What is asked of a set of images that can tell its own."""

    @property
    def kinds(self) -> tuple[str, ...]: ...


class Squares(ABC):
    """What sets of square images that can tell their own have in common."""

    size: int
    channels: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]]  # the names of `judge`'s kinds, the first of which is in support

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, `(channels, size, size)`."""
        return (self.channels, self.size, self.size)

    @abstractmethod
    def judge(self, x: Tensor) -> Any:
        """What each image is, its `kind` and more."""

    def in_support(self, x: Float[Tensor, "n channels size size"]) -> Bool[Tensor, " n"]:
        """True where `judge` finds nothing wrong."""
        return self.judge(x).kind == 0

    def _checked(self, x: Tensor) -> Tensor:
        return _check.shaped(_check.floats("x", x, ndim=4, finite=False), self.shape)


def drawn(n: int, among: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """n of so many images, in any order, none twice. Raises TinyhallError for more than there are, or no generator."""
    _check.generator("generator", generator)
    if _check.positive_int("n", n) > among:
        raise _check.fail("n", n, f"at most {among}, the number of images")
    return torch.randperm(among, generator=generator, device=generator.device)[:n].cpu()


def quantised(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """-1..1 as 0..255; what lies beyond is cut off."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def restored(x: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 as -1..1, float32."""
    return x.float() / 127.5 - 1


def local_maximum(variance: Float[Tensor, "n channel height width"], patch: int) -> Float[Tensor, " n"]:
    """The largest mean over any `patch` x `patch` pixels, half a patch apart."""
    return F.avg_pool2d(variance, patch, max(patch // 2, 1)).flatten(1).amax(1)
