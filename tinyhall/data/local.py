"""Denoisers in closed form that see P pixels around each place: optimal for a training set, and trained by nobody.

Source: Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models, arXiv 2412.20292.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..core import _check
from ..core._typing import Float, Int, Net, Tensor
from ..core.schedule import Schedule

BORDERS = ("zeros", "circular")

# Numbers in one block of pixels against training images: on a processor 1 MB, which its cache holds through ten passes.
_ON_PROCESSOR, _ON_GPU = 2**18, 2**26


class LocalDenoiser:
    """The local score machine (LS, eq. 7 and 8): at every pixel the mean over all training images, each weighted by how well
    it explains the P x P pixels around; or with patches from every place, the equivariant one (ELS, eq. 9, 10 and 41).

    Under the call of a network. A patch as wide as the image is the whole of it, for every pixel: that is the exact denoiser of
    the training set (the ideal score machine, eq. 3 and 4), which repeats it.

    Squared differences are summed over patches by products with a band of ones, in float32. On a processor that is as quick as
    running sums; and as nothing is subtracted, ten times as exact: x_0 lies within 1e-3 of float64 (measured on shapes and
    hands, every noise level of a cosine schedule). Weights are summed over blocks of images, rescaled as a nearer one comes.
    Memory, beside the training set: four blocks of 1 MB (256 MB on a GPU; or of `chunk` images), and four times x. Time on one
    core, for each state: 5 to 6 ns a pixel and grey training image, 9 to 12 in colour, 1 to 3 with the whole image in view;
    and height x width times as much if `equivariant`.

    Args:
        images: the training set, float32 `[n, channel, height, width]`; it follows x to its device.
        schedule: of the states.
        patch: P, odd, or at least the longer side of an image; or a function from t to P, such as a `PatchFit`.
        equivariant: take patches from every place, not from the pixel's own alone.
        border: "zeros", where a patch ends with the image, as a network with zero padding sees it, and one that ends is
            compared with those that end alike (section 3.4); or "circular", where it goes on from the opposite edge.
        chunk: training images in a block; None for as many as the block's memory holds.
        dtype: in which to work, float32 or float64.

    Raises:
        TinyhallError: images that are not float32 of that shape, not finite or none at all; another patch, border or dtype.
    """

    def __init__(
        self,
        images: Float[Tensor, "n channel height width"],
        schedule: Schedule,
        patch: int | Callable[[int], int],
        *,
        equivariant: bool = False,
        border: str = "zeros",
        chunk: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check.floats("images", images, ndim=4)
        if border not in BORDERS:
            raise _check.fail("border", border, " or ".join(map(repr, BORDERS)))
        if dtype not in (torch.float32, torch.float64):
            raise _check.fail("dtype", dtype, "torch.float32 or torch.float64")
        self.schedule, self.patch, self.equivariant, self.border = schedule, patch, equivariant, border
        self.chunk = None if chunk is None else _check.positive_int("chunk", chunk)
        self.shape = tuple(images.shape[1:])
        if not callable(patch):
            self._patch(patch)
        self.images = images.detach().to(dtype)

    def _patch(self, patch: object) -> int:
        side = max(self.shape[1:])
        if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1 or (patch % 2 == 0 and patch < side):
            raise _check.fail("patch", patch, f"an odd whole number, or at least {side}, the image's longer side")
        return patch

    def at(self, patch: int | Callable[[int], int]) -> LocalDenoiser:
        """The same with another patch; the two share their training set. Raises TinyhallError for what is no patch."""
        other = copy.copy(self)
        other.patch = patch if callable(patch) else self._patch(patch)
        return other

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "n channel height width"], t: Int[Tensor, " n"], label: Tensor | None = None
    ) -> Float[Tensor, "n channel height width"]:
        """The predicted noise, in x's dtype. `label` is taken for the common signature and must be None.

        Raises:
            TinyhallError: x of another shape than the training images, not one t for each x, a t outside the schedule, a label,
                or a function `patch` that returns no patch.
        """
        _check.unlabelled(x, t, label, self.shape)
        self.images = self.images.to(x.device)
        if t.stride(0) == 0:  # as a sampler passes it: one number, expanded
            return self._eps(x, int(t[0]))
        out = torch.empty_like(x)
        for one in t.unique().tolist():
            out[t == one] = self._eps(x[t == one], one)
        return out

    def _eps(self, x: Tensor, t: int) -> Tensor:
        if not 0 <= t < self.schedule.timesteps:
            raise _check.TinyhallError(f"t: expected values in 0..{self.schedule.timesteps - 1}, got {t}")
        patch = self._patch(self.patch(t) if callable(self.patch) else self.patch)
        log_bar = float(self.schedule.log_alpha_bar[t])
        signal, rest = math.exp(0.5 * log_bar), -math.expm1(log_bar)
        z = x.to(self.images.dtype)
        return ((z - signal * self._mean(z, signal, rest, patch)) / math.sqrt(rest)).to(x.dtype)

    def _mean(self, x: Tensor, signal: float, rest: float, patch: int) -> Tensor:
        """E[x_0 | the patch of x around each pixel], for alpha_bar = signal^2 = 1 - rest."""
        whole = patch >= max(self.shape[1:])
        down, across = (self._band(side, patch) for side in self.shape[1:])
        scale = math.sqrt(0.5 / rest)
        scaled, mean = scale * x, torch.zeros_like(x)
        # The smallest -log of a weight so far, and the sum of all, at each pixel: [n, height, width]; or for all, [n, 1, 1].
        least = torch.full_like(x[:, 0, :1, :1] if whole else x[:, 0], math.inf)
        total = torch.zeros_like(least)
        for y, allowed in self._candidates(patch):
            for i, state in enumerate(scaled):
                gap = torch.sub(state[0], y[:, 0], alpha=signal * scale).square_()
                for channel in range(1, len(state)):
                    difference = torch.sub(state[channel], y[:, channel], alpha=signal * scale)
                    gap.addcmul_(difference, difference)
                if whole:
                    gap = gap.sum((1, 2), keepdim=True)
                else:
                    gap = down @ (gap.view(-1, len(across)) @ across).view_as(gap)
                if allowed is not None:
                    gap.masked_fill_(~allowed, math.inf)
                nearest = torch.minimum(least[i], gap.amin(0))
                weight = torch.sub(nearest, gap, out=gap).exp_()
                fade = (nearest - least[i]).exp_()
                least[i] = nearest
                total[i] = total[i] * fade + weight.sum(0)
                for channel in range(len(state)):
                    mean[i, channel] = mean[i, channel] * fade + (weight * y[:, channel]).sum(0)
        return mean.div_(total[:, None])

    def _band(self, side: int, patch: int) -> Tensor:
        """Ones where two places lie in one patch, `[side, side]`."""
        place = torch.arange(side, device=self.images.device)
        gap = (place[:, None] - place).abs()
        if self.border == "circular":
            gap = torch.minimum(gap, side - gap)
        return (gap <= patch // 2).to(self.images.dtype)

    def _candidates(self, patch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Blocks of training images, and at which pixels they count (None for all).

        A patch from another place is one from this place of an image that was moved, in a circle. Where patches end with the
        image, only those that end alike may stand for each other. An image that was not moved comes first, and counts at every
        pixel.
        """
        channels, height, width = self.shape
        numbers = _ON_PROCESSOR if self.images.device.type == "cpu" else _ON_GPU
        # Along each axis: places whose patch lies within the image.
        inside = [
            (torch.arange(side, device=self.images.device) - (side - 1) / 2).abs() <= (side - patch) / 2
            for side in (height, width)
        ]
        for y in self.images.split(self.chunk or max(numbers // (channels * height * width), 1)):
            yield y, None
            for shift in range(1, height * width if self.equivariant else 1):
                by = (-(shift // width), -(shift % width))
                allowed = None
                if self.border == "zeros":
                    rows, columns = (
                        own & own.roll(step) if step else torch.ones_like(own) for own, step in zip(inside, by, strict=True)
                    )
                    allowed = rows[:, None] & columns
                    if not bool(allowed.any()):
                        continue
                yield y.roll(by, (2, 3)), allowed


class PatchFit(NamedTuple):
    """P as a function of t: called with a t, the patch of the nearest t that was fitted; made by `fit_patch`."""

    t: Int[Tensor, " times"]  # distinct, rising
    patch: Int[Tensor, " times"]  # the median over states of the nearest patch
    error: Float[Tensor, "times patches"]  # 1 - cosine similarity with the network, mean over states

    def __call__(self, t: int) -> int:
        return int(self.patch[(self.t - t).abs().argmin()])


@torch.no_grad()
def fit_patch(
    net: Net,
    local: LocalDenoiser,
    x: Float[Tensor, "n channel height width"],
    t: Int[Tensor, " n"],
    patches: Sequence[int],
) -> PatchFit:
    """The P at each t with which a local denoiser comes nearest to a network (appendix C.2).

    As its authors do it: for each state the P of the largest cosine similarity between the two predictions of the noise, and
    for each t the median over states. Near pure noise all P answer alike, and the median says little: see `PatchFit.error`.

    Args:
        net: predicts eps.
        local: training set, schedule and kind of the denoiser; its own patch is not used.
        x, t: states, such as those that a reverse run of the network passes through.
        patches: the P to try.

    Raises:
        TinyhallError: no patches, or what `local` raises.
    """
    if not len(patches):
        raise _check.fail("patches", patches, "at least one P")
    theirs = _check.eps(net(x, t), x).flatten(1).double()
    errors = []
    for patch in patches:
        ours = local.at(patch)(x, t).flatten(1).double()
        errors.append(1 - torch.cosine_similarity(ours, theirs).cpu())
    error = torch.stack(errors, 1)  # [n, patches]
    best = torch.tensor(list(patches))[error.argmin(1)]
    times, t = t.unique().cpu(), t.cpu()
    return PatchFit(
        times,
        torch.stack([best[t == one].median() for one in times]),
        torch.stack([error[t == one].mean(0) for one in times]).float(),
    )
