"""An experiment, run from end to end: train, draw, judge, score, and keep what a chapter needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..core import _check
from ..core import device as _device
from ..store.files import once, write_json
from . import experiments
from .artifact import Artifact, load
from .experiment import Experiment, Lab, folder
from .provenance import describe_device, revision


def reproduce(
    experiment: Experiment,
    seed: int = 0,
    *,
    root: str | Path = "artifacts",
    runs: str | Path = "runs",
    device: str | None = None,
    samplers: Sequence[str] | None = None,
    keep: int | tuple[int, int] = 2_000,
    progress: bool = True,
) -> Artifact:
    """Trains, draws with each sampler, judges, scores, writes the artifact. A second call resumes an unfinished training.

    A recursion is run arm by arm instead; `samplers` is not for it. Of models of images, `keep` is how many an artifact keeps
    verdicts, scores and pictures of, with traces of a few; two numbers are how many of each, and no traces. What `metrics`
    says rests on all that were drawn.

    Raises:
        TinyhallError: an experiment that is not, field by field, the one of its name and scale, whose artifact this would
            replace; a sampler that is none of its own; or what training and drawing raise.
    """
    if experiment != experiments.get(experiment.name, experiment.scale):
        raise _check.fail(
            "experiment", experiment, f"{experiment.name} at {experiment.scale} scale as `tinyhall.experiments` has it"
        )
    names = _known(experiment, samplers)
    lab = Lab(seed, Path(root), Path(runs), _device.pick(device), progress)
    spent = experiment.make(lab, names, keep if isinstance(keep, tuple) else (keep, None))
    info = {
        "card": asdict(experiment), "hash": experiment.hash, "seed": seed, "device": describe_device(lab.device),
        "revision": revision(), "torch": torch.__version__,
    } | spent  # fmt: skip
    once(write_json, folder(root, experiment, seed) / "card.json", info)  # last: without it there is no artifact
    return load(experiment.name, experiment.scale, seed, root)


def redraw(
    name: str, scale: str, seed: int = 0, *, root: str | Path = "artifacts", device: str | None = None,
    samplers: Sequence[str] | None = None, progress: bool = True,
) -> Artifact:  # fmt: skip
    """Draws again from the network of an artifact, judges and scores: nothing is trained, and what was measured by other
    samplers stays.

    Raises:
        TinyhallError: no artifact, a recursion, one without a network, or a sampler that is none of the experiment's.
    """
    made = load(name, scale, seed, root)
    experiment, lab = made.experiment, Lab(seed, Path(root), Path("runs"), _device.pick(device), progress)
    if "arms" in made.metrics:
        raise _check.fail("experiment", name, "one of a single model; a recursion is only made whole, by `reproduce`")
    names = _known(experiment, samplers)
    began = time.perf_counter()
    drawn = experiment.drawn(lab, made.net.to(lab.device), names, (2_000, None))
    metrics = made.metrics | {name: made.metrics.get(name, {}) | told for name, told in drawn.items()}
    info = made.info | {"drawn": {"device": describe_device(lab.device), "revision": revision(), "torch": torch.__version__}}
    info["sample_seconds"] = round(time.perf_counter() - began, 1)
    once(write_json, made.folder / "metrics.json", metrics)
    once(write_json, made.folder / "card.json", info)
    return load(name, scale, seed, root)


def _known(experiment: Experiment, samplers: Sequence[str] | None) -> Sequence[str]:
    known = experiment.samplers()
    for name in samplers or ():
        if name not in known:
            raise _check.fail("samplers", name, f"some of {', '.join(known)}")
    return list(known) if samplers is None else samplers
