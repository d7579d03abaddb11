"""Where a result comes from: the device, and the revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def describe_device(device: torch.device) -> str:
    """A name a reader can place: the card's, or the processor's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{device.type}: {name}, {os.cpu_count()} cores"


def revision() -> str:
    """The project's git revision, "+" where the package differs from it; "unknown" outside a checkout, as in a site-packages
    that lies in the checkout of something else."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=_PACKAGE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails where the repository around is not ours
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
