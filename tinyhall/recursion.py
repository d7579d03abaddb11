"""Models trained on models: each generation learns from what the last one drew, whole or filtered."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _check
from ._typing import Float, Int, Net, Tensor
from .artifacts import alone, read_json, read_tensors, write_json, write_tensors
from .cards import stream
from .device import barrier, rank
from .filtering import keep_k, needed
from .metrics import Metric, TrajectoryVariance
from .sampling import Sampler, Samples, ddpm, sample
from .schedule import Schedule
from .training import fingerprint

ARMS = ("none", "random", "variance")

Learn = Callable[..., Net]
"""`learn(data, generation, checkpoint) -> net`: trains a model of data; called again, it resumes from the checkpoint. Data with
labels come as `learn(data, generation, checkpoint, label)`."""


@dataclass(frozen=True)
class Generation:
    """One generation, as its folder keeps it."""

    number: int  # 1 is the model of the real data, which all arms share
    arm: str
    folder: Path
    metrics: dict[str, Any]  # what `evaluate` said of the samples drawn, as its file has it: lists for tuples, text for keys
    kept: Int[Tensor, " keep"]  # which of them the next generation learns from, rising

    def samples(self) -> Samples:
        """All that this generation drew, with the scores that the filter saw."""
        return _drawn(self.folder)


def select(samples: Samples, arm: str, keep: int, drop: float, generator: torch.Generator) -> Int[Tensor, " keep"]:
    """Which samples the next generation learns from: rising indices, `keep` of the first keep/(1-drop).

    Args:
        samples: with one score each; what scores highest is dropped by "variance".
        arm: "none" keeps the first `keep`; "random" and "variance" drop the same share, by lot or by score.
        drop: that share; the paper drops 2,500 of 102,500.
        generator: for the lot.

    Raises:
        TinyhallError: an unknown arm, a share outside [0, 1), too few samples, or a lot without a generator.
    """
    if arm not in ARMS:
        raise _check.fail("arm", arm, f"one of {', '.join(ARMS)}")
    of = needed(keep, 0.0 if arm == "none" else drop)
    if of > len(samples):
        raise _check.TinyhallError(f"draw: expected at least {of}, to keep {keep} and drop {drop:.2%}, got {len(samples)}")
    if arm == "none":
        return torch.arange(keep)
    if arm == "random":
        _check.generator("generator", generator)
        return torch.randperm(of, generator=generator, device=generator.device)[:keep].cpu().sort().values
    return keep_k(next(iter(samples.scores.values()))[:of], keep)


def recurse(
    data: Float[Tensor, "n *shape"],
    learn: Learn,
    schedule: Schedule,
    *,
    folder: str | Path,
    arm: str = "variance",
    drop: float = 2_500 / 102_500,
    draw: int | None = None,
    generations: int = 5,
    metric: Metric | None = None,
    sampler: Sampler = ddpm(),  # noqa: B008 (frozen)
    label: Int[Tensor, " n"] | None = None,
    guidance: float | None = None,
    real: float = 0.0,
    accumulate: bool = False,
    evaluate: Callable[[Samples], dict[str, Any]] | None = None,
    seed: int = 0,
    note: str = "",
    progress: bool = False,
) -> Iterator[Generation]:
    """Trains on data, draws, filters, trains on what is kept, and so on: yields each generation once it is on disk.

    Every generation learns from as many samples as there are data, unless they accumulate. The first is the same for all arms
    and lies in `folder/1`, the others in `folder/<arm>-<of how many it keeps>/<generation>`, with the part that real data take
    in the name. Each of these holds the model's checkpoint, everything drawn with its scores, and `state.json`: seed, metrics,
    and hashes of what it learned from, of the indices by which that was kept from the generation before, and of what it drew.
    That is enough to check any generation from the one before. What is there is not made again, and a run that was killed,
    also in mid-training, ends in the bits of one that was not.

    Args:
        data: the real data, float32 `[n, *shape]`, wherever they lie; `learn` gets them on the processor, as it does samples.
        learn: see `Learn`; its generators should come from the generation's number, so that arms share their luck.
        arm, drop: see `select`.
        draw: samples drawn by each generation; without it, as many as the arm needs. Arms that share a folder must agree on it.
        metric: what "variance" filters by; without it `TrajectoryVariance((0, 10))`, the paper's. Its score is of any floating
            type, kept in that of the samples, and nowhere NaN.
        sampler: draws the samples.
        label, guidance: classes of the data, for networks that take them; every generation is asked for the same ones in the
            same order, over again where it draws more, and the next learns each sample under the class it was asked for.
        real: share of what each later generation learns from that is real data, the first of them, in the place of samples.
        accumulate: each generation learns from all that came before, too: real data and every generation's samples
            (Gerstgrasser et al. 2024).
        evaluate: says of the samples drawn what is worth keeping, as JSON.
        seed: of the drawing and the lot.
        note: anything else that a folder must agree on, such as a card's hash.

    Raises:
        TinyhallError: bad arguments, a folder that other arguments or damaged files have left behind, one in which another
            process makes the same generation, or scores that are none.
    """
    data = _check.floats("data", data).detach().cpu()
    _check.positive_int("generations", generations)
    if arm not in ARMS:
        raise _check.fail("arm", arm, f"one of {', '.join(ARMS)}")
    drop = 0.0 if arm == "none" else drop
    least = needed(len(data), drop)
    draw = least if draw is None else _check.positive_int("draw", draw)
    if draw < least:
        raise _check.TinyhallError(f"draw: expected at least {least}, to keep {len(data)} and drop {drop:.2%}, got {draw}")
    share = "0 beside accumulate" if accumulate else "a share in [0, 1)"
    _check.number("real", real, share, lambda v: v == 0 if accumulate else 0 <= v < 1)
    metric = metric or TrajectoryVariance((0, 10))
    metric.check(schedule)
    if isinstance(metric, TrajectoryVariance):
        moves = _moves(sampler, schedule)
        seen = sum(metric.sees(move.t, schedule.noise_share(move.t), len(moves) - 1 - i) for i, move in enumerate(moves))
        if seen < 2:  # one has no variance; every arm keeps the scores
            raise _check.TinyhallError(
                f"metric: expected a window in which the sampler makes 2 steps, got {seen} of {metric.where}"
            )
    settings = {
        "data": fingerprint(data), "draw": draw, "metric": metric.name, "note": note, "schedule": schedule.name,
        "sampler": _moves(sampler, schedule), "seed": seed,
    }  # fmt: skip
    if label is not None:
        label = _check.labels("label", label, len(data)).cpu()
        if guidance is not None:
            _check.number("guidance", guidance, "a finite number", math.isfinite)
        settings |= {"label": fingerprint(label), "guidance": guidance}
    elif guidance is not None:
        raise _check.TinyhallError("guidance: expected a label beside it, got none")
    root = Path(folder)
    _agree(root / "recursion.json", settings)
    return _generations(
        data, learn, schedule, root, arm, drop, draw, generations, metric, sampler, label, guidance, real, accumulate,
        evaluate or (lambda _: {}), seed, progress,
    )  # fmt: skip


def _generations(
    data: Tensor, learn: Learn, schedule: Schedule, root: Path, arm: str, drop: float, draw: int, generations: int,
    metric: Metric, sampler: Sampler, label: Tensor | None, guidance: float | None, real: float, accumulate: bool,
    evaluate: Callable[[Samples], dict[str, Any]], seed: int, progress: bool,
) -> Iterator[Generation]:  # fmt: skip
    keep, shape, kept = len(data), tuple(data.shape[1:]), None
    asked = None if label is None else label[torch.arange(draw) % keep]
    share = round(real * keep)
    branch = root / (f"{arm}-{needed(keep, drop)}" + (f"-real{share}" if share else "") + ("-accumulate" if accumulate else ""))
    first, first_label = data, label
    for number in range(1, generations + 1):
        place = root / "1" if number == 1 else branch / str(number)
        origin = {"generation": number, "seed": seed, "learned_from": fingerprint(data), "kept": kept}
        state: dict[str, Any] | None = _finished(place / "state.json", origin)
        if state is not None:
            drawn = _drawn(place)
            if state.get("drew") != fingerprint(drawn.x):
                raise _check.TinyhallError(f"samples: expected {state.get('drew')}, got {fingerprint(drawn.x)} in {place}")
            if list(drawn.scores) != [metric.name]:
                raise _check.TinyhallError(f"samples: expected scores {metric.name}, got {list(drawn.scores)} in {place}")
        else:
            # Held while it is made, not where the training locks too: two processes on an arm would write the same files.
            with contextlib.nullcontext() if rank() else alone(place.parent):
                labels = () if label is None else (label,)
                net = learn(data, number, place / "checkpoint.safetensors", *labels)
                drawn = sample(
                    net, schedule, draw, shape=shape, metrics=[metric], sampler=sampler, label=asked, guidance=guidance,
                    generator=stream(seed, f"generation/{number}"), progress=progress,
                )  # fmt: skip
                if not _is_score(score := drawn.scores[metric.name], drawn.x):
                    raise _check.fail(f"metric {metric.name}", score, f"a floating score of shape [{draw}] without NaN")
                drawn = Samples(drawn.x, {metric.name: score.to(drawn.x.dtype)}, drawn.label)  # as its file will have it
                state = {**origin, "drew": fingerprint(drawn.x), "metrics": evaluate(drawn)}
                if rank() == 0:
                    scores = {f"score.{name}": score for name, score in drawn.scores.items()}
                    asked_for = {} if asked is None else {"label": asked}
                    write_tensors(place / "samples.safetensors", {"x": drawn.x, **asked_for, **scores})
                    write_json(place / "state.json", state)  # last: a generation without it is not finished
                barrier()
                state = read_json(place / "state.json")  # what a second call will find
        indices = select(drawn, arm, keep, drop, stream(seed, f"lot/{number}"))
        yield Generation(number, arm, place, state["metrics"], indices)
        kept = hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]
        # `share` real ones in the place of as many samples, or all there has been.
        old, new = (data, indices) if accumulate else (first[:share], indices[: keep - share])
        if label is not None and asked is not None and first_label is not None:
            label = torch.cat([label if accumulate else first_label[:share], asked[new]])
        data = torch.cat([old, drawn.x[new]])


def _finished(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a finished generation, None where there is none; refuses one of another origin."""
    if not path.exists():
        return None
    state = read_json(path)
    if not isinstance(state, dict) or "metrics" not in state:
        raise _check.TinyhallError(f"state: expected the state of a generation, got something else in {path}")
    for key, value in origin.items():
        if state.get(key) != value:
            raise _check.TinyhallError(f"state: expected {key} {value!r}, got {state.get(key)!r} in {path}")
    return state


def _drawn(place: Path) -> Samples:
    tensors, _ = read_tensors(place / "samples.safetensors")
    got = ", ".join(sorted(tensors))
    x, label = tensors.pop("x", None), tensors.pop("label", None)
    scores = {k.removeprefix("score."): v for k, v in tensors.items()}
    if x is None or not scores or not all(_is_score(score, x) and score.dtype == x.dtype for score in scores.values()):
        raise _check.TinyhallError(f"samples: expected a tensor x and a score for each, got {got} in {place}")
    return Samples(x, scores, label)


def _is_score(score: Tensor, x: Tensor) -> bool:
    """One for each sample, of any floating type, none NaN."""
    return score.is_floating_point() and score.shape == x.shape[:1] and not bool(score.isnan().any())


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new folder; refuses to go on in one of other settings."""
    if not path.exists():
        if rank() == 0:
            write_json(path, settings)
        return
    before = read_json(path)
    before = before if isinstance(before, dict) else {}
    for key in [*settings, *before]:  # also what is set there and not here: labels
        was, value = before.get(key), settings.get(key)
        if was != value:
            raise _check.TinyhallError(f"{key}: expected {was!r}, with which {path.parent} was begun, got {value!r}")


def _moves(sampler: Sampler, schedule: Schedule) -> str:
    """A sampler is its moves: their hash tells one from another, and stays the same from process to process."""
    moves = sampler(schedule)
    return f"{len(moves)} moves sha256:{hashlib.sha256(repr([tuple(m) for m in moves]).encode()).hexdigest()[:16]}"
