"""Samplers against diffusers and against the exact denoiser; chunks, seeds, guidance, and staying finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from common import one_line, seeded
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from tinyhall import device
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import TrajectoryVariance
from tinyhall.core.network import conditioned, where
from tinyhall.core.noise import BLOCK, Noise, Stream, Supply, stream
from tinyhall.core.sampling import (
    Coefficients,
    SampleConfig,
    chunks,
    coefficients,
    ddim,
    ddpm,
    reverse,
    sample,
    watched,
)  # fmt: skip
from tinyhall.core.schedule import Schedule
from tinyhall.datasets import GaussianMixture
from tinyhall.lab.mitigations import hybrid
from tinyhall.nets import MLP

MILD = Schedule.linear(1e-3, 0.2, 100)  # diffusers keeps float32 tables, which the paper's T = 1000 underflows
PAPER = Schedule.linear()


def double_tables(scheduler):
    """diffusers' tables in float64, by its own formulas: 1 - alpha_bar at t = 0 loses four digits in float32."""
    scheduler.betas = MILD.betas
    scheduler.alphas = 1 - MILD.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


def net(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """Smooth, cheap, bounded, and a function of each row alone: chunking cannot change a bit."""
    return torch.sin(x + 0.01 * t.view(-1, *[1] * (x.ndim - 1))) + 0.1 * torch.tanh(x.flip(-1))


def start(n: int = 16, dim: int = 2) -> Tensor:
    return torch.randn(n, dim, generator=seeded(11))


def compare(sampler, scheduler, times: Sequence[int], **options: object) -> None:
    """Walks both from one start with one noise stream, and compares every state and every predicted x_0."""
    theirs, x, g = [], start(), seeded(12)
    for t in times:
        eps = net(x, torch.full((len(x),), t))
        out = scheduler.step(eps, t, x, generator=g, **options)
        x = out.prev_sample
        theirs.append((t, x, out.pred_original_sample))
    ours = list(reverse(net, MILD, (16, 2), sampler=sampler, generator=seeded(12), x=start()))
    assert [s.t for s in ours] == list(times)
    for step, (_, state, x0) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(step.x, state.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(step.x0_hat, x0.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ddpm_equals_diffusers(variance: str) -> None:
    scheduler = DDPMScheduler(100, trained_betas=MILD.betas.numpy(), variance_type=f"fixed_{variance}", clip_sample=False)
    compare(ddpm(variance), double_tables(scheduler), range(99, -1, -1))


@pytest.mark.parametrize("variance", ["large", "small"])
def test_respaced_ddpm_equals_diffusers(variance: str) -> None:
    scheduler = DDPMScheduler(100, trained_betas=MILD.betas.numpy(), variance_type=f"fixed_{variance}", clip_sample=False)
    times = list(range(99, -1, -9))
    scheduler.set_timesteps(timesteps=times)
    compare(ddpm(variance, sample_steps=12), double_tables(scheduler), times)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 9])
def test_ddim_equals_diffusers(eta: float, stride: int) -> None:
    # set_alpha_to_one: the step out of t = 0 ends in clean data, as ours does.
    scheduler = DDIMScheduler(100, trained_betas=MILD.betas.numpy(), clip_sample=False, set_alpha_to_one=True)
    # DDIMScheduler takes t - T // num_inference_steps as the next t; 100 // 11 is our stride of 9 over 99, 90, ..., 0.
    scheduler.num_inference_steps = 100 if stride == 1 else 11
    times = list(range(99, -1, -stride))
    compare(ddim(eta, sample_steps=len(times)), double_tables(scheduler), times, eta=eta)


@pytest.mark.parametrize("schedule", [MILD, PAPER, Schedule.cosine(200)])
@pytest.mark.parametrize("steps", [None, 20])
def test_ddim_with_eta_1_is_ddpm_small(schedule: Schedule, steps: int | None) -> None:
    for a, b in zip(ddim(1.0, steps)(schedule), ddpm("small", steps)(schedule), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 340, 341, 342, 500, 999, 1000, None])
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_times_fall_from_noise_to_zero(make: Callable, steps: int | None) -> None:
    for schedule in (PAPER, Schedule.linear(1e-4, 0.02, 1000)):
        moves = make(sample_steps=steps)(schedule)
        times = [m.t for m in moves]
        assert len(times) == (steps or 1000)
        assert all(a > b for a, b in itertools.pairwise(times))
        if len(times) > 1:
            assert times[-1] == 0
        assert float(schedule.alpha_bar[times[0]]) < 1e-4  # starts in noise
        assert moves[-1].noise == 0


def test_short_samplers_skip_the_pure_noise() -> None:
    times = [m.t for m in ddim(sample_steps=50)(PAPER)]
    assert float(PAPER.alpha_bar[times[0]]) < 1e-6 <= float(PAPER.alpha_bar[times[0] - 1])
    assert max(a - b for a, b in itertools.pairwise(times)) <= times[0] / 49 + 1


def test_moves_follow_the_posterior() -> None:
    """Fixed small is q(x_{t-1} | x_t, x_0) with x_0 predicted; fixed large has its mean, and beta_t for variance."""
    for small, large in zip(ddpm("small")(MILD), ddpm("large")(MILD), strict=True):
        t = torch.tensor([small.t])
        x, eps = torch.tensor([[0.8]]), torch.tensor([[-0.4]])
        mean, variance = MILD.posterior(MILD.predict_x0(x, t, eps), x, t)
        assert small.x * 0.8 - small.eps * 0.4 == pytest.approx(float(mean), abs=1e-4)
        assert small.noise**2 == pytest.approx(float(variance), rel=1e-4, abs=1e-12)
        assert (large.x, large.eps) == pytest.approx((small.x, small.eps), rel=1e-9)
        assert large.noise**2 == pytest.approx(float(MILD.betas[small.t]) if small.t > 0 else 0.0, rel=1e-9)


def test_hybrid_is_ddim_then_ddpm() -> None:
    for variance in ("small", "large"):
        for steps in (None, 20):
            moves = hybrid(3, variance, steps)(MILD)
            assert moves[:-3] == ddim(sample_steps=steps)(MILD)[:-3]
            assert moves[-3:] == ddpm(variance, steps)(MILD)[-3:]
            assert [m.noise > 0 for m in moves[-5:]] == [False, False, True, True, False]
    assert hybrid(500)(MILD) == ddpm("small")(MILD)


def test_step_reports_what_the_network_said() -> None:
    before = start()
    for step in reverse(net, MILD, (16, 2), sampler=ddim(), generator=seeded(), x=before):
        t = torch.full((16,), step.t)
        assert step.walk is not None
        assert torch.equal(step.walk.eps_at(before, t), step.eps)
        assert (step.walk.schedule, isinstance(step.walk.noise, Noise)) == (MILD, True)
        torch.testing.assert_close(step.eps, net(before, t))
        torch.testing.assert_close(step.x0_hat, MILD.predict_x0(before, t, step.eps))
        before = step.x


def test_last_step_is_the_prediction() -> None:
    """No noise in it: the sample is the last predicted x_0."""
    for sampler in (ddpm(), ddpm("small"), ddim(), ddim(0.5), hybrid()):
        *_, last = reverse(net, MILD, (16, 2), sampler=sampler, generator=seeded())
        torch.testing.assert_close(last.x, last.x0_hat, rtol=1e-4, atol=1e-5)


def test_ddim_draws_no_noise_and_a_given_start_is_used() -> None:
    g = seeded(3)
    state = g.get_state()
    given = start()
    kept = given.clone()
    *_, a = reverse(net, MILD, (16, 2), sampler=ddim(), generator=g, x=given)
    assert torch.equal(g.get_state(), state)
    assert torch.equal(given, kept)  # not written to
    *_, b = reverse(net, MILD, (16, 2), sampler=ddim(), generator=seeded(4), x=given)
    assert torch.equal(a.x, b.x)
    *_, c = reverse(net, MILD, (16, 2), sampler=ddim(), generator=seeded(4), x=given + 0.1)
    assert not torch.equal(a.x, c.x)


@pytest.mark.parametrize("sampler", [ddpm(), ddpm("small"), ddim(0.5), hybrid(), ddim()])
def test_equal_seeds_give_equal_bits(sampler) -> None:
    before = torch.get_rng_state()
    a, b, c = (
        sample(MLP(2), MILD, 20, sampler=sampler, generator=seeded(s), metrics=[TrajectoryVariance()]) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.x, b.x)
    assert all(torch.equal(a.scores[k], b.scores[k]) for k in a.scores)
    assert not torch.equal(a.x, c.x)
    runs = [list(reverse(MLP(2), MILD, (20, 2), sampler=sampler, generator=seeded(s))) for s in (1, 1, 2)]
    assert torch.equal(runs[0][-1].x, runs[1][-1].x)
    assert not torch.equal(runs[0][-1].x, runs[2][-1].x)


def test_a_generator_moves_on() -> None:
    g = seeded(1)
    assert not torch.equal(sample(MLP(2), MILD, 5, generator=g).x, sample(MLP(2), MILD, 5, generator=g).x)


def test_start_is_standard_normal_and_noise_is_fresh() -> None:
    first = next(reverse(lambda x, t, label=None: torch.zeros_like(x), MILD, (20_000, 1), sampler=ddim(), generator=seeded()))
    x = first.x / ddim()(MILD)[0].x
    assert float(x.mean()) == pytest.approx(0, abs=0.03)
    assert float(x.std()) == pytest.approx(1, abs=0.03)
    zero = lambda x, t, label=None: torch.zeros_like(x)  # noqa: E731
    states = list(reverse(zero, MILD, (5000, 1), sampler=ddpm(), generator=seeded(2)))
    moves = ddpm()(MILD)
    noise = [(b.x - m.x * a.x) / m.noise for a, b, m in zip(states[40:45], states[41:46], moves[41:46], strict=True)]
    assert all(float(z.std()) == pytest.approx(1, abs=0.05) for z in noise)
    assert abs(float((noise[0] * noise[1]).mean())) < 0.06


@pytest.mark.parametrize("batch", [1, 7, 16, 23, 40, 100])
def test_chunked_equals_whole_for_images(batch: int) -> None:
    # 4,096 numbers a sample: noise comes in blocks of 16 samples, so these batches cut blocks in every way.
    whole = sample(
        net,
        MILD,
        40,
        shape=(1, 64, 64),
        sampler=ddpm(sample_steps=4),
        generator=seeded(5),
        metrics=[TrajectoryVariance((0, 99))],
    )
    part = sample(
        net, MILD, 40, shape=(1, 64, 64), sampler=ddpm(sample_steps=4), generator=seeded(5), batch_size=batch,
        metrics=[TrajectoryVariance((0, 99))],
    )  # fmt: skip
    assert torch.equal(whole.x, part.x)
    assert torch.equal(whole.scores["variance[0,99)"], part.scores["variance[0,99)"])
    assert len(whole.x.flatten(1).unique(dim=0)) == 40  # no block repeats another's noise


def test_chunked_equals_whole_across_blocks_with_the_exact_denoiser() -> None:
    mixture = GaussianMixture.line()
    n = 140_000  # two whole blocks of 65,536 points and a rest
    first = None
    for batch in (None, 65_536, 50_000, 139_999):
        out = sample(
            mixture.denoiser(MILD), MILD, n, shape=(1,), sampler=ddpm(sample_steps=3), generator=seeded(6), batch_size=batch
        )
        first = out if first is None else first
        assert torch.equal(out.x, first.x)
    assert len(first) == n
    assert len(first.x.unique()) > 0.9 * n


def test_processes_share_what_one_chunk_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, n = GaussianMixture.line(), 140_000

    def drawn() -> Tensor:
        return sample(mixture.denoiser(MILD), MILD, n, shape=(1,), sampler=ddpm(sample_steps=3), generator=seeded(6)).x

    whole, parts = drawn(), []
    monkeypatch.setattr(device, "processes", lambda: 2)
    monkeypatch.setattr(device, "gather_rows", lambda rows: rows)
    for rank in (0, 1):
        monkeypatch.setattr(device, "rank", lambda rank=rank: rank)
        parts.append(drawn())
    assert [len(part) for part in parts] == [131_072, n - 131_072]  # whole blocks of noise
    assert torch.equal(torch.cat(parts), whole)


def test_chunked_equals_whole_with_the_network() -> None:
    whole = sample(MLP(2), MILD, 20, generator=seeded(7), metrics=[TrajectoryVariance()])
    for batch in (3, 13, 20):
        part = sample(MLP(2), MILD, 20, generator=seeded(7), metrics=[TrajectoryVariance()], batch_size=batch)
        torch.testing.assert_close(part.x, whole.x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.scores["variance[0,10)"], whole.scores["variance[0,10)"], rtol=1e-2, atol=1e-2)


def test_scores_belong_to_their_samples() -> None:
    out = sample(
        net,
        MILD,
        30,
        shape=(2,),
        generator=seeded(8),
        metrics=[TrajectoryVariance(), TrajectoryVariance((20, 60))],
        batch_size=7,
    )
    assert list(out.scores) == ["variance[0,10)", "variance[20,60)"]
    assert all(s.shape == (30,) for s in out.scores.values())
    again = {}
    for window in ((0, 10), (20, 60)):
        metric = TrajectoryVariance(window)
        sample(net, MILD, 30, shape=(2,), generator=seeded(8), metrics=[metric])
        again[metric.name] = metric.score()
    for name, score in again.items():
        torch.testing.assert_close(out.scores[name], score)


@pytest.mark.parametrize(
    "sampler",
    [
        ddpm(),
        ddpm("small"),
        ddim(sample_steps=10),
        ddim(sample_steps=50),
        ddim(sample_steps=1000),
        ddim(0.5, 50),
        hybrid(),
        hybrid(4, "small", 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [1, 2])
def test_finite_over_the_paper_s_schedule(sampler, dim: int, unchecked: None) -> None:
    """An untrained network predicts none of the noise, and the walk multiplies all of it by 1 / sqrt(alpha_bar)."""
    for step in reverse(MLP(dim), PAPER, (8, dim), sampler=sampler, generator=seeded(1)):
        assert bool(torch.isfinite(step.x).all()), step.t
        assert bool(torch.isfinite(step.x0_hat).all()), step.t
        assert bool(torch.isfinite(step.eps).all()), step.t


def width_by_recursion(sampler, std: float) -> float:
    """The std that a sampler leaves of one Gaussian, over the true one: with the exact denoiser each step is affine in x."""
    variance = 1.0
    for t, of_x, of_eps, noise in sampler(PAPER):
        bar = math.exp(float(PAPER.log_alpha_bar[t]))
        slope = math.sqrt(1 - bar) / (bar * std**2 + 1 - bar)
        variance = (of_x + of_eps * slope) ** 2 * variance + noise**2
    return math.sqrt(variance) / std


@pytest.mark.parametrize(
    ("sampler", "line", "grid"), [(ddpm(), 0.93, 0.62), (ddpm("small"), 0.78, 0.47), (ddim(), 0.83, 0.50)], ids=str
)
def test_the_exact_score_does_not_hallucinate_but_narrows(sampler, line: float, grid: float, unchecked: None) -> None:
    for mixture, measured, n in ((GaussianMixture.line(), line, 2500), (GaussianMixture.grid(), grid, 1000)):
        x = sample(mixture.denoiser(PAPER), PAPER, n, shape=mixture.shape, sampler=sampler, generator=seeded(13)).x
        assert bool(mixture.in_support(x).all())  # as of the data: 2e-9 of it lies outside, in one dimension
        gap = x.double() - mixture.means[mixture.judge(x).mode]
        width = float(gap.square().mean().sqrt()) / mixture.std
        error = 1 / math.sqrt(2 * gap.numel())  # of a std, relative
        assert width == pytest.approx(measured, rel=4 * error + 0.01)
        if sampler != ddim():  # without noise each mode keeps the shape of its basin, which is no Gaussian
            assert width == pytest.approx(width_by_recursion(sampler, mixture.std), rel=4 * error)


def test_the_exact_score_finds_every_mode() -> None:
    mixture = GaussianMixture.line((1, 2, 4, 5))
    x = sample(mixture.denoiser(PAPER), PAPER, 4000, shape=(1,), sampler=ddim(sample_steps=100), generator=seeded(14)).x
    share = torch.bincount(mixture.judge(x).mode, minlength=4) / 4000
    assert bool(((share - 0.25).abs() < 0.04).all())


class Classes(torch.nn.Module):
    """A class-conditional stand-in that remembers what it was asked."""

    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.asked.append(label)
        return net(x, t) if label is None else net(x, t) + 0.3 * (label[:, None] + 1)


def test_guidance_0_and_1_are_unconditional_and_conditional() -> None:
    label = torch.arange(16) % 3
    options = {"sampler": ddpm(), "x": start()}

    def walk(**more: object) -> Tensor:
        *_, last = reverse(Classes(), MILD, (16, 2), generator=seeded(2), **options, **more)
        return last.x

    free, told = walk(), walk(label=label)
    assert not torch.allclose(free, told, atol=0.1)
    assert torch.equal(walk(label=label, guidance=0.0), free)
    assert torch.equal(walk(label=label, guidance=1.0), told)
    near = walk(label=label, guidance=1.0 + 1e-6)  # the formula, which 1 itself spares
    torch.testing.assert_close(near, told, rtol=1e-3, atol=1e-3)
    step = next(reverse(Classes(), MILD, (16, 2), generator=seeded(2), label=label, guidance=2.5, **options))
    torch.testing.assert_close(step.eps, net(start(), torch.full((16,), 99)) + 2.5 * 0.3 * (label[:, None] + 1))


def test_labels_follow_their_samples_through_chunks() -> None:
    label = torch.arange(30) % 10
    whole = sample(Classes(), MILD, 30, generator=seeded(3), label=label)
    model = Classes()
    assert torch.equal(sample(model, MILD, 30, generator=seeded(3), label=label, batch_size=7, sampler=ddpm()).x, whole.x)
    assert torch.equal(torch.cat(model.asked[::100]), label)
    assert not torch.equal(sample(Classes(), MILD, 30, generator=seeded(3), label=label.flip(0)).x, whole.x)


def test_labels_go_where_the_network_is_asked() -> None:
    """A device that only keeps shapes stands for a GPU; its last state cannot be looked at, its first can."""
    model = Classes()
    step = next(reverse(model, MILD, (4, 2), generator=seeded(), label=torch.arange(4), guidance=2.0, device="meta"))
    assert step.x.device.type == "meta"
    assert [label.device.type for label in model.asked if label is not None] == ["meta"]


def test_device_of_a_network() -> None:
    assert where(MLP(1)) == torch.device("cpu")
    assert where(net) == torch.device("cpu")
    assert where(torch.nn.Identity()) == torch.device("cpu")


def test_no_gradient_is_kept() -> None:
    assert not sample(MLP(2), MILD, 3, generator=seeded()).x.requires_grad


def test_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    a = sample(MLP(2), MILD, 9, generator=seeded(), batch_size=2, progress=True)
    assert "sampling" in capsys.readouterr().err
    assert torch.equal(a.x, sample(MLP(2), MILD, 9, generator=seeded(), batch_size=2).x)


# --- the network under a class and guidance


LABEL = torch.arange(16) % 3
AT = torch.full((16,), 40)


@pytest.mark.parametrize(
    ("guidance", "label", "asked", "weight"),
    [
        (None, None, [None], 0.0),
        (None, LABEL, [LABEL], 1.0),
        (1, LABEL, [LABEL], 1.0),
        (1.0, LABEL, [LABEL], 1.0),
        (0, LABEL, [None], 0.0),
        (0.0, LABEL, [None], 0.0),
        (2.5, LABEL, [None, LABEL], 2.5),
        (-1.0, LABEL, [None, LABEL], -1.0),
    ],
)
def test_a_network_at_fixed_classes(guidance: float | None, label: Tensor | None, asked: list, weight: float) -> None:
    model, x = Classes(), start()
    eps = conditioned(model, label, guidance)(x, AT)
    torch.testing.assert_close(eps, net(x, AT) + weight * 0.3 * (LABEL[:, None] + 1))
    assert len(model.asked) == len(asked)  # once, but for weights between and beyond
    assert all(a is b for a, b in zip(model.asked, asked, strict=True))


def test_a_network_without_labels_is_called_as_one() -> None:
    x = start()
    assert torch.equal(conditioned(lambda x, t: 2 * x)(x, AT), 2 * x)  # it need not take a label


@pytest.mark.parametrize(
    ("label", "guidance", "parts"),
    [
        (None, 2.0, ("guidance", "a label beside it", "none")),
        (None, 0.0, ("guidance", "a label beside it", "none")),
        (LABEL, math.nan, ("guidance", "a finite number", "nan")),
        (LABEL, math.inf, ("guidance", "a finite number", "inf")),
        (LABEL, "much", ("guidance", "a finite number", "'much'")),
        (LABEL, True, ("guidance", "a finite number", "True")),
    ],
)
def test_conditioned_refuses(label: Tensor | None, guidance: object, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        conditioned(net, label, guidance)  # before the network is asked
    one_line(caught.value, *parts)


# --- noise that knows its sample


def test_a_supply_is_blocks_that_each_have_a_seed() -> None:
    """By hand: a generator each for blocks of BLOCK numbers, seeded from the one that was given."""
    numbers, n = 4096, 40  # 16 samples a block
    seeds = torch.randint(2**63 - 1, (3,), generator=seeded(5)).tolist()
    generators = [seeded(seed) for seed in seeds]
    whole = [torch.cat([torch.randn(rows, 1, 64, 64, generator=g) for g, rows in zip(generators, (16, 16, 8), strict=True)])
             for _ in range(3)]  # fmt: skip
    supply = Supply(n, numbers, seeded(5), torch.device("cpu"))
    assert (supply.block, supply.seeds) == (BLOCK // numbers, seeds)
    for low, high in ((0, 40), (0, 1), (15, 16), (15, 17), (16, 32), (5, 39), (33, 40), (39, 40)):
        blocks = supply.of(low, high)
        for state in whole:  # one after the other, as the steps ask for them
            assert torch.equal(blocks.randn((high - low, 1, 64, 64)), state[low:high])


@pytest.mark.parametrize("numbers", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_block_holds_at_least_one_sample(numbers: int) -> None:
    supply = Supply(5, numbers, seeded(1), torch.device("cpu"))
    assert supply.block == max(1, BLOCK // numbers)
    assert len(supply.seeds) == math.ceil(5 / supply.block)
    whole = supply.of(0, 5).randn((5, numbers))
    assert torch.equal(torch.cat([supply.of(i, i + 1).randn((1, numbers)) for i in range(5)]), whole)
    assert len(whole[:, 0].unique()) == 5


def test_noise_of_a_supply_is_standard_normal_and_fresh() -> None:
    blocks = Supply(100_000, 1, seeded(1), torch.device("cpu")).of(0, 100_000)
    a, b = blocks.randn((100_000, 1)), blocks.randn((100_000, 1))
    for z in (a, b):
        assert (float(z.mean()), float(z.std())) == pytest.approx((0, 1), abs=0.015)
    assert abs(float((a * b).mean())) < 0.015
    assert abs(float((a[:30_000] * a[BLOCK : BLOCK + 30_000]).mean())) < 0.025  # nor do blocks share numbers


def test_what_may_stand_for_a_generator() -> None:
    g = seeded(4)
    noise = Stream(g, torch.device("cpu"))
    assert isinstance(noise, Noise) and isinstance(Supply(2, 1, seeded(), torch.device("cpu")).of(0, 2), Noise)
    assert torch.equal(noise.randn([3, 2]), torch.randn(3, 2, generator=seeded(4)))
    *_, a = reverse(net, MILD, (5, 2), generator=Stream(seeded(4), torch.device("cpu")))
    *_, b = reverse(net, MILD, (5, 2), generator=seeded(4))
    assert torch.equal(a.x, b.x)


def test_streams_of_purposes_are_independent() -> None:
    a, b, c, d = (
        torch.randn(4000, generator=stream(seed, purpose))
        for seed, purpose in ((0, "data"), (0, "data"), (0, "weights"), (1, "data"))
    )
    assert torch.equal(a, b)
    for other in (c, d):
        assert not bool((a == other).any())
        assert abs(float((a * other).mean())) < 0.08


# --- chunk by chunk


def test_watched_shows_all_steps_and_returns_the_last() -> None:
    metric = TrajectoryVariance((0, 10))
    for _ in range(2):  # afresh each time
        last = watched(reverse(net, MILD, (5, 2), generator=seeded(1)), [metric])
    *_, expected = reverse(net, MILD, (5, 2), generator=seeded(1))
    assert (last.t, metric.seen.count) == (0, 10)
    assert torch.equal(last.x, expected.x)
    assert torch.equal(watched(reverse(net, MILD, (5, 2), generator=seeded(1))).x, expected.x)


def test_sample_gathers_the_chunks() -> None:
    label, metric = torch.arange(30) % 10, TrajectoryVariance()
    settings = {"batch_size": 7, "sampler": ddim(0.5, 20), "label": label, "guidance": 1.5, "shape": (2,)}
    whole = sample(Classes(), MILD, 30, generator=seeded(3), metrics=[metric], **settings)
    parts = []
    for part in chunks(Classes(), MILD, 30, generator=seeded(3), metrics=[metric], config=SampleConfig(**settings)):
        parts.append((part.start, part.x, metric.score()))  # read in between
    assert [start for start, *_ in parts] == [0, 7, 14, 21, 28]
    assert torch.equal(torch.cat([x for _, x, _ in parts]), whole.x)
    assert torch.equal(torch.cat([score for *_, score in parts]), whole.scores[metric.name])
    assert whole.label is not None and torch.equal(whole.label, label)


def test_a_sampler_of_one_s_own_is_a_list_of_coefficients() -> None:
    def halves(schedule: Schedule) -> list[Coefficients]:
        return [Coefficients(t, 0.5, 0.25, 0.0) for t in (9, 5, 2)]

    assert coefficients(halves, MILD) == halves(MILD)
    x = start()
    steps = list(reverse(net, MILD, (16, 2), sampler=halves, generator=seeded(), x=x))
    assert [step.t for step in steps] == [9, 5, 2]
    for step in steps:
        torch.testing.assert_close(step.x, 0.5 * x + 0.25 * net(x, torch.full((16,), step.t)))
        x = step.x


@pytest.mark.parametrize("make", [ddpm, ddim, hybrid])
def test_the_old_keyword_says_what_it_is_called_now(make: Callable) -> None:
    with pytest.warns(FutureWarning, match=f"tinyhall: steps of {make.__name__} is now sample_steps"):
        old = make(steps=7)
    assert old == make(sample_steps=7)
    assert old(MILD) == make(sample_steps=7)(MILD)
    with pytest.raises(TinyhallError) as caught:
        make(sample_steps=7, steps=7)
    one_line(caught.value, "sample_steps", make.__name__, "steps, its old name")


def go(**changed: object) -> object:
    options = {"generator": seeded(), **changed}
    return sample(options.pop("net", MLP(2)), MILD, options.pop("n", 5), **options)


def walk(**changed: object) -> object:
    options = {"generator": seeded(), **changed}
    return list(reverse(options.pop("net", net), MILD, options.pop("of", (5, 2)), **options))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: go(n=0), ("n", "at least 1", "0 (int)")),
        (lambda: go(n=2.0), ("n", "whole number", "2.0 (float)")),
        (lambda: go(batch_size=0), ("batch_size", "at least 1", "0")),
        (lambda: go(batch_size=-2), ("batch_size", "at least 1", "-2")),
        (lambda: go(net=net), ("shape", "(2,)", "None")),
        (lambda: go(shape=()), ("shape", "(2,)", "()")),
        (lambda: go(shape=(0,)), ("shape", "(0,)")),
        (lambda: go(metrics=[TrajectoryVariance((0, 101))]), ("window", "b <= 100", "(0, 101)")),
        (lambda: go(label=torch.zeros(4).long()), ("label", "[5]", "(4,)")),
        (lambda: go(guidance=2.0), ("guidance", "label", "none")),
        (lambda: go(device="cuda:99"), ("device", "of this machine", "cuda:99")),
        (lambda: go(device="abacus"), ("device", "of this machine", "abacus")),
        (
            lambda: go(metrics=[TrajectoryVariance((1, 2))], sampler=ddim(sample_steps=4)),
            ("window", "the sampler makes 2 steps", "got 0 with t in [1,2)"),
        ),
        (lambda: walk(of=(5,)), ("shape", "(n, *shape)", "(5,)")),
        (lambda: walk(of=(0, 2)), ("shape", "at least 1", "(0, 2)")),
        (lambda: walk(x=torch.zeros(4, 2)), ("x", "(5, 2)", "(4, 2)")),
        (lambda: walk(x=torch.zeros(5, 2).double()), ("x", "float32", "float64")),
        (lambda: walk(x=torch.full((5, 2), float("nan"))), ("x", "finite", "10")),
        (lambda: walk(net=lambda x, t: x[:, :1]), ("net", "(5, 2)", "(5, 1)")),
        (lambda: walk(net=lambda x, t: x / 0), ("samples", "finite", "5 of 5")),
        (lambda: go(generator=0), ("generator", "torch.Generator().manual_seed(0)", "0 (int)")),
        (lambda: walk(generator=None), ("generator", "torch.Generator().manual_seed(0)", "None")),
        (lambda: go(sampler="ddim"), ("sampler", "ddim()", "'ddim' (str)")),
        (lambda: go(sampler=ddim), ("sampler", "ddim()", "class")),
        (lambda: go(sampler=lambda schedule: []), ("sampler", "at least one Coefficients", "[]")),
        (lambda: walk(sampler=lambda schedule: [5, 3]), ("sampler", "at least one Coefficients", "[5, 3]")),
        (lambda: ddpm("medium"), ("variance", "'large' or 'small'", "'medium'")),
        (lambda: ddim(1.5), ("eta", "0 to 1", "1.5")),
        (lambda: ddim(-0.1), ("eta", "0 to 1", "-0.1")),
        (lambda: ddim(float("nan")), ("eta", "0 to 1", "nan")),
        (lambda: hybrid(0), ("stochastic", "at least 1", "0")),
        (lambda: hybrid(2, "medium")(MILD), ("variance", "'medium'")),
        (lambda: ddim(sample_steps=0)(MILD), ("sample_steps", "at least 1", "0")),
        (lambda: ddpm(sample_steps=101)(MILD), ("sample_steps", "at most 100", "101")),
        (lambda: ddpm(sample_steps=2.5)(MILD), ("sample_steps", "whole number", "2.5")),
        (lambda: ddpm(sample_steps=[5.0, 3.0])(MILD), ("sample_steps", "falling values of t in 0..99", "[5.0, 3.0]")),
        (lambda: ddim(sample_steps=torch.tensor([5, 3]))(MILD), ("sample_steps", "a list of falling values of t", "(2,)")),
        (lambda: ddim(sample_steps=np.array([5, 3]))(MILD), ("sample_steps", "a list of falling values of t", "array([5, 3])")),
        (lambda: ddpm(sample_steps="31")(MILD), ("sample_steps", "falling values of t", "'31'")),
        (lambda: go(metrics=[TrajectoryVariance(), TrajectoryVariance()]), ("metrics", "different name", "variance[0,10)")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


def test_bad_arguments_raise_at_the_call_and_not_at_the_first_step() -> None:
    with pytest.raises(TinyhallError):
        reverse(net, MILD, (5, 2), generator=seeded(), x=torch.zeros(4, 2))
