"""What several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_t(t: int, n: int) -> torch.Tensor:
    """t as a sampler passes it: one number, expanded."""
    return torch.tensor([t]).expand(n)


def environment(**extra: str) -> dict[str, str]:
    """For a child process: the package on its path, one thread, nothing of another launcher."""
    kept = {k: v for k, v in os.environ.items() if k not in {"WORLD_SIZE", "RANK", "LOCAL_RANK", "TINYHALL_SCALE"}}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def run_python(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**extra), cwd=ROOT, capture_output=True, text=True, timeout=1800
    )


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(error: BaseException, *parts: str) -> None:
    """The message is one line and holds every part."""
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
