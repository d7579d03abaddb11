"""The experiments of the book, by name: the paper's figures, and how each is made smaller.

    th.experiments.get("line123", "laptop")

Hashes cover every field: an artifact stands as long as its experiment does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from ..core import _check, _renamed
from .chains import (
    CuredDigitsExperiment,
    DigitsExperiment,
    GridRecursionExperiment,
    PostHocDigitsExperiment,
    RecursionExperiment,
    ShapesRecursionExperiment,
    SimpleShapesRecursionExperiment,
)
from .experiment import Experiment
from .pictures import (
    HandPhotosExperiment,
    HandsExperiment,
    LocalShapesExperiment,
    ShapesExperiment,
    SimpleShapesExperiment,
)
from .points import ExactExperiment, GaussianExperiment, TightExperiment


def _line(name: str, means: Sequence[float], **fields: Any) -> GaussianExperiment:
    return GaussianExperiment(name, layout="line", means=tuple(float(m) for m in means), **fields)


def _plane(layout: str, **fields: Any) -> GaussianExperiment:
    """The paper's 25 modes: n = 100,000 for 10,000 epochs of 10 batches."""
    usual: dict[str, Any] = {"name": layout, "n": 100_000, "steps": 100_000, "samples": 200_000}
    return GaussianExperiment(layout=layout, **usual | fields)


def _shapes(name: str, **fields: Any) -> ShapesExperiment:
    return ShapesExperiment(name, window=(0, 200), **fields)


def _recursion(name: str, kind: type[RecursionExperiment] = RecursionExperiment, **fields: Any) -> RecursionExperiment:
    return kind(name, layout="grid", n=100_000, steps=100_000, samples=0, **fields)


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        # The paper's main figure: n = 50,000 for 10,000 epochs of 5 batches.
        _line("line123", (1, 2, 3)),
        # The same steps at other n: the paper keeps epochs, so that its n = 20,000 sees 20,000 steps.
        _line("line123-n20000", (1, 2, 3), n=20_000),
        _line("line123-n5000", (1, 2, 3), n=5_000),
        _line("line123-n1000", (1, 2, 3), n=1_000),
        # Modes at two distances: 1-2 and 4-5 are neighbours, 2-4 are not.
        _line("line1245", (1, 2, 4, 5)),
        # Two neighbours, and one apart (Fig. 2c, d).
        _line("line124", (1, 2, 4)),
        _line("line12", (1, 2)),  # Fig. 14 has two modes, and does not say where
        # The paper's other sizes, at its equal epochs; and at the same steps as line123, so that data and training come apart.
        _line("line123-n25000-epochs", (1, 2, 3), n=25_000, steps=25_000),
        _line("line123-n100000-epochs", (1, 2, 3), n=100_000, steps=100_000),
        _line("line123-n500000-epochs", (1, 2, 3), n=500_000, steps=500_000),
        _line("line123-n25000", (1, 2, 3), n=25_000),
        _line("line123-n100000", (1, 2, 3), n=100_000),
        _line("line123-n500000", (1, 2, 3), n=500_000),
        _line("line1245-n25000-epochs", (1, 2, 4, 5), n=25_000, steps=25_000),
        # Other T between the same betas.
        _line("line123-T250-same", (1, 2, 3), timesteps=250),
        _line("line123-T500-same", (1, 2, 3), timesteps=500),
        _line("line123-T2000-same", (1, 2, 3), timesteps=2_000),
        # What the paper's code does by accident of `[block] * n`, undone.
        _line("line123-separate", (1, 2, 3), shared=False),
        _line("line123-T250", (1, 2, 3), timesteps=250, beta_start=4e-3, beta_end=0.8),
        _plane("grid"),
        _plane("diamond"),
        # Fig. 11 trains on a tenth of the points.
        _plane("grid", name="grid-n10000", n=10_000, steps=50_000),
        # The paper's rotation also shrinks: this one does not.
        _plane("diamond-spaced"),
        TightExperiment(
            "grid-tight", layout="grid", n=100_000, steps=100_000, samples=200_000, beta_start=1e-4, beta_end=0.02, shared=False
        ),
        # The true score in the network's place (Fig. 11).
        ExactExperiment("line123-exact", layout="line", means=(1.0, 2.0, 3.0), samples=1_000_000),
        ExactExperiment("grid-exact", layout="grid", n=100_000),
        _shapes("shapes"),
        # The same steps at other n.
        _shapes("shapes-n500", n=500),
        _shapes("shapes-n2000", n=2_000),
        _shapes("shapes-n20000", n=20_000),
        SimpleShapesExperiment("simple-shapes"),
        LocalShapesExperiment("simple-shapes-local"),
        HandsExperiment("hands", window=(0, 100)),
        HandsExperiment("hands-n500", n=500, window=(0, 100)),  # the same steps
        HandPhotosExperiment("hand-photos", window=(0, 100)),
        ShapesRecursionExperiment("shapes-recursion", n=5_000, draw=5_556, samples=0, window=(0, 20)),  # chapter 3 chose it
        SimpleShapesRecursionExperiment("simple-shapes-recursion"),
        PostHocDigitsExperiment("digits"),
        DigitsExperiment("mnist"),
        CuredDigitsExperiment("mnist-fine", finer=4),
        CuredDigitsExperiment("mnist-wide", variance="large"),
        CuredDigitsExperiment("mnist-unguided", guidance=1.0),
        CuredDigitsExperiment("mnist-real50", real=0.5),
        CuredDigitsExperiment("mnist-accumulated", accumulate=True),
        _recursion("grid-recursion", GridRecursionExperiment),
        _recursion("grid-recursion-oracle", GridRecursionExperiment, arms=(("variance", 0.2),), draw=125_000, score="oracle"),
        _recursion("recursion"),
        # How much must the filter drop? The 10% arm needs more samples than the paper draws.
        _recursion("recursion-sweep", arms=(("variance", 0.01), ("variance", 0.05), ("variance", 0.1)), draw=111_111),
        # What a perfect filter would do: its share only has to exceed the hallucinated.
        _recursion("recursion-oracle", arms=(("variance", 0.2),), draw=125_000, score="oracle"),
        # On this schedule the exact denoiser keeps the width of a mode to 1%, where on the paper's it keeps 62%.
        _recursion("recursion-fine", arms=(("none", 0.0),), beta_start=5e-5, beta_end=0.02),
    )
}


def get(name: str, scale: str | None = None) -> Experiment:
    """The experiment of that name; without a scale, at TINYHALL_SCALE, or else the paper's.

    Raises:
        TinyhallError: an unknown name or scale.
    """
    if name not in EXPERIMENTS:
        raise _check.fail("experiment", name, f"one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name].at(scale or os.environ.get("TINYHALL_SCALE", "paper"))


_OLD = {
    "CARDS": ("lab.experiments", "EXPERIMENTS"), "stream": ("core", "stream"), "available": ("lab.artifact", "available"),
    "histories": ("lab.artifact", "histories"), "read": ("lab.summary", "generation_summary"),
    "figures": ("lab.summary", "of_points"), "refit": ("lab.summary", "refit"),
    "describe_device": ("lab.provenance", "describe_device"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names of the first edition."""
    if name not in _OLD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, new = _OLD[name]
    _renamed.warn(f"th.experiments.{name}", f"tinyhall.{module}.{new}")
    return getattr(importlib.import_module(f"tinyhall.{module}"), new)
