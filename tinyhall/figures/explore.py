"""Figures that answer: in a page without a kernel, and in a live notebook with the reader's own samples."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..core import _check
from ..core._typing import Bool, Float, Int, Net, Tensor
from ..core.sampling import Sampler
from ..core.schedule import Schedule
from ..data.mixtures import GaussianMixture
from ..measure import stats
from ..measure.filtering import Filter
from .heat import Sheet as Sheet
from .heat import heat as heat
from .widgets import Explorer
from .widgets import Rerun as Rerun
from .widgets import sprite as sprite


def threshold(
    scores: Float[Tensor, " n"],
    bad: Bool[Tensor, " n"],
    *,
    images: Float[Tensor, "n channels size size"] | None = None,
    label: str = "trajectory variance",
    remove: float = 0.95,
    thumbs: int = 60,
) -> Explorer:
    """A slider on the threshold of a score: what is removed and kept changes at once, in counts, on the ROC and in pictures.

    Args:
        scores: positive, drawn on a log axis.
        bad: which samples are hallucinated.
        images: of the samples, in -1..1; `thumbs` of them are shown, in the order of their scores.
        label: the score's name.
        remove: the share of the hallucinated that the first threshold removes.

    Raises:
        TinyhallError: lengths that differ, scores that are not positive and finite, samples of one class only, or a share
            outside (0, 1].
    """
    stats.check_labelled(scores, bad, "bad", both=True)
    _logarithmic(scores)
    if images is not None and len(images) != len(scores):
        raise _check.fail("images", images, f"{len(scores)} of them, one for each score")
    # Three digits after the point of a logarithm, and few bytes. The first slider position counts with the rounded ones.
    logs = [round(float(v), 3) for v in scores.cpu().log10()]
    of_bad = [v for v, b in zip(logs, bad.tolist(), strict=True) if b]
    first = Filter.calibrate(torch.tensor(logs, dtype=torch.float64), bad.cpu(), remove).threshold
    data: dict[str, Any] = {
        "scores": logs, "bad": [bool(b) for b in bad], "label": label, "start": sorted(logs).index(first),
        "thumbs": [], "sprite": "", "columns": 1, "cell": 1,
    }  # fmt: skip
    if images is not None:
        # Evenly spaced over the ranks, so that the row of pictures is a row of scores.
        order = sorted(range(len(logs)), key=logs.__getitem__)
        shown = min(_check.positive_int("thumbs", thumbs), len(order))
        rows = [order[round(i * (len(order) - 1) / max(shown - 1, 1))] for i in range(shown)]
        data |= {"thumbs": rows, **sprite(images[rows])}
    removed = sum(v >= first for v in of_bad)
    kept = sum(v < first for v, b in zip(logs, bad.tolist(), strict=True) if not b)
    good = len(logs) - len(of_bad)
    still = (
        f"A threshold on the {label} that removes {removed} of {len(of_bad)} hallucinated samples keeps {kept} of {good} in "
        "support. With JavaScript, a slider moves it."
    )
    return Explorer("threshold", data, still)


def ride(
    t: Sequence[int],
    x: Float[Tensor, "n k"],
    x0_hat: Float[Tensor, "n k"],
    bad: Bool[Tensor, " n"],
    *,
    grid: Float[Tensor, " m"],
    exact: Float[Tensor, "k m"],
    learned: Float[Tensor, "k m"],
    modes: Sequence[float],
) -> Explorer:
    """Time by hand for points on a line: where the samples are, what is predicted for one of them, and what either denoiser
    would predict anywhere. x0_hat and the predictions are cut to the range of `grid`.

    Args:
        t: the k moments, falling.
        x, x0_hat: of n samples at those moments.
        bad: which samples end as hallucinations.
        grid: places of x at which `exact` and `learned` give the predicted x_0.
        modes: of the data.

    Raises:
        TinyhallError: shapes that do not fit, or t that does not fall.
    """
    n, k, m = len(bad), len(t), len(grid)
    _falling(t)
    _shaped(("x", x, (n, k)), ("x0_hat", x0_hat, (n, k)), ("exact", exact, (k, m)), ("learned", learned, (k, m)))
    low, high = float(grid.min()), float(grid.max())

    def short(values: Tensor) -> Any:
        return [[round(float(v), 2) for v in row] for row in values.clamp(low, high)]

    data = {
        "t": [int(v) for v in t], "x": short(x), "x0": short(x0_hat), "bad": [bool(b) for b in bad],
        "grid": [round(float(v), 3) for v in grid], "exact": short(exact), "learned": short(learned),
        "modes": [float(v) for v in modes], "low": low, "high": high,
    }  # fmt: skip
    still = (
        f"{n} samples on their way from noise to data, {int(bad.sum())} of which end as hallucinations. With JavaScript, a "
        "slider and a button move the time."
    )
    return Explorer("ride", data, still)


def draw(
    net: Net,
    schedule: Schedule,
    samplers: Mapping[str, Sampler],
    data: GaussianMixture,
    *,
    within: float = 6.0,
    bins: int = 160,
    most: int = 400_000,
) -> Explorer:
    """A network on a line, in the page: its reader draws samples by a sampler, a number and a seed of their choice, and puts
    the exact denoiser of the data in the network's place. The network comes as a table, a curve for each t that is visited.

    Args:
        net: over one dimension.
        samplers: by the name that the reader chooses from; they share what t they can, and so the table's rows.
        data: its modes say what is hallucinated.
        within: standard deviations around a mode that count as in support.
        most: samples that can be drawn, of which half are when the page opens; a multiple of 40.

    Raises:
        TinyhallError: a network or a mixture of more dimensions, a mixture of one mode, or no sampler.
    """
    if getattr(net, "dim", 1) != 1:
        raise _check.fail("net", net, "a network of one dimension")
    if data.dim != 1 or len(data.means) < 2:
        raise _check.fail("data", data.name, "a mixture of one dimension and at least two modes")
    if not samplers:
        raise _check.fail("samplers", samplers, "at least one")
    steps = {name: sampler(schedule) for name, sampler in samplers.items()}
    times = sorted({c.t for moves in steps.values() for c in moves})

    def short(*values: float) -> list[float]:
        return [float(f"{v:.8g}") for v in values]

    modes = [float(v) for v in data.means[:, 0]]
    low, high = min(-4.5, min(modes) - 1), max(4.5, max(modes) + 1)  # noise at one end of the way, and data at the other
    places = torch.linspace(low, high, round((high - low) / 0.02) + 1)
    with torch.no_grad():
        table = torch.stack([net(places[:, None], torch.full((len(places),), t))[:, 0] for t in times])
    figure = {
        "table": _levels(table, -25.0, 25.0), "points": len(places), "low": low, "high": high,
        "logs": short(*schedule.log_alpha_bar[times].tolist()),
        "samplers": [[name, [[times.index(c.t), *short(*c[1:])] for c in moves]] for name, moves in steps.items()],
        "modes": modes, "std": data.std, "within": within, "bins": bins, "most": most,
    }  # fmt: skip
    still = (
        f"A network that draws samples on a line with modes at {', '.join(f'{m:g}' for m in modes)}. With JavaScript, it draws "
        "them here, without a kernel, and the exact denoiser in its place leaves next to nothing between the modes."
    )
    return Explorer("draw", figure, still)


def brush(
    t: Sequence[int],
    x: Float[Tensor, "n 2"],
    x0_hat: Float[Tensor, "n k 2"],
    scores: Float[Tensor, " n"],
    data: GaussianMixture,
    *,
    within: float = 6.0,
    label: str = "trajectory variance",
) -> Explorer:
    """Samples of the plane under a brush: the way that the predictions of them took, and their scores.

    Args:
        t: the k last moments, falling.
        x: the samples.
        x0_hat: predicted at those moments; cut to the range of the figure.
        scores: positive.
        data: its modes say what is hallucinated.
        within: standard deviations around a mode that count as in support.

    Raises:
        TinyhallError: shapes that do not fit, t that does not fall, or scores that are not positive and finite.
    """
    n, k = len(x), len(t)
    _falling(t)
    _shaped(("x", x, (n, 2)), ("x0_hat", x0_hat, (n, k, 2)), ("scores", scores, (n,)))
    _logarithmic(scores)
    bad = ~data.in_support(x, within)
    edge = round(float(data.means.abs().max()) * 1.25, 2)
    start = x[bad][0] if bool(bad.any()) else x[0]
    figure = {
        "x": _levels(x, -edge, edge), "paths": _levels(x0_hat, -edge, edge), "t": [int(v) for v in t],
        "bad": [bool(b) for b in bad], "scores": [round(float(v), 3) for v in scores.log10()], "label": label,
        "modes": [[round(float(v), 4) for v in m] for m in data.means], "support": within * data.std,
        "low": -edge, "high": edge, "start": [float(v) for v in start],
    }  # fmt: skip
    still = (
        f"{n} samples in the plane, {int(bad.sum())} of which are hallucinated. With JavaScript, a brush shows the "
        "trajectories of those under it."
    )
    return Explorer("brush", figure, still)


def gallery(
    images: Any,
    scores: Mapping[str, Float[Tensor, " n"]],
    kind: Int[Tensor, " n"],
    kinds: Sequence[str],
    notes: Sequence[str] = (),
) -> Explorer:
    """Images sorted by the score of the reader's choice; told are the kinds of those at either end.

    Args:
        images: see `tinyhall.adapters.pictures`.
        scores: by name; the highest comes first.
        kind: of each image, an index of `kinds`, whose first is in support.
        notes: printed on the images, one on each, or none.

    Raises:
        TinyhallError: lengths that differ, no score, one that is not finite, or a kind without a name.
    """
    n = len(images)
    _shaped(*((name, value, (n,)) for name, value in {"kind": kind, **scores}.items()))
    if not scores:
        raise _check.fail("scores", scores, "at least one")
    for name, value in scores.items():
        if odd := int((~torch.isfinite(value)).sum()):
            raise _check.TinyhallError(f"scores: expected finite values, got {odd} of {name} that are not")
    if int(kind.min()) < 0 or int(kind.max()) >= len(kinds):
        raise _check.fail("kind", kind, f"indices of the {len(kinds)} kinds")
    if len(notes) not in (0, n):
        raise _check.TinyhallError(f"notes: expected {n} of them, one for each image, or none, got {len(notes)}")
    data = {
        "scores": [[name, [float(f"{float(v):.4g}") for v in value]] for name, value in scores.items()],
        "kind": [int(k) for k in kind], "kinds": list(kinds), "notes": list(notes),
        **sprite(images),
    }  # fmt: skip
    still = (
        f"{n} images, {int((kind > 0).sum())} of which are hallucinated. With JavaScript, they are sorted by "
        f"{' or '.join(scores)}, and shown by kind."
    )
    return Explorer("gallery", data, still)


class Drawn(NamedTuple):
    """What the generations of one arm drew: points of the plane or images in -1..1, a sentence for each generation, and which
    samples are hallucinated."""

    x: Float[Tensor, "generations n *shape"]
    bad: Bool[Tensor, "generations n"]
    told: Sequence[str]


def generations(
    sets: Mapping[str, Mapping[str, Drawn]], *, mixture: GaussianMixture | None = None, within: float = 6.0
) -> Explorer:
    """What each generation drew, in every arm of a recursion: a slider and a button go from one to the next.

    Args:
        sets: by the name of the data and the arm; within one set as many samples of each generation, though an arm may end
            before the others.
        mixture: of the points, whose modes are ringed at `within` standard deviations.

    Raises:
        TinyhallError: no data, arms whose samples differ in number or shape, or verdicts and sentences that do not fit them.
    """
    if not sets or not all(sets.values()):
        raise _check.fail("sets", sets, "at least one, of at least one arm")
    made = []
    for name, arms in sets.items():
        if len(shapes := {tuple(a.x.shape[1:]) for a in arms.values()}) != 1:
            raise _check.TinyhallError(f"sets: expected samples of one shape in all arms of {name}, got {sorted(shapes)}")
        for arm, drawn in arms.items():
            _shaped((f"bad of {arm}", drawn.bad, tuple(drawn.x.shape[:2])))
            if len(drawn.told) != len(drawn.x):
                raise _check.TinyhallError(f"told: expected {len(drawn.x)} sentences of {arm}, got {len(drawn.told)}")
        each, *shape = next(iter(shapes))
        x = torch.cat([a.x.flatten(0, 1) for a in arms.values()])
        one: dict[str, Any] = {
            "name": name, "arms": list(arms), "depth": [len(a.x) for a in arms.values()], "each": each,
            "bad": "".join(str(int(b)) for a in arms.values() for b in a.bad.flatten()),
            "figures": [sentence for a in arms.values() for sentence in a.told],
        }  # fmt: skip
        if shape == [2]:
            means = torch.zeros(0, 2) if mixture is None else mixture.means
            edge = round(1.35 * float((means if len(means) else x).abs().max()), 3)
            rings = [[round(float(v), 4) for v in m] for m in means]
            one |= {"points": _levels(x, -edge, edge), "modes": rings, "support": within * mixture.std if mixture else 0}
        else:
            one |= sprite(x, columns=each)
        made.append(one)
    deepest = max(max(one["depth"]) for one in made)
    still = f"Samples of up to {deepest} generations of {', '.join(sets)}. With JavaScript, a slider goes from one to the next."
    return Explorer("generations", {"sets": made}, still)


def answers(
    t: Sequence[int],
    schedule: Schedule,
    seen: Mapping[str, Float[Tensor, "k channels size size"]],
    given: Mapping[str, Float[Tensor, "cases k channels size size"]],
    near: Mapping[int, Float[Tensor, "cases k channels size size"]],
    light: Mapping[Any, Float[Tensor, "cases k"]],
    *,
    what: str,
) -> Explorer:
    """What denoisers answer to the same noisy images, side by side: by t, and for near-sighted ones by their patch.

    Args:
        t: the k moments, falling.
        seen: the noisy images, by what they were; cut to -1..1, as all here.
        given, near: the predicted x_0, by the denoiser's name, and by the patch of a near-sighted one.
        light: for each of these a number that stands below its image.
        what: that number's name.

    Raises:
        TinyhallError: shapes that do not fit, or t that does not fall.
    """
    _falling(t)
    shape = (len(seen), len(t), *next(iter(seen.values())).shape[1:])
    said: dict[Any, Tensor] = dict(given) | dict(near)
    _shaped(*((name, x, shape[1:]) for name, x in seen.items()), *((str(name), x, shape) for name, x in said.items()))
    _shaped(*((f"light of {name}", light[name], shape[:2]) for name in said))
    images = torch.stack([torch.stack(list(seen.values())), *said.values()], 2).flatten(0, 2)
    data = {
        "cases": list(seen), "t": [int(v) for v in t], "names": list(given), "patches": list(near), "what": what,
        "bars": [f"{float(schedule.alpha_bar[v]):.1%}" for v in t], "start": [len(t) // 2, len(near) // 3],
        "light": [[round(float(v), 2) for v in row] for row in torch.stack([light[n] for n in said], 2).flatten(0, 1)],
        **sprite(images, columns=1 + len(said)),
    }  # fmt: skip
    still = (
        f"What {', '.join(given)} and {len(near)} near-sighted denoisers answer to {len(seen)} images under noise. With "
        "JavaScript, sliders go from one t to the next, and from one patch to another."
    )
    return Explorer("answers", data, still)


def story(
    forward: Float[Tensor, "j n 2"],
    backward: Float[Tensor, "k n 2"],
    bad: Bool[Tensor, " n"],
    removed: Bool[Tensor, " n"],
    captions: Sequence[str],
) -> Explorer:
    """The whole story in a moving picture of the plane, with a sentence for each of its five scenes: the data, noise added, the
    way back, what was hallucinated, what a filter removes. It plays once, unless the reader has asked for stillness.

    Args:
        forward: the data on its way to noise, j pictures of n points.
        backward: samples on their way from noise.
        bad: which samples end as hallucinations.
        removed: which a filter takes out.
        captions: five sentences.

    Raises:
        TinyhallError: shapes that do not fit, or another number of captions.
    """
    n = len(bad)
    for name, value in (("forward", forward), ("backward", backward)):
        if value.ndim != 3 or tuple(value.shape[1:]) != (n, 2) or len(value) < 2:
            raise _check.fail(name, value, f"shape (at least 2, {n}, 2)")
    _shaped(("removed", removed, (n,)))
    if len(captions) != 5:
        raise _check.fail("captions", list(captions), "5 sentences")
    hold = 22  # pictures for a sentence to be read in while nothing moves
    frames = torch.cat([forward[:1].expand(hold, n, 2), forward, backward, backward[-1:].expand(2 * hold, n, 2)])
    scenes = [0] * hold + [1] * len(forward) + [2] * len(backward) + [3] * hold + [4] * hold
    edge = 3.0
    data = {
        "frames": _levels(frames, -edge, edge), "n": n, "scenes": scenes, "captions": list(captions),
        "bad": [bool(b) for b in bad], "removed": [bool(r) for r in removed], "low": -edge, "high": edge,
    }  # fmt: skip
    return Explorer("story", data, " ".join(captions))


def _falling(t: Sequence[int]) -> None:
    if len(t) < 2 or any(a <= b for a, b in pairwise(t)):
        raise _check.fail("t", list(t), "at least two falling moments")


def _logarithmic(scores: Tensor) -> None:
    """Refuses scores that have no place on a log axis."""
    odd = scores[~(scores > 0) | ~torch.isfinite(scores)]
    if len(odd):
        raise _check.TinyhallError(f"scores: expected finite values above 0, got {float(odd[0])}")


def _shaped(*expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, value, shape in expected:
        if tuple(value.shape) != shape:
            raise _check.fail(name, value, f"shape {shape}")


def _levels(values: Tensor, low: float, high: float) -> dict[str, Any]:
    """Numbers cut to [low, high] in 16 bits each."""
    level = ((values.double().clamp(low, high) - low) / (high - low) * 65_535).round()
    return {"packed": base64.b64encode(level.numpy().astype("<u2").tobytes()).decode(), "low": low, "high": high}
