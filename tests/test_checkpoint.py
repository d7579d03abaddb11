"""`fit`: resume to the bit, kills and interrupts, losses that are not finite, and checkpoints of another run."""

from __future__ import annotations

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
from common import ROOT, environment, one_line, run_python, same_bits, seeded
from torch import Tensor, nn

from tinyhall.core._check import TinyhallError
from tinyhall.core.mlp import MLP
from tinyhall.core.sampling import ddim, sample
from tinyhall.core.schedule import Schedule
from tinyhall.core.training import Run, TrainingConfig, start, train
from tinyhall.core.unet import UNet
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.store import checkpoint
from tinyhall.store.checkpoint import fingerprint, fit, load, save, settings
from tinyhall.store.files import read_tensors, write_tensors

SCHEDULE = Schedule.linear(1e-3, 0.2, 100)
DATA = GaussianMixture.line().sample(50, seeded(100))
END = 11  # steps; with 50 rows in batches of 16, epochs turn at steps 3, 6 and 9


def small(seed: int = 0) -> MLP:
    return MLP(1, width=16, generator=seeded(seed))


def options(**changed: Any) -> dict[str, Any]:
    return {"train_steps": END, "batch_size": 16, "lr": 1e-3, "generator": seeded(5), **changed}


def fitted(net: nn.Module | None = None, **changed: Any) -> Run:
    more = options(**changed)
    return fit(net or small(), more.pop("data", DATA), more.pop("schedule", SCHEDULE), progress=False, **more)


def weights(run: Run) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in run.net.state_dict().items()}


def walk(net: nn.Module, data: Tensor, schedule: Schedule = SCHEDULE, **changed: Any) -> list[Tensor]:
    return [step.loss for step in train(net, data, schedule, **options(**changed))]


# --- what fit does beside training


def test_equal_seeds_give_equal_bits_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (weights(fitted(generator=seeded(s))) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(a, b)
    assert not same_bits(a, c)


def test_training_and_sampling_repeat() -> None:
    x = [sample(fitted().net, SCHEDULE, 6, generator=seeded(1), sampler=ddim(sample_steps=5)).x for _ in range(2)]
    assert torch.equal(*x)


def test_train_and_fit_agree() -> None:
    net = small()
    walk(net, DATA)
    assert same_bits(net.state_dict(), weights(fitted()))


def test_fit_leaves_the_average_in_the_network() -> None:
    net = small()
    walk(net, DATA, ema=0.5)
    run = fitted(ema=0.5)
    assert same_bits(weights(run), run.weights())
    assert not same_bits(weights(run), net.state_dict())
    assert run.raw is not None and same_bits(run.raw, net.state_dict())
    assert same_bits(weights(fitted()), net.state_dict())  # and averaging does not change what is averaged


def test_data_that_asks_for_a_gradient_trains_as_any() -> None:
    data = DATA.clone().requires_grad_()
    assert same_bits(weights(fitted(data=data, microbatch=5)), weights(fitted(microbatch=5)))
    assert data.grad is None


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
                net.to("cuda"), data, SCHEDULE, train_steps=end, batch_size=32, lr=1e-3, checkpoint=path, every=10,
                generator=torch.Generator("cuda").manual_seed(5), captured=captured, bf16=kind == "bfloat16", progress=False,
                **more,
            )  # fmt: skip
        return run

    eager = trained(False, 40)
    for again in (trained(True, 40), trained(True, 20, 40)):
        assert again.losses == eager.losses
        assert same_bits(again.raw or again.net.state_dict(), eager.raw or eager.net.state_dict())
        assert same_bits(again.weights(), eager.weights())
        assert torch.equal(again.generator.get_state(), eager.generator.get_state())


def test_the_old_keyword_says_what_it_is_called_now() -> None:
    more = options()
    more["steps"] = more.pop("train_steps")
    with pytest.warns(FutureWarning, match="tinyhall: steps of fit is now train_steps"):
        run = fit(small(), DATA, SCHEDULE, progress=False, **more)
    assert same_bits(weights(run), weights(fitted()))


# --- resume


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 10])
def test_resume_equals_uninterrupted(tmp_path: Path, stop: int, ema: float | None) -> None:
    path = tmp_path / "run.safetensors"
    whole = fitted(ema=ema)
    fitted(ema=ema, train_steps=stop, checkpoint=path)
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
    fitted(train_steps=4, bf16=began, checkpoint=path)
    monkeypatch.setenv("TINYHALL_PRECISION", "float32" if began else "bfloat16")
    resumed = fitted(bf16=None, checkpoint=path)
    assert resumed.config.bf16 is began
    assert same_bits(weights(resumed), weights(fitted(bf16=began)))


def test_resume_in_many_pieces(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for stop in range(1, END + 1):
        run = fitted(train_steps=stop, checkpoint=path, every=1)
    whole = fitted(every=1)
    assert same_bits(weights(run), weights(whole))
    assert run.losses == whole.losses


def same_file(one: Path, other: Path) -> bool:
    """But for the order of what their headers say."""
    (a, note), (b, noted) = read_tensors(one), read_tensors(other)
    return same_bits(a, b) and note == noted


def test_a_run_that_fit_averaged_goes_on_from_what_it_averaged(tmp_path: Path) -> None:
    path, net = tmp_path / "run", small()
    whole, run = fitted(ema=0.9), fitted(net, ema=0.9, train_steps=6, checkpoint=path)
    save(run, tmp_path / "again", settings(run))
    assert same_file(tmp_path / "again", path)
    average = weights(run)
    assert list(run.steps(6)) == []
    assert same_bits(weights(run), average)  # nothing is left to train: the average stays
    assert [step.step for step in run.steps(END)] == list(range(7, END + 1))
    assert whole.raw is not None and same_bits(weights(run), whole.raw)
    assert same_bits(run.weights(), whole.weights())
    load(run, path, settings(run))
    assert run.step == 6
    save(run, tmp_path / "again", settings(run))
    assert same_file(tmp_path / "again", path)


def test_saved_and_loaded_by_hand_a_run_goes_on(tmp_path: Path) -> None:
    def begun() -> Run:
        return start(small(), DATA, SCHEDULE, TrainingConfig(batch_size=16, lr=1e-3, ema=0.9), generator=seeded(5))

    run, other = begun(), begun()
    list(run.steps(4))
    save(run, tmp_path / "run", settings(run, "mine"))
    other.generator.manual_seed(77)  # it is taken from the file
    load(other, tmp_path / "run", settings(other, "mine"))
    assert other.step == 4
    for each in (run, other):
        list(each.steps(END))
    assert same_bits(weights(other), weights(run)) and same_bits(other.weights(), run.weights())
    with pytest.raises(TinyhallError) as caught:
        load(other, tmp_path / "run", settings(other))
    one_line(caught.value, "checkpoint", "note=''", "'mine'")


def test_a_checkpoint_beyond_the_steps_is_returned_as_it_is(tmp_path: Path) -> None:
    whole = fitted(checkpoint=tmp_path / "run")
    run = fitted(checkpoint=tmp_path / "run", train_steps=3)
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
    monkeypatch.setattr(checkpoint, "save", lambda run, path, agreed: written.append(run.step))
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
from tinyhall.core import MLP, Schedule
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.store.checkpoint import fit

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
    fit(net, GaussianMixture.line().sample(50, seeded(100)), Schedule.linear(1e-3, 0.2, 100), train_steps=11, batch_size=16,
        lr=1e-3, generator=seeded(5), progress=False, checkpoint=f"{folder}/run", every=1)

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
        fitted(lr=1e30, train_steps=50)
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
    fitted(train_steps=2, checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(TinyhallError) as caught:
        fitted(**changed, checkpoint=path)
    one_line(caught.value, "checkpoint", f"{key}=", came, str(path))
    assert path.read_bytes() == content


def test_networks_of_one_name_and_size_are_told_apart() -> None:
    image = {"size": 8, "widths": (8,), "blocks": 1}
    nets = [UNet(**image), UNet(**image, schedule=SCHEDULE), MLP(2), MLP(2, blocks=6), MLP(2, shared=False)]
    assert len({checkpoint._layout(net) for net in nets}) == len(nets)
    assert checkpoint._layout(MLP(2, generator=seeded(1))) == checkpoint._layout(MLP(2))


def test_a_checkpoint_from_before_they_were_told_apart_loads(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(train_steps=4, checkpoint=path)
    tensors, note = read_tensors(path)
    known = json.loads(note["settings"])
    for key in checkpoint._LATER:
        del known[key]
    write_tensors(path, tensors, note | {"settings": json.dumps(known)})
    assert same_bits(weights(fitted(checkpoint=path)), weights(fitted()))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(train_steps=2, checkpoint=path)
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
    fitted(train_steps=2, checkpoint=path)
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
    fitted(train_steps=2, checkpoint=path)
    tensors, note = read_tensors(path)
    write_tensors(path, tensors | {name: change(tensors.get(name, torch.zeros(1)))}, note)
    net = small()
    with pytest.raises(TinyhallError) as caught:
        fitted(net, checkpoint=path)
    one_line(caught.value, "checkpoint", "the tensors of this network", str(path))
    assert same_bits(net.state_dict(), small().state_dict())


def test_a_checkpoint_of_another_kind_of_device_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fitted(train_steps=2, checkpoint=path)
    tensors, note = read_tensors(path)
    write_tensors(path, tensors | {"generator": torch.zeros(16, dtype=torch.uint8)}, note)  # as many as of a GPU's
    with pytest.raises(TinyhallError) as caught:
        fitted(checkpoint=path)
    one_line(caught.value, "checkpoint", "the same kind of device, cpu", str(path))


class Told(MLP):
    """Takes labels, and does nothing with them."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t)


class Wide(MLP):
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t).expand(-1, 2)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: fitted(data=torch.zeros(5)), ("data", "[n, *shape]", "(5,)")),
        (lambda: fitted(data=torch.zeros(0, 1)), ("data", "n >= 1", "(0, 1)")),
        (lambda: fitted(data=DATA.double()), ("data", "float32", "float64")),
        (lambda: fitted(data=DATA.long()), ("data", "float32", "int64")),
        (lambda: fitted(data=DATA.numpy()), ("data", "float32 tensor", "ndarray")),
        (lambda: fitted(data=torch.full((5, 1), math.inf)), ("data", "finite", "5")),
        (lambda: fitted(train_steps=0), ("train_steps", "at least 1", "0")),
        (lambda: fitted(train_steps=1.5), ("train_steps", "whole number", "1.5")),
        (lambda: fitted(batch_size=0), ("batch_size", "at least 1", "0")),
        (lambda: fitted(every=0), ("every", "at least 1", "0")),
        (lambda: fitted(microbatch=0), ("microbatch", "at least 1", "0")),
        (lambda: fitted(lr=0), ("lr", "above 0", "0")),
        (lambda: fitted(lr=math.nan), ("lr", "finite", "nan")),
        (lambda: fitted(ema=1.0), ("ema", "(0, 1)", "1.0")),
        (lambda: fitted(label=torch.zeros(49).long()), ("label", "[50]", "(49,)")),
        (lambda: fitted(label=torch.zeros(50)), ("label", "int64", "float32")),
        (lambda: fitted(net=Wide(1)), ("net", "eps of x's shape (16, 1)", "(16, 2)")),
        (lambda: fitted(net=torch.zeros_like), ("net", "an nn.Module with parameters", "zeros_like")),
        (lambda: fitted(generator=0), ("generator", "torch.Generator().manual_seed(0)", "0 (int)")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


def test_settings_describe_the_run() -> None:
    def described(data: Tensor = DATA, note: str = "", **more: Any) -> dict[str, Any]:
        label = more.pop("label", None)
        config = TrainingConfig(**{"batch_size": 16, "lr": 1e-3} | more)
        return settings(start(small(), data, SCHEDULE, config, generator=seeded(), label=label), note)

    usual = described()
    assert (usual["batch_size"], usual["lr"], usual["ema"], usual["note"]) == (16, 1e-3, None, "")
    assert usual["data"] == fingerprint(DATA) != fingerprint(DATA + 1)
    label = torch.arange(50) % 3
    changes: dict[str, dict[str, Any]] = {
        "data": {"data": DATA + 1}, "lr": {"lr": 2e-3}, "ema": {"ema": 0.9}, "batch_size": {"batch_size": 8},
        "note": {"note": "mine"}, "label": {"label": label, "label_dropout": 0.1},
    }  # fmt: skip
    for key, changed in changes.items():
        told = described(**changed)
        assert {k for k in told.keys() | usual.keys() if told.get(k) != usual.get(k)} - {"label_dropout"} == {key}
    # How the products are taken decides nothing that a checkpoint must agree on.
    assert described(bf16=True, microbatch=3, captured=True) == usual


def test_a_fingerprint_is_of_shape_and_bytes() -> None:
    assert fingerprint(DATA) == fingerprint(DATA.clone())
    assert fingerprint(DATA).startswith("(50, 1) sha256:")
    assert len({fingerprint(DATA), fingerprint(DATA.flip(0)), fingerprint(DATA[:, 0]), fingerprint(DATA[:49])}) == 4


@pytest.mark.slow
def test_compiled_training_equals_eager() -> None:
    """In a process without the type checks, which a compiler need not understand."""
    code = """
import shutil, sys, torch
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit(77)
from tinyhall.core import MLP, Schedule
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.store.checkpoint import fit
g = lambda s: torch.Generator().manual_seed(s)
data = GaussianMixture.line().sample(600, g(1))
def run(compile):
    return fit(MLP(1), data, Schedule.linear(), train_steps=3, batch_size=300, lr=1e-3, generator=g(2), bf16=False,
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
    for name in ("fit", "save", "load", "settings", "fingerprint", "gains_bf16"):
        assert hasattr(checkpoint, name)


def test_a_checkpoint_knows_its_labels(tmp_path: Path) -> None:
    data, label = torch.randn(20, 1, generator=seeded()), torch.arange(20) % 3
    path = tmp_path / "c.safetensors"

    def go(steps: int, **changes: object) -> None:
        arguments = {"label": label, "label_dropout": 0.1} | changes
        fitted(Told(1, width=16), data=data, train_steps=steps, batch_size=5, checkpoint=path, **arguments)

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


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    holder = """
import sys, pathlib
from tinyhall.store.files import alone
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
