"""`recurse`: generations of models on disk, each resumable, checkable and made once. The loop is `tinyhall.core.recursion`."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..core import _check
from ..core._typing import Float, Int, Net, Tensor
from ..core.device import barrier, rank
from ..core.metrics import Metric, TrajectoryVariance
from ..core.noise import stream
from ..core.recursion import ARMS, Lesson, needed, select
from ..core.recursion import generations as loop
from ..core.sampling import Sampler, Samples, coefficients, ddpm, sample
from ..core.schedule import Schedule
from .checkpoint import fingerprint
from .files import alone, differing, read_json, read_tensors, write_json, write_tensors

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
        metric: what "variance" filters by, such as `PostHocVariance`; without it `TrajectoryVariance((0, 10))`, as in the
            paper's code. Its score is of any floating type, kept in that of the samples, and nowhere NaN.
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
    wanted = "0 beside accumulate" if accumulate else "a share in [0, 1)"
    _check.number("real", real, wanted, lambda v: v == 0 if accumulate else 0 <= v < 1)
    metric = metric or TrajectoryVariance((0, 10))
    steps = coefficients(sampler, schedule)
    metric.check(schedule, [c.t for c in steps])
    settings = {
        "data": fingerprint(data), "draw": draw, "metric": metric.name, "note": note, "schedule": schedule.name,
        "sampler": _hash_of(steps), "seed": seed,
    }  # fmt: skip
    if label is not None:
        label = _check.labels("label", label, len(data)).cpu()
        if guidance is not None:
            _check.number("guidance", guidance, "a finite number", math.isfinite)
        settings |= {"label": fingerprint(label), "guidance": guidance}
    elif guidance is not None:
        raise _check.TinyhallError("guidance: expected a label beside it, got none")
    root, share = Path(folder), round(real * len(data))
    _agree(root / "recursion.json", settings)
    name = f"{arm}-{needed(len(data), drop)}" + (f"-real{share}" if share else "") + ("-accumulate" if accumulate else "")
    asked = None if label is None else label[torch.arange(draw) % len(data)]
    told: dict[str, Any] = {}  # of the generation at hand: what its file says

    def place(number: int) -> Path:
        return root / "1" if number == 1 else root / name / str(number)

    def drawn_by(net: Net, number: int) -> Samples:
        drawn = sample(
            net, schedule, draw, shape=tuple(data.shape[1:]), metrics=[metric], sampler=sampler, label=asked,
            guidance=guidance, generator=stream(seed, f"generation/{number}"), progress=progress,
        )  # fmt: skip
        if not _is_score(score := drawn.scores[metric.name], drawn.x):
            raise _check.fail(f"metric {metric.name}", score, f"a floating score of shape [{draw}] without NaN")
        return Samples(drawn.x, {metric.name: score.to(drawn.x.dtype)}, drawn.label)  # as its file will have it

    def make(lesson: Lesson) -> Samples:
        at = place(lesson.number)
        origin = {
            "generation": lesson.number, "seed": seed, "learned_from": fingerprint(lesson.data),
            "kept": None if lesson.kept is None else hashlib.sha256(lesson.kept.numpy().tobytes()).hexdigest()[:16],
        }  # fmt: skip
        state = _finished(at / "state.json", origin)
        if state is not None:
            drawn = _drawn(at)
            if state.get("drew") != fingerprint(drawn.x):
                raise _check.TinyhallError(f"samples: expected {state.get('drew')}, got {fingerprint(drawn.x)} in {at}")
            if list(drawn.scores) != [metric.name]:
                raise _check.TinyhallError(f"samples: expected scores {metric.name}, got {list(drawn.scores)} in {at}")
        else:
            # Held while it is made, not where the training locks too: two processes on an arm would write the same files.
            with contextlib.nullcontext() if rank() else alone(at.parent):
                labels = () if lesson.label is None else (lesson.label,)
                drawn = drawn_by(learn(lesson.data, lesson.number, at / "checkpoint.safetensors", *labels), lesson.number)
                state = {**origin, "drew": fingerprint(drawn.x), "metrics": evaluate(drawn) if evaluate else {}}
                if rank() == 0:
                    scores = {f"score.{name}": score for name, score in drawn.scores.items()}
                    asked_for = {} if asked is None else {"label": asked}
                    write_tensors(at / "samples.safetensors", {"x": drawn.x, **asked_for, **scores})
                    write_json(at / "state.json", state)  # last: a generation without it is not finished
                barrier()
                state = read_json(at / "state.json")  # what a second call will find
        told.update(state)
        return drawn

    def choose(lesson: Lesson, drawn: Samples) -> Tensor:
        return select(drawn, arm, len(data), drop, stream(seed, f"lot/{lesson.number}"))

    made = loop(Lesson(1, data, label, None), make, choose, real=share, accumulate=accumulate)
    return (
        Generation(lesson.number, arm, place(lesson.number), told["metrics"], kept)
        for lesson, _, kept in islice(made, generations)
    )


def _finished(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a finished generation, None where there is none; refuses one of another origin."""
    if not path.exists():
        return None
    state = read_json(path)
    if not isinstance(state, dict) or "metrics" not in state:
        raise _check.TinyhallError(f"state: expected the state of a generation, got something else in {path}")
    if (key := differing(origin, {key: state.get(key) for key in origin})) is not None:
        raise _check.TinyhallError(f"state: expected {key} {origin[key]!r}, got {state.get(key)!r} in {path}")
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
    if (key := differing(settings, before)) is not None:  # also what is set there and not here: labels
        raise _check.TinyhallError(
            f"{key}: expected {before.get(key)!r}, with which {path.parent} was begun, got {settings.get(key)!r}"
        )


def _hash_of(steps: Sequence[tuple[float, ...]]) -> str:
    """A sampler is its steps: their hash tells one from another, and stays the same from process to process."""
    return f"{len(steps)} moves sha256:{hashlib.sha256(repr([tuple(c) for c in steps]).encode()).hexdigest()[:16]}"
