"""Devices, and the work shared by two processes through accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from common import one_line, run_python, seeded

from tinyhall import device
from tinyhall._check import TinyhallError
from tinyhall.artifacts import read_tensors
from tinyhall.datasets import GaussianMixture
from tinyhall.metrics import TrajectoryVariance
from tinyhall.nets import MLP
from tinyhall.sampling import ddpm, sample
from tinyhall.schedule import Schedule
from tinyhall.training import fit

SHARED = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from common import seeded
from tinyhall import device
from tinyhall.artifacts import write_tensors
from tinyhall.datasets import GaussianMixture
from tinyhall.metrics import TrajectoryVariance
from tinyhall.nets import MLP
from tinyhall.sampling import ddpm, sample
from tinyhall.schedule import Schedule
from tinyhall.training import fit

folder = sys.argv[1]
schedule, mixture = Schedule.linear(1e-3, 0.2, 100), GaussianMixture.line()
device.pick()
net = MLP(1, width=16, generator=seeded(0))
# 17 rows do not split evenly, and a microbatch of 5 does not divide a share.
run = fit(net, mixture.sample(53, seeded(100)), schedule, steps=8, batch_size=17, lr=1e-3, generator=seeded(5), progress=False,
          microbatch=5, checkpoint=f"{folder}/run", every=3)
x = sample(mixture.denoiser(schedule), schedule, 41, shape=(1,), sampler=ddpm(), generator=seeded(7), batch_size=6,
           metrics=[TrajectoryVariance()])
one = sample(mixture.denoiser(schedule), schedule, 3, shape=(1,), sampler=ddpm(), generator=seeded(8), batch_size=100)
score = x.scores["variance[0,10)"]
write_tensors(f"{folder}/rank{device.rank()}", {**net.state_dict(), "x": x.x, "score": score, "one": one.x})
with open(f"{folder}/losses{device.rank()}.json", "w") as file:
    json.dump([device.processes(), *run.losses], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they trained and drew."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "script.py").write_text(SHARED)
    # What `accelerate launch` starts on GPUs; on processors it would start a single process, or want MPI.
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(folder / "script.py"), str(folder),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


SCHEDULE, MIXTURE = Schedule.linear(1e-3, 0.2, 100), GaussianMixture.line()


def test_two_processes_train_the_weights_of_one(folder: Path) -> None:
    net = MLP(1, width=16, generator=seeded(0))
    run = fit(
        net,
        MIXTURE.sample(53, seeded(100)),
        SCHEDULE,
        steps=8,
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


def test_two_processes_draw_the_samples_of_one(folder: Path) -> None:
    net = MIXTURE.denoiser(SCHEDULE)
    whole = sample(net, SCHEDULE, 41, shape=(1,), sampler=ddpm(), generator=seeded(7), metrics=[TrajectoryVariance()])
    one = sample(net, SCHEDULE, 3, shape=(1,), sampler=ddpm(), generator=seeded(8))
    for rank in (0, 1):
        got, _ = read_tensors(folder / f"rank{rank}")
        assert len(got["x"]) == 41
        assert torch.equal(got["x"], whole.x)
        assert torch.equal(got["score"], whole.scores["variance[0,10)"])
        assert torch.equal(got["one"], one.x)  # one chunk: the second process has nothing to do


def test_alone() -> None:
    assert device.world() is None
    assert (device.rank(), device.processes()) == (0, 1)
    parts = [1, 2]
    assert device.gather_rows(parts) == [1, 2]
    x = torch.ones(3)
    device.sum_over_processes([x])
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


def test_bf16_is_asked_of_the_device() -> None:
    assert isinstance(device.gains_bf16(torch.device("cpu")), bool)
    assert device.gains_bf16(torch.device("meta")) is False


@pytest.mark.parametrize(("tiles", "dots"), [(False, False), (False, True), (True, False)])
def test_bf16_gains_where_a_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, tiles: bool, dots: bool) -> None:
    monkeypatch.delenv("TINYHALL_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dots, raising=False)
    assert device.gains_bf16(torch.device("cpu")) is (tiles or dots)
    assert device.gains_bf16(torch.device("cpu"), images=True) is tiles


def test_the_precision_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("float32", "bfloat16"):
        monkeypatch.setenv("TINYHALL_PRECISION", wanted)
        assert device.gains_bf16(torch.device("cpu")) is (wanted == "bfloat16")
    monkeypatch.setenv("TINYHALL_PRECISION", "float16")
    with pytest.raises(TinyhallError) as caught:
        device.gains_bf16(torch.device("cpu"))
    one_line(caught.value, "TINYHALL_PRECISION", "float32 or bfloat16", "'float16'")


def test_autocast() -> None:
    a = torch.ones(2, 2)
    with device.autocast(torch.device("cpu"), True):
        assert (a @ a).dtype == torch.bfloat16
    with device.autocast(torch.device("cpu"), False):
        assert (a @ a).dtype == torch.float32
