"""Training in the open: the loop, its randomness, the options that change the arithmetic, and refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import one_line, same_bits, seeded
from torch import Tensor, nn

from tinyhall.core import training
from tinyhall.core._check import TinyhallError
from tinyhall.core.mlp import MLP
from tinyhall.core.sampling import ddim, sample
from tinyhall.core.schedule import Schedule
from tinyhall.core.training import Run, TrainingConfig, start, train
from tinyhall.core.unet import UNet
from tinyhall.data.mixtures import GaussianMixture

SCHEDULE = Schedule.linear(1e-3, 0.2, 100)
DATA = GaussianMixture.line().sample(50, seeded(100))
END = 11  # steps; with 50 rows in batches of 16, epochs turn at steps 3, 6 and 9


def small(seed: int = 0) -> MLP:
    return MLP(1, width=16, generator=seeded(seed))


def options(**changed: Any) -> dict[str, Any]:
    return {"train_steps": END, "batch_size": 16, "lr": 1e-3, "generator": seeded(5), **changed}


def trained(net: nn.Module | None = None, **changed: Any) -> Run:
    more = options(**changed)
    *_, step = train(net or small(), more.pop("data", DATA), more.pop("schedule", SCHEDULE), **more)
    return step.run


def weights(run: Run) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in run.net.state_dict().items()}


class Recorder(nn.Module):
    """A one-weight network that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.label: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.x.append(x)
        self.t.append(t.clone())
        if label is not None:
            self.label.append(label.clone())
        return 0 * x + 1e-3 * self.weight


def walk(net: nn.Module, data: Tensor, schedule: Schedule = SCHEDULE, **changed: Any) -> list[Tensor]:
    return [step.loss for step in train(net, data, schedule, **options(**changed))]


# --- the loop


def test_every_step_is_yielded() -> None:
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    numbers = []
    for step in train(net, DATA, SCHEDULE, **options()):
        numbers.append(step.step)
        assert step.loss.shape == ()
        assert not step.loss.requires_grad
        assert step.run.net is net
        assert not same_bits(before, net.state_dict())
        before = {k: v.clone() for k, v in net.state_dict().items()}
    assert numbers == list(range(1, END + 1))


def test_the_task_is_to_find_the_noise_in_q_sample() -> None:
    """For data that is a single point c, eps = (x_t - sqrt(abar) c) / sqrt(1 - abar): with it the loss is zero."""

    class Knows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            bar = SCHEDULE.alpha_bar[t][:, None]
            return ((x - bar.sqrt() * 0.7) / (1 - bar).sqrt() * self.one.double()).float()

    losses = walk(Knows(), torch.full((64, 1), 0.7), lr=1e-12)
    assert float(max(losses)) < 1e-6
    # Of a network that says 0, the loss is the noise's variance: mean squares, of every number, not sums.
    losses = walk(Recorder(), torch.randn(5000, 3, generator=seeded()), batch_size=5000, lr=1e-9)
    assert float(torch.stack(losses).mean()) == pytest.approx(1, abs=0.02)


def test_one_step_is_adam_on_the_mean_squared_error() -> None:
    """A hand-written step from what the network was given; eps is found by solving q_sample, as the data is one point."""
    net, other = small(), small()
    data = torch.full((32, 1), 0.7)
    seen: dict[str, Tensor] = {}
    net.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], t=args[1]))
    step = next(train(net, data, SCHEDULE, **options(batch_size=32)))
    x, t = seen["x"], seen["t"]
    bar = SCHEDULE.alpha_bar[t][:, None]
    eps = ((x - bar.sqrt() * 0.7) / (1 - bar).sqrt()).float()
    adam = torch.optim.Adam(other.parameters(), lr=1e-3)
    loss = F.mse_loss(other(x, t), eps)
    loss.backward()
    adam.step()
    torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-4, atol=1e-5)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        # Adam's first step is lr times the gradient's sign: where the gradient is rounding, so is the sign.
        sure = (b.grad.abs() > 1e-4) if b.grad is not None else torch.ones_like(b, dtype=torch.bool)
        torch.testing.assert_close(a[sure], b[sure], rtol=1e-4, atol=1e-5)


def test_training_learns() -> None:
    data = GaussianMixture.line((1,)).sample(512, seeded(1))
    losses = torch.stack(walk(MLP(1, width=32), data, batch_size=256, train_steps=150, lr=3e-3))
    assert float(losses[-20:].mean()) < 0.5 * float(losses[:5].mean())


def test_every_t_is_trained_equally() -> None:
    schedule = Schedule.linear(0.1, 0.9, 8)
    net = Recorder()
    walk(net, torch.randn(2000, 1, generator=seeded()), schedule, batch_size=2000, train_steps=4, microbatch=2000)
    share = torch.bincount(torch.cat(net.t), minlength=8) / 8000
    assert len(share) == 8
    assert bool(((share - 1 / 8).abs() < 0.02).all())


def test_an_epoch_deals_every_row_once_and_epochs_differ() -> None:
    net = Recorder()
    label = torch.arange(48)
    walk(net, torch.randn(48, 1, generator=seeded()), label=label, train_steps=9)
    epochs = [torch.cat(net.label[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, label)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_small_set_is_used_whole() -> None:
    net = Recorder()
    walk(net, torch.randn(10, 1, generator=seeded()), batch_size=10_000, label=torch.arange(10), train_steps=2)
    assert [sorted(part.tolist()) for part in net.label] == [list(range(10))] * 2


def test_rows_keep_their_labels() -> None:
    """At t = 0 the state is nearly the data: where the data is the label, so is x."""
    net = Recorder()
    data = torch.arange(48.0)[:, None] * 10
    walk(net, data, label=torch.arange(48), train_steps=12)
    for x, t, label in zip(net.x, net.t, net.label, strict=True):
        clean = x[:, 0].double() / SCHEDULE.alpha_bar[t].sqrt()
        near = t < 5
        assert bool(((clean - 10 * label).abs() < 2)[near].all())


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.3, 0.24, 0.36), (1.0, 1, 1)])
def test_label_dropout(dropout: float, low: float, high: float) -> None:
    net = Recorder()
    walk(
        net,
        torch.zeros(1000, 1),
        batch_size=1000,
        label=torch.arange(1000) % 10,
        label_dropout=dropout,
        train_steps=3,
        microbatch=1000,
    )
    labels = torch.cat(net.label)
    assert low <= float((labels == -1).float().mean()) <= high
    assert bool((labels >= -1).all())


def test_without_labels_the_network_is_called_without() -> None:
    class Two(Recorder):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return 0 * x + self.weight

    assert len(walk(Two(), DATA, train_steps=2)) == 2


def test_a_run_goes_on_as_if_it_had_never_stopped() -> None:
    whole, net = trained(ema=0.9), small()
    first = list(train(net, DATA, SCHEDULE, **options(ema=0.9, train_steps=2)))
    run = first[-1].run
    assert (run.step, run.net is net, run.schedule is SCHEDULE) == (2, True, True)
    assert list(run.steps(2)) == []  # nothing is left to train
    assert list(run.steps(1)) == []
    assert [step.step for step in run.steps(7)] == [3, 4, 5, 6, 7]
    assert [step.step for step in run.steps(END)] == list(range(8, END + 1))
    assert same_bits(weights(run), weights(whole))
    assert same_bits(run.weights(), whole.weights())
    assert torch.equal(run.generator.get_state(), whole.generator.get_state())


def test_start_is_a_run_at_step_zero() -> None:
    net, config = small(), TrainingConfig(batch_size=16, lr=1e-3, ema=0.9)
    run = start(net, DATA, SCHEDULE, config, generator=seeded(5))
    assert (run.step, run.losses, run.seconds, run.raw) == (0, [], 0.0, None)
    assert run.net is net and run.config is config and run.label is None
    assert same_bits(run.weights(), small().state_dict())
    assert len(list(run.steps(END))) == END
    assert same_bits(weights(run), weights(trained()))


def test_a_config_says_how_a_network_is_trained() -> None:
    config = TrainingConfig(16, 1e-3)
    assert dataclasses.asdict(config) == {
        "batch_size": 16, "lr": 1e-3, "label_dropout": 0.0, "ema": None, "bf16": False, "microbatch": None, "captured": False
    }  # fmt: skip
    assert (config.batch(DATA), config.batch(DATA[:5])) == (16, 5)
    assert next(train(small(), DATA, SCHEDULE, **options())).run.config == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_the_old_keyword_says_what_it_is_called_now() -> None:
    more = options()
    more["steps"] = more.pop("train_steps")
    with pytest.warns(FutureWarning, match="tinyhall: steps of train is now train_steps"):
        steps = train(net := small(), DATA, SCHEDULE, **more)
    assert len(list(steps)) == END
    assert same_bits(net.state_dict(), weights(trained()))


# --- randomness


def test_equal_seeds_give_equal_bits_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (weights(trained(generator=seeded(s))) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(a, b)
    assert not same_bits(a, c)


def test_training_and_sampling_repeat() -> None:
    x = [sample(trained().net, SCHEDULE, 6, generator=seeded(1), sampler=ddim(sample_steps=5)).x for _ in range(2)]
    assert torch.equal(*x)


def test_noise_is_fresh_in_every_step() -> None:
    net = Recorder()
    walk(net, torch.zeros(16, 1), train_steps=3)
    assert len(torch.cat(net.x).unique()) == 48


# --- options that change the arithmetic


@pytest.mark.parametrize("microbatch", [1, 5, 15, 16, 100])
def test_microbatches_equal_the_whole_batch(microbatch: int) -> None:
    whole, parts = walk(small(), DATA, microbatch=16), walk(small(), DATA, microbatch=microbatch)
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole), rtol=1e-4, atol=1e-5)
    a, b = small(), small()
    next(train(a, DATA, SCHEDULE, **options(microbatch=16)))
    next(train(b, DATA, SCHEDULE, **options(microbatch=microbatch)))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def test_data_that_asks_for_a_gradient_trains_as_any() -> None:
    data = DATA.clone().requires_grad_()
    assert same_bits(weights(trained(data=data, microbatch=5)), weights(trained(microbatch=5)))
    assert data.grad is None


def test_microbatches_split_as_told() -> None:
    net = Recorder()
    walk(net, DATA, microbatch=6, train_steps=1)
    assert [len(x) for x in net.x] == [6, 6, 4]


def test_images_train() -> None:
    net = Recorder()
    walk(net, torch.rand(20, 1, 8, 8, generator=seeded()), train_steps=3)
    assert net.x[0].shape == (16, 1, 8, 8)


def test_ema_is_the_average_of_the_weights() -> None:
    net = small()
    average = {k: v.clone() for k, v in net.state_dict().items()}
    for step in train(net, DATA, SCHEDULE, **options(ema=0.5)):
        decay = min(0.5, (1 + step.step) / (10 + step.step))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in net.state_dict().items()}
        for k, v in step.run.weights().items():
            torch.testing.assert_close(v, average[k], rtol=1e-5, atol=1e-7)
    assert same_bits(net.state_dict(), weights(trained()))  # averaging does not change what is averaged


def test_ema_keeps_numbers_that_are_no_weights() -> None:
    class Counting(MLP):
        def __init__(self) -> None:
            super().__init__(1, width=16, generator=seeded())
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            self.calls = self.calls + 1  # another tensor every time
            return super().forward(x, t, label)

    run = trained(Counting(), ema=0.5)
    assert int(run.weights()["calls"]) == END
    same = {k: v for k, v in run.weights().items() if k != "calls"}
    assert same_bits(same, trained(ema=0.5).weights())


def test_after_some_steps_one_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU makes of it is tested there; a processor can look at what it is handed, and what is done with the answer."""
    seen: list[int] = []

    def capture(run: Run, update: Any, rows: Tensor) -> Any:
        seen.append(run.step)
        return lambda rows: (seen.append(-1), update(rows))[1]

    monkeypatch.setattr(training, "_capture", capture)
    net, asked = small(), options()
    config = TrainingConfig(batch_size=16, lr=1e-3, ema=0.9, microbatch=16, captured=True)
    run = start(net, DATA, SCHEDULE, config, generator=asked["generator"])
    steps = training._steps(run, END)
    assert [step.step for step in steps] == list(range(1, END + 1))
    assert seen == [training._WARM] + [-1] * (END - training._WARM)
    assert same_bits(run.weights(), trained(ema=0.9).weights())


class Rebinding(MLP):
    def __init__(self) -> None:
        super().__init__(1, width=16, generator=seeded())
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x, t, label)


@pytest.mark.parametrize(
    ("net", "problem", "raised", "parts"),
    [
        (small(), None, None, ()),
        (Rebinding(), None, TinyhallError, ("captured", "False for a network that", "moves its buffers", "True")),
        (small(), RuntimeError("operation not permitted"), TinyhallError, ("captured", "asks the processor", "new process")),
        (small(), torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, ("out of memory",)),
    ],
)
def test_what_cannot_be_captured_is_told(net, problem, raised, parts, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """With a stand-in for the graph, which takes the step once as it is recorded and again whenever it is replayed."""

    class Graph:
        def register_generator_state(self, generator: torch.Generator) -> None: ...

        def replay(self) -> None:
            replayed.append(1)

    @contextlib.contextmanager
    def recording(graph: Graph, stream: object) -> Any:
        yield
        if problem is not None:
            raise problem

    replayed: list[int] = []
    for name, stand_in in {"CUDAGraph": Graph, "graph": recording, "device": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(training, "_stream", lambda device: None)
    config = TrainingConfig(batch_size=16, lr=1e-3, microbatch=16, captured=True)
    run = start(net, DATA, SCHEDULE, config, generator=seeded())
    steps = training._steps(run, END)
    if raised is None:
        assert len(list(steps)) == END and len(replayed) == END - training._WARM
        return
    with pytest.raises(raised) as caught:
        list(steps)
    one_line(caught.value, *parts)
    assert run.step == training._WARM


def test_bf16_trains_in_float32_weights_and_is_close() -> None:
    nets = small(), small()
    full, half = (torch.stack(walk(net, DATA, bf16=bf16)) for net, bf16 in zip(nets, (False, True), strict=True))
    assert all(v.dtype == torch.float32 for v in nets[1].state_dict().values())
    assert not same_bits(nets[0].state_dict(), nets[1].state_dict())
    assert float(half.mean()) == pytest.approx(float(full.mean()), rel=0.02)


# --- refusals


class Wide(Recorder):
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t).expand(-1, 2)


IMAGES = torch.zeros(3, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: walk(small(), torch.zeros(5)), ("data", "[n, *shape]", "(5,)")),
        (lambda: walk(small(), torch.zeros(0, 1)), ("data", "n >= 1", "(0, 1)")),
        (lambda: walk(small(), DATA.double()), ("data", "float32", "float64")),
        (lambda: walk(small(), DATA.half()), ("data", "float32", "float16")),
        (lambda: walk(small(), DATA.long()), ("data", "float32", "int64")),
        (lambda: walk(small(), DATA.numpy()), ("data", "float32 tensor", "ndarray")),
        (lambda: walk(small(), torch.full((5, 1), math.inf)), ("data", "finite", "5")),
        (lambda: walk(small(), DATA, train_steps=0), ("train_steps", "at least 1", "0")),
        (lambda: walk(small(), DATA, train_steps=1.5), ("train_steps", "whole number", "1.5")),
        (lambda: trained().steps(0), ("end", "at least 1", "0")),
        (lambda: walk(small(), DATA, batch_size=0), ("batch_size", "at least 1", "0")),
        (lambda: walk(small(), DATA, batch_size=-1), ("batch_size", "at least 1", "-1")),
        (lambda: walk(small(), DATA, microbatch=0), ("microbatch", "at least 1", "0")),
        (lambda: walk(small(), DATA, lr=0), ("lr", "above 0", "0")),
        (lambda: walk(small(), DATA, lr=math.nan), ("lr", "finite", "nan")),
        (lambda: walk(small(), DATA, ema=1.0), ("ema", "(0, 1)", "1.0")),
        (lambda: walk(small(), DATA, label=torch.zeros(49).long()), ("label", "[50]", "(49,)")),
        (lambda: walk(small(), DATA, label=torch.zeros(50)), ("label", "int64", "float32")),
        (
            lambda: walk(UNet(size=8, widths=(8,), classes=2), IMAGES, label=torch.full((3,), 2)),
            ("label", "-1 (no class) to 1", "2"),
        ),
        (lambda: walk(Wide(), DATA), ("net", "eps of x's shape (16, 1)", "(16, 2)")),
        (lambda: walk(torch.zeros_like, DATA), ("net", "an nn.Module with parameters", "zeros_like")),
        (lambda: walk(nn.Identity(), DATA), ("net", "an nn.Module with parameters", "Identity")),
        (lambda: walk(small(), DATA, generator=None), ("generator", "torch.Generator().manual_seed(0)", "None")),
        (lambda: walk(small(), DATA, captured=True), ("captured", "on a GPU and one process", "cpu, 1 at work")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


def test_a_generator_of_another_device_is_refused(unchecked: None) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(TinyhallError) as caught:
        train(small(), DATA, SCHEDULE, **options(generator=Elsewhere()))
    one_line(caught.value, "generator", "cpu", "cuda:0")


def test_bad_arguments_raise_at_the_call(unchecked: None) -> None:
    with pytest.raises(TinyhallError):
        train(small(), DATA, SCHEDULE, **options(train_steps=0))


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half"])
def test_label_dropout_is_a_share(share: object, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        walk(Recorder(), torch.randn(8, 1, generator=seeded()), label=torch.arange(8), label_dropout=share)
    one_line(caught.value, "label_dropout", "[0, 1]")


def test_module_keeps_its_public_names() -> None:
    for name in ("train", "start", "Run", "TrainStep", "TrainingConfig"):
        assert hasattr(training, name)
