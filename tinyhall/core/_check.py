"""One clear line for bad input: the argument's name, what came, what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TinyhallError(ValueError):
    """Bad input, a bad file, or a run that cannot go on. The message is one line; the command line exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    text = " ".join(repr(value).split())  # an array's repr has many lines
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def fail(name: str, value: Any, expected: str) -> TinyhallError:
    return TinyhallError(f"{name}: expected {expected}, got {describe(value)}")


def positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise fail(name, value, "a whole number of at least 1")
    return value


def positive(name: str, value: Any) -> float:
    return number(name, value, "a finite number above 0", lambda v: 0 < v < math.inf)


def number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """A number for which `fits`; `expected` says so in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise fail(name, value, expected)
    return float(value)


def generator(name: str, value: Any) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise fail(name, value, "a torch.Generator, such as torch.Generator().manual_seed(0)")
    return value


def eps(value: Any, x: Tensor) -> Tensor:
    """What a network returned at x. Of another shape it would be broadcast, and train or sample on without a word."""
    if not isinstance(value, Tensor) or value.shape != x.shape:
        raise fail("net", value, f"eps of x's shape {tuple(x.shape)}")
    return value


def labels(name: str, value: Any, n: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (n,):
        raise fail(name, value, f"int64 of shape [{n}]")
    return value


def classes(label: Tensor, known: int) -> None:
    """Labels of a network that knows so many classes. A GPU waits here; unchecked, a wrong one would end the process."""
    low, high = (int(end) for end in label.aminmax())
    if low < -1 or high >= known:
        raise TinyhallError(f"label: expected -1 (no class) to {known - 1}, got {low} to {high}")


def floats(name: str, value: Any, *, ndim: int | None = None, finite: bool = True) -> Tensor:
    """A float32 tensor with a batch axis, `[n, *shape]` and n >= 1."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise fail(name, value, "a float32 tensor")
    if value.ndim < 2 or (ndim is not None and value.ndim != ndim) or value.shape[0] == 0:
        raise fail(name, value, f"shape [n, {'*shape' if ndim is None else ', '.join(['.'] * (ndim - 1))}], n >= 1")
    return all_finite(name, value) if finite else value


def all_finite(name: str, value: Tensor) -> Tensor:
    if bad := int((~torch.isfinite(value)).sum()):
        raise TinyhallError(f"{name}: expected finite values, got {bad} that are not")
    return value


def shaped(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Samples `[n, *shape]`."""
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) != shape:
        raise fail("x", x, f"shape [n, {', '.join(map(str, shape))}]")
    return x


def unlabelled(x: Tensor, t: Tensor, label: Tensor | None, shape: tuple[int, ...]) -> None:
    """What a network without classes is asked: samples of this shape, one t for each, and no label."""
    if label is not None:
        raise fail("label", label, "None: this network knows no classes")
    shaped(x, shape)
    if t.shape != x.shape[:1]:
        raise fail("t", t, f"shape [{len(x)}], one for each x")


def window(value: Any, steps: int | None = None) -> tuple[int, int]:
    """(a, b) stands for a <= t < b."""
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int for v in value)
    if not ok or not 0 <= value[0] < value[1]:
        raise fail("window", value, "two whole numbers (a, b) with 0 <= a < b")
    if steps is not None and value[1] > steps:
        raise fail("window", value, f"b <= {steps}, the schedule's number of steps")
    return int(value[0]), int(value[1])


def shares(name: str, value: Any) -> tuple[float, float]:
    """(a, b) stands for a <= share < b."""
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if not ok or not 0 <= value[0] < value[1] <= 1:
        raise fail(name, value, "two numbers (a, b) with 0 <= a < b <= 1")
    return float(value[0]), float(value[1])
