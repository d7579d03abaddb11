"""Scores of finished samples: the post-hoc variance against a loop in float64, and the denoising error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from common import one_line, seeded
from torch import Tensor

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import Metric, Step
from tinyhall.core.mlp import MLP
from tinyhall.core.noise import BLOCK, Supply
from tinyhall.core.sampling import ddim, reverse, sample
from tinyhall.core.schedule import Schedule
from tinyhall.core.unet import UNet
from tinyhall.measure import denoising
from tinyhall.measure.denoising import PostHocVariance, denoising_error

SHORT = Schedule.linear(1e-4, 0.3, 60)
CPU = torch.device("cpu")


def net(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """Smooth, in x's precision, and a function of each row alone."""
    out = torch.sin(x + 0.01 * t.view(-1, *[1] * (x.ndim - 1)))
    return out if label is None else out + 0.3 * (label.view(-1, *[1] * (x.ndim - 1)) + 1)


def by_loop(x: Tensor, times: list[int], noises: list[Tensor], eps_at: Any = net) -> Tensor:
    """The score as PAPER.md writes it, in float64, from x, the values of t and a noise for each."""
    x0_hat = []
    for t, noise in zip(times, noises, strict=True):
        bar = float(SHORT.alpha_bar[t])
        noisy = math.sqrt(bar) * x.double() + math.sqrt(1 - bar) * noise.double()
        eps = eps_at(noisy, torch.full((len(x),), t))
        x0_hat.append((noisy - math.sqrt(1 - bar) * eps) / math.sqrt(bar))
    stacked = np.stack([v.numpy() for v in x0_hat])
    return torch.from_numpy(stacked.var(axis=0).reshape(len(x), -1).mean(axis=1)).float()


def noises(g: torch.Generator, x: Tensor, k: int, *, one: bool = False) -> list[Tensor]:
    """What `of` draws for them: for each value of t in turn, from the blocks of the samples."""
    blocks = Supply(len(x), x[0].numel(), g, CPU).of(0, len(x))
    drawn = [blocks.randn(x.shape) for _ in range(1 if one else k)]
    return drawn * k if one else drawn


# --- the post-hoc variance


@pytest.mark.parametrize("one_noise", [False, True])
@pytest.mark.parametrize(("window", "k"), [((5, 40), 7), ((10, 13), 3), ((0, 60), 2), ((20, 31), 10)])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 3, 4)])
def test_equals_a_loop_in_float64(shape: tuple[int, ...], window: tuple[int, int], k: int, one_noise: bool) -> None:
    x = torch.randn(6, *shape, generator=seeded(1))
    metric = PostHocVariance(window, k, one_noise=one_noise)
    got = metric.of(net, SHORT, x, generator=seeded(2))
    assert (got.dtype, got.shape) == (torch.float32, (6,))
    torch.testing.assert_close(got, by_loop(x, metric.times(), noises(seeded(2), x, k, one=one_noise)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "k", "times"),
    [
        ((100, 150), 10, [100, 105, 111, 116, 122, 127, 133, 138, 144, 149]),
        ((5, 8), 3, [5, 6, 7]),
        ((0, 60), 2, [0, 59]),
        ((20, 31), 10, [20, 21, 22, 23, 24, 26, 27, 28, 29, 30]),
    ],
)
def test_times_are_evenly_spaced_with_both_ends(window: tuple[int, int], k: int, times: list[int]) -> None:
    assert PostHocVariance(window, k).times() == times
    assert PostHocVariance().times() == PostHocVariance((100, 150), 10).times()


def test_no_two_times_are_the_same() -> None:
    for b in range(2, 40):
        for k in range(2, b + 1):
            times = PostHocVariance((0, b), k).times()
            assert (len(set(times)), times[0], times[-1]) == (k, 0, b - 1)


def test_one_noise_and_the_same_prediction_vary_by_the_schedule_alone() -> None:
    """Of a network that says 0, x0_hat is x + noise sqrt(1 - abar) / sqrt(abar): with one noise, that factor alone varies."""
    x, metric = torch.randn(5, 3, generator=seeded()), PostHocVariance((5, 40), 6, one_noise=True)
    got = metric.of(lambda x, t, label=None: torch.zeros_like(x), SHORT, x, generator=seeded(2))
    (noise,) = noises(seeded(2), x, 1)
    factor = [math.sqrt(1 / float(SHORT.alpha_bar[t]) - 1) for t in metric.times()]
    torch.testing.assert_close(got, (float(np.var(factor)) * noise.double().square().mean(1)).float(), rtol=1e-4, atol=1e-6)


def test_a_perfect_answer_does_not_vary() -> None:
    """Data that is one point: eps follows from x_t, and x0_hat is that point at every t."""
    point = 0.7

    def knows(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        bar = SHORT.alpha_bar[t][:, None]
        return ((x - bar.sqrt() * point) / (1 - bar).sqrt()).float()

    got = PostHocVariance((5, 40)).of(knows, SHORT, torch.randn(5, 2, generator=seeded()), generator=seeded(2))
    assert float(got.max()) < 1e-10


def test_seeds_decide() -> None:
    x, metric = torch.randn(5, 2, generator=seeded()), PostHocVariance((5, 40))
    a, b, c = (metric.of(net, SHORT, x, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not bool((a == c).any())
    g = seeded(1)
    assert not torch.equal(metric.of(net, SHORT, x, generator=g), metric.of(net, SHORT, x, generator=g))  # it moves on
    drawn = [sample(net, SHORT, 5, shape=(2,), generator=seeded(s), metrics=[metric]).scores[metric.name] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not bool((drawn[0] == drawn[2]).any())


@pytest.mark.parametrize("one_noise", [False, True])
def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, one_noise: bool) -> None:
    # 4,096 numbers a sample: noise comes in blocks of 16 samples, so these parts cut blocks in every way.
    assert BLOCK // 4096 == 16
    x, label = torch.randn(40, 1, 64, 64, generator=seeded()), torch.arange(40) % 3
    metric, sizes = PostHocVariance((5, 40), 3, one_noise=one_noise), []

    def counted(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        sizes.append(len(x))
        return net(x, t, label)

    def scored(at_a_time: int) -> Tensor:
        sizes.clear()
        monkeypatch.setattr(denoising, "IN_FLIGHT", at_a_time * 4096)
        return metric.of(counted, SHORT, x, generator=seeded(2), label=label)

    whole = scored(1000)
    assert sizes == [40] * 3
    for rows in (1, 7, 16, 23, 32):
        assert torch.equal(scored(rows), whole)
        assert sum(sizes) == 3 * 40 and max(sizes) == rows
    drawn = noises(seeded(2), x, 3, one=one_noise)
    torch.testing.assert_close(whole, by_loop(x, metric.times(), drawn, lambda x, t: net(x, t, label)), rtol=1e-3, atol=1e-6)
    assert len(whole.unique()) == 40


def test_by_default_a_large_set_goes_in_parts() -> None:
    x, sizes = torch.randn(2 * denoising.IN_FLIGHT + 5, 1, generator=seeded()), []

    def counted(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        sizes.append(len(x))
        return net(x, t)

    got = PostHocVariance((5, 40), 2).of(counted, SHORT, x, generator=seeded(2))
    assert sizes == [denoising.IN_FLIGHT] * 4 + [5] * 2
    rows = torch.tensor([0, BLOCK - 1, BLOCK, denoising.IN_FLIGHT, len(x) - 1])
    z = noises(seeded(2), x, 2)
    expected = by_loop(x[rows], [5, 39], [noise[rows] for noise in z])
    torch.testing.assert_close(got[rows], expected, rtol=1e-3, atol=1e-5)


# --- as a metric of `sample`


@pytest.mark.parametrize("batch", [1, 7, 16, 23, 100])
@pytest.mark.parametrize("one_noise", [False, True])
def test_as_a_metric_it_does_not_depend_on_chunks(batch: int, one_noise: bool) -> None:
    metric = PostHocVariance((5, 40), 3, one_noise=one_noise)

    def drawn(**more: object) -> th.Samples:
        return sample(net, SHORT, 40, shape=(1, 64, 64), generator=seeded(5), metrics=[metric], sampler=ddim(0.5, 4), **more)

    whole, part = drawn(), drawn(batch_size=batch)
    assert torch.equal(whole.x, part.x)
    assert list(whole.scores) == [metric.name]
    assert torch.equal(whole.scores[metric.name], part.scores[metric.name])
    assert len(whole.scores[metric.name].unique()) == 40


def test_as_a_metric_it_goes_on_with_the_samples_noise() -> None:
    """The samples are those without it, and what it draws comes after what drew them."""
    metric = PostHocVariance((5, 40), 4)
    out = sample(net, SHORT, 9, shape=(2,), generator=seeded(5), metrics=[metric], sampler=ddim(0.5, 6))
    assert torch.equal(out.x, sample(net, SHORT, 9, shape=(2,), generator=seeded(5), sampler=ddim(0.5, 6)).x)
    noise = Supply(9, 2, seeded(5), CPU).of(0, 9)
    for _ in range(6):  # the start, and five steps that add noise
        noise.randn((9, 2))
    expected = by_loop(out.x, metric.times(), [noise.randn((9, 2)) for _ in range(4)])
    torch.testing.assert_close(out.scores[metric.name], expected, rtol=1e-3, atol=1e-6)


def test_two_of_them_stand_side_by_side() -> None:
    metrics = [PostHocVariance((5, 40)), PostHocVariance((5, 40), 3), PostHocVariance((5, 40), one_noise=True)]
    out = sample(net, SHORT, 9, shape=(2,), generator=seeded(5), metrics=metrics, batch_size=4)
    assert list(out.scores) == [
        "post-hoc variance[5,40) at 10", "post-hoc variance[5,40) at 3", "post-hoc variance[5,40) at 10, one noise"
    ]  # fmt: skip
    again = sample(net, SHORT, 9, shape=(2,), generator=seeded(5), metrics=metrics)
    assert all(torch.equal(out.scores[name], again.scores[name]) for name in out.scores)


def test_it_takes_any_walk_s_network() -> None:
    metric = PostHocVariance((5, 40), 4)
    label = torch.arange(5) % 3
    steps = list(reverse(net, SHORT, (5, 2), generator=seeded(1), label=label, guidance=2.0, sampler=ddim(sample_steps=5)))
    for step in steps:
        metric.update(step)
    g = seeded(1)
    torch.randn(5, 2, generator=g)  # the start; DDIM draws no more, and the score goes on
    drawn = [torch.randn(5, 2, generator=g) for _ in range(4)]
    expected = by_loop(steps[-1].x, metric.times(), drawn, lambda x, t: net(x, t) + 2.0 * (net(x, t, label) - net(x, t)))
    torch.testing.assert_close(metric.score(), expected, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def unet() -> UNet:
    """Class-conditional, and every weight moved: at its start it would say 0."""
    made, g = UNet(size=8, widths=(8, 16), blocks=1, classes=3, generator=seeded()), seeded(9)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return made


@pytest.mark.parametrize("guidance", [None, 0.0, 1.0, 2.5])
def test_labels_and_guidance_on_a_unet(unet: UNet, guidance: float | None) -> None:
    x, label = torch.randn(5, 1, 8, 8, generator=seeded(1)), torch.tensor([0, 2, 1, -1, 2])
    metric = PostHocVariance((5, 40), 3)

    @torch.no_grad()
    def eps_at(x: Tensor, t: Tensor) -> Tensor:
        without, within = unet(x.float(), t).double(), unet(x.float(), t, label).double()
        return without + (1.0 if guidance is None else guidance) * (within - without)

    got = metric.of(unet, SHORT, x, generator=seeded(2), label=label, guidance=guidance)
    torch.testing.assert_close(got, by_loop(x, metric.times(), noises(seeded(2), x, 3), eps_at), rtol=2e-3, atol=1e-5)
    assert not got.requires_grad
    free = metric.of(unet, SHORT, x, generator=seeded(2))
    assert torch.equal(got, free) is (guidance == 0.0)

    drawn = [
        sample(
            unet, SHORT, 5, generator=seeded(3), label=label, guidance=guidance, metrics=[metric], batch_size=size,
            sampler=ddim(sample_steps=4),
        )
        for size in (2, 5)
    ]  # fmt: skip
    torch.testing.assert_close(drawn[0].scores[metric.name], drawn[1].scores[metric.name], rtol=1e-3, atol=1e-4)
    noise = Supply(5, 64, seeded(3), CPU).of(0, 5)
    noise.randn((5, 1, 8, 8))  # the start
    expected = by_loop(drawn[1].x, metric.times(), [noise.randn((5, 1, 8, 8)) for _ in range(3)], eps_at)
    torch.testing.assert_close(drawn[1].scores[metric.name], expected, rtol=2e-3, atol=1e-4)


def test_labels_follow_their_samples() -> None:
    x, label = torch.randn(6, 2, generator=seeded(1)), torch.tensor([0, 1, 2, 0, 1, 2])
    metric = PostHocVariance((5, 40), 3)
    whole = metric.of(net, SHORT, x, generator=seeded(2), label=label)
    assert torch.equal(whole != metric.of(net, SHORT, x, generator=seeded(2), label=label.flip(0)), label != label.flip(0))


def test_it_asks_the_network_as_often_as_it_says() -> None:
    asked: list[Tensor] = []

    def counted(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        asked.append(t)
        return net(x, t, label)

    x, metric = torch.zeros(4, 2), PostHocVariance((5, 40), 6)
    metric.of(counted, SHORT, x, generator=seeded())
    assert [int(t[0]) for t in asked] == metric.times()
    assert all(t.stride(0) == 0 for t in asked)  # one t for all, as a sampler asks it
    metric.of(counted, SHORT, x, generator=seeded(), label=torch.zeros(4).long(), guidance=2.0)
    assert len(asked) == 6 + 12


def test_the_answer_lies_on_the_processor_and_has_no_graph() -> None:
    got = PostHocVariance((5, 40), 2).of(MLP(2), SHORT, torch.zeros(3, 2), generator=seeded())
    assert (got.device, got.requires_grad) == (CPU, False)


def test_it_goes_where_the_network_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shapes:  # such a device has no generators
        def __init__(self, n: int, numbers: int, generator: torch.Generator, device: torch.device) -> None:
            self.device = device

        def of(self, start: int, stop: int) -> Any:
            return self

        def randn(self, shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, device=self.device)

    monkeypatch.setattr(denoising, "Supply", Shapes)
    with pytest.raises(LookupError, match="meta meta meta"):
        PostHocVariance((5, 40)).of(Far(), SHORT, torch.zeros(5, 2), generator=seeded(), label=torch.zeros(5).long())


@pytest.mark.gpu
def test_on_a_gpu_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    there, x, metric = MLP(2).to("cuda"), torch.randn(40_000, 2, generator=seeded()), PostHocVariance((5, 40), 3)
    whole = metric.of(there, SHORT, x, generator=seeded(2))
    monkeypatch.setattr(denoising, "IN_FLIGHT", 2 * 30_000)
    parts = metric.of(there, SHORT, x, generator=seeded(2))
    assert whole.device.type == parts.device.type == "cpu"
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    drawn = [sample(there, SHORT, 40, generator=seeded(3), metrics=[metric], batch_size=size) for size in (7, 40)]
    torch.testing.assert_close(drawn[0].scores[metric.name], drawn[1].scores[metric.name], rtol=1e-2, atol=1e-2)


def test_reset_forgets() -> None:
    metric = PostHocVariance((5, 40), 2)
    *_, last = reverse(net, SHORT, (3, 2), generator=seeded())
    metric.update(last)
    assert metric.score().shape == (3,)
    metric.reset()
    with pytest.raises(TinyhallError):
        metric.score()


def test_steps_that_do_not_know_their_network_are_told() -> None:
    metric = PostHocVariance((5, 40))
    assert isinstance(metric, Metric)
    with pytest.raises(TinyhallError) as caught:
        metric.score()
    one_line(caught.value, "post-hoc variance", "steps that know their network", "none")
    x = torch.zeros(3, 2)
    metric.update(Step(0, x, x, x))
    with pytest.raises(TinyhallError) as caught:
        metric.score()
    one_line(caught.value, "post-hoc variance", "steps that know their network", "steps without one")


def of(metric: PostHocVariance | None = None, **changed: Any) -> Tensor:
    options = {"net": net, "schedule": SHORT, "x": torch.zeros(5, 2), "generator": seeded(), **changed}
    return (metric or PostHocVariance((5, 40))).of(**options)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: PostHocVariance((5, 15), 11), ("k", "2 to 10", "as many as t in [5,15)", "11")),
        (lambda: PostHocVariance((5, 15), 1), ("k", "2 to 10", "1")),
        (lambda: PostHocVariance((5, 15), 0), ("k", "at least 1", "0")),
        (lambda: PostHocVariance((5, 15), 2.5), ("k", "whole number", "2.5")),
        (lambda: PostHocVariance((5, 6), 2), ("k", "[5,6)", "2")),
        (lambda: PostHocVariance((15, 5)), ("window", "0 <= a < b", "(15, 5)")),
        (lambda: PostHocVariance(None), ("window", "0 <= a < b", "None")),
        (lambda: of(PostHocVariance((50, 61))), ("window", "b <= 60", "(50, 61)")),
        (lambda: sample(net, SHORT, 2, shape=(2,), generator=seeded(), metrics=[PostHocVariance()]), ("window", "b <= 60")),
        (lambda: of(x=torch.zeros(5)), ("x", "[n, *shape]", "(5,)")),
        (lambda: of(x=torch.zeros(5, 2).double()), ("x", "float32", "float64")),
        (lambda: of(generator=0), ("generator", "torch.Generator", "0 (int)")),
        (lambda: of(label=torch.zeros(4).long()), ("label", "[5]", "(4,)")),
        (lambda: of(guidance=2.0), ("guidance", "label", "none")),
        (lambda: of(label=torch.zeros(5).long(), guidance=math.nan), ("guidance", "finite", "nan")),
        (lambda: of(net=lambda x, t: x[:, :1]), ("net", "(5, 2)", "(5, 1)")),
    ],
)
def test_errors(make: Any, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


# --- the denoising error


class Pull:
    """Stands for a network whose x0_hat is 0 everywhere."""

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return x / (1 - SHORT.alpha_bar[t[0]]).sqrt().float()


def test_denoising_error_of_a_known_denoiser() -> None:
    x = torch.randn(5, 2, 3, generator=seeded())
    error = denoising_error(Pull(), SHORT, x, (5, 40), generator=seeded(1))
    torch.testing.assert_close(error, x.square().flatten(1).mean(1)[:, None].expand(5, 2), rtol=1e-3, atol=1e-4)


class Far(torch.nn.Module):
    """On a device that only keeps shapes, for want of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        raise LookupError(" ".join(str(v.device) for v in (x, t, label) if v is not None))


def test_denoising_error_goes_where_the_network_is() -> None:
    with pytest.raises(LookupError, match="meta meta"):
        denoising_error(Far(), SHORT, torch.zeros(5, 2), [5], generator=seeded())


def test_denoising_error_needs_a_generator(unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        denoising_error(Pull(), SHORT, torch.zeros(5, 2), [5], generator=0)  # type: ignore[arg-type]
    one_line(caught.value, "generator", "torch.Generator", "0 (int)")


def test_the_public_names_are_these() -> None:
    assert (th.PostHocVariance, th.denoising_error) == (PostHocVariance, denoising_error)
