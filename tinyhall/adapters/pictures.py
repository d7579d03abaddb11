"""Where in the pictures x0_hat moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import _check
from .._typing import Float, Tensor


def overlay(images: Any, variance: Float[Tensor, "n *shape"], *, strength: float = 0.7) -> Float[Tensor, "n 3 height width"]:
    """The pictures in grey, and in red where the predicted x_0 moved most:

        metric.per_dimension()  # [n, channels, height, width], of pixels or latents
        th.overlay(images, metric.per_dimension())

    The variance is averaged over channels, drawn out to the pictures' size, and shown relative to the largest of its picture.

    Args:
        images: a list of PIL images, an array `[n, height, width, 3]` of 0 to 1 or 0 to 255, or a tensor
            `[n, channels, height, width]` in [-1, 1] with one, three or more channels, of which the first three are shown.
        variance: of as many pictures; of patches `[n, patches, channels]` (FLUX), their grid has the shape of the picture.
        strength: of the red, 0 to 1.

    Returns:
        float32 in [-1, 1], on the processor.

    Raises:
        TinyhallError: images of another kind, a variance of another number, or patches in no grid of the picture's shape.
    """
    _check.number("strength", strength, "a number in [0, 1]", lambda v: 0 <= v <= 1)
    pictures = _pictures(images)
    n, _, height, width = pictures.shape
    moved = variance.detach().float().cpu()
    if len(moved) != n:
        raise _check.fail("variance", variance, f"one for each of {n} pictures")
    if moved.ndim == 3:
        low = round((moved.shape[1] * height / width) ** 0.5)
        if low == 0 or low * round(low * width / height) != moved.shape[1]:
            raise _check.fail("variance", variance, f"patches in a grid of the shape {height} by {width}")
        moved = moved.mean(2).view(n, 1, low, -1)
    elif moved.ndim == 4:
        moved = moved.mean(1, keepdim=True)
    else:
        raise _check.fail("variance", variance, "[n, channels, height, width] or [n, patches, channels]")
    moved = torch.nn.functional.interpolate(moved, size=(height, width), mode="bilinear")
    share = strength * moved / moved.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    red = torch.tensor([1.0, -0.8, -0.8]).view(1, 3, 1, 1)
    return (1 - share) * pictures.mean(1, keepdim=True) + share * red


def _pictures(images: Any) -> Tensor:
    """[n, 1 or 3, height, width] in [-1, 1]."""
    if isinstance(images, (list, tuple)) and len(images):
        images = np.stack([np.asarray(image) for image in images])
    if isinstance(images, np.ndarray) and images.ndim in (3, 4):
        whole = torch.from_numpy(np.array(images, dtype=np.float32)) / (255 if images.dtype == np.uint8 else 1)
        images = (whole[..., None] if whole.ndim == 3 else whole).movedim(-1, 1) * 2 - 1
    if not isinstance(images, Tensor) or images.ndim != 4:
        expected = "PIL images, an array [n, height, width, 3] or a tensor [n, channels, height, width]"
        raise _check.fail("images", images, expected)
    images = images.detach().float().cpu()
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1]
