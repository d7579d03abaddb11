"""Machines that are not here: a device without float64 (Apple's), and Windows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT, environment, one_line, seeded
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import tinyhall as th
from tinyhall.core import device as place
from tinyhall.core._check import TinyhallError
from tinyhall.figures import labels
from tinyhall.lab.mitigations import log_modes
from tinyhall.store import files as artifacts

MPS = torch.device("mps")


class OnApple(torch.Tensor):
    """Marks what lies on the emulated device."""


class Source(torch.Generator):
    """Of the emulated device: the processor's."""

    def __new__(cls, device: Any = "cpu") -> Source:
        return super().__new__(cls, device="cpu" if torch.device(device).type == "mps" else device)


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Apple:
    monkeypatch.setattr(torch, "Generator", Source)
    return Apple()


class Apple(TorchFunctionMode):
    """Emulates Apple's device on the processor: what lies there is marked, mixes with nothing else, and is never float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        there = any(isinstance(value, OnApple) for value in given)
        if func == torch.Tensor.device.__get__:
            return MPS if there else super_call(func, args, kwargs)
        target = there
        if name in ("cpu", "numpy", "tolist", "item", "__float__", "__int__", "__bool__", "__index__"):
            target = False
        elif name in ("to", "randn", "rand", "randint", "randperm", "empty", "zeros", "ones", "full", "tensor", "arange"):
            wanted = kwargs.get("device", args[1] if name == "to" and len(args) > 1 else None)
            if isinstance(wanted, OnApple):
                wanted = MPS
            elif isinstance(wanted, torch.Tensor):
                wanted = "cpu"
            if isinstance(wanted, (str, torch.device)):
                target = torch.device(wanted).type == "mps"
                kwargs.pop("device", None)
                if name == "to":
                    rest = [a.dtype for a in args[1:2] if isinstance(a, torch.Tensor)] + list(args[2:])
                    args = (args[0], *(a for a in rest if isinstance(a, torch.dtype)))
                    if len(args) == 1 and "dtype" not in kwargs:
                        args = (args[0], args[0].dtype)
                    kwargs.setdefault("copy", True)
        elif there and any(value.ndim and not isinstance(value, OnApple) for value in given):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found mps and cpu!")
        out = super_call(func, tree_map(bare, args), tree_map(bare, kwargs))

        def mark(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if target and value.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
            return value.as_subclass(OnApple) if target else bare(value)

        return tree_map(mark, out)


def super_call(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def bare(value: Any) -> Any:
    if isinstance(value, OnApple):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    return value


def moved(net: torch.nn.Module) -> torch.nn.Module:
    """The network, its weights and buffers on the emulated device."""
    with torch._C.DisableTorchFunctionSubclass():
        for module in net.modules():
            for key, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[key] = value.data.as_subclass(OnApple).requires_grad_()
            for key, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[key] = buffer.float().as_subclass(OnApple)
    return net


SCHEDULE = th.Schedule.linear(1e-3, 0.2, 100)
MIXTURE = th.datasets.GaussianMixture.line()


def test_the_emulation_is_as_strict_as_the_device(apple: Apple) -> None:
    with apple:
        x = torch.ones(3, device=MPS)
        assert x.device == MPS and x.cpu().device.type == "cpu" and (x + 1).device == MPS
        assert place.widest(MPS) is torch.float32 and place.widest(torch.device("cpu")) is torch.float64
        assert place.exact(x).dtype == torch.float64
        wrong = [lambda: x.double(), lambda: torch.ones(3).double().to(MPS)]
        for bad in wrong:
            with pytest.raises(TypeError, match="float64"):
                bad()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.usefixtures("unchecked")
def test_sampling_and_scoring_on_a_device_without_float64(apple: Apple) -> None:
    net = th.nets.MLP(1)
    metrics = [th.TrajectoryVariance((0, 20)), th.TrajectoryVariance(noise=(0, 0.5))]
    expected = th.sample(net, SCHEDULE, 5, metrics=metrics, generator=seeded(), device="cpu")
    with apple:
        got = th.sample(moved(net), SCHEDULE, 5, metrics=metrics, generator=seeded(), device=MPS)
        assert got.x.device.type == "cpu"
        error = th.denoising_error(net, SCHEDULE, got.x, [5, 20], generator=seeded())
    torch.testing.assert_close(got.x, expected.x, rtol=1e-4, atol=1e-5)
    for key, score in expected.scores.items():
        torch.testing.assert_close(got.scores[key], score, rtol=1e-3, atol=0)
    assert bool(error.isfinite().all())


@pytest.mark.usefixtures("unchecked")
def test_what_is_exact_stays_on_the_processor(apple: Apple) -> None:
    x, t = torch.tensor([[1.0], [1.6], [9.0]]), torch.tensor([5, 50, 99])
    shapes = th.datasets.SimpleShapes(size=32)
    verdict, eps = MIXTURE.judge(x), MIXTURE.denoiser(SCHEDULE)(x, t)
    modes, density = log_modes(MIXTURE, SCHEDULE, x, t), MIXTURE.log_density(x)
    with apple:
        there, then = x.to(MPS), t.to(MPS)
        got = MIXTURE.judge(there)
        assert all(value.device == MPS for value in got)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, verdict, strict=True))
        assert torch.equal(MIXTURE.in_support(there).cpu(), MIXTURE.in_support(x))
        assert torch.equal(MIXTURE.denoiser(SCHEDULE)(there, then).cpu(), eps)
        assert torch.equal(MIXTURE.log_density(there).cpu(), density)
        assert torch.equal(log_modes(MIXTURE, SCHEDULE, there, then), modes)
        noisy = SCHEDULE.q_sample(there, then, there)
        assert noisy.device == MPS
        torch.testing.assert_close(SCHEDULE.predict_x0(noisy, then, there).cpu(), x, rtol=1e-2, atol=1e-2)
        image = shapes.sample(3, seeded())
        exact = shapes.denoiser(SCHEDULE)(image, t)
        assert torch.equal(shapes.denoiser(SCHEDULE)(image.to(MPS), then).cpu(), exact)


@pytest.mark.usefixtures("unchecked")
def test_training_on_a_device_without_float64(apple: Apple) -> None:
    net = th.nets.MLP(1)
    data = MIXTURE.sample(50, seeded())
    with apple:
        for weight in moved(net).parameters():
            assert weight.device == MPS
        t = torch.randint(100, (50,), generator=seeded(), device=MPS)
        eps = torch.randn(50, 1, generator=seeded(), device=MPS)
        there = data.to(MPS)
        schedule = SCHEDULE.to(MPS)
        assert schedule._tables.dtype == torch.float32
        out = net(schedule.q_sample(there, t, eps), t)
    assert bool(out.isfinite().all())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_pipelines_on_a_device_without_float64(apple: Apple) -> None:
    import pipelines
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    with torch.no_grad():
        x, said = torch.randn(2, 1, 8, 8, generator=seeded(1)), torch.randn(2, 1, 8, 8, generator=seeded(2))
        scores = []
        for there in (False, True):
            scheduler, metric = EulerDiscreteScheduler(**pipelines.STABLE), th.TrajectoryVariance(last=5)
            scheduler.set_timesteps(8)
            with apple:
                z, eps = (x.to(MPS), said.to(MPS)) if there else (x, said)
                with th.watch(scheduler, metric):
                    for i, t in enumerate(scheduler.timesteps):
                        z = scheduler.step(eps * (1 + i), t, z).prev_sample
                assert z.device.type == ("mps" if there else "cpu")
                scores.append(metric.score().cpu())
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)
        net, _ = th.from_diffusers(pipelines.plain_unet(), DDPMScheduler())
        t = torch.tensor([3, 700])
        expected = net(x, t)
        with apple:
            torch.testing.assert_close(moved(net)(x.to(MPS), t.to(MPS)).cpu(), expected, rtol=1e-4, atol=1e-5)


def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock on a folder; fsync takes what was opened for writing."""
    fcntl: Any = pytest.importorskip("fcntl")

    real = os.fsync

    def fsync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("filelock.has_fcntl", False)


def test_windows_writes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    windows(monkeypatch)
    data = MIXTURE.sample(40, seeded())

    def fit(**more: Any) -> th.Run:
        return th.fit(
            th.nets.MLP(1), data, SCHEDULE, train_steps=2, batch_size=10, lr=1e-3, generator=seeded(), progress=False, **more
        )

    fit(checkpoint=tmp_path / "run")
    artifacts.write_json(tmp_path / "a.json", {"ü": "ß"})
    assert artifacts.read_json(tmp_path / "a.json") == {"ü": "ß"}
    labels.write_labels(tmp_path / "l.csv", {0: "5"})
    made = th.recurse(data, lambda *_: th.nets.MLP(1), SCHEDULE, folder=tmp_path / "r", generations=2, arm="none")
    assert len(list(made)) == 2


def test_windows_keeps_a_folder_to_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    windows(monkeypatch)
    for _ in range(2):  # and lets go of it
        with artifacts.alone(tmp_path / "run"), pytest.raises(TinyhallError) as caught, artifacts.alone(tmp_path / "run"):
            pass
    one_line(caught.value, "checkpoint", "another process")


def test_a_spawned_process_can_take_a_network_and_a_schedule(tmp_path: Path) -> None:
    """Windows and macOS spawn: what goes to another process is pickled, and its module imported anew."""
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing, torch, tinyhall as th\n"
        "def work(given):\n"
        "    net, schedule = given\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    return th.sample(net, schedule, 3, generator=g, metrics=[th.TrajectoryVariance((0, 5))]).x.sum().item()\n"
        "if __name__ == '__main__':\n"
        "    given = th.nets.MLP(1), th.Schedule.linear(1e-3, 0.2, 50 * 2)\n"
        "    given[1].to('meta')\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.apply(work, (given,)) == work(given)\n"
        "    print('same')\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "same", done.stderr
