"""tinyhall: why diffusion models hallucinate, small enough to read in an evening.

    import tinyhall as th

    schedule = th.Schedule.linear(1e-3, 0.2, 1000)
    data = th.datasets.GaussianMixture.line((1, 2, 3), std=0.05)
    ...

Figures (`tinyhall.plots`), the command line and statistics import their own dependencies when they are used.
"""

from . import cards, datasets, device, images, nets
from ._check import TinyhallError
from .adapters import from_diffusers, overlay, step_at, watch
from .density import law
from .experiments import load, reproduce
from .filtering import Filter, keep_k, kept_at, split
from .metrics import TrajectoryVariance, denoising_error
from .recursion import recurse
from .sampling import Samples, Step, ddim, ddpm, hybrid, reverse, sample
from .schedule import Schedule
from .stats import Estimate, auroc, fraction, mean, roc, sliced_wasserstein
from .training import Run, TrainStep, fit, train

__version__ = "0.1.0"
__all__ = [
    "Estimate",
    "Filter",
    "Run",
    "Samples",
    "Schedule",
    "Step",
    "TinyhallError",
    "TrainStep",
    "TrajectoryVariance",
    "auroc",
    "cards",
    "datasets",
    "ddim",
    "ddpm",
    "denoising_error",
    "device",
    "fit",
    "fraction",
    "from_diffusers",
    "hybrid",
    "images",
    "keep_k",
    "kept_at",
    "law",
    "load",
    "mean",
    "nets",
    "overlay",
    "recurse",
    "reproduce",
    "reverse",
    "roc",
    "sample",
    "sliced_wasserstein",
    "split",
    "step_at",
    "train",
    "watch",
]
