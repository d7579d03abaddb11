"""Data whose support is known: `th.datasets.GaussianMixture` and its kin."""

from .core.mixture import GaussianMixture as GaussianMixture
from .data.hands import HandPhotos as HandPhotos
from .data.hands import Hands as Hands
from .data.mnist import MNIST as MNIST
from .data.shapes import SimpleShapes as SimpleShapes
