"""Training: seeds, resume to the bit, kills and interrupts, refusals, and the options that change the arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import ROOT, environment, one_line, run_python, same_bits, seeded
from torch import Tensor, nn

from tinyhall import training
from tinyhall._check import TinyhallError
from tinyhall.artifacts import read_tensors, write_tensors
from tinyhall.datasets import GaussianMixture
from tinyhall.nets import MLP
from tinyhall.sampling import ddim, sample
from tinyhall.schedule import Schedule
from tinyhall.training import Run, fit, start, train
from tinyhall.unet import UNet

SCHEDULE = Schedule.linear(1e-3, 0.2, 100)
DATA = GaussianMixture.line().sample(50, seeded(100))
END = 11  # steps; with 50 rows in batches of 16, epochs turn at steps 3, 6 and 9


def small(seed: int = 0) -> MLP:
    return MLP(1, width=16, generator=seeded(seed))


def options(**changed: Any) -> dict[str, Any]:
    return {"steps": END, "batch_size": 16, "lr": 1e-3, "generator": seeded(5), **changed}


def fitted(net: nn.Module | None = None, **changed: Any) -> Run:
    more = options(**changed)
    return fit(net or small(), more.pop("data", DATA), more.pop("schedule", SCHEDULE), progress=False, **more)


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
    losses = torch.stack(walk(MLP(1, width=32), data, batch_size=256, steps=150, lr=3e-3))
    assert float(losses[-20:].mean()) < 0.5 * float(losses[:5].mean())


def test_every_t_is_trained_equally() -> None:
    schedule = Schedule.linear(0.1, 0.9, 8)
    net = Recorder()
    walk(net, torch.randn(2000, 1, generator=seeded()), schedule, batch_size=2000, steps=4, microbatch=2000)
    share = torch.bincount(torch.cat(net.t), minlength=8) / 8000
    assert len(share) == 8
    assert bool(((share - 1 / 8).abs() < 0.02).all())


def test_an_epoch_deals_every_row_once_and_epochs_differ() -> None:
    net = Recorder()
    label = torch.arange(48)
    walk(net, torch.randn(48, 1, generator=seeded()), label=label, steps=9)
    epochs = [torch.cat(net.label[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, label)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_small_set_is_used_whole() -> None:
    net = Recorder()
    walk(net, torch.randn(10, 1, generator=seeded()), batch_size=10_000, label=torch.arange(10), steps=2)
    assert [sorted(part.tolist()) for part in net.label] == [list(range(10))] * 2


def test_rows_keep_their_labels() -> None:
    """At t = 0 the state is nearly the data: where the data is the label, so is x."""
    net = Recorder()
    data = torch.arange(48.0)[:, None] * 10
    walk(net, data, label=torch.arange(48), steps=12)
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
        steps=3,
        microbatch=1000,
    )
    labels = torch.cat(net.label)
    assert low <= float((labels == -1).float().mean()) <= high
    assert bool((labels >= -1).all())


def test_without_labels_the_network_is_called_without() -> None:
    class Two(Recorder):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return 0 * x + self.weight

    assert len(walk(Two(), DATA, steps=2)) == 2


# --- randomness


def test_equal_seeds_give_equal_bits_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (weights(fitted(generator=seeded(s))) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(a, b)
    assert not same_bits(a, c)


def test_training_and_sampling_repeat() -> None:
    x = [sample(fitted().net, SCHEDULE, 6, generator=seeded(1), sampler=ddim(steps=5)).x for _ in range(2)]
    assert torch.equal(*x)


def test_train_and_fit_agree() -> None:
    net = small()
    walk(net, DATA)
    assert same_bits(net.state_dict(), weights(fitted()))


def test_noise_is_fresh_in_every_step() -> None:
    net = Recorder()
    walk(net, torch.zeros(16, 1), steps=3)
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
    assert same_bits(weights(fitted(data=data, microbatch=5)), weights(fitted(microbatch=5)))
    assert data.grad is None


def test_microbatches_split_as_told() -> None:
    net = Recorder()
    walk(net, DATA, microbatch=6, steps=1)
    assert [len(x) for x in net.x] == [6, 6, 4]


def test_images_train() -> None:
    net = Recorder()
    walk(net, torch.rand(20, 1, 8, 8, generator=seeded()), steps=3)
    assert net.x[0].shape == (16, 1, 8, 8)


def test_ema_is_the_average_of_the_weights() -> None:
    net = small()
    average = {k: v.clone() for k, v in net.state_dict().items()}
    for step in train(net, DATA, SCHEDULE, **options(ema=0.5)):
        decay = min(0.5, (1 + step.step) / (10 + step.step))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in net.state_dict().items()}
        for k, v in step.run.weights().items():
            torch.testing.assert_close(v, average[k], rtol=1e-5, atol=1e-7)
    raw = {k: v.clone() for k, v in net.state_dict().items()}
    run = fitted(ema=0.5)
    assert same_bits(weights(run), run.weights())  # fit leaves the average in the network
    assert not same_bits(weights(run), raw)
    assert same_bits(weights(fitted()), raw)  # and averaging does not change what is averaged


def test_ema_keeps_numbers_that_are_no_weights() -> None:
    class Counting(MLP):
        def __init__(self) -> None:
            super().__init__(1, width=16, generator=seeded())
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            self.calls = self.calls + 1  # another tensor every time
            return super().forward(x, t, label)

    run = fitted(Counting(), ema=0.5)
    assert int(run.weights()["calls"]) == END
    same = {k: v for k, v in run.weights().items() if k != "calls"}
    assert same_bits(same, fitted(ema=0.5).weights())


def test_after_some_steps_one_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU makes of it is tested there; a processor can look at what it is handed, and what is done with the answer."""
    seen: list[int] = []

    def capture(run: Run, update: Any, rows: Tensor) -> Any:
        seen.append(run.step)
        return lambda rows: (seen.append(-1), update(rows))[1]

    monkeypatch.setattr(training, "_capture", capture)
    net, asked = small(), options()
    run = start(net, DATA, SCHEDULE, batch_size=16, lr=1e-3, ema=0.9, generator=asked["generator"])
    steps = training._steps(run, DATA, None, SCHEDULE, END, 16, 0.0, 0.9, False, 16, captured=True)
    assert [step.step for step in steps] == list(range(1, END + 1))
    assert seen == [training._WARM] + [-1] * (END - training._WARM)
    assert same_bits(run.weights(), weights(fitted(ema=0.9)))


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
    run = start(net, DATA, SCHEDULE, batch_size=16, lr=1e-3, generator=seeded())
    steps = training._steps(run, DATA, None, SCHEDULE, END, 16, 0.0, None, False, 16, captured=True)
    if raised is None:
        assert len(list(steps)) == END and len(replayed) == END - training._WARM
        return
    with pytest.raises(raised) as caught:
        list(steps)
    one_line(caught.value, *parts)
    assert run.step == training._WARM


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["points", "bfloat16", "labels"])
def test_a_captured_step_ends_in_the_bits_of_an_eager_one(kind: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images = kind == "labels"
    data = torch.rand(200, 1, 8, 8, generator=seeded()) * 2 - 1 if images else torch.randn(200, 1, generator=seeded())
    more = {"label": torch.arange(200) % 3, "label_dropout": 0.1, "ema": 0.9} if images else {}

    def trained(captured: bool, *ends: int) -> Run:
        path = tmp_path / f"{captured}{len(ends)}.safetensors"
        for end in ends:  # each resumes the one before
            net = UNet(size=8, widths=(8, 8), blocks=1, classes=3) if images else small()
            run = fit(
                net.to("cuda"), data, SCHEDULE, steps=end, batch_size=32, lr=1e-3, checkpoint=path, every=10, captured=captured,
                generator=torch.Generator("cuda").manual_seed(5), bf16=kind == "bfloat16", progress=False, **more,
            )  # fmt: skip
        return run

    eager = trained(False, 40)
    for again in (trained(True, 40), trained(True, 20, 40)):
        assert again.losses == eager.losses
        assert same_bits(again.raw or again.net.state_dict(), eager.raw or eager.net.state_dict())
        assert same_bits(again.weights(), eager.weights())
        assert torch.equal(again.generator.get_state(), eager.generator.get_state())


def test_bf16_trains_in_float32_weights_and_is_close() -> None:
    full, half = fitted(bf16=False), fitted(bf16=True)
    assert all(v.dtype == torch.float32 for v in half.net.state_dict().values())
    assert not same_bits(weights(full), weights(half))
    assert half.losses[-1] == pytest.approx(full.losses[-1], rel=0.02)


def test_fit_leaves_the_network_ready_to_sample() -> None:
    assert not fitted().net.training


def test_losses_are_means_over_every() -> None:
    run = fitted(every=4)
    losses = [float(x) for x in walk(small(), DATA)]
    expected = [sum(losses[0:4]) / 4, sum(losses[4:8]) / 4, sum(losses[8:11]) / 3]
    assert run.losses == pytest.approx(expected, rel=1e-5)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fit(small(), DATA, SCHEDULE, **options())
    assert "training" in capsys.readouterr().err


# --- resume


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 10])
def test_resume_equals_uninterrupted(tmp_path: Path, stop: int, ema: float | None) -> None:
    path = tmp_path / "run.safetensors"
    whole = fitted(ema=ema)
    fitted(ema=ema, steps=stop, checkpoint=path)
    # The second process knows neither the weights nor where the generator stood.
    again = fitted(small(), ema=ema, checkpoint=path)
    assert again.step == END
    assert same_bits(weights(again), weights(whole))
    assert torch.equal(again.generator.get_state(), whole.generator.get_state())
    a, b = whole.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


@pytest.mark.parametrize("began", [True, False])
def test_a_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool) -> None:
    """On a machine that would have chosen the other one, too: else it would end in other bits."""
    path = tmp_path / "run"
    fitted(steps=4, bf16=began, checkpoint=path)
    monkeypatch.setenv("TINYHALL_PRECISION", "float32" if began else "bfloat16")
    resumed = fitted(bf16=None, checkpoint=path)
    assert resumed.bf16 is began
    assert same_bits(weights(resumed), weights(fitted(bf16=began)))


def test_resume_in_many_pieces(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for stop in range(1, END + 1):
        run = fitted(steps=stop, checkpoint=path, every=1)
    whole = fitted(every=1)
    assert same_bits(weights(run), weights(whole))
    assert run.losses == whole.losses


def same_file(one: Path, other: Path) -> bool:
    """But for the order of what their headers say."""
    (a, note), (b, noted) = read_tensors(one), read_tensors(other)
    return same_bits(a, b) and note == noted


def test_a_run_that_fit_averaged_goes_on_from_what_it_averaged(tmp_path: Path) -> None:
    path, net = tmp_path / "run", small()
    whole, run = fitted(ema=0.9), fitted(net, ema=0.9, steps=6, checkpoint=path)
    run.save(tmp_path / "again")
    assert same_file(tmp_path / "again", path)
    average = weights(run)
    assert list(train(net, DATA, SCHEDULE, run=run, **options(ema=0.9, steps=6))) == []
    assert same_bits(weights(run), average)  # nothing is left to train: the average stays
    assert [step.step for step in train(net, DATA, SCHEDULE, run=run, **options(ema=0.9))] == list(range(7, END + 1))
    assert whole.raw is not None and same_bits(weights(run), whole.raw)
    assert same_bits(run.weights(), whole.weights())
    run.load(path)
    run.save(tmp_path / "again")
    assert same_file(tmp_path / "again", path)


def test_a_checkpoint_beyond_the_steps_is_returned_as_it_is(tmp_path: Path) -> None:
    whole = fitted(checkpoint=tmp_path / "run")
    run = fitted(checkpoint=tmp_path / "run", steps=3)
    assert run.step == END
    assert same_bits(weights(run), weights(whole))


def test_checkpoints_do_not_change_the_run(tmp_path: Path) -> None:
    assert same_bits(weights(fitted(checkpoint=tmp_path / "a", every=2)), weights(fitted()))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for ema in (None, 0.9):
        path.unlink(missing_ok=True)
        whole = weights(fitted(ema=ema, checkpoint=path))
        content = path.read_bytes()
        assert same_bits(weights(fitted(ema=ema, checkpoint=path)), whole)
        assert path.read_bytes() == content


def test_checkpoint_is_written_every_so_many_steps_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(Run, "save", lambda self, path: written.append(self.step))
    fitted(checkpoint=tmp_path / "run", every=4)
    assert written == [4, 8, END]


def stopping_at(call: int, act: Any) -> MLP:
    """A network that acts in its `call`-th forward pass, in the middle of step `call`."""
    net, count = small(), iter(range(1, 10_000))
    net.register_forward_pre_hook(lambda module, args: act() if next(count) == call else None)
    return net


@pytest.mark.parametrize("call", [1, 4, 7, END])
def test_sigint_leaves_a_usable_checkpoint(tmp_path: Path, call: int) -> None:
    path = tmp_path / "run.safetensors"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fitted(stopping_at(call, lambda: os.kill(os.getpid(), signal.SIGINT)), checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is before
    one_line(caught.value, f"step {call}", str(path))
    assert os.listdir(tmp_path) == [path.name]
    assert read_tensors(path)[1]["step"] == str(call)  # the step was finished, not cut
    resumed = fitted(checkpoint=path)
    assert same_bits(weights(resumed), weights(fitted()))
    assert call < END or resumed.losses == fitted().losses  # in the last step, too, nothing is lost
    assert os.listdir(tmp_path) == [path.name]


def test_a_second_sigint_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fitted(stopping_at(2, twice), checkpoint=tmp_path / "run")
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from pathlib import Path
from common import seeded
from tinyhall.datasets import GaussianMixture
from tinyhall.nets import MLP
from tinyhall.schedule import Schedule
from tinyhall.training import fit

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(folder, at, how):
    net = MLP(1, width=16, generator=seeded(0))
    calls, writes = iter(range(1, 1000)), iter(range(1, 1000))
    real = Path.write_bytes
    def half_written(path, content):
        if how == "write" and next(writes) == at:
            real(path, content[:1000])
            die()
        return real(path, content)
    Path.write_bytes = half_written
    net.register_forward_pre_hook(lambda *_: die() if how == "step" and next(calls) == at else None)
    fit(net, GaussianMixture.line().sample(50, seeded(100)), Schedule.linear(1e-3, 0.2, 100), steps=11, batch_size=16, lr=1e-3,
        generator=seeded(5), progress=False, checkpoint=f"{folder}/run", every=1)

for how in ("step", "write"):
    for at in (2, 5, 10):
        folder = f"{sys.argv[1]}/{how}-{at}"
        os.makedirs(folder)
        pid = os.fork()
        if pid == 0:
            child(folder, at, how)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_sigkill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    done = run_python("-c", KILLED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    whole = fitted(every=1)
    for folder in sorted(tmp_path.iterdir()):
        at = int(folder.name.split("-")[1])
        assert read_tensors(folder / "run")[1]["step"] == str(at - 1)
        resumed = fitted(checkpoint=folder / "run", every=1)
        assert same_bits(weights(resumed), weights(whole)), folder.name
        assert resumed.losses == whole.losses


# --- a loss that is not finite


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, every: int) -> None:
    path = tmp_path / "run.safetensors"
    net = small()
    calls = iter(range(1, 100))

    def poison(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * math.nan if next(calls) == 8 else out

    net.register_forward_hook(poison)
    with pytest.raises(TinyhallError) as caught:
        fitted(net, checkpoint=path, every=every)
    one_line(caught.value, "loss", "finite", "nan", "step", "checkpoint", "lr")
    tensors, note = read_tensors(path)
    assert note["step"] == str(7 if every == 1 else 6)
    assert all(bool(torch.isfinite(v).all()) for k, v in tensors.items() if k.startswith(("net.", "adam.")))
    assert os.listdir(tmp_path) == [path.name]
    assert same_bits(weights(fitted(checkpoint=path, every=every)), weights(fitted(every=every)))


def test_weights_that_an_update_broke_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    net = small()
    calls = iter(range(1, 100))

    def poison(gradient: Tensor) -> Tensor:
        return gradient * math.nan if next(calls) == 4 else gradient

    next(net.parameters()).register_hook(poison)
    with pytest.raises(TinyhallError) as caught:
        fitted(net, checkpoint=path, every=1)
    one_line(caught.value, "loss", "finite", "weights", "step 4", "checkpoint")
    assert read_tensors(path)[1]["step"] == "3"


def test_an_absurd_rate_is_reported() -> None:
    with pytest.raises(TinyhallError) as caught:
        fitted(lr=1e30, steps=50)
    one_line(caught.value, "loss", "finite")


# --- refusals


@pytest.mark.parametrize(
    ("changed", "key", "came"),
    [
        ({"lr": 2e-3}, "lr", "0.001"),
        ({"batch_size": 8}, "batch_size", "16"),
        ({"ema": 0.9}, "ema", "None"),
        ({"note": "another card"}, "note", "''"),
        ({"data": DATA + 1}, "data", "sha256:"),
        ({"data": DATA[:40]}, "data", "(50, 1)"),
        ({"schedule": Schedule.linear(1e-3, 0.3, 100)}, "schedule", "linear(0.001, 0.2, 100)"),
        ({"net": MLP(1, width=18)}, "net", "parameters"),
        ({"schedule": Schedule(Schedule.linear(1e-3, 0.3, 100).betas, SCHEDULE.name)}, "schedule betas", "(100,) sha256:"),
        ({"net": MLP(1, width=16, blocks=6)}, "net layout", "sha256:"),  # one block shared: as many parameters
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], key: str, came: str) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=2, checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(TinyhallError) as caught:
        fitted(**changed, checkpoint=path)
    one_line(caught.value, "checkpoint", f"{key}=", came, str(path))
    assert path.read_bytes() == content


def test_networks_of_one_name_and_size_are_told_apart() -> None:
    image = {"size": 8, "widths": (8,), "blocks": 1}
    nets = [UNet(**image), UNet(**image, schedule=SCHEDULE), MLP(2), MLP(2, blocks=6), MLP(2, shared=False)]
    assert len({training._layout(net) for net in nets}) == len(nets)
    assert training._layout(MLP(2, generator=seeded(1))) == training._layout(MLP(2))


def test_a_checkpoint_from_before_they_were_told_apart_loads(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=4, checkpoint=path)
    tensors, note = read_tensors(path)
    settings = json.loads(note["settings"])
    for key in training._LATER:
        del settings[key]
    write_tensors(path, tensors, note | {"settings": json.dumps(settings)})
    assert same_bits(weights(fitted(checkpoint=path)), weights(fitted()))


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"lr": 2e-3}, ("lr", "0.001, with which the run began", "0.002")),
        ({"batch_size": 8}, ("batch_size", "16", "8")),
        ({"ema": 0.9}, ("ema", "None", "0.9")),
        ({"data": DATA + 1}, ("data", "sha256:")),
        ({"schedule": Schedule.linear(1e-3, 0.3, 100)}, ("schedule", "linear(0.001, 0.2, 100)")),
        ({"net": small()}, ("net", "the run's own network")),
        ({"label": torch.zeros(50).long()}, ("label", "None")),
    ],
)
def test_a_run_is_continued_as_it_began(changed: dict[str, Any], parts: tuple[str, ...]) -> None:
    net = small()
    run = start(net, DATA, SCHEDULE, batch_size=16, lr=1e-3, generator=seeded(5), note="mine")
    given = options(steps=2) | {"net": net, "data": DATA, "schedule": SCHEDULE} | changed
    with pytest.raises(TinyhallError) as caught:
        train(given.pop("net"), given.pop("data"), given.pop("schedule"), run=run, **given)
    one_line(caught.value, *parts)
    assert [step.step for step in train(net, DATA, SCHEDULE, run=run, **options(steps=2))] == [1, 2]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=2, checkpoint=path)
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(TinyhallError) as caught:
            fitted(checkpoint=path)
        one_line(caught.value, "artifact", "safetensors", str(path))
    path.write_bytes(b"PK not a checkpoint")
    with pytest.raises(TinyhallError):
        fitted(checkpoint=path)


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, small().state_dict())
    with pytest.raises(TinyhallError) as caught:
        fitted(checkpoint=path)
    one_line(caught.value, "checkpoint", "a training checkpoint", str(path))


@pytest.mark.parametrize("missing", ["generator", "losses", "net.project_in.weight", "adam.0.exp_avg"])
def test_a_checkpoint_without_some_tensor_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=2, checkpoint=path)
    tensors, note = read_tensors(path)
    del tensors[missing]
    write_tensors(path, tensors, note)
    with pytest.raises(TinyhallError) as caught:
        fitted(checkpoint=path)
    one_line(caught.value, "checkpoint", "the tensors of this network", str(path))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("net.time.weight", lambda x: x.double()),
        ("net.time.bias", lambda x: x.fill_(math.inf)),
        ("adam.1.exp_avg_sq", lambda x: x[:1]),
        ("adam.2.exp_avg", lambda x: x.fill_(math.nan)),
        ("adam.-1.step", lambda x: torch.tensor(3.0)),
        ("losses", lambda x: x.float()),
        ("losses", lambda x: x[:, None]),
        ("generator", lambda x: x.long()),
    ],
)
def test_a_checkpoint_with_a_tensor_that_does_not_fit_changes_nothing(tmp_path: Path, name: str, change: Any) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=2, checkpoint=path)
    tensors, note = read_tensors(path)
    write_tensors(path, tensors | {name: change(tensors.get(name, torch.zeros(1)))}, note)
    net = small()
    with pytest.raises(TinyhallError) as caught:
        fitted(net, checkpoint=path)
    one_line(caught.value, "checkpoint", "the tensors of this network", str(path))
    assert same_bits(net.state_dict(), small().state_dict())


def test_a_checkpoint_of_another_kind_of_device_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(steps=2, checkpoint=path)
    tensors, note = read_tensors(path)
    write_tensors(path, tensors | {"generator": torch.zeros(16, dtype=torch.uint8)}, note)  # as many as of a GPU's
    with pytest.raises(TinyhallError) as caught:
        fitted(checkpoint=path)
    one_line(caught.value, "checkpoint", "the same kind of device, cpu", str(path))


class Wide(Recorder):
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t).expand(-1, 2)


def bad(**changed: Any) -> Any:
    return fitted(**changed)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: bad(data=torch.zeros(5)), ("data", "[n, *shape]", "(5,)")),
        (lambda: bad(data=torch.zeros(0, 1)), ("data", "n >= 1", "(0, 1)")),
        (lambda: bad(data=DATA.double()), ("data", "float32", "float64")),
        (lambda: bad(data=DATA.long()), ("data", "float32", "int64")),
        (lambda: bad(data=DATA.numpy()), ("data", "float32 tensor", "ndarray")),
        (lambda: bad(data=torch.full((5, 1), math.inf)), ("data", "finite", "5")),
        (lambda: bad(steps=0), ("steps", "at least 1", "0")),
        (lambda: bad(steps=1.5), ("steps", "whole number", "1.5")),
        (lambda: bad(batch_size=0), ("batch_size", "at least 1", "0")),
        (lambda: bad(every=0), ("every", "at least 1", "0")),
        (lambda: bad(microbatch=0), ("microbatch", "at least 1", "0")),
        (lambda: bad(lr=0), ("lr", "above 0", "0")),
        (lambda: bad(lr=math.nan), ("lr", "finite", "nan")),
        (lambda: bad(ema=1.0), ("ema", "(0, 1)", "1.0")),
        (lambda: bad(label=torch.zeros(49).long()), ("label", "[50]", "(49,)")),
        (lambda: bad(label=torch.zeros(50)), ("label", "int64", "float32")),
        (lambda: walk(small(), DATA, batch_size=-1), ("batch_size", "at least 1", "-1")),
        (lambda: walk(small(), DATA.half()), ("data", "float32", "float16")),
        (lambda: bad(net=Wide()), ("net", "eps of x's shape (16, 1)", "(16, 2)")),
        (lambda: bad(net=torch.zeros_like), ("net", "an nn.Module with parameters", "zeros_like")),
        (lambda: walk(nn.Identity(), DATA), ("net", "an nn.Module with parameters", "Identity")),
        (lambda: bad(generator=0), ("generator", "torch.Generator().manual_seed(0)", "0 (int)")),
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
        train(small(), DATA, SCHEDULE, **options(steps=0))


def test_start_describes_the_run() -> None:
    run = start(small(), DATA, SCHEDULE, batch_size=16, lr=1e-3, generator=seeded())
    assert run.step == 0
    assert run.losses == []
    assert (
        run.settings["data"] != start(small(), DATA + 1, SCHEDULE, batch_size=16, lr=1e-3, generator=seeded()).settings["data"]
    )


@pytest.mark.slow
def test_compiled_training_equals_eager() -> None:
    """In a process without the type checks, which a compiler need not understand."""
    code = """
import shutil, sys, torch
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit(77)
from tinyhall.datasets import GaussianMixture
from tinyhall.nets import MLP
from tinyhall.schedule import Schedule
from tinyhall.training import fit
g = lambda s: torch.Generator().manual_seed(s)
data = GaussianMixture.line().sample(600, g(1))
def run(compile):
    return fit(MLP(1), data, Schedule.linear(), steps=3, batch_size=300, lr=1e-3, generator=g(2), bf16=False,
               compile=compile, progress=False)
plain, fast, again = run(False), run(True), run(True)
assert abs(plain.losses[-1] - fast.losses[-1]) < 1e-3 * plain.losses[-1]
a, b = fast.net.state_dict(), again.net.state_dict()
assert all(torch.equal(a[k], b[k]) for k in a), "compiled runs must repeat"
"""
    done = run_python("-c", code)
    if done.returncode == 77:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr


def test_module_keeps_its_public_names() -> None:
    for name in ("train", "fit", "start", "Run", "TrainStep"):
        assert hasattr(training, name)


def test_a_checkpoint_knows_its_labels(tmp_path: Path) -> None:
    data, label = torch.randn(20, 1, generator=seeded()), torch.arange(20) % 3
    path = tmp_path / "c.safetensors"

    def go(steps: int, **changes: object) -> None:
        arguments = {"label": label, "label_dropout": 0.1} | changes
        fitted(Recorder(), data=data, steps=steps, batch_size=5, checkpoint=path, **arguments)

    go(2)
    go(3)
    for changes, name in (
        ({"label": label.flip(0)}, "label"),
        ({"label_dropout": 0.2}, "label_dropout"),
        ({"label": None}, "label"),
    ):
        with pytest.raises(TinyhallError) as caught:
            go(4, **changes)
        one_line(caught.value, "checkpoint", name)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half"])
def test_label_dropout_is_a_share(share: object, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        walk(Recorder(), torch.randn(8, 1, generator=seeded()), label=torch.arange(8), label_dropout=share)
    one_line(caught.value, "label_dropout", "[0, 1]")


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    holder = """
import sys, pathlib
from tinyhall.artifacts import alone
with alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(TinyhallError) as caught:
            fitted(checkpoint=tmp_path / "c.safetensors")
        one_line(caught.value, "checkpoint", str(tmp_path), "another process")
        assert not list(tmp_path.iterdir())
        process.kill()
    fitted(checkpoint=tmp_path / "c.safetensors")  # who is dead holds nothing
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
