"""Shape annotations. jaxtyping writes them and checks them in the tests; without it they are plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Plain:
            def __class_getitem__(cls, item: Any) -> type:
                return Tensor

        Bool = Float = Int = UInt8 = _Plain

__all__ = ["Bool", "Float", "Int", "Net", "Tensor", "UInt8", "torch"]


@runtime_checkable
class Net(Protocol):
    """Anything that stands for a network: predicts the noise eps, of x's shape, from `x [n, *shape]` and `t [n]`."""

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor: ...
