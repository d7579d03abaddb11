"""Where in the pictures x0_hat moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..core import _check
from ..core._typing import Float, Tensor


def overlay(images: Any, variance: Float[Tensor, "n *shape"], *, strength: float = 0.7) -> Float[Tensor, "n 3 height width"]:
    """The pictures in grey, and in red where the predicted x_0 moved most:

        metric.per_dimension()  # [n, channels, height, width], of pixels or latents
        th.overlay(images, metric.per_dimension())

    The variance is averaged over channels, drawn out to the pictures' size, and shown relative to the largest of its picture.

    Args:
        images: see `pictures`.
        variance: of as many pictures; of patches `[n, patches, channels]` (FLUX), their grid has the shape of the picture.
        strength: of the red, 0 to 1.

    Returns:
        float32 in [-1, 1], on the processor.

    Raises:
        TinyhallError: images of another kind, a variance of another number, or patches in no grid of the picture's shape.
    """
    _check.number("strength", strength, "a number in [0, 1]", lambda v: 0 <= v <= 1)
    shown = pictures(images)
    n, _, height, width = shown.shape
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
    return (1 - share) * shown.mean(1, keepdim=True) + share * red


def pictures(images: Any) -> Float[Tensor, "n channels height width"]:
    """Images as people hold them, as float32 in [-1, 1] on the processor, with one channel or three.

    PIL images; bytes 0 to 255; `[n, channels, height, width]` in [-1, 1]; `[n, height, width, channels]`, with 1, 3 or 4 of
    them, in [0, 1], as pipelines return under `output_type="np"`. Of four channels or more the first three are shown.

    Raises:
        TinyhallError: anything else.
    """
    expected = "PIL images, [n, channels, height, width] in [-1, 1] or [n, height, width, channels] in [0, 1]"
    if (
        isinstance(images, (list, tuple))
        and len(images)
        and all(hasattr(i, "__array__") or hasattr(i, "__array_interface__") for i in images)
    ):
        images = np.stack([np.asarray(image.cpu() if isinstance(image, Tensor) else image) for image in images])
    if isinstance(images, np.ndarray) and images.dtype.kind in "fui":
        images = torch.from_numpy(images.copy())
    if not isinstance(images, Tensor) or images.ndim not in (3, 4):
        raise _check.fail("images", images, expected)
    images = images.detach().cpu()
    if images.ndim == 3:  # grey PIL images
        images = images[..., None]
    last = images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4)
    whole = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    if last:
        whole = whole.movedim(-1, 1)
        whole = whole if images.dtype == torch.uint8 else whole * 2 - 1
    return whole[:, :3] if whole.shape[1] >= 3 else whole[:, :1]
