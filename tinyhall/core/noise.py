"""Where normal numbers come from: a generator for each purpose of a run, and noise that knows which sample it is for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from ._typing import Tensor

BLOCK = 65_536  # numbers of one state of the samples that share a generator


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose ("data", "weights", "training", "samples") of a run, independent of the others."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


@runtime_checkable
class Noise(Protocol):
    """Where a sampler's normal numbers come from."""

    def randn(self, shape: Sequence[int]) -> Tensor: ...


class Stream:
    """All from one generator, in turn."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.generator.device).to(self.device)


class Blocks:
    """Noise for samples [start, stop) of a set of `total`, in blocks that each have a generator of their own.

    Which numbers a sample gets then depends on the seeds and its index alone, not on how the set is cut into chunks or shared
    among processes.
    """

    def __init__(self, seeds: list[int], block: int, start: int, stop: int, total: int, device: torch.device) -> None:
        self.spans = []
        for b in range(start // block, (stop - 1) // block + 1):
            rows = min(block, total - b * block)
            low, high = max(start - b * block, 0), min(stop - b * block, rows)
            self.spans.append((torch.Generator(device).manual_seed(seeds[b]), rows, low, high))
        self.device = device

    def randn(self, shape: Sequence[int]) -> Tensor:
        parts = [torch.randn(rows, *shape[1:], generator=g, device=self.device)[low:high] for g, rows, low, high in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Supply:
    """Blocks of noise for chunks of n samples of `numbers` numbers each, all from one generator."""

    def __init__(self, n: int, numbers: int, generator: torch.Generator, device: torch.device) -> None:
        self.n, self.device, self.block = n, device, max(1, BLOCK // numbers)
        count = math.ceil(n / self.block)
        self.seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).tolist()

    def of(self, start: int, stop: int) -> Blocks:
        return Blocks(self.seeds, self.block, start, stop, self.n, self.device)
