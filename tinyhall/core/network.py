"""What is asked of any network, whoever built it: where it is, and what it answers under a class and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import _check
from ._typing import Net, Tensor

EpsAt = Callable[[Tensor, Tensor], Tensor]
"""eps at x `[n, *shape]` and t `[n]`."""


def where(net: Any) -> torch.device:
    """The device of a network's first parameter; the processor for what has none."""
    first = next(net.parameters(), None) if isinstance(net, torch.nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def conditioned(net: Net, label: Tensor | None = None, guidance: float | None = None) -> EpsAt:
    """The network at fixed classes, `label` int64 `[n]`, under classifier-free guidance of weight w,

        eps(x) + w (eps(x, label) - eps(x))

    (Ho and Salimans 2022, in the form where w = 1 is the conditional model and w = 0 the unconditional one; None is 1). Both
    ask the network once, other weights twice. Without a label it is the network as it is.

    Raises:
        TinyhallError: a weight that is not finite, or one without a label.
    """
    if guidance is not None:
        if label is None:
            raise _check.TinyhallError("guidance: expected a label beside it, got none")
        _check.number("guidance", guidance, "a finite number", math.isfinite)
    if label is None or guidance == 0:
        return lambda x, t: net(x, t)
    if guidance is None or guidance == 1:
        return lambda x, t: net(x, t, label)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        without = net(x, t)
        return without + guidance * (net(x, t, label) - without)

    return guided
