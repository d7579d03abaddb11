"""The command line: `python -m tinyhall train|sample|reproduce|bench|info`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ImportError:
    print("tinyhall: the command line needs tyro: pip install 'tinyhall[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from . import _check


@dataclass
class Common:
    """What every command over a card takes."""

    card: tyro.conf.Positional[str]
    """Which experiment; `info` lists them."""
    scale: str | None = None
    """smoke, laptop or paper; without it TINYHALL_SCALE, or else paper."""
    seed: int = 0
    device: str | None = None
    """cuda, mps, cpu; without it the first of them that is there."""
    quiet: bool = False
    """No progress bars."""
    runs: Path = Path("runs")
    """Where checkpoints live; a run found there is resumed."""


@dataclass
class Sample:
    """Draws n samples of a trained card, with the trajectory variance of each, into one safetensors file."""

    n: int = 10_000
    out: Path = Path("samples.safetensors")
    sampler: str | None = None
    """Of points large or small (DDPM with that variance), ddim, ddim-50; of images small, ddim, full (all steps)."""
    batch_size: int | None = None
    """Samples in flight at a time."""


def train(common: Common) -> None:
    from . import cards, device, experiments

    card = cards.get(common.card, common.scale)
    _, history = experiments.train_card(card, common.seed, runs=common.runs, device=common.device, progress=not common.quiet)
    if device.rank() == 0:
        path = experiments.folder(common.runs, card, common.seed) / "checkpoint.safetensors"
        print(f"{card.name} at {card.scale} scale: {card.steps} steps, loss {history['losses'][-1]:.4f}, in {path}")


def sample(common: Common, options: Sample) -> None:
    from . import cards, device, experiments
    from .artifacts import write_tensors
    from .metrics import TrajectoryVariance
    from .sampling import sample as draw

    _check.positive_int("n", options.n)
    if options.batch_size is not None:
        _check.positive_int("batch_size", options.batch_size)  # before hours of training, not after
    above = (path for path in options.out.absolute().parents if path.exists())
    if options.out.is_dir() or not (place := next(above)).is_dir() or not os.access(place, os.W_OK):
        raise _check.fail("out", str(options.out), "a file in a folder that can be written to")
    card = cards.get(common.card, common.scale)
    samplers = experiments.samplers_of(card)
    name = options.sampler or next(iter(samplers))
    if name not in samplers:
        raise _check.fail("sampler", name, f"one of {', '.join(samplers)}")
    net, _ = experiments.train_card(card, common.seed, runs=common.runs, device=common.device, progress=not common.quiet)
    meter = TrajectoryVariance(card.window)
    drawn = draw(
        net, card.schedule(), options.n, metrics=[meter], batch_size=options.batch_size,
        sampler=samplers[name], generator=cards.stream(common.seed, "samples"),
        progress=not common.quiet,
    )  # fmt: skip
    if device.rank() == 0:
        hallucinated = ~card.data().in_support(drawn.x)
        note = {"card": card.hash, "sampler": name, "window": str(card.window)}
        tensors = {"x": drawn.x, "score": drawn.scores[meter.name], "hallucinated": hallucinated}
        write_tensors(options.out, tensors, note)
        print(f"{options.n} samples, {int(hallucinated.sum())} hallucinated, in {options.out}")


def reproduce(common: Common, root: Path) -> None:
    from . import cards, device, experiments, stats

    card = cards.get(common.card, common.scale)
    made = experiments.reproduce(
        card, common.seed, root=root, runs=common.runs, device=common.device, progress=not common.quiet
    )
    if device.rank():
        return
    # A recursion has a history for each arm, the others one entry for each sampler.
    last = {arm: history[-1] for arm, history in made.metrics["arms"].items()} if "arms" in made.metrics else made.metrics
    for name in [k for k, v in last.items() if isinstance(v, dict) and "fraction" in v]:
        fraction = last[name]["fraction"]
        print(f"{name}: {stats.Estimate(*fraction.get('5', fraction.get('any'))):.2e} hallucinated")
    print(f"{made.measured}; in {made.folder}")


def bench(tasks: Sequence[str], scale: str | None, seed: int, device: str | None, quiet: bool, root: Path) -> None:
    from . import bench as bench_

    names = list(tasks) or list(bench_.TASKS)
    for name in names:
        bench_.task(name)  # a slip in the last one should not cost the time of the others
    for name in names:
        result = bench_.run(name, scale, seed, root=root, device=device, progress=not quiet)
        print("\n".join(bench_.table({name: result})), flush=True)


def info(root: Path) -> None:
    import torch

    from . import __version__, cards, device, experiments

    place = device.pick()
    print(f"tinyhall {__version__}, torch {torch.__version__}, {experiments.describe_device(place)}")
    print(f"bfloat16 gains here: {'yes' if device.gains_bf16(place) else 'no'}")
    have = experiments.available(root)
    for name, card in cards.CARDS.items():
        made = ", ".join(f"{scale} seed {seed}" for c, scale, seed in have if c == name)
        print(f"{name:20} n={card.n:,}, {card.steps:,} steps of {min(card.batch_size, card.n):,}; made: {made or 'none'}")


def main(argv: list[str] | None = None) -> None:
    """Runs a command; bad input ends in one line on stderr and exit code 2, an interruption in 130, a reader that went away (as
    in `info | head -1`) in 141 without a word, as the shell's own programs do."""

    def train_(common: Annotated[Common, tyro.conf.arg(name="")]) -> None:
        """Train a card's network, with checkpoints; a run found in --runs is resumed."""
        train(common)

    def sample_(
        common: Annotated[Common, tyro.conf.arg(name="")],
        options: Annotated[Sample, tyro.conf.arg(name="")],
    ) -> None:
        """Draw samples of a card's network and score them."""
        sample(common, options)

    def reproduce_(common: Annotated[Common, tyro.conf.arg(name="")], root: Path = Path("book/artifacts")) -> None:
        """Train, draw, judge, score: write the artifact that the book loads."""
        reproduce(common, root)

    def bench_(
        tasks: tuple[str, ...] = (),
        scale: str | None = None,
        seed: int = 0,
        device: str | None = None,
        quiet: bool = False,
        root: Path = Path("book/artifacts"),
    ) -> None:
        """Tune and measure all detectors and cures on stored models: all tasks, or those named."""
        bench(tasks, scale, seed, device, quiet, root)

    def info_(root: Path = Path("book/artifacts")) -> None:
        """List cards, artifacts and the device."""
        info(root)

    commands: dict[str, Callable[..., Any]] = {
        "train": train_, "sample": sample_, "reproduce": reproduce_, "bench": bench_, "info": info_,
    }  # fmt: skip
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="tinyhall")
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
