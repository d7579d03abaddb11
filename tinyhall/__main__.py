"""The command line: `python -m tinyhall train|sample|reproduce|bench|info`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import tyro
except ImportError:
    print("tinyhall: the command line needs tyro: pip install 'tinyhall[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from .core import _check

if TYPE_CHECKING:
    from .lab.experiment import Experiment, Lab

app = tyro.extras.SubcommandApp()
ARTIFACTS = Path("book/artifacts")


@dataclass
class Common:
    """What every command over an experiment takes."""

    experiment: tyro.conf.Positional[str]
    """Which one; `info` lists them."""
    scale: str | None = None
    """smoke, laptop or paper; without it TINYHALL_SCALE, or else paper."""
    seed: int = 0
    device: str | None = None
    """cuda, mps, cpu; without it the first of them that is there."""
    quiet: bool = False
    """No progress bars."""
    runs: Path = Path("runs")
    """Where checkpoints live; a run found there is resumed."""

    def open(self, root: Path = ARTIFACTS) -> tuple[Experiment, Lab]:
        from .core import device
        from .lab import experiments
        from .lab.experiment import Lab

        experiment = experiments.get(self.experiment, self.scale)
        return experiment, Lab(self.seed, root, self.runs, device.pick(self.device), not self.quiet)


@dataclass
class Sample:
    """Draws n samples of a trained experiment, with the trajectory variance of each, into one safetensors file."""

    n: int = 10_000
    out: Path = Path("samples.safetensors")
    sampler: str | None = None
    """Of points large or small (DDPM with that variance), ddim, ddim-50; of images small, ddim, full (all steps)."""
    batch_size: int | None = None
    """Samples in flight at a time."""


Shared = Annotated[Common, tyro.conf.arg(name="")]


@app.command
def train(common: Shared) -> None:
    """Train an experiment's network, with checkpoints; a run found in --runs is resumed."""
    from .core import device
    from .lab.experiment import folder

    experiment, lab = common.open()
    _, run = experiment.trained(lab)
    if device.rank() == 0:
        path = folder(lab.runs, experiment, lab.seed) / "checkpoint.safetensors"
        print(f"{experiment.name} at {experiment.scale} scale: {run.step} steps, loss {run.losses[-1]:.4f}, in {path}")


@app.command
def sample(common: Shared, options: Annotated[Sample, tyro.conf.arg(name="")]) -> None:
    """Draw samples of an experiment's network and score them."""
    from .core import device
    from .core.sampling import sample as draw
    from .store.files import write_tensors

    _check.positive_int("n", options.n)
    if options.batch_size is not None:
        _check.positive_int("batch_size", options.batch_size)  # before hours of training, not after
    above = (path for path in options.out.absolute().parents if path.exists())
    if options.out.is_dir() or not (place := next(above)).is_dir() or not os.access(place, os.W_OK):
        raise _check.fail("out", str(options.out), "a file in a folder that can be written to")
    experiment, lab = common.open()
    samplers = experiment.samplers()
    name = options.sampler or next(iter(samplers))
    if name not in samplers:
        raise _check.fail("sampler", name, f"one of {', '.join(samplers)}")
    net, _ = experiment.trained(lab)
    meter = experiment.metric()
    drawn = draw(
        net, experiment.schedule(), options.n, metrics=[meter], batch_size=options.batch_size, sampler=samplers[name],
        generator=lab.stream("samples"), progress=lab.progress,
    )  # fmt: skip
    if device.rank() == 0:
        hallucinated = ~experiment.data().in_support(drawn.x)
        note = {"card": experiment.hash, "sampler": name, "metric": meter.name}
        tensors = {"x": drawn.x, "score": drawn.scores[meter.name], "hallucinated": hallucinated}
        write_tensors(options.out, tensors, note)
        print(f"{options.n} samples, {int(hallucinated.sum())} hallucinated, in {options.out}")


@app.command
def reproduce(common: Shared, root: Path = ARTIFACTS, redraw: bool = False) -> None:
    """Train, draw, judge, score: write the artifact that the book loads; or draw again from the network that is there."""
    from .core import device
    from .lab import reproduce as lab_
    from .measure import stats

    experiment, lab = common.open(root)
    options: dict[str, Any] = {"root": root, "device": common.device, "progress": lab.progress}
    if redraw:
        made = lab_.redraw(experiment.name, experiment.scale, lab.seed, **options)
    else:
        made = lab_.reproduce(experiment, lab.seed, runs=lab.runs, **options)
    if device.rank():
        return
    # A recursion has a history for each arm, the others one entry for each sampler.
    last = {arm: history[-1] for arm, history in made.metrics["arms"].items()} if "arms" in made.metrics else made.metrics
    for name in [k for k, v in last.items() if isinstance(v, dict) and "fraction" in v]:
        fraction = last[name]["fraction"]
        print(f"{name}: {stats.Estimate(*fraction.get('6', fraction.get('any'))):.2e} hallucinated")
    print(f"{made.measured}; in {made.folder}")


@app.command
def bench(
    tasks: tuple[str, ...] = (),
    scale: str | None = None,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
    root: Path = ARTIFACTS,
    only: tuple[str, ...] = (),
) -> None:
    """Tune and measure all detectors and mitigations on stored models: all tasks, or those named. `--only DETECTOR...` adds
    those detectors' rows to the results that are there."""
    from .lab import bench as bench_

    names: Sequence[str] = tasks or list(bench_.TASKS)
    for name in names:
        bench_.task(name)  # a slip in the last one should not cost the time of the others
    for name in names:
        result = bench_.run(name, scale, seed, root=root, device=device, progress=not quiet, only=only)
        print("\n".join(bench_.table({name: result})), flush=True)


@app.command
def info(root: Path = ARTIFACTS) -> None:
    """List experiments, artifacts and the device."""
    import torch

    from . import __version__
    from .core import device
    from .lab import experiments
    from .lab.artifact import available
    from .lab.provenance import describe_device
    from .store.checkpoint import gains_bf16

    place = device.pick()
    print(f"tinyhall {__version__}, torch {torch.__version__}, {describe_device(place)}")
    print(f"bfloat16 gains here: {'yes' if gains_bf16(place) else 'no'}")
    have = available(root)
    for name, e in experiments.EXPERIMENTS.items():
        made = ", ".join(f"{scale} seed {seed}" for found, scale, seed in have if found == name)
        print(f"{name:20} n={e.n:,}, {e.steps:,} steps of {min(e.batch_size, e.n):,}; made: {made or 'none'}")


def main(argv: list[str] | None = None) -> None:
    """Runs a command; bad input ends in one line on stderr and exit code 2, an interruption in 130, a reader that went away (as
    in `info | head -1`) in 141 without a word, as the shell's own programs do."""
    try:
        app.cli(args=argv, prog="tinyhall")
        sys.stdout.flush()  # here, where it may fail in good order
    except _check.TinyhallError as error:
        print(f"tinyhall: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        raise SystemExit(141) from None
    except OSError as error:
        print(f"tinyhall: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(f"tinyhall: {stop or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
