"""What a set of samples says of the model that drew them, as JSON, and one generation's figures as numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import _check
from ..core._typing import Tensor
from ..data.images import quantised
from ..data.mixtures import INTERPOLATED, GaussianMixture, Judgement
from ..data.mnist import MNIST
from ..data.shapes import SimpleShapes
from ..measure import stats
from ..measure.quality import class_width, coverage, fid, imbalance

WIDTHS = (4.0, 5.0, 6.0, 8.0)  # std from the nearest mode beyond which a sample counts as hallucinated
_OF_DIGITS = ("agreement", "fid", "precision", "recall", "density", "coverage", "width")  # figures of digits alone


def of_points(mixture: GaussianMixture, x: Tensor, verdict: Judgement | None = None) -> dict[str, Any]:
    """What samples `[n, dim]` say of the model that drew them, as JSON: fractions beyond each width, where the hallucinations
    lie, how the modes are shared, and their width and place in units of the mixture's std. Those two are of the points
    within 4 std of a mode: in the plane, points spread evenly over that disc read a width of 2, however far they go beyond it.
    `verdict` is the mixture's, where it has been asked for already."""
    verdict = verdict or mixture.judge(x)
    near = verdict.distance <= 4
    at_mode = [x[near & (verdict.mode == m)].double() for m in range(len(mixture.means))]
    pairs, counts = verdict.pair[verdict.kind == INTERPOLATED].unique(dim=0, return_counts=True)
    centres = mixture.means.to(x.device)
    return {
        "n": len(x),
        "fraction": {f"{w:g}": stats.fraction(int((verdict.distance > w).sum()), len(x)) for w in WIDTHS},
        "interpolated": stats.fraction(int((verdict.kind == INTERPOLATED).sum()), len(x)),
        "pairs": {f"{a}-{b}": int(c) for (a, b), c in zip(pairs.tolist(), counts.tolist(), strict=True)},
        "share": [int(c) for c in torch.bincount(verdict.mode, minlength=len(mixture.means))],
        "std_ratio": [float(p.std(0).mean()) / mixture.std if len(p) > 1 else None for p in at_mode],
        "offset": [
            float((p.mean(0) - c).norm()) / mixture.std if len(p) else None for p, c in zip(at_mode, centres, strict=True)
        ],
    }


def of_shapes(data: SimpleShapes, x: Tensor) -> dict[str, Any]:
    """What a generation says of images: fractions by kind, and how the sets of shapes are shared among those in support."""
    verdict = data.judge(x)
    good = (verdict.counts[verdict.kind == 0] > 0).long() @ torch.tensor([1, 2, 4])
    return {
        "n": len(x),
        "fraction": stats.fraction_by_kind(verdict.kind, data.kinds),
        "share": torch.bincount(good, minlength=8)[1:].tolist(),
        "distinct": len(quantised(x).flatten(1).unique(dim=0)),
    }


def of_digits(data: MNIST, x: Tensor, asked: Tensor) -> dict[str, Any]:
    """Fractions by kind, how the digits are shared, and how often the classifier reads the one that was asked for."""
    verdict = data.judge(x)
    return {
        "n": len(x),
        "fraction": stats.fraction_by_kind(verdict.kind, data.kinds),
        "share": torch.bincount(verdict.digit, minlength=10).tolist(),
        "agreement": float((verdict.digit == asked).double().mean()),
        "distinct": len(quantised(x).flatten(1).unique(dim=0)),
    }


class DigitReference:
    """MNIST's test digits, which no model has seen, as what generated ones are measured against."""

    def __init__(self, data: MNIST, n: int, generator: torch.Generator) -> None:
        self.data, self.n = data, n
        test, digit = MNIST(data.root, train=False, size=data.size).draw(n, generator)
        self.features, self.width = data.classifier.read(test).features, class_width(test, digit)

    def against(self, x: Tensor, digit: Tensor) -> dict[str, float]:
        """FID, precision, recall, density and coverage of the first n, and the width of a class over that of test digits."""
        features = self.data.classifier.read(x[: self.n]).features
        near = coverage(self.features[:2_000], features[:2_000])
        width = class_width(x[: self.n], digit[: self.n]) / self.width
        return {"fid": fid(self.features, features), **near._asdict(), "width": width}


def refit(mixture: GaussianMixture, x: Tensor) -> GaussianMixture:
    """The mixture that points `[n, dim]` look like: for each mode the mean of the points nearest to it and within 5 std, and
    one std for all. A mode with fewer than two points is gone.

    Raises:
        TinyhallError: no mode is left.
    """
    mode, distance = mixture.nearest(x)
    means, squares, count = [], 0.0, 0
    for k in range(len(mixture.means)):
        at = x[(mode == k) & (distance <= 5)].double()
        if len(at) < 2:
            continue
        means.append(at.mean(0))
        squares += float((at - means[-1]).square().sum())
        count += at.numel() - at.shape[1]
    if not means:
        raise _check.fail("x", x, "points near the modes")
    return GaussianMixture(torch.stack(means), max((squares / count) ** 0.5, 1e-9), f"refit of {mixture.name}")


def generation_summary(m: dict[str, Any]) -> dict[str, float]:
    """One generation's figures, a number each; NaN for what was not measured.

    Of points: fractions beyond 6 and 8 std, of those handed on, the score's AUROC, how many modes hold a tenth of their share
    or more, the total variation of the shares from equal ones, the modes' width over the true one, and the sliced Wasserstein
    distance to true data in std. Of images: the fraction of each kind, of those handed on, the AUROC, the total variation of
    the shares of the seven sets of shapes, or ten digits, from equal ones, and the share of images that are not repeated. Of
    digits also how often the classifier reads the one that was asked for, and the measures of `tinyhall.quality`, the width of
    a class over that of test digits.
    """
    counts = torch.tensor(m["share"])
    classes = torch.arange(len(counts))
    share = counts.double() / counts.sum()
    shared = {
        "handed on": (m.get("passed_on") or [math.nan])[0],
        "AUROC": (m.get("auroc") or [math.nan])[0],
    }
    uneven = imbalance(classes.repeat_interleave(counts), classes, len(counts)) if bool(counts.any()) else math.nan
    if "any" in m["fraction"]:
        kinds = {"hallucinated" if kind == "any" else kind: e[0] for kind, e in m["fraction"].items()}
        rest = {key: m[key] for key in _OF_DIGITS if key in m}
        return kinds | shared | {"imbalance": uneven, "distinct": m["distinct"] / m["n"]} | rest
    widths = [w for w in m["std_ratio"] if w is not None]
    return {
        "hallucinated": m["fraction"]["6"][0],
        "beyond 8 std": m["fraction"]["8"][0],
        **shared,
        "modes alive": float((share >= 0.1 / len(share)).sum()),
        "imbalance": uneven,
        "width": sum(widths) / len(widths) if widths else math.nan,
        "distance": m.get("distance", math.nan),
    }
