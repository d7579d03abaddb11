"""The science: diffusion models of points and images, the variance of their trajectories, and generations of them.

To be read in this order, an evening's worth: `schedule`, `mixture`, `mlp`, `unet`, `training`, `sampling`, `metrics`,
`recursion`. Nothing here imports the rest of the package.
"""

from ._check import TinyhallError
from .metrics import Metric, Step, TrajectoryVariance
from .mixture import Mixture
from .mlp import MLP
from .network import conditioned
from .noise import stream
from .recursion import lowest_k
from .sampling import Samples, ddim, ddpm, reverse, sample
from .schedule import Schedule
from .training import Run, TrainingConfig, TrainStep, train
from .unet import UNet

__all__ = [
    "Mixture", "MLP", "Metric", "Run", "Samples", "Schedule", "Step", "TinyhallError", "TrainStep", "TrainingConfig",
    "TrajectoryVariance", "UNet", "conditioned", "ddim", "ddpm", "lowest_k", "reverse", "sample", "stream", "train",
]  # fmt: skip
