"""Models that others built: score a diffusers pipeline while it runs, or take its network and schedule over."""

from .levels import PREDICTIONS, step_at
from .networks import DiffusersNet, from_diffusers
from .pictures import overlay, pictures
from .watching import NOISE, watch

__all__ = ["NOISE", "PREDICTIONS", "DiffusersNet", "from_diffusers", "overlay", "pictures", "step_at", "watch"]
