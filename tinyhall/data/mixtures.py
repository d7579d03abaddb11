"""Mixtures of Gaussians that say of a point between which of their modes it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..core.device import exact
from ..core.mixture import Mixture

IN_SUPPORT, INTERPOLATED, ELSEWHERE = 0, 1, 2


class Judgement(NamedTuple):
    """What a mixture says of samples, each field of length n."""

    mode: Int[Tensor, " n"]  # index of the nearest mode
    distance: Float[Tensor, " n"]  # to it, in the mixture's std
    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, INTERPOLATED 1, ELSEWHERE 2
    pair: Int[Tensor, "n 2"]  # the two modes between which it lies, lower index first; (-1, -1) in support


@dataclass(frozen=True, eq=False)
class GaussianMixture(Mixture):
    """A `core.Mixture`, built as it is, that says of a point between which of its modes it lies."""

    def judge(self, x: Float[Tensor, "n dim"], width: float = 6.0) -> Judgement:
        """Where each point lies: in support; *interpolated*, out of it yet within `width` std of a segment that joins two
        modes (the rule of arXiv 2605.06831); or elsewhere.

        In the plane many segments pass near a point, and the long ones nearly everywhere. `pair` is therefore the *closest
        pair of modes* with a segment within `width` std (of equally close pairs, the one whose segment is nearest); for a
        point elsewhere, the pair whose segment is nearest.
        """
        _check.positive("width", width)
        mode, distance = self.nearest(x)
        kind = torch.full_like(mode, IN_SUPPORT)
        pair = torch.full((len(x), 2), -1, dtype=torch.int64, device=x.device)
        out = (distance > width).nonzero()[:, 0]
        # Rows against all pairs of modes at a time: their distances take some 30 MB a step.
        pairs = len(self.means) * (len(self.means) - 1) // 2
        for rows in out.split(max(2**22 // max(pairs * self.dim, 1), 1)):
            gap, joined = self._nearest_segment(x[rows], width * self.std)
            kind[rows] = torch.where(gap <= width * self.std, INTERPOLATED, ELSEWHERE).to(x.device)
            pair[rows] = joined
        return Judgement(mode, distance, kind, pair)

    def _nearest_segment(self, x: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """The distance `[n]` of each point to the segment of the pair of modes `[n, 2]` that `judge` names for it. It stays
        where there is float64."""
        if len(self.means) < 2:
            return torch.full((len(x),), math.inf, device=x.device), torch.full((len(x), 2), -1, device=x.device)
        place, x = x.device, exact(x)
        ends, order = self._pairs
        ends, order = ends.to(x.device), order.to(x.device)
        means = self.means.to(x.device)
        start, along = means[ends[:, 0]], means[ends[:, 1]] - means[ends[:, 0]]  # [pairs, dim]
        x = x.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9)
        away = x[:, None] - start  # [n, pairs, dim]
        share = ((away * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
        gap = (away - share[..., None] * along).norm(dim=-1)
        # Within reach, pairs are ranked by their order and then by the gap; out of it by the gap alone. On a lattice many
        # segments overlap, and rounding must not decide: a longer one out of reach has to be nearer by a real margin.
        near = gap <= reach
        least = torch.where(near, order, len(ends) + 1).amin(1, keepdim=True)
        candidates = torch.where(near.any(1, keepdim=True), near & (order == least), True)
        closest = gap.masked_fill(~candidates, math.inf)
        best = (closest <= closest.amin(1, keepdim=True) + 1e-6 * self.std).float().argmax(dim=1)
        return gap.gather(1, best[:, None])[:, 0], ends[best].to(place)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """All pairs of modes `[pairs, 2]`, the closest first, and the order of each (see `neighbour_order`)."""
        ends = torch.combinations(torch.arange(len(self.means)), 2)
        lengths = (self.means[ends[:, 1]] - self.means[ends[:, 0]]).norm(dim=1)
        lengths, index = lengths.sort(stable=True)
        apart = lengths.diff() > 1e-9 * lengths[1:]
        return ends[index], torch.cat([torch.ones(1, dtype=torch.int64), 1 + apart.long().cumsum(0)])

    def neighbour_order(self, pair: Int[Tensor, "n 2"]) -> Int[Tensor, " n"]:
        """How near the two modes of each pair are among all pairs: 1 for nearest neighbours, 2 for second-nearest (on a square
        lattice the diagonal), and so on; 0 for (-1, -1).

        Raises:
            TinyhallError: a pair that is not two distinct modes.
        """
        ends, order = self._pairs
        k = len(self.means)
        table = torch.zeros(k + 1, k + 1, dtype=torch.int64)  # the last row and column are those of -1
        table[ends[:, 0], ends[:, 1]] = table[ends[:, 1], ends[:, 0]] = order
        inside = (pair >= -1) & (pair < k)
        out = table[tuple(pair.cpu().clamp(-1, k - 1).T)] if len(pair) else torch.empty(0, dtype=torch.int64)
        if not bool(inside.all()) or bool((out == 0).logical_and(pair.cpu().amax(1) >= 0).any()):
            raise _check.fail("pair", pair, f"pairs of two distinct modes of 0..{k - 1}, or (-1, -1)")
        return out
