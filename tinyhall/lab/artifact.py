"""What one run of an experiment left behind, as a chapter loads it: weights, samples, figures, and tidy tables of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import _check
from ..core._typing import Tensor
from ..core.metrics import parsed, spelled
from ..core.mlp import MLP
from ..core.schedule import Schedule
from ..core.unet import UNet
from ..measure import stats
from ..notebook import locate
from ..store.files import load_weights, read_json, read_tensors
from . import experiments
from .experiment import Experiment, folder
from .summary import generation_summary

if TYPE_CHECKING:
    import pandas

COLUMNS = ("sampler", "window", "alpha_bar_low", "alpha_bar_high", "rule", "statistic", "value", "low", "high", "n")
_NUMBERS = ("alpha_bar_low", "alpha_bar_high", "value", "low", "high", "n")


@dataclass(frozen=True)
class Artifact:
    """What one run of a card left behind, as a chapter loads it."""

    folder: Path
    experiment: Experiment
    info: dict[str, Any]  # seed, device, revision, wall seconds, versions
    metrics: dict[str, Any]

    @functools.cached_property
    def net(self) -> MLP | UNet:
        """The trained network, on the processor; of images, the moving average of its weights."""
        net = self.experiment.net(self.info["seed"])
        load_weights(net, self.folder / "model.safetensors", self._tensors("model"))
        return net.eval()

    def samples(self, sampler: str) -> dict[str, Tensor]:
        """The tensors kept of one sampler's draw; see `Draw.tensors`."""
        return self._tensors(f"samples-{sampler}")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        tensors, note = read_tensors(self.folder / f"{name}.safetensors")
        if note.get("card") != self.experiment.hash:  # networks of many cards have the same shapes
            raise _check.TinyhallError(
                f"artifact: expected {name} of card {self.experiment.hash}, got that of {note.get('card')} in {self.folder}"
            )
        return tensors

    def fraction(self, sampler: str, width: str = "6") -> stats.Estimate:
        """The fraction of a sampler's draw that lies beyond `width` std of every mode; of images, of the kind `width`.

        Raises:
            TinyhallError: a sampler that is none of the artifact's, or a width that was not counted.
        """
        found = {key: m["fraction"] for key, m in self.metrics.items() if isinstance(m, dict) and "fraction" in m}
        if sampler not in found:
            raise _check.fail("sampler", sampler, f"one of {', '.join(found) or 'none, in a recursion'}")
        if width not in found[sampler]:
            raise _check.fail("width", width, f"one of {', '.join(found[sampler])}")
        return stats.Estimate(*found[sampler][width])

    @property
    def measured(self) -> str:
        """How this was measured, in a phrase for captions. It names what is not the paper's."""
        e = self.experiment
        told = [
            e.name, f"{e.scale} scale", f"seed {self.info['seed']}", f"n = {e.n:,}",
            f"{e.steps:,} steps of {min(e.batch_size, e.n):,}", *e.differences(),
        ]  # fmt: skip
        return ", ".join(told) + f", on {self.info['device']}"

    def table(self) -> pandas.DataFrame:
        """All that was measured, a row for each figure: see `tidy`."""
        return tidy(self.metrics, self.experiment.schedule())


def load(name: str, scale: str = "paper", seed: int = 0, root: str | Path = "artifacts") -> Artifact:
    """Opens the artifact of an experiment.

    Raises:
        TinyhallError: nothing there, a damaged file, or one that another experiment made.
    """
    experiment = experiments.get(name, scale)
    place = folder(locate(root), experiment, seed)
    if not place.is_dir():
        raise _check.TinyhallError(
            f"artifact: expected {place}, got nothing there; make it with "
            f"`python -m tinyhall reproduce {name} --scale {scale} --seed {seed} --root {root}`"
        )
    info, metrics = read_json(place / "card.json"), read_json(place / "metrics.json")
    if not isinstance(info, dict) or info.get("hash") != experiment.hash:
        got = info.get("hash") if isinstance(info, dict) else type(info).__name__
        raise _check.TinyhallError(
            f"artifact: expected one of experiment {name}-{scale} ({experiment.hash}), got {got} in {place}"
        )
    if info.get("seed") != seed or not isinstance(info.get("device"), str) or not isinstance(metrics, dict) or not metrics:
        raise _check.TinyhallError(f"artifact: expected seed {seed}, a device and metrics, got something else in {place}")
    return Artifact(place, experiment, info, respelled(metrics))


def available(root: str | Path = "artifacts") -> list[tuple[str, str, int]]:
    """(experiment, scale, seed) of every artifact under root that its experiment still stands by."""
    found: list[Any] = []
    for file in sorted(locate(root).glob("*/seed*/card.json")):
        info = read_json(file)
        if not isinstance(info, dict) or not isinstance(info.get("card"), dict):
            raise _check.TinyhallError(f"artifact: expected what an experiment left, got something else in {file}")
        name, scale, seed = info["card"].get("name"), info["card"].get("scale"), info.get("seed")
        if name in experiments.EXPERIMENTS and info.get("hash") == experiments.get(name, scale).hash:
            found.append((name, scale, seed))
    return found


def histories(name: str, scale: str = "paper", root: str | Path = "artifacts") -> dict[str, dict[str, Tensor]]:
    """What became of each arm of a recursion, over all seeds that have an artifact: for each figure of `generation_summary`,
    float64 `[seeds, generations]`.

    Raises:
        TinyhallError: no artifact of that experiment.
    """
    arms: dict[str, list[list[dict[str, float]]]] = {}
    for seed in sorted(seed for card, at, seed in available(root) if (card, at) == (name, scale)):
        for arm, history in load(name, scale, seed, root).metrics["arms"].items():
            arms.setdefault(arm, []).append([generation_summary(m) for m in history])
    if not arms:
        raise _check.TinyhallError(f"artifact: expected one of {name} at {scale} scale, got none under {root}")
    return {
        arm: {key: torch.tensor([[m[key] for m in h] for h in seeds], dtype=torch.float64) for key in seeds[0][0]}
        for arm, seeds in arms.items()
    }


def results(*names: str, scale: str = "paper", root: str | Path = "artifacts") -> pandas.DataFrame:
    """`Artifact.table` of all seeds of those experiments, of all there are where none is named, with where each comes from:
    experiment, scale, seed, device, revision.

    Raises:
        TinyhallError: an experiment without an artifact at that scale, or none at all.
    """
    import pandas

    found = [(name, seed) for name, at, seed in available(root) if at == scale]
    missing = [name for name in names if name not in {e for e, _ in found}]
    if missing or not found:
        wanted = missing[0] if missing else "any experiment"
        raise _check.TinyhallError(f"artifact: expected one of {wanted} at {scale} scale, got none under {root}")
    tables = []
    for name, seed in found:
        if not names or name in names:
            made = load(name, scale, seed, root)
            origin = {"experiment": name, "scale": scale, "seed": seed}
            origin |= {"device": made.info["device"], "revision": made.info["revision"]}
            tables.append(made.table().assign(**origin))
    return pandas.concat(tables, ignore_index=True)


def respelled(metrics: dict[str, Any]) -> dict[str, Any]:
    """Figures of an artifact with every window under its one spelling, [a,b): older files have it as a-b."""

    def key(old: str) -> str:
        ends = old.split("-")
        return spelled([int(end) for end in ends]) if all(end.isdecimal() for end in ends) else old

    def entry(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("windows"), dict):
            return value | {"windows": {key(w): found for w, found in value["windows"].items()}}
        return value

    return {name: entry(value) for name, value in metrics.items()}


def tidy(metrics: dict[str, Any], schedule: Schedule) -> pandas.DataFrame:
    """Figures of an artifact as a table of `COLUMNS`, a row for each: what a figure has no use for is empty.

    Of a draw: `fraction` and, of a density, `integral` at each rule (std from the nearest mode, or a kind of image), and for
    each window `auroc`, `removed` and `kept`, with the alpha_bar at its ends; of images these are of the mean over pixels, and
    with ", local" behind of the largest mean over a patch. Of a recursion: each generation's figures, with its arm in the
    place of the sampler, and `generation` as a further column.
    """
    import pandas

    rows = list(_rows(metrics, schedule))
    # The types of columns should not hang on which figures there happen to be.
    frame = pandas.DataFrame(rows, columns=[*COLUMNS, "generation"])
    frame = frame.astype({column: "float64" if column in _NUMBERS else object for column in COLUMNS})
    return frame if frame["generation"].notna().any() else frame.drop(columns="generation")


def _rows(metrics: dict[str, Any], schedule: Schedule) -> Iterator[dict[str, Any]]:
    for sampler, told in metrics.items():
        if not isinstance(told, dict) or "fraction" not in told:
            continue
        for rule, estimate in told["fraction"].items():
            yield _row(estimate, sampler=sampler, rule=_rule(rule), statistic="fraction")
        for rule, value in told.get("integral", {}).items():
            yield _row([value], sampler=sampler, rule=_rule(rule), statistic="integral")
        for window, found in told.get("windows", {}).items():
            low, high = schedule.alpha_bars(parsed(window))
            where = {"sampler": sampler, "window": window, "alpha_bar_low": low, "alpha_bar_high": high}
            for rule, report in found.items():
                end = {"mean": "", "local": ", local"}.get(rule)  # of images
                for statistic, estimate in (report or {}).items():
                    yield _row(estimate, **where, rule=_rule(rule) if end is None else "any", statistic=statistic + (end or ""))
    for arm, history in metrics.get("arms", {}).items():
        for generation, told in enumerate(history, 1):
            for statistic, value in generation_summary(told).items():
                yield _row([value], sampler=arm, statistic=statistic, generation=generation)


def _row(estimate: Any, **where: Any) -> dict[str, Any]:
    return where | dict(zip(("value", "low", "high", "n"), estimate, strict=False))


def _rule(name: str) -> float | str:
    """Std from a mode as a number; a kind of image as it is."""
    try:
        return float(name)
    except ValueError:
        return name
