"""Where the work runs, and how it is shared when several processes run it."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _check

if TYPE_CHECKING:
    from accelerate import PartialState

# Points sent through a network at a time on a processor: 128 features of so many rows stay in its caches, layer after layer.
ROWS_IN_CACHE = 2500


def pick(name: str | torch.device | None = None) -> torch.device:
    """The device asked for; without a name cuda, then mps, then cpu.

    Raises:
        TinyhallError: a device that torch does not know or that is not here.
    """
    if name is None:
        if world() is not None:
            return world().device  # type: ignore[union-attr]
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise _check.fail("device", str(name), "a device of this machine (cpu, cuda, cuda:0, mps)") from error
    return device


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (Apple's MPS)."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64


def exact(x: Tensor) -> Tensor:
    """x in float64: where it lies, or on the processor if its device has none."""
    return x.to(torch.float64) if widest(x.device) is torch.float64 else x.cpu().to(torch.float64)


@cache
def keep_freed_memory() -> None:
    """Spares a processor thousands of page faults a step, where a loop allocates the same tensors again and again.

    glibc returns freed memory to the system, unless it has seen a large block freed: then it keeps up to twice that block's
    size. 32 MB is the largest block that it learns from. Other allocators are not affected.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@cache
def world() -> PartialState | None:
    """accelerate's view of the processes sharing this run (`accelerate launch -m tinyhall ...`); None where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"})


def rank() -> int:
    state = world()
    return 0 if state is None else state.process_index


def processes() -> int:
    state = world()
    return 1 if state is None else state.num_processes


def barrier() -> None:
    """Waits until all processes have come here: none reads what another has yet to write."""
    state = world()
    if state is not None:
        state.wait_for_everyone()


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Adds each tensor over all processes, in place, in one message."""
    if processes() == 1:
        return
    from accelerate.utils import reduce

    flat = reduce(torch.cat([t.reshape(-1) for t in tensors]), "sum")
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_rows(parts: list[Any]) -> list[Any]:
    """The lists of all processes, joined; order follows the ranks."""
    if processes() == 1:
        return parts
    from accelerate.utils import gather_object

    return list(gather_object(parts))


def bar(items: Any, what: str, unit: str, show: bool) -> Any:
    """The items, with a progress bar where one is wanted."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit=unit, disable=not show, leave=False)
