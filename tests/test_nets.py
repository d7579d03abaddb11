"""The paper's network against a plain second writing of it, and the shortcuts against the direct way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import one_line, run_python, same_bits, same_t, seeded
from torch import Tensor

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import TrajectoryVariance
from tinyhall.core.mlp import MLP, sinusoidal
from tinyhall.core.sampling import sample
from tinyhall.core.schedule import Schedule
from tinyhall.measure.density import Tabulated


def plain(net: MLP, x: Tensor, t: Tensor) -> Tensor:
    """The network as PAPER.md's table describes it, one row after the other, from the weights alone."""
    w = {k: v.double() for k, v in net.state_dict().items()}
    out = []
    for row, time in zip(x.double(), t.tolist(), strict=True):
        rates = [math.exp(-math.log(10_000) * i / 63) for i in range(64)]
        wave = torch.tensor([math.sin(time * r) for r in rates] + [math.cos(time * r) for r in rates], dtype=torch.float64)
        hidden = F.leaky_relu(w["time.weight"] @ wave + w["time.bias"], 0.02)
        h = w["project_in.weight"] @ row
        for i in range(net.blocks):
            b = f"body.{0 if net.shared else i}."
            a = F.leaky_relu(F.layer_norm(h, (128,), w[b + "norm1.weight"], w[b + "norm1.bias"]), 0.02)
            a = w[b + "linear1.weight"] @ a + (w[b + "time.weight"] @ hidden + w[b + "time.bias"])
            a = F.leaky_relu(F.layer_norm(a, (128,), w[b + "norm2.weight"], w[b + "norm2.bias"]), 0.02)
            h = h + w[b + "linear2.weight"] @ a
        h = F.layer_norm(h, (128,), w["norm.weight"], w["norm.bias"])
        out.append(w["project_out.weight"] @ h + w["project_out.bias"])
    return torch.stack(out)


def shaken(net: MLP, seed: int = 9) -> MLP:
    """Every weight moved, so that no bias is zero and no norm is the identity."""
    g = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize(("dim", "count"), [(2, 67_074), (1, 66_817)])
def test_parameter_count(dim: int, count: int) -> None:
    assert sum(p.numel() for p in MLP(dim).parameters()) == count
    assert sum(p.numel() for p in MLP(dim, blocks=7).parameters()) == count  # shared: more passes, no more weights


def test_separate_blocks_have_their_own_weights() -> None:
    one, three = MLP(2), MLP(2, shared=False)
    block = sum(p.numel() for p in one.body.parameters())
    assert sum(p.numel() for p in three.parameters()) == 67_074 + 2 * block
    assert not torch.equal(three.body[0].linear1.weight, three.body[1].linear1.weight)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_equals_plain_network(dim: int, shared: bool) -> None:
    net = shaken(MLP(dim, shared=shared))
    g = seeded(1)
    x, t = torch.randn(12, dim, generator=g), torch.randint(1000, (12,), generator=g)
    torch.testing.assert_close(net(x, t).double(), plain(net, x, t), rtol=1e-4, atol=1e-5)


def test_time_matters() -> None:
    net = shaken(MLP(2))
    x = torch.randn(4, 2, generator=seeded())
    assert not torch.allclose(net(x, torch.full((4,), 3)), net(x, torch.full((4,), 700)), atol=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_time_shortcuts_equal_the_direct_way(shared: bool) -> None:
    net = shaken(MLP(2, shared=shared))
    # Few rows take the direct way; many rows over few t, and one expanded t, take the shortcuts.
    for t in (torch.randint(5, 30, (200,), generator=seeded(2)), same_t(17, 200), torch.arange(5, 205)):
        x = torch.randn(200, 2, generator=seeded(3))
        direct = torch.cat([net(x[i : i + 1], t[i : i + 1].clone()) for i in range(200)])
        torch.testing.assert_close(net(x, t), direct, rtol=1e-4, atol=1e-5)


def test_time_shortcut_has_the_same_gradient() -> None:
    x, t = torch.randn(200, 2, generator=seeded(3)), torch.randint(5, 30, (200,), generator=seeded(2))
    net = shaken(MLP(2))
    net(x, t).square().sum().backward()
    short = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for i in range(200):
        net(x[i : i + 1], t[i : i + 1].clone()).square().sum().backward()
    for a, p in zip(short, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-3)


def test_sinusoidal() -> None:
    out = sinusoidal(torch.tensor([0, 7]), 128)
    assert torch.equal(out[0], torch.cat([torch.zeros(64), torch.ones(64)]))
    assert float(out[1, 0]) == pytest.approx(math.sin(7), abs=1e-6)
    assert float(out[1, 63]) == pytest.approx(math.sin(7e-4), abs=1e-8)
    assert float(out[1, 127]) == pytest.approx(math.cos(7e-4), abs=1e-6)


def test_weights_come_from_the_generator() -> None:
    a, b, c = (MLP(2, generator=seeded(s)).state_dict() for s in (4, 4, 5))
    assert same_bits(a, b)
    assert not same_bits(a, c)
    assert same_bits(MLP(2).state_dict(), MLP(2).state_dict())  # without one, still the same every time


def test_initial_weights_are_xavier_with_zero_bias() -> None:
    net = MLP(2)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * bound < float(module.weight.detach().abs().max()) <= bound
            assert module.bias is None or not bool(module.bias.any())
    assert net.project_in.bias is None
    assert net.body[0].linear1.bias is None


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    MLP(2)
    MLP(1, shared=False, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_huge_states_give_finite_noise() -> None:
    # An untrained network lets the sampler's states grow this far on the paper's schedule.
    for scale in (1e10, 1e18, 1e23, 1e30):
        x = scale * torch.randn(16, 2, generator=seeded())
        assert bool(torch.isfinite(MLP(2)(x, same_t(500, 16))).all())


def test_trained_range_is_not_clamped() -> None:
    net = shaken(MLP(1))
    x = torch.tensor([[-50.0], [50.0], [51.0]])
    torch.testing.assert_close(net(x, torch.full((3,), 4)).double(), plain(net, x, torch.full((3,), 4)), rtol=1e-4, atol=1e-5)


class TestTabulated:
    net = shaken(MLP(1))

    def table(self) -> Tabulated:
        return Tabulated(self.net, 3, low=-2.0, high=2.0, points=4001)

    @pytest.mark.parametrize("t", [0, 1, 2])
    def test_close_to_its_network(self, t: int) -> None:
        x = torch.linspace(-2, 2, 777)[:, None]
        with torch.no_grad():
            expected = self.net(x, same_t(t, 777))
        out = self.table()(x, same_t(t, 777))
        assert out.shape == (777, 1)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
        assert float((out - expected).abs().mean()) < 1e-4

    def test_exact_at_its_places_and_linear_between(self) -> None:
        table = Tabulated(lambda x, t, label=None: 3 * x + t[:, None], 2, low=-1.0, high=1.0, points=3)
        x = torch.tensor([[-1.0], [-0.3], [0.0], [0.9], [1.0]])
        torch.testing.assert_close(table(x, same_t(1, 5)), 3 * x + 1)

    def test_outside_asks_the_network(self) -> None:
        x = torch.tensor([[-2.5], [0.1], [2.01], [1e20]])
        with torch.no_grad():
            expected = self.net(x, same_t(1, 4))
        out = self.table()(x, same_t(1, 4))
        torch.testing.assert_close(out[[0, 2, 3]], expected[[0, 2, 3]])
        torch.testing.assert_close(out[1], expected[1], rtol=0, atol=1e-3)

    def test_what_is_no_number_stays_none(self) -> None:
        x = torch.tensor([[math.nan], [0.5], [math.nan]])
        out = self.table()(x, same_t(1, 3))
        assert out.isnan().flatten().tolist() == [True, False, True]
        assert torch.equal(out[1:2], self.table()(x[1:2], same_t(1, 1)))

    def test_refuses_mixed_t(self) -> None:
        with pytest.raises(TinyhallError) as caught:
            self.table()(torch.zeros(2, 1), torch.tensor([0, 1]))
        one_line(caught.value, "t", "the same t")

    def test_refuses_an_empty_range(self) -> None:
        with pytest.raises(TinyhallError) as caught:
            Tabulated(self.net, 3, low=1.0, high=1.0)
        one_line(caught.value, "low < high", "1.0")
        with pytest.raises(TinyhallError) as caught:
            Tabulated(self.net, 3, points=1)
        one_line(caught.value, "points", "at least 2", "1")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: MLP(0), ("dim", "at least 1", "0")),
        (lambda: MLP(2, width=127), ("width", "even", "127")),
        (lambda: MLP(2, width=2), ("width", "at least 4", "2")),
        (lambda: MLP(2, blocks=0), ("blocks", "at least 1", "0")),
        (lambda: MLP(2)(torch.zeros(1, 2), torch.zeros(1).long(), torch.zeros(1)), ("label", "None", "no classes")),
        (lambda: MLP(2)(torch.zeros(3, 1), torch.zeros(3).long()), ("x", "[n, 2]", "(3, 1)")),
        (lambda: MLP(2)(torch.zeros(3), torch.zeros(3).long()), ("x", "[n, 2]", "(3,)")),
        (lambda: MLP(2)(torch.zeros(3, 2), torch.zeros(1).long()), ("t", "[3], one for each x", "(1,)")),
        (lambda: MLP(2)(torch.zeros(3, 2), torch.tensor(4)), ("t", "[3], one for each x", "()")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


def test_the_shape_check_bites() -> None:
    """The import hook that conftest installs is alive: a wrong shape trips over the annotation."""
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        MLP(2)(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeCheckError):
        Schedule.linear().q_sample(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """In a process without the type checks, which a compiler need not understand."""
    code = """
import shutil, sys, torch
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit(77)
from tinyhall.nets import MLP
net = MLP(2)
x, t = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 40
plain = net(x, t)
net.compile()
torch.testing.assert_close(net(x, t), plain, rtol=1e-4, atol=1e-5)
"""
    done = run_python("-c", code)
    if done.returncode == 77:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_table_leaves_the_figures_as_they_are() -> None:
    """On a trained network, whose curves are steep: same samples, same verdicts as by asking the network at every step."""
    made = th.load("line123", "laptop", root=Path(__file__).parents[1] / "book" / "artifacts")
    schedule, data = made.experiment.schedule(), made.experiment.data()
    drawn = [
        sample(
            net, schedule, 4000, shape=(1,), metrics=[TrajectoryVariance((0, 10))], generator=torch.Generator().manual_seed(5)
        )
        for net in (made.net, Tabulated(made.net, schedule.timesteps))
    ]
    assert float((drawn[0].x - drawn[1].x).abs().median()) < 1e-5
    verdicts = [data.in_support(d.x) for d in drawn]
    assert int((verdicts[0] != verdicts[1]).sum()) <= 1
    scores = [d.scores["variance[0,10)"].log10() for d in drawn]
    assert float((scores[0] - scores[1]).abs().median()) < 1e-3
