"""The variational diffusion model against closed forms for one Gaussian, whose exact denoiser is linear."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from common import one_line, same_bits, same_t, seeded
from torch import nn

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.sampling import Sampler
from tinyhall.datasets import GaussianMixture
from tinyhall.lab.vdm import ENDS, VDM, AtLevel, Gamma, train
from tinyhall.measure.density import exact_std

STD, LOW, HIGH = 0.7, -9.0, 8.0
N = 40_000


class Exact(nn.Module):
    """E[eps | z] for points from N(0, STD^2 I)."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(()))  # so that there is something to train

    def forward(self, z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        return self.scale * (noise.sqrt() / (signal * STD**2 + noise))[:, None] * z


class Frozen(Exact):
    """The same, whatever its training says."""

    def forward(self, z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return super().forward(z, gamma) / self.scale.detach() + 0 * self.scale


def points(n: int = N, dim: int = 2, seed: int = 0) -> torch.Tensor:
    return STD * torch.randn(n, dim, generator=seeded(seed))


def bent(seed: int = 3) -> Gamma:
    """A schedule of another shape between the same ends: up to 2 in gamma away from the first."""
    gamma = Gamma(LOW, HIGH)
    with torch.no_grad():
        for parameter in gamma.parameters():
            parameter += torch.randn(parameter.shape, generator=seeded(seed)) * (0.2 if parameter is gamma.centre else 1.0)
    return gamma


def close(values: torch.Tensor, expected: float, errors: float = 5) -> None:
    """The mean of a sample lies within so many of its standard errors (which t, spread evenly, can only make too wide)."""
    values = values.double()
    assert abs(float(values.mean()) - expected) < errors * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("gamma", [Gamma(LOW, HIGH), bent(), Gamma(LOW, HIGH, units=1)])
def test_gamma_rises_between_its_ends(gamma: Gamma) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64).requires_grad_()
    value, slope = copy.deepcopy(gamma).double()(t)
    torch.testing.assert_close(slope, torch.autograd.grad(value.sum(), t)[0])
    value = value.detach()
    assert (float(value[0]), float(value[-1])) == (pytest.approx(LOW), pytest.approx(HIGH))
    assert bool((value.diff() > 0).all())
    assert float((gamma(t.float())[0] - value).detach().abs().max()) < 1e-4


def test_gamma_begins_as_nearly_a_line() -> None:
    t = torch.linspace(0, 1, 101)
    assert float((Gamma(LOW, HIGH)(t)[0] - (LOW + (HIGH - LOW) * t)).detach().abs().max()) < 0.5


def kl_diffusion(dim: int = 2, low: float = LOW, high: float = HIGH) -> float:
    """The integral of half the error over gamma: what z at the low end says of x, less what z at the high end says."""
    said = [0.5 * math.log(1 + STD**2 * math.exp(-gamma)) for gamma in (low, high)]  # mutual information with x
    return dim * (said[0] - said[1])


@pytest.mark.parametrize("gamma", [Gamma(LOW, HIGH), bent(3), bent(4)])
def test_in_continuous_time_only_the_ends_matter(gamma: Gamma) -> None:
    """Equation 18, and the integral's value."""
    with torch.no_grad():
        close(VDM(Exact(), gamma).terms(points(), seeded(1)).diffusion, kl_diffusion())


def test_other_ends_change_it() -> None:
    with torch.no_grad():
        for low, high in ((-5.0, 8.0), (-12.0, 12.0)):
            close(VDM(Exact(), Gamma(low, high)).terms(points(), seeded(1)).diffusion, kl_diffusion(2, low, high))


def discrete(gamma: Gamma, steps: int, dim: int = 2) -> float:
    """Equation 14 as a sum: each step's KL divergence for the exact denoiser."""
    places = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        g = copy.deepcopy(gamma).double()(places)[0]
    error = dim * STD**2 / (STD**2 + g[1:].exp())
    return float((0.5 * torch.expm1(g.diff()) * error).sum())


@pytest.mark.parametrize("steps", [1, 3, 20, 400])
def test_in_steps_it_is_the_sum(steps: int) -> None:
    gamma = Gamma(LOW, HIGH) if steps > 1 else Gamma(-2.0, 7.0)
    with torch.no_grad():
        close(VDM(Exact(), gamma, steps).terms(points(), seeded(2)).diffusion, discrete(gamma, steps))


def test_more_steps_lose_less_down_to_continuous_time() -> None:
    """Section 4.1, and the limit."""
    for gamma in (Gamma(LOW, HIGH), bent()):
        loss = [discrete(gamma, steps) for steps in (10, 20, 40, 80, 160, 10_000)]
        assert loss == sorted(loss, reverse=True)
        assert loss[-1] == pytest.approx(kl_diffusion(), rel=3e-3)
        assert loss[-1] > kl_diffusion()


def test_a_step_s_loss_is_the_kl_of_the_two_reverse_steps() -> None:
    """Equation 12, one step: KL of q(z_s | z_t, x) from q(z_s | z_t, x_hat), two Gaussians of one variance."""
    gamma, steps = Gamma(-2.0, 7.0), 1
    model, x = VDM(Exact(1), gamma, steps), points(5, 1)
    with torch.no_grad():
        ours = model.terms(x, seeded(2)).diffusion
        g = seeded(2)
        torch.rand(1, generator=g)
        z_noise = torch.randn(x.shape, generator=g)
        (low, high), _ = gamma(torch.tensor([0.0, 1.0]))
        signal, noise = torch.sigmoid(-high).sqrt(), torch.sigmoid(high).sqrt()
        z = signal * x + noise * z_noise
        x_hat = (z - noise * model.net(z, high.expand(5))) / signal
        # Of the posterior (appendix A.2): the weight of x in its mean, and its variance.
        between = -torch.expm1(low - high) * torch.sigmoid(high)
        of_x = torch.sigmoid(-low).sqrt() * between / torch.sigmoid(high)
        variance = between * torch.sigmoid(low) / torch.sigmoid(high)
        expected = ((of_x * (x - x_hat)) ** 2 / (2 * variance))[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_prior_and_reconstruction_are_the_closed_forms() -> None:
    x = points(50)
    with torch.no_grad():
        terms = VDM(Exact(), Gamma(LOW, HIGH)).terms(x, seeded(1))
    normal = torch.distributions.Normal
    bar = torch.sigmoid(torch.tensor(-HIGH, dtype=torch.float64))
    kl = torch.distributions.kl_divergence(
        normal(bar.sqrt() * x.double(), (1 - bar).sqrt()), normal(torch.zeros(50, 2).double(), 1.0)
    ).sum(1)
    torch.testing.assert_close(terms.prior.double(), kl, rtol=1e-4, atol=1e-7)
    # -log N(x; z_0 / alpha_0, exp(low) I), mean over z_0: by its draws.
    width = math.exp(LOW / 2)
    drawn = -normal(torch.zeros(N, 2), width).log_prob(width * torch.randn(N, 2, generator=seeded(2))).sum(1)
    close(drawn, float(terms.reconstruction[0]))
    assert bool((terms.reconstruction == terms.reconstruction[0]).all())


def test_the_bound_of_the_exact_denoiser_is_the_entropy() -> None:
    """With ends far out; and it bounds: from nearer ends it is larger."""
    entropy = math.log(2 * math.pi * math.e * STD**2)
    with torch.no_grad():
        far = sum(VDM(Exact(), Gamma(-13.3, 14.0)).terms(points(200_000), seeded(1)))
        close(far, entropy)
    slack = [
        (1 + math.log(2 * math.pi) + low) + kl_diffusion(2, low, 14.0) + 2e-6 - entropy for low in (-13.3, -5.0, -2.0, 0.0)
    ]
    assert slack == sorted(slack)
    assert slack[0] >= 0


def test_in_continuous_time_the_schedule_learns_to_lower_the_variance() -> None:
    """The network is exact: its loss stays where it is, and gamma moves until the loss varies less with t."""
    model, x = VDM(Frozen(), Gamma(LOW, HIGH)), points()
    before = model.terms(x, seeded(5)).diffusion.detach()
    for _ in train(model, x, train_steps=200, batch_size=1000, lr=1e-2, generator=seeded(6)):
        pass
    with torch.no_grad():
        after = model.terms(x, seeded(5)).diffusion
        assert float(after.std()) < 0.85 * float(before.std())
        close(after, kl_diffusion())
        # Where the error is next to nothing, few steps are spent: the slope there is steeper than the line's.
        assert float(model.gamma(torch.tensor([0.97]))[1]) > 1.5 * (HIGH - LOW)


def test_in_few_steps_the_schedule_learns_to_lower_the_loss() -> None:
    model, x = VDM(Frozen(), Gamma(LOW, HIGH), 5), points()
    before = discrete(model.gamma, 5)
    for _ in train(model, x, train_steps=300, batch_size=1000, lr=1e-2, generator=seeded(6)):
        pass
    assert discrete(model.gamma, 5) < 0.9 * before


def test_the_schedule_s_gradient_is_that_of_the_squared_loss() -> None:
    """One step of `train` against automatic differentiation of what appendix I.2 asks for, all in one graph."""
    x = points(64)
    for steps in (None, 7):
        model = VDM(AtLevel(2, 16), Gamma(LOW, HIGH), steps)
        g = seeded(8)
        rows = torch.randint(64, (32,), generator=g)
        loss = model.terms(x[rows], g).diffusion
        of_net = torch.autograd.grad(loss.mean(), list(model.net.parameters()), retain_graph=True)
        aim = loss.square().mean() if steps is None else loss.mean()
        of_gamma = torch.autograd.grad(aim, list(model.gamma.parameters()))
        next(iter(train(model, x, train_steps=1, batch_size=32, lr=1e-9, generator=seeded(8))))
        for module, expected in ((model.net, of_net), (model.gamma, of_gamma)):
            for parameter, gradient in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("steps", [None, 20])
def test_the_same_seeds_give_the_same_bits(steps: int | None) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        model = VDM(AtLevel(2, 16), Gamma(), steps)
        losses = list(train(model, points(500), train_steps=20, batch_size=50, lr=1e-3, generator=seeded(seed)))
        assert not losses[0].requires_grad
        return {**model.state_dict(), "losses": torch.stack(losses)}

    assert same_bits(made(1), made(1))
    assert not same_bits(made(1), made(2))


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_the_schedule_handed_over(steps: int) -> None:
    model = VDM(Exact(), bent())
    schedule, net = model.discretize(steps)
    assert schedule.timesteps == steps
    assert schedule.name == f"learned({steps})"
    bar = schedule.alpha_bar
    assert bool((bar.diff() < 0).all())
    assert float(bar[-1]) == pytest.approx(1 / (1 + math.exp(HIGH)), rel=1e-4)
    t = torch.tensor([steps // 2, 0])
    gamma = torch.log1p(-bar[t]) - bar[t].log()
    torch.testing.assert_close(gamma.float(), model.gamma((t + 1) / steps)[0], rtol=0, atol=1e-3)
    x = points(2)
    torch.testing.assert_close(net(x, t), model.net(x, gamma.float()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", [th.ddpm("small"), th.ddpm("large"), th.ddim()])
def test_our_samplers_take_it(sampler: Sampler) -> None:
    """The exact denoiser in 200 steps of a schedule of any shape: the data's width comes out, as in closed form."""
    schedule, net = VDM(Exact(), bent()).discretize(200)
    x = th.sample(net, schedule, 20_000, sampler=sampler, generator=seeded(3)).x
    assert x.shape == (20_000, 2)
    expected = exact_std(STD, schedule, sampler)
    assert expected == pytest.approx(STD, rel=0.05)
    assert float(x.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * x.numel()))


def test_the_network_under_the_usual_call_is_that_at_its_level() -> None:
    model = VDM(AtLevel(2, 16, fourier=2), Gamma())
    schedule, net = model.discretize(10)
    x = points(6000)
    t = torch.arange(6000) % 10
    with torch.no_grad():
        mixed = net(x, t)
        torch.testing.assert_close(mixed, model.net(x, net.levels[t]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(x, same_t(4, 6000))[t == 4], mixed[t == 4], rtol=1e-4, atol=1e-5)
    assert th.sample(net, schedule, 5, generator=seeded()).x.shape == (5, 2)


def test_the_level_is_a_time_of_a_thousand_steps() -> None:
    """At whole levels the features are the MLP's own."""
    net = AtLevel(2, 16)
    t, x = torch.tensor([0, 1, 500, 999]), points(4)
    torch.testing.assert_close(net(x, ENDS[0] + (ENDS[1] - ENDS[0]) * t / 1000), net.mlp(x, t), rtol=1e-3, atol=1e-3)
    gamma = torch.tensor([0.3], requires_grad=True)
    net(x, gamma).sum().backward()
    assert gamma.grad is not None and float(gamma.grad.abs()) > 0


def test_fourier_features_are_those_of_the_paper() -> None:
    net, seen = AtLevel(2, 16, fourier=3), []
    assert net.mlp.dim == 14
    net.mlp.project_in.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    x = points(5)
    out = net(x, torch.zeros(5))
    assert out.shape == (5, 2)
    waves = [2**i * math.pi * x for i in range(3)]
    torch.testing.assert_close(seen[0], torch.cat([x, *(w.sin() for w in waves), *(w.cos() for w in waves)], 1))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 50])
def test_it_learns_three_modes(steps: int | None) -> None:
    mixture = GaussianMixture.line()
    data = mixture.sample(3000, seeded())
    model = VDM(AtLevel(1, 64), Gamma(), steps)
    for _ in train(model, data, train_steps=800, batch_size=300, lr=3e-3, generator=seeded(1)):
        pass
    with torch.no_grad():
        bound = float(sum(sum(model.terms(data, seeded(seed))).mean() for seed in range(10))) / 10
    entropy = -float(mixture.log_density(data).mean())
    assert entropy < bound < entropy + 5  # untrained, 34 nats above it in continuous time
    schedule, net = model.discretize(50)
    x = th.sample(net, schedule, 2000, sampler=th.ddpm("small"), generator=seeded(2)).x
    assert float(mixture.in_support(x, 6).float().mean()) > 0.5  # untrained, 0.0015


MODEL = VDM(Exact(), Gamma())


def trained(**other):
    return train(MODEL, points(5), **{"train_steps": 1, "batch_size": 1, "lr": 1, "generator": seeded()} | other)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Gamma(low=1.0), ("low", "-30 to 0", "1.0")),
        (lambda: Gamma(low=math.nan), ("low", "-30 to 0", "nan")),
        (lambda: Gamma(high=5.0), ("high", "above 6.9", "5.0")),
        (lambda: Gamma(units=0), ("units", "at least 1", "0")),
        (lambda: AtLevel(0), ("dim", "at least 1", "0")),
        (lambda: AtLevel(fourier=-1), ("fourier", "at least 1", "-1")),
        (lambda: AtLevel(width=5), ("width", "even", "5")),
        (lambda: VDM(Exact(), Gamma(), 0), ("timesteps", "at least 1", "0")),
        (lambda: MODEL.terms(torch.zeros(3), seeded()), ("x", "[n, .]", "(3,)")),
        (lambda: MODEL.terms(torch.zeros(3, 2) / 0, seeded()), ("x", "finite", "6")),
        (lambda: MODEL.terms(torch.zeros(3, 2), None), ("generator", "torch.Generator", "None")),
        (lambda: MODEL.discretize(0), ("sample_steps", "at least 1", "0")),
        (
            lambda: train(MODEL, points(5), train_steps=0, batch_size=1, lr=1, generator=seeded()),
            ("train_steps", "at least 1", "0"),
        ),
        (
            lambda: train(MODEL, points(5), train_steps=1, batch_size=0, lr=1, generator=seeded()),
            ("batch_size", "at least 1", "0"),
        ),
        (lambda: trained(lr=0), ("lr", "above 0", "0")),
        (
            lambda: train(MODEL, points(5), train_steps=1, batch_size=1, lr=1, generator=3),
            ("generator", "torch.Generator", "3"),
        ),
        (lambda: train(MODEL, points(5)[0], train_steps=1, batch_size=1, lr=1, generator=seeded()), ("data", "[n, .]", "(2,)")),
        (
            lambda: list(train(VDM(Exact(), Gamma()), points(5), train_steps=200, batch_size=5, lr=1e30, generator=seeded())),
            ("loss", "finite", "step 100", "lower lr"),
        ),
        (lambda: MODEL.discretize(9)[1](points(3), torch.arange(3), torch.arange(3)), ("label", "None", "(3,)")),
        (lambda: MODEL.discretize(9)[1](points(3, 1), torch.arange(3)), ("x", "[n, 2]", "(3, 1)")),
        (lambda: MODEL.discretize(9)[1](points(3), torch.arange(4)), ("t", "[3]", "(4,)")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)
