"""tinyhall: why diffusion models hallucinate.

    import tinyhall as th

    schedule = th.Schedule.linear(1e-3, 0.2, 1000)
    data = th.datasets.GaussianMixture.line((1, 2, 3), std=0.05)
    ...

`core` is the science, 2,000 lines to be read in an evening. Around it stand the wings: `measure` (how good, how rare, with
intervals), `store` (what survives a kill), `data` (what knows its own), `lab` (the book's experiments), `figures`. What is not
of the core is imported when it is asked for, and so are its own dependencies.
"""

from __future__ import annotations

import importlib
from typing import Any

from .core import *  # noqa: F403
from .core import __all__ as _core
from .core import _renamed, device

__version__ = "0.2.0"

# Names of the wings, and the modules that have them.
_LAZY = {
    "from_diffusers": "adapters",
    "overlay": "adapters",
    "step_at": "adapters",
    "watch": "adapters",
    "Filter": "measure.filtering",
    "split": "measure.filtering",
    "tnr_at_tpr": "measure.filtering",
    "PostHocVariance": "measure.denoising",
    "denoising_error": "measure.denoising",
    "sample_density": "measure.density",
    "Estimate": "measure.stats",
    "auroc": "measure.stats",
    "fraction": "measure.stats",
    "mean": "measure.stats",
    "roc": "measure.stats",
    "sliced_wasserstein": "measure.stats",
    "GaussianMixture": "data.mixtures",
    "fit": "store.checkpoint",
    "recurse": "store.generations",
    "hybrid": "lab.mitigations",
    "available": "lab.artifact",
    "histories": "lab.artifact",
    "load": "lab.artifact",
    "results": "lab.artifact",
    "reproduce": "lab.reproduce",
}
_MODULES = {
    "datasets": "datasets",
    "nets": "nets",
    "experiments": "lab.experiments",
    "bench": "lab.bench",
    "images": "data.images",
    "plots": "figures.plots",
    "explore": "figures.explore",
}
_OLD = {
    "cards": "experiments",
    "keep_k": "lowest_k",
    "kept_at": "tnr_at_tpr",
    "law": "sample_density",
}

__all__ = [*_core, "device", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _OLD:
        _renamed.warn(f"th.{name}", f"th.{_OLD[name]}")
        return getattr(importlib.import_module(__name__), _OLD[name])
    if name in _LAZY:
        found = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        found = importlib.import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
