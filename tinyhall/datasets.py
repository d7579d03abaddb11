"""Data whose support is known: `th.datasets.GaussianMixture` and its kin."""

from .data.hands import HandPhotos as HandPhotos
from .data.hands import Hands as Hands
from .data.mixtures import GaussianMixture as GaussianMixture
from .data.mnist import MNIST as MNIST
from .data.shapes import SimpleShapes as SimpleShapes
