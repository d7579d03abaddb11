"""The network for images: its parts against a plain second writing, its labels, and how training and sampling use it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import one_line, run_python, same_bits, same_t, seeded
from torch import Tensor, nn

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.unet import Attention, Block, UNet
from tinyhall.store.files import load_weights, write_tensors

SCHEDULE = th.Schedule.linear(1e-3, 0.2, 100)


def tiny(seed: int = 0, **changes) -> UNet:
    """Two levels of 4 x 4 and 2 x 2 pixels, two classes."""
    settings = {"size": 8, "widths": (8, 16), "blocks": 1, "classes": 2}
    return UNet(**(settings | changes), generator=seeded(seed))


def shaken(net: nn.Module, seed: int = 9) -> nn.Module:
    """Every weight moved: no bias is zero, no norm the identity, and what starts at zero does something."""
    g = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return net


def part(kind: type, *arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # UNet does so for its parts
        return shaken(kind(*arguments))


def inputs(n: int, net: UNet, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    return torch.randn(n, *net.shape, generator=g), torch.randint(100, (n,), generator=g), torch.arange(n) % 3 - 1


def images(n: int) -> tuple[Tensor, Tensor]:
    """Two images, over and over: bright on the left (class 0), bright at the top (class 1)."""
    two = -torch.ones(2, 1, 8, 8)
    two[0, :, :, :4] = two[1, :, :4] = 1
    label = torch.arange(n) % 2
    return two[label], label


@pytest.fixture(scope="module")
def trained() -> tuple[UNet, list[float]]:
    data, label = images(32)
    net, losses = tiny(), []
    for step in th.train(
        net, data, SCHEDULE, train_steps=120, batch_size=32, lr=5e-3, generator=seeded(2), label=label, label_dropout=0.2
    ):
        losses.append(float(step.loss))
    return net, losses


class TestParts:
    @pytest.mark.parametrize(("width", "heads"), [(16, 1), (128, 2), (200, 1)])
    def test_attention_equals_its_formula(self, width: int, heads: int) -> None:
        layer = part(Attention, width).double()
        assert layer.heads == heads
        h = torch.randn(2, width, 3, 2, generator=seeded(), dtype=torch.float64)
        with torch.no_grad():
            out = layer(h.contiguous(memory_format=torch.channels_last))
            normed, d = layer.norm(h), width // heads
            for i in range(2):
                pixels = torch.stack([normed[i, :, r, c] for r in range(3) for c in range(2)])  # [pixels, width]
                q, k, v = (pixels @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=1)
                mixed = []
                for head in range(heads):
                    a = slice(head * d, (head + 1) * d)
                    weight = torch.exp(q[:, a] @ k[:, a].T / math.sqrt(d))
                    mixed.append(weight / weight.sum(1, keepdim=True) @ v[:, a])
                expected = h[i] + layer.out(torch.cat(mixed, dim=1)).T.reshape(width, 3, 2)
                torch.testing.assert_close(out[i], expected)

    @pytest.mark.parametrize("width_in", [8, 12])
    def test_block_equals_its_formula(self, width_in: int) -> None:
        layer = part(Block, width_in, 8, 6, False)
        w = dict(layer.named_parameters())
        h, condition = torch.randn(2, width_in, 4, 4, generator=seeded(1)), torch.randn(2, 6, generator=seeded(2))
        groups = [F.group_norm(row[None], width_in // 4, w["norm1.weight"], w["norm1.bias"])[0] for row in h]
        out = F.conv2d(F.silu(torch.stack(groups)), w["conv1.weight"], w["conv1.bias"], padding=1)
        both = condition @ w["condition.weight"].T + w["condition.bias"]
        out = F.group_norm(out, 2, w["norm2.weight"], w["norm2.bias"])
        out = out + out * both[:, :8, None, None] + both[:, 8:, None, None]
        out = F.conv2d(F.silu(out), w["conv2.weight"], w["conv2.bias"], padding=1)
        skip = h if width_in == 8 else F.conv2d(h, w["skip.weight"], w["skip.bias"])
        torch.testing.assert_close(layer(h, condition), skip + out, rtol=1e-4, atol=1e-5)

    def test_attention_is_where_it_is_asked_for(self) -> None:
        def places(**changes) -> list[str]:
            net = tiny(widths=(8, 8, 8), size=16, **changes)
            return [name.rpartition(".")[0] for name, part in net.named_modules() if isinstance(part, Attention)]

        assert places() == ["down.2.0"]  # of 8, 4, 2: the lowest
        assert places(attention=(8,)) == ["down.0.0", "up.1.0"]
        assert places(attention=[4, 2]) == ["down.1.0", "down.2.0", "up.0.0"]
        assert places(attention=()) == []


class TestBuilding:
    def test_parameter_count(self) -> None:
        assert sum(p.numel() for p in UNet().parameters()) == 2_698_372
        assert sum(p.numel() for p in UNet(classes=10).parameters()) == 2_698_372 + 11 * 128
        assert th.nets.UNet is UNet

    def test_weights_come_from_the_generator(self) -> None:
        a, b, c = (tiny(seed).state_dict() for seed in (4, 4, 5))
        assert same_bits(a, b)
        assert not any(torch.equal(a[k], c[k]) for k in ("conv_in.weight", "label.weight", "down.0.0.conv1.weight"))
        assert same_bits(UNet(size=8, widths=(8,)).state_dict(), UNet(size=8, widths=(8,)).state_dict())

    def test_starts_by_predicting_nothing(self) -> None:
        net = tiny()
        assert int(torch.count_nonzero(net(*inputs(6, net)))) == 0

    def test_weights_lie_in_the_ordinary_order(self) -> None:
        # Adam's moments come back so from a checkpoint, and its fused step pairs them by their place in memory.
        assert all(p.is_contiguous() for p in UNet().parameters())

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"size": 30}, ("size", "a multiple of 4", "stem=2", "30")),
            ({"channels": 0}, ("channels", "at least 1", "0")),
            ({"blocks": 0}, ("blocks", "at least 1", "0")),
            ({"stem": 0}, ("stem", "at least 1", "0")),
            ({"widths": ()}, ("widths", "multiples of 4", "()")),
            ({"widths": (8, 18)}, ("widths", "multiples of 4", "(8, 18)")),
            ({"widths": (8, 0)}, ("widths", "at least 1", "0")),
            ({"attention": (3,)}, ("attention", "[4, 2]", "(3,)")),
            ({"classes": 0}, ("classes", "at least 1", "0")),
        ],
    )
    def test_errors(self, settings: dict, parts: tuple[str, ...]) -> None:
        with pytest.raises(TinyhallError) as caught:
            tiny(**settings)
        one_line(caught.value, *parts)


class TestCalling:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"channels": 3, "stem": 1},
            {"widths": (8,), "stem": 4, "blocks": 2},
            {"widths": (4, 8, 12), "blocks": 2, "classes": None, "size": 24},
        ],
    )
    def test_shape_and_dtype(self, settings: dict) -> None:
        net = shaken(tiny(**settings))
        x, t, _ = inputs(3, net)
        out = net(x, t)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert net.shape == x.shape[1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x, t)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, out, rtol=0.1, atol=0.1)

    def test_samples_are_independent(self) -> None:
        net = shaken(tiny())
        x, t, label = inputs(6, net)
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(net(x, t, label), alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("classes", [None, 2])
    def test_expanded_t_equals_full_t(self, classes: int | None) -> None:
        net = shaken(tiny(classes=classes))
        x, _, label = inputs(6, net)
        for part in (None, label if classes else None):
            torch.testing.assert_close(net(x, same_t(7, 6), part), net(x, torch.full((6,), 7), part), rtol=1e-4, atol=1e-5)
        assert net.condition(same_t(7, 6)).shape[0] == 1

    def test_t_and_label_matter(self) -> None:
        net = shaken(tiny())
        x, t, _ = inputs(4, net)
        with torch.no_grad():
            outs = [net(x, t), net(x, t + 40), net(x, t, torch.zeros_like(t)), net(x, t, torch.ones_like(t))]
        for i in range(4):
            for j in range(i):
                assert float((outs[i] - outs[j]).abs().max()) > 1e-3

    def test_label_minus_one_is_none(self) -> None:
        net = shaken(tiny())
        x, t, label = inputs(6, net)
        none = torch.full((6,), -1)
        torch.testing.assert_close(net(x, t, none), net(x, t))
        torch.testing.assert_close(net(x, t, label)[label == -1], net(x, t)[label == -1])

    def test_features_are_the_bottom_of_the_u(self) -> None:
        net = shaken(UNet(widths=(4, 8, 12), blocks=1, classes=2))
        x, t, label = inputs(2, net)
        seen: list[Tensor] = []
        net.down[-1].register_forward_hook(lambda module, args, out: seen.append(out))
        features = net.features(x, t, label)
        assert features.shape == (2, 12, 8, 8)
        net(x, t, label)
        assert torch.equal(features, seen[1])

    def test_channels_are_last_in_memory(self) -> None:
        net = shaken(UNet(size=16, widths=(8, 16), blocks=2, channels=3))
        checked = []

        def look(module: nn.Module, args: tuple, out: Tensor) -> None:
            checked.append(out.is_contiguous(memory_format=torch.channels_last))

        for part in net.modules():
            if isinstance(part, (nn.Conv2d, nn.GroupNorm, Block, Attention)):
                part.register_forward_hook(look)
        x, t, _ = inputs(2, net)
        net(x, t)
        assert len(checked) > 20
        assert all(checked)

    def test_huge_states_give_finite_noise(self) -> None:
        net = shaken(tiny())
        x, t, _ = inputs(4, net)
        for scale in (1e10, 1e18, 1e23, 1e30):
            assert bool(torch.isfinite(net(scale * x, t)).all())

    @pytest.mark.parametrize(
        ("classes", "label", "parts"),
        [
            (2, torch.tensor([0, 1, 2]), ("label", "-1 (no class) to 1", "0 to 2")),
            (2, torch.tensor([0, -2, 1]), ("label", "-1 (no class) to 1", "-2 to 1")),
            (2, torch.tensor([0.0, 1.0, 1.0]), ("label", "int64 of shape [3]", "float32")),
            (2, torch.tensor([0]), ("label", "int64 of shape [3]", "(1,)")),
            (None, torch.tensor([0, 0, 0]), ("label", "no classes")),
        ],
    )
    def test_refuses_a_bad_label(self, classes: int | None, label: Tensor, parts: tuple[str, ...], unchecked) -> None:
        net = tiny(classes=classes)
        for call in (net, net.features):
            with pytest.raises(TinyhallError) as caught:
                call(torch.zeros(3, *net.shape), torch.arange(3), label)
            one_line(caught.value, *parts)

    def test_refuses_images_of_another_shape(self) -> None:
        with pytest.raises(TinyhallError) as caught:
            tiny()(torch.zeros(2, 1, 16, 16), torch.arange(2))
        one_line(caught.value, "x", "[n, 1, 8, 8]", "(2, 1, 16, 16)")


class TestUse:
    def test_learns_two_images(self, trained: tuple[UNet, list[float]]) -> None:
        losses = trained[1]
        assert losses[0] == pytest.approx(1, abs=0.1)  # eps = 0 at the start
        assert sum(losses[-10:]) / 10 < 0.2

    def test_every_parameter_learns(self) -> None:
        net, label = tiny(), images(8)[1]
        for step in th.train(
            net,
            images(8)[0],
            SCHEDULE,
            train_steps=6,
            batch_size=8,
            lr=1e-3,
            generator=seeded(),
            label=label,
            label_dropout=0.3,
        ):
            assert math.isfinite(float(step.loss))
        for name, p in net.named_parameters():
            assert p.grad is not None and bool(p.grad.any()), name

    def test_the_right_label_is_better_after_training(self, trained: tuple[UNet, list[float]]) -> None:
        x0, label = images(256)
        t, eps = torch.arange(256) % 30 + 30, torch.randn(256, 1, 8, 8, generator=seeded(3))
        x = SCHEDULE.q_sample(x0, t, eps)
        with torch.no_grad():
            right, wrong = (float(F.mse_loss(trained[0](x, t, given), eps)) for given in (label, 1 - label))

        assert right < 0.95 * wrong

    def test_sample_with_guidance(self, trained: tuple[UNet, list[float]]) -> None:
        label = torch.tensor([0, 1, 1, 0, 1])
        drawn = [
            th.sample(
                trained[0], SCHEDULE, 5, generator=seeded(3), label=label, guidance=2.0, batch_size=size,
                sampler=th.ddim(sample_steps=5), metrics=[th.TrajectoryVariance((0, 100))],
            )
            for size in (2, 5)
        ]  # fmt: skip
        assert drawn[0].x.shape == (5, 1, 8, 8)
        torch.testing.assert_close(drawn[0].x, drawn[1].x, rtol=1e-3, atol=1e-3)
        assert all(score.shape == (5,) for score in drawn[0].scores.values())

    def test_guidance_zero_and_one(self, trained: tuple[UNet, list[float]]) -> None:
        net, label = trained[0], torch.tensor([0, 1, 1, 0])

        def last(label: Tensor | None, guidance: float | None) -> Tensor:
            *_, step = th.reverse(
                net,
                SCHEDULE,
                (4, *net.shape),
                sampler=th.ddim(sample_steps=10),
                generator=seeded(4),
                label=label,
                guidance=guidance,
            )
            return step.x

        assert torch.equal(last(label, 1.0), last(label, None))
        assert torch.equal(last(label, 0.0), last(None, None))
        assert float((last(label, 1.0) - last(label, 0.0)).abs().max()) > 0.1

    @pytest.mark.parametrize("bf16", [False, True])
    def test_resumes_to_the_same_bits(self, tmp_path: Path, bf16: bool) -> None:
        data, label = images(12)

        def run(steps: int, path: Path | None) -> th.Run:
            return th.fit(
                tiny(), data, SCHEDULE, train_steps=steps, batch_size=5, lr=1e-2, generator=seeded(6), label=label, ema=0.9,
                label_dropout=0.3, bf16=bf16, microbatch=3, checkpoint=path, every=2, progress=False,
            )  # fmt: skip

        run(3, tmp_path / "run.safetensors")
        resumed, whole = run(6, tmp_path / "run.safetensors"), run(6, None)
        assert same_bits(dict(resumed.net.state_dict()), dict(whole.net.state_dict()))
        assert resumed.ema is not None
        assert same_bits(dict(resumed.net.state_dict()), resumed.ema)  # fit returns the average

    @pytest.mark.parametrize("half", [False, True])
    def test_saved_and_loaded(self, tmp_path: Path, half: bool) -> None:
        net, path = shaken(tiny()), tmp_path / "model.safetensors"
        kept = {k: v.half() if half else v for k, v in net.state_dict().items()}
        write_tensors(path, kept)
        other = tiny(seed=1)
        load_weights(other, path)
        assert same_bits(dict(other.state_dict()), {k: v.float() for k, v in kept.items()})
        x, t, label = inputs(3, net)
        torch.testing.assert_close(other(x, t, label), net(x, t, label), rtol=0, atol=2e-2 if half else 0)
        with pytest.raises(TinyhallError) as caught:
            load_weights(tiny(classes=3), path)
        one_line(caught.value, "label.weight", "another network")


@pytest.mark.slow
def test_compiled_trains_as_eager() -> None:
    """In a process without the type checks, which a compiler need not understand. What is traced runs as it is: building it
    takes minutes on a busy core, and fullgraph already refuses whatever a compiler could not take whole."""
    code = """
import torch, tinyhall as th
def run(compile):
    g = torch.Generator().manual_seed(0)
    net = th.nets.UNet(size=8, widths=(4, 8), blocks=1, classes=2)
    if compile:
        net.compile(backend="aot_eager", fullgraph=True)
    data, label = torch.randn(4, 1, 8, 8, generator=g), torch.arange(4) % 2
    th.fit(net, data, th.Schedule.linear(), train_steps=3, batch_size=4, lr=1e-2, generator=g, label=label, label_dropout=0.3,
           bf16=False, progress=False)
    return dict(net.state_dict())
torch.testing.assert_close(run(True), run(False), rtol=1e-2, atol=1e-3)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_with_a_schedule_the_last_layer_predicts_v() -> None:
    """Salimans and Ho 2022: where the layer says v exactly, the network says eps exactly, at every t."""
    schedule = th.Schedule.linear(1e-4, 0.04, 500)
    arguments = {"channels": 1, "size": 16, "widths": (8, 8), "blocks": 1, "stem": 2}
    plain = UNet(**arguments, generator=seeded())
    net = UNet(**arguments, schedule=schedule, generator=seeded())
    assert net.state_dict().keys() == plain.state_dict().keys()  # the schedule is not among the weights
    g = seeded(1)
    x0, eps, t = (
        torch.randn(6, 1, 16, 16, generator=g),
        torch.randn(6, 1, 16, 16, generator=g),
        torch.tensor([0, 1, 50, 250, 400, 499]),
    )
    x = schedule.q_sample(x0, t, eps)
    a = schedule.alpha_bar.float()[t][:, None, None, None]
    net.trunk = lambda x, condition: a.sqrt() * eps - (1 - a).sqrt() * x0  # type: ignore[method-assign]
    torch.testing.assert_close(net(x, t), eps, rtol=0, atol=2e-5)
    # An untrained one says v = 0: no more than what the noisy image itself tells.
    untrained = UNet(**arguments, schedule=schedule, generator=seeded())
    torch.testing.assert_close(untrained(x, t), (1 - a).sqrt() * x)
