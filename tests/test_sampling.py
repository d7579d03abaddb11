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
from tinyhall._check import TinyhallError
from tinyhall.datasets import GaussianMixture
from tinyhall.metrics import TrajectoryVariance
from tinyhall.nets import MLP
from tinyhall.sampling import ddim, ddpm, hybrid, reverse, sample, where
from tinyhall.schedule import Schedule

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
    compare(ddpm(variance, steps=12), double_tables(scheduler), times)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 9])
def test_ddim_equals_diffusers(eta: float, stride: int) -> None:
    # set_alpha_to_one: the step out of t = 0 ends in clean data, as ours does.
    scheduler = DDIMScheduler(100, trained_betas=MILD.betas.numpy(), clip_sample=False, set_alpha_to_one=True)
    # DDIMScheduler takes t - T // num_inference_steps as the next t; 100 // 11 is our stride of 9 over 99, 90, ..., 0.
    scheduler.num_inference_steps = 100 if stride == 1 else 11
    times = list(range(99, -1, -stride))
    compare(ddim(eta, steps=len(times)), double_tables(scheduler), times, eta=eta)


@pytest.mark.parametrize("schedule", [MILD, PAPER, Schedule.cosine(200)])
@pytest.mark.parametrize("steps", [None, 20])
def test_ddim_with_eta_1_is_ddpm_small(schedule: Schedule, steps: int | None) -> None:
    for a, b in zip(ddim(1.0, steps)(schedule), ddpm("small", steps)(schedule), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 340, 341, 342, 500, 999, 1000, None])
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_times_fall_from_noise_to_zero(make: Callable, steps: int | None) -> None:
    for schedule in (PAPER, Schedule.linear(1e-4, 0.02, 1000)):
        moves = make(steps=steps)(schedule)
        times = [m.t for m in moves]
        assert len(times) == (steps or 1000)
        assert all(a > b for a, b in itertools.pairwise(times))
        if len(times) > 1:
            assert times[-1] == 0
        assert float(schedule.alpha_bar[times[0]]) < 1e-4  # starts in noise
        assert moves[-1].noise == 0


def test_short_samplers_skip_the_pure_noise() -> None:
    times = [m.t for m in ddim(steps=50)(PAPER)]
    assert float(PAPER.alpha_bar[times[0]]) < 1e-6 <= float(PAPER.alpha_bar[times[0] - 1])
    assert max(a - b for a, b in itertools.pairwise(times)) <= times[0] / 49 + 1


def test_moves_follow_the_posterior() -> None:
    """Fixed small is q(x_{t-1} | x_t, x_0) with x_0 predicted; fixed large has its mean, and beta_t for variance."""
    for small, large in zip(ddpm("small")(MILD), ddpm("large")(MILD), strict=True):
        t = torch.tensor([small.t])
        x, eps = torch.tensor([[0.8]]), torch.tensor([[-0.4]])
        mean, variance = MILD.posterior(MILD.predict_x0(x, t, eps), x, t)
        assert small.keep * 0.8 - small.push * 0.4 == pytest.approx(float(mean), abs=1e-4)
        assert small.noise**2 == pytest.approx(float(variance), rel=1e-4, abs=1e-12)
        assert (large.keep, large.push) == pytest.approx((small.keep, small.push), rel=1e-9)
        assert large.noise**2 == pytest.approx(float(MILD.betas[small.t]) if small.t > 0 else 0.0, rel=1e-9)


def test_hybrid_is_ddim_then_ddpm() -> None:
    for variance in ("small", "large"):
        for steps in (None, 20):
            moves = hybrid(3, variance, steps)(MILD)
            assert moves[:-3] == ddim(steps=steps)(MILD)[:-3]
            assert moves[-3:] == ddpm(variance, steps)(MILD)[-3:]
            assert [m.noise > 0 for m in moves[-5:]] == [False, False, True, True, False]
    assert hybrid(500)(MILD) == ddpm("small")(MILD)


def test_step_reports_what_the_network_said() -> None:
    before = start()
    for step in reverse(net, MILD, (16, 2), sampler=ddim(), generator=seeded(), x=before):
        t = torch.full((16,), step.t)
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
    x = first.x / ddim()(MILD)[0].keep
    assert float(x.mean()) == pytest.approx(0, abs=0.03)
    assert float(x.std()) == pytest.approx(1, abs=0.03)
    zero = lambda x, t, label=None: torch.zeros_like(x)  # noqa: E731
    states = list(reverse(zero, MILD, (5000, 1), sampler=ddpm(), generator=seeded(2)))
    moves = ddpm()(MILD)
    noise = [(b.x - m.keep * a.x) / m.noise for a, b, m in zip(states[40:45], states[41:46], moves[41:46], strict=True)]
    assert all(float(z.std()) == pytest.approx(1, abs=0.05) for z in noise)
    assert abs(float((noise[0] * noise[1]).mean())) < 0.06


@pytest.mark.parametrize("batch", [1, 7, 16, 23, 40, 100])
def test_chunked_equals_whole_for_images(batch: int) -> None:
    # 4,096 numbers a sample: noise comes in blocks of 16 samples, so these batches cut blocks in every way.
    whole = sample(
        net, MILD, 40, shape=(1, 64, 64), sampler=ddpm(steps=4), generator=seeded(5), metrics=[TrajectoryVariance((0, 99))]
    )
    part = sample(
        net, MILD, 40, shape=(1, 64, 64), sampler=ddpm(steps=4), generator=seeded(5), metrics=[TrajectoryVariance((0, 99))],
        batch_size=batch,
    )  # fmt: skip
    assert torch.equal(whole.x, part.x)
    assert torch.equal(whole.scores["variance[0,99)"], part.scores["variance[0,99)"])
    assert len(whole.x.flatten(1).unique(dim=0)) == 40  # no block repeats another's noise


def test_chunked_equals_whole_across_blocks_with_the_exact_denoiser() -> None:
    mixture = GaussianMixture.line()
    n = 140_000  # two whole blocks of 65,536 points and a rest
    first = None
    for batch in (None, 65_536, 50_000, 139_999):
        out = sample(mixture.denoiser(MILD), MILD, n, shape=(1,), sampler=ddpm(steps=3), generator=seeded(6), batch_size=batch)
        first = out if first is None else first
        assert torch.equal(out.x, first.x)
    assert len(first) == n
    assert len(first.x.unique()) > 0.9 * n


def test_processes_share_what_one_chunk_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, n = GaussianMixture.line(), 140_000

    def drawn() -> Tensor:
        return sample(mixture.denoiser(MILD), MILD, n, shape=(1,), sampler=ddpm(steps=3), generator=seeded(6)).x

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
    [ddpm(), ddpm("small"), ddim(steps=10), ddim(steps=50), ddim(steps=1000), ddim(0.5, 50), hybrid(), hybrid(4, "small", 50)],
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
    for t, keep, push, noise in sampler(PAPER):
        bar = math.exp(float(PAPER.log_alpha_bar[t]))
        slope = math.sqrt(1 - bar) / (bar * std**2 + 1 - bar)
        variance = (keep + push * slope) ** 2 * variance + noise**2
    return math.sqrt(variance) / std


@pytest.mark.parametrize(
    ("sampler", "line", "grid"), [(ddpm(), 0.93, 0.62), (ddpm("small"), 0.78, 0.47), (ddim(), 0.83, 0.50)], ids=str
)
def test_the_exact_score_does_not_hallucinate_but_narrows(sampler, line: float, grid: float, unchecked: None) -> None:
    for mixture, measured, n in ((GaussianMixture.line(), line, 2500), (GaussianMixture.grid(), grid, 1000)):
        x = sample(mixture.denoiser(PAPER), PAPER, n, shape=mixture.shape, sampler=sampler, generator=seeded(13)).x
        assert bool(mixture.in_support(x).all())  # as of the data: 6e-7 of it lies outside, in one dimension
        gap = x.double() - mixture.means[mixture.judge(x).mode]
        width = float(gap.square().mean().sqrt()) / mixture.std
        error = 1 / math.sqrt(2 * gap.numel())  # of a std, relative
        assert width == pytest.approx(measured, rel=4 * error + 0.01)
        if sampler != ddim():  # without noise each mode keeps the shape of its basin, which is no Gaussian
            assert width == pytest.approx(width_by_recursion(sampler, mixture.std), rel=4 * error)


def test_the_exact_score_finds_every_mode() -> None:
    mixture = GaussianMixture.line((1, 2, 4, 5))
    x = sample(mixture.denoiser(PAPER), PAPER, 4000, shape=(1,), sampler=ddim(steps=100), generator=seeded(14)).x
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
        (lambda: go(metrics=[TrajectoryVariance((1, 2))], sampler=ddim(steps=4)), ("window", "1 <= t < 2", "got 0")),
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
        (lambda: go(sampler=lambda schedule: []), ("sampler", "at least one Move", "[]")),
        (lambda: walk(sampler=lambda schedule: [5, 3]), ("sampler", "at least one Move", "[5, 3]")),
        (lambda: ddpm("medium"), ("variance", "'large' or 'small'", "'medium'")),
        (lambda: ddim(1.5), ("eta", "0 to 1", "1.5")),
        (lambda: ddim(-0.1), ("eta", "0 to 1", "-0.1")),
        (lambda: ddim(float("nan")), ("eta", "0 to 1", "nan")),
        (lambda: hybrid(0), ("stochastic", "at least 1", "0")),
        (lambda: hybrid(2, "medium")(MILD), ("variance", "'medium'")),
        (lambda: ddim(steps=0)(MILD), ("steps", "at least 1", "0")),
        (lambda: ddpm(steps=101)(MILD), ("steps", "at most 100", "101")),
        (lambda: ddpm(steps=2.5)(MILD), ("steps", "whole number", "2.5")),
        (lambda: ddpm(steps=[5.0, 3.0])(MILD), ("steps", "falling values of t in 0..99", "[5.0, 3.0]")),
        (lambda: ddim(steps=torch.tensor([5, 3]))(MILD), ("steps", "a list of falling values of t", "(2,)")),
        (lambda: ddim(steps=np.array([5, 3]))(MILD), ("steps", "a list of falling values of t", "array([5, 3])")),
        (lambda: ddpm(steps="31")(MILD), ("steps", "falling values of t", "'31'")),
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
