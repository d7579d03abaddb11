"""Networks that predict the noise: `net(x, t, label=None) -> eps`, eps of x's shape."""

from .core.mlp import MLP as MLP
from .core.unet import UNet as UNet
from .measure.density import Tabulated as Tabulated
