"""Devices, and the work shared by two processes through accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, run_python, seeded

from tinyhall.core import device
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import TrajectoryVariance
from tinyhall.core.mlp import MLP
from tinyhall.core.sampling import ddpm, reverse, sample
from tinyhall.core.schedule import Schedule
from tinyhall.core.unet import UNet
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.data.mnist import MNIST, DigitOracle
from tinyhall.lab.mitigations import log_classes
from tinyhall.measure import stats
from tinyhall.measure.denoising import PostHocVariance
from tinyhall.store.checkpoint import fit, gains_bf16
from tinyhall.store.files import once, read_tensors

SHARED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from common import seeded
from tinyhall.core import MLP, Schedule, TrajectoryVariance, ddpm, device, sample
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.measure.denoising import PostHocVariance
from tinyhall.store.checkpoint import fit
from tinyhall.store.files import write_tensors

folder = sys.argv[1]
schedule, mixture = Schedule.linear(1e-3, 0.2, 100), GaussianMixture.line()
device.pick()
net = MLP(1, width=16, generator=seeded(0))
# 17 rows do not split evenly, and a microbatch of 5 does not divide a share.
run = fit(net, mixture.sample(53, seeded(100)), schedule, train_steps=8, batch_size=17, lr=1e-3, generator=seeded(5),
          progress=False, microbatch=5, checkpoint=f"{folder}/run", every=3)
x = sample(mixture.denoiser(schedule), schedule, 41, shape=(1,), sampler=ddpm(), generator=seeded(7), batch_size=6,
           metrics=[TrajectoryVariance(), PostHocVariance((20, 60))])
one = sample(mixture.denoiser(schedule), schedule, 3, shape=(1,), sampler=ddpm(), generator=seeded(8), batch_size=100)
score = x.scores["variance[0,10)"]
post_hoc = x.scores["post-hoc variance[20,60) at 10"]
write_tensors(f"{folder}/rank{device.rank()}", {**net.state_dict(), "x": x.x, "score": score, "post": post_hoc, "one": one.x})
with open(f"{folder}/losses{device.rank()}.json", "w") as file:
    json.dump([device.processes(), *run.losses], file)

net, calls = MLP(1, width=16, generator=seeded(0)), iter(range(1, 1000))
if device.rank() == 1:
    net.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT) if next(calls) == 4 else None)
try:
    fit(net, mixture.sample(53, seeded(100)), schedule, train_steps=900, batch_size=17, lr=1e-3, generator=seeded(5),
        progress=False, checkpoint=f"{folder}/stopped")
except KeyboardInterrupt as error:
    with open(f"{folder}/stopped{device.rank()}.json", "w") as file:
        json.dump([str(error), os.path.exists(f"{folder}/stopped")], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def by_two(script: str, folder: Path) -> None:
    """Runs it in two processes, as `accelerate launch` does on GPUs; on processors that would start one, or want MPI."""
    (folder / "script.py").write_text(script)
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(folder / "script.py"), str(folder),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they trained and drew."""
    folder = tmp_path_factory.mktemp("shared")
    by_two(SHARED, folder)
    return folder


SCHEDULE, MIXTURE = Schedule.linear(1e-3, 0.2, 100), GaussianMixture.line()


def test_two_processes_train_the_weights_of_one(folder: Path) -> None:
    net = MLP(1, width=16, generator=seeded(0))
    run = fit(
        net,
        MIXTURE.sample(53, seeded(100)),
        SCHEDULE,
        train_steps=8,
        batch_size=17,
        lr=1e-3,
        generator=seeded(5),
        progress=False,
        every=3,
    )
    for rank in (0, 1):
        processes, *losses = json.loads((folder / f"losses{rank}.json").read_text())
        assert processes == 2
        assert losses == pytest.approx(run.losses, rel=1e-4)
    both = [read_tensors(folder / f"rank{rank}")[0] for rank in (0, 1)]
    for name, value in net.state_dict().items():
        assert torch.equal(both[0][name], both[1][name])  # the processes never drift apart
        # Adam turns a gradient of rounding size into a step of lr, so a few weights may differ by some steps.
        assert float((both[0][name] - value).abs().max()) < 8e-3
        assert float((both[0][name] - value).abs().mean()) < 1e-4
    tensors, note = read_tensors(folder / "run")
    assert note["step"] == "8"
    assert torch.equal(tensors["net.time.weight"], both[0]["time.weight"])


def test_two_processes_stop_together_and_saved(folder: Path) -> None:
    """Only the second was sent SIGINT; the first is the one that writes."""
    for rank in (0, 1):
        stopped = json.loads((folder / f"stopped{rank}.json").read_text())
        assert stopped == [f"stopped at step 4, saved in {folder / 'stopped'}", True]
    assert read_tensors(folder / "stopped")[1]["step"] == "4"


def test_two_processes_draw_the_samples_of_one(folder: Path) -> None:
    net = MIXTURE.denoiser(SCHEDULE)
    metrics = [TrajectoryVariance(), PostHocVariance((20, 60))]
    whole = sample(net, SCHEDULE, 41, shape=(1,), sampler=ddpm(), generator=seeded(7), metrics=metrics)
    one = sample(net, SCHEDULE, 3, shape=(1,), sampler=ddpm(), generator=seeded(8))
    for rank in (0, 1):
        got, _ = read_tensors(folder / f"rank{rank}")
        assert len(got["x"]) == 41
        assert torch.equal(got["x"], whole.x)
        assert torch.equal(got["score"], whole.scores["variance[0,10)"])
        assert torch.equal(got["post"], whole.scores["post-hoc variance[20,60) at 10"])
        assert torch.equal(got["one"], one.x)  # one chunk: the second process has nothing to do


REPRODUCED = """
import dataclasses, json, sys
import torch
torch.set_num_threads(1)
from tinyhall.core import device
from tinyhall.lab import experiments
from tinyhall.lab.reproduce import reproduce

folder = sys.argv[1]
device.pick()
smaller = {
    "recursion": {"steps": 10, "timesteps": 60, "beta_end": 0.3, "generations": 2},
    "line123": {"steps": 20, "timesteps": 60, "beta_end": 0.3, "samples": 100},
    "shapes": {"steps": 8, "samples": 8},
}
told = {}
for name, fields in smaller.items():
    experiment = experiments.EXPERIMENTS[name] = dataclasses.replace(experiments.get(name, "smoke"), **fields)
    samplers = None if name == "recursion" else [known for known in experiment.samplers() if known == "small"]
    made = reproduce(experiment, root=f"{folder}/root", runs=f"{folder}/runs", samplers=samplers, progress=False)
    told[name] = made.metrics
with open(f"{folder}/told{device.rank()}.json", "w") as file:
    json.dump(told, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_reproduce_experiments(tmp_path: Path) -> None:
    by_two(REPRODUCED, tmp_path)
    first, second = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [len(history) for history in first["recursion"]["arms"].values()] == [2, 2, 2]
    assert [stage["step"] for stage in first["shapes"]["by_step"]] == list(range(1, 9))
    assert first["line123"]["small"]["n"] == 100
    assert {p.name for p in (tmp_path / "root").glob("*/seed0/*")} == {
        "card.json", "metrics.json", "model.safetensors", "samples-arms.safetensors", "samples-small.safetensors"
    }  # fmt: skip


@pytest.mark.gpu
def test_figures_of_what_lies_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    place = torch.device("cuda")
    scores, bad = torch.rand(40, generator=seeded()), torch.arange(40) % 3 == 0
    there = (scores.to(place), bad.to(place))
    assert stats.auroc(*there, (torch.arange(40) % 2).to(place)) == stats.auroc(scores, bad, torch.arange(40) % 2)
    for ours, theirs in zip(stats.roc(*there), stats.roc(scores, bad), strict=True):
        assert torch.equal(ours, theirs)
    x = MIXTURE.sample(40, seeded(1))
    torch.testing.assert_close(MIXTURE.log_density(x.to(place)).cpu(), MIXTURE.log_density(x))
    digits = MNIST(ROOT / "book" / "data" / "mnist", train=False)
    digits.__dict__["oracle"] = DigitOracle(digits.classifier, digits.images(slice(0, 500)), 0.5)
    images = digits.images(slice(500, 520))
    for ours, theirs in zip(digits.judge(images.to(place)), digits.judge(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    schedule = Schedule.linear(1e-4, 0.04, 500)
    classes = log_classes(digits, schedule, place)
    t = torch.tensor([3], device=place).expand(20)
    assert classes is not None and classes(images.to(place), t, torch.zeros_like(images).to(place)).shape == (20, 10)
    assert digits.classifier.out.weight.device.type == "cpu"
    net = UNet(size=8, widths=(8,), blocks=1, classes=3).to(place)
    labels = torch.arange(4) % 3
    drawn = [step.x for step in reverse(net, SCHEDULE, (4, 1, 8, 8), generator=seeded(2), label=labels, guidance=2.0)]
    assert drawn[-1].device.type == "cuda"


def test_alone() -> None:
    assert device.world() is None
    assert (device.rank(), device.processes()) == (0, 1)
    parts = [1, 2]
    assert device.gather_rows(parts) == [1, 2]
    x = torch.ones(3)
    device.sum_over_processes([x])
    device.barrier()
    assert x.tolist() == [1, 1, 1]


def test_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.pick("cpu") == torch.device("cpu")
    assert device.pick(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick() == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x", ""])
def test_refuses_what_is_not_here(name: str) -> None:
    with pytest.raises(TinyhallError) as caught:
        device.pick(name)
    one_line(caught.value, "device", "cpu, cuda, cuda:0, mps", repr(name))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_writes_and_all_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int) -> None:
    told: list[str] = []
    monkeypatch.setattr(device, "rank", lambda: rank)
    monkeypatch.setattr(device, "barrier", lambda: told.append("waited"))
    once(lambda path, word: told.append(f"{path.name} {word}"), tmp_path / "a", "b")
    assert told == (["a b", "waited"] if rank == 0 else ["waited"])


def test_bf16_is_asked_of_the_device() -> None:
    assert isinstance(gains_bf16(torch.device("cpu")), bool)
    assert gains_bf16(torch.device("meta")) is False


@pytest.mark.parametrize(("tiles", "dots"), [(False, False), (False, True), (True, False)])
def test_bf16_gains_where_a_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, tiles: bool, dots: bool) -> None:
    monkeypatch.delenv("TINYHALL_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dots, raising=False)
    assert gains_bf16(torch.device("cpu")) is (tiles or dots)
    assert gains_bf16(torch.device("cpu"), images=True) is tiles


def test_the_precision_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("float32", "bfloat16"):
        monkeypatch.setenv("TINYHALL_PRECISION", wanted)
        assert gains_bf16(torch.device("cpu")) is (wanted == "bfloat16")
    monkeypatch.setenv("TINYHALL_PRECISION", "float16")
    with pytest.raises(TinyhallError) as caught:
        gains_bf16(torch.device("cpu"))
    one_line(caught.value, "TINYHALL_PRECISION", "float32 or bfloat16", "'float16'")
