"""A part of the torture suite in seconds, and invariants that hold for any input within the contract, and no other passes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import run_python, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyhall as th


def test_nothing_is_lost() -> None:
    done = run_python("tests/torture.py", "--short", JAXTYPING_DISABLE="1")
    assert done.returncode in (0, 1), done.stderr[-3000:]
    rows = re.findall(r"^(\S.*?) +(\d+) +(\d+) +(\d+) +(\d+)  ", done.stdout, re.MULTILINE)
    assert len(rows) == 11, done.stdout
    for what, tried, survived, refused, lost in rows:
        assert int(lost) == 0, done.stdout
        compared = what.startswith("for comparison")  # there, a bit may pass
        assert int(tried) > 0 and (compared or int(survived) + int(refused) == int(tried)), done.stdout


# Within the contract.


@st.composite
def schedules(draw: st.DrawFn) -> th.Schedule:
    steps = draw(st.integers(20, 300))
    if draw(st.booleans()):
        return th.Schedule.cosine(steps)
    # alpha_bar[-1] is at most exp(-sum of betas): 8 is more than enough noise.
    low = draw(st.floats(1e-5, 0.02))
    return th.Schedule.linear(low, draw(st.floats(min(16 / steps, 0.95), 0.97)), steps)


@given(schedule=schedules(), data=st.data())
def test_tables_of_any_schedule(schedule: th.Schedule, data: st.DataObject) -> None:
    bar, end = schedule.alpha_bar, schedule.timesteps
    assert bool((bar.diff() < 0).all()) and 0 < float(bar[-1]) < 1e-3 and float(bar[0]) < 1
    torch.testing.assert_close(bar, torch.cumprod(1 - schedule.betas, 0), rtol=1e-9, atol=0)
    t = torch.tensor(data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=8)))
    x0, eps = (torch.randn(len(t), 3, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    x = schedule.q_sample(x0, t, eps)
    error = (schedule.predict_x0(x, t, eps) - x0).abs() * bar[t].sqrt()[:, None]  # in units of x
    assert float(error.max()) < 1e-12
    mean, variance = schedule.posterior(x0, x, t)
    assert bool((variance >= 0).all()) and bool((variance.flatten() <= schedule.betas[t]).all())
    assert torch.equal(mean[t == 0], x0[t == 0]) or float((mean - x0)[t == 0].abs().max()) < 1e-12


@given(schedule=schedules(), data=st.data())
@settings(max_examples=40)
def test_any_respaced_sampler_starts_and_ends_right(schedule: th.Schedule, data: st.DataObject) -> None:
    end = schedule.timesteps
    count = data.draw(st.integers(2, end))
    chosen = st.lists(st.integers(0, end - 1), min_size=1, max_size=20, unique=True)
    steps = data.draw(st.one_of(st.none(), st.just(count), chosen.map(lambda times: sorted(times, reverse=True))))
    make = data.draw(st.sampled_from([
        th.ddpm("large", steps), th.ddpm("small", steps), th.ddim(0.0, steps), th.ddim(0.7, steps),
        th.hybrid(3, sample_steps=steps),
    ]))  # fmt: skip
    moves = make(schedule)
    times = [move.t for move in moves]
    assert times == sorted(set(times), reverse=True)
    assert len(times) == (end if steps is None else steps if isinstance(steps, int) else len(steps))
    assert all(math.isfinite(v) for move in moves for v in move) and all(move.noise >= 0 for move in moves)
    assert moves[-1].noise == 0
    if not isinstance(steps, list):
        assert times[-1] == 0
        assert float(schedule.alpha_bar[times[0]]) < 2e-3 or times[0] == end - 1  # begins where there is noise
    # The exact prediction for data at one point leads there, from anywhere, and the last step reaches it.
    place, bar = 0.7, schedule.alpha_bar

    def knows(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return ((x - bar[t].sqrt()[:, None] * place) / (1 - bar[t]).sqrt()[:, None]).float()

    last = list(th.reverse(knows, schedule, (4, 1), sampler=make, generator=seeded()))[-1]
    torch.testing.assert_close(last.x, torch.full((4, 1), place), rtol=0, atol=1e-2 if times[-1] == 0 else math.inf)


@given(data=st.data())
@settings(max_examples=40)
def test_samples_depend_on_seed_and_number_alone(data: st.DataObject) -> None:
    n, shape = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([(1,), (2,), (1, 4, 4), (3, 40, 60), (70_000,)]))
    n = min(n, 12) if math.prod(shape) > 1000 else n  # of the large ones, a block of noise is a few or one
    batch = data.draw(st.integers(1, 70))
    samplers = [th.ddpm("large", 7), th.ddpm("small", 5), th.ddim(0.5, 4), th.hybrid(2, sample_steps=6)]
    sampler = data.draw(st.sampled_from(samplers))
    seed = data.draw(st.integers(0, 2**40))
    label = torch.arange(n)

    def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        assert label is not None
        return 0.9 * x + label.view(-1, *[1] * (x.ndim - 1)) / 100

    def drawn(batch_size: int | None) -> th.Samples:
        return th.sample(
            net, SCHEDULE, n, shape=shape, metrics=[th.TrajectoryVariance((0, 100))], batch_size=batch_size, sampler=sampler,
            generator=seeded(seed), label=label,
        )  # fmt: skip

    whole, cut = drawn(None), drawn(batch)
    assert torch.equal(whole.x, cut.x)
    assert torch.equal(whole.scores["variance[0,100)"], cut.scores["variance[0,100)"])


@given(data=st.data())
def test_the_variance_of_any_dtype_is_numpy_s(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    states = [(data.draw(st.sampled_from([1.0, 30.0])) * torch.randn(5, 3, generator=seeded(i))).to(dtype) for i in range(6)]
    metric = th.TrajectoryVariance((0, 6))
    for t, x in enumerate(states):
        metric.update(th.Step(t, x, x, x))
    expected = np.stack([x.double().numpy() for x in states]).var(axis=0).mean(axis=1)
    np.testing.assert_allclose(metric.score().numpy(), expected, rtol=1e-6)


SCORES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e30, 1e30), st.just(math.inf)), min_size=2, max_size=40)


@given(scores=SCORES, data=st.data())
def test_any_roc_and_the_samples_that_any_filter_keeps(scores: list[float], data: st.DataObject) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    bad = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    bad[0], bad[1] = True, False
    false, true = th.roc(values, bad)
    for rate in (false, true):
        assert float(rate[0]) == 0 and float(rate[-1]) == 1 and bool((rate.diff() >= 0).all())
    area = th.auroc(values, bad)
    assert float(torch.trapezoid(true, false)) == pytest.approx(area.value)
    assert 0 <= area.low <= area.value <= area.high <= 1
    k = data.draw(st.integers(1, len(values)))
    if k > int(values.isfinite().sum()):
        with pytest.raises(th.TinyhallError, match="finite"):
            th.lowest_k(values, k)
        return
    kept = th.lowest_k(values, k)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == k
    dropped = values[[i for i in range(len(values)) if i not in kept]]
    assert not len(dropped) or float(values[kept].max()) <= float(dropped.min())


@given(n=st.integers(1, 10**9), share=st.floats(0, 1))
def test_any_fraction_lies_in_its_interval(n: int, share: float) -> None:
    found = th.fraction(int(share * n), n)
    assert -1e-15 <= found.low <= found.value <= found.high + 1e-15 <= 1 + 1e-14


@pytest.mark.parametrize("where", ["data", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_a_training(where: str, value: float, tmp_path: Path) -> None:
    net, data = th.nets.MLP(1, width=8), DATA.clone()
    with torch.no_grad():
        (data if where == "data" else net.time.weight)[3, 0] = value
    with pytest.raises(th.TinyhallError, match="finite"):
        fit(net=net, data=data, checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())


# Outside of it.

SCHEDULE, LINE = th.Schedule.linear(1e-3, 0.2, 100), th.datasets.GaussianMixture.line()
DATA = LINE.sample(20, seeded())
BAD = torch.arange(6) > 3


def still(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    return 0.9 * x


def fit(**changed: Any) -> Any:
    given = {"net": th.nets.MLP(1, width=8), "data": DATA, "train_steps": 1, "batch_size": 4, "lr": 1e-3} | changed
    return th.fit(given.pop("net"), given.pop("data"), SCHEDULE, generator=seeded(), progress=False, **given)


def draw(**changed: Any) -> Any:
    given = {"n": 3, "shape": (1,), "generator": seeded(), "sampler": th.ddim(sample_steps=4)} | changed
    return th.sample(given.pop("net", still), SCHEDULE, given.pop("n"), **given)


def recurse(**changed: Any) -> Any:
    given = {"data": DATA, "folder": "/nowhere", "arm": "variance", "generations": 1} | changed
    return th.recurse(given.pop("data"), lambda *_: LINE.denoiser(SCHEDULE), SCHEDULE, **given)


NUMBERS = (-1, 0, 1, 2, 1.5, -0.5, math.nan, math.inf, -math.inf, True)
TENSORS = (
    torch.tensor(1.0), torch.zeros(0), torch.zeros(0, 1), torch.zeros(3, 2).long(), torch.full((4, 1), math.nan),
    torch.zeros(6).double(), torch.zeros(6, dtype=torch.bool), torch.full((6,), math.inf),
)  # fmt: skip
OTHERS = (None, "x", b"x", [], {}, ())
UNET = {"size": 8, "widths": (8,), "blocks": 1}
CALLS: dict[str, Callable[[Any], Any]] = {
    **{f"linear {k}": lambda v, k=k: th.Schedule.linear(**{k: v}) for k in ("beta_start", "beta_end", "timesteps")},
    **{f"cosine {k}": lambda v, k=k: th.Schedule.cosine(**{k: v}) for k in ("timesteps", "offset", "max_beta")},
    "betas": th.Schedule, "alpha_bar": th.Schedule.from_alpha_bar, "window": th.TrajectoryVariance,
    "window low": lambda v: SCHEDULE.window(v, 0.9), "window high": lambda v: SCHEDULE.window(0.1, v),
    "alpha_bars": SCHEDULE.alpha_bars, "alpha_bar of a window": lambda v: th.TrajectoryVariance(alpha_bar=v),
    "low of a window": lambda v: draw(metrics=[th.TrajectoryVariance(alpha_bar=(v, 0.9))]),
    "variance": th.ddpm, "eta": th.ddim, "stochastic": th.hybrid,
    **{f"sample {k}": lambda v, k=k: draw(**{k: v}) for k in ("n", "shape", "batch_size", "label")},
    "guidance": lambda v: draw(guidance=v, label=torch.zeros(3).long()), "device": th.device.pick,
    "net": lambda v: draw(net=lambda x, t, label=None: v),
    "shape": lambda v: th.reverse(still, SCHEDULE, v, generator=seeded()),
    "start": lambda v: th.reverse(still, SCHEDULE, (4, 1), generator=seeded(), x=v),
    "k": lambda v: th.lowest_k(torch.arange(6.0), v), "lowest_k scores": lambda v: th.lowest_k(v, 1),
    "split n": lambda v: th.split(v, seeded()), "share": lambda v: th.split(9, seeded(), v),
    "remove": lambda v: th.Filter.calibrate(torch.arange(6.0), BAD, v), "scores": lambda v: th.Filter.calibrate(v, BAD),
    "hallucinated": lambda v: th.Filter.calibrate(torch.arange(6.0), v), "positive": lambda v: th.auroc(torch.arange(6.0), v),
    "strata": lambda v: th.auroc(torch.arange(6.0), BAD, v), "roc": lambda v: th.roc(v, BAD),
    "fraction k": lambda v: th.fraction(v, 5), "fraction n": lambda v: th.fraction(1, v),
    "points": lambda v: th.sliced_wasserstein(v, DATA), "std": lambda v: th.datasets.GaussianMixture.line(std=v),
    "side": th.datasets.GaussianMixture.grid, "judge": LINE.judge, "width": lambda v: LINE.judge(DATA, v),
    "dim": th.nets.MLP, "mlp width": lambda v: th.nets.MLP(1, v), "blocks": lambda v: th.nets.MLP(1, blocks=v),
    **{f"unet {k}": lambda v, k=k: th.nets.UNet(**UNET | {k: v}) for k in ("channels", "size", "stem")},
    **{f"fit {k}": lambda v, k=k: fit(**{k: v}) for k in
       ("train_steps", "batch_size", "lr", "label", "label_dropout", "ema", "microbatch", "every")},
    **{f"recurse {k}": lambda v, k=k: recurse(**{k: v}) for k in
       ("arm", "drop", "draw", "generations", "label", "guidance", "real")},
    "denoising x": lambda v: th.denoising_error(still, SCHEDULE, v, [1], generator=seeded()),
    "denoising t": lambda v: th.denoising_error(still, SCHEDULE, DATA, [v], generator=seeded()),
    "repeats": lambda v: th.denoising_error(still, SCHEDULE, DATA, [1], generator=seeded(), repeats=v),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_no_argument_may_be_is_refused_in_one_line(name: str, unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes for one argument of a public function, the call works or raises TinyhallError, and nothing else."""
    monkeypatch.setattr("tinyhall.store.generations._agree", lambda *_: None)  # nothing is written
    refused = 0
    for value in (*NUMBERS, *TENSORS, *OTHERS):
        try:
            CALLS[name](value)
        except th.TinyhallError as error:
            refused += 1
            assert "\n" not in str(error) and ": expected " in str(error), (value, error)
    assert refused >= 10, "nearly all of them are nothing that it takes"
