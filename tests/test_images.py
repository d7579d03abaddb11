"""Images: eight bits and back, and an experiment's whole path from a training to what is kept of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, run_python, same_bits, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.core.noise import stream
from tinyhall.core.sampling import SampleConfig, ddpm, sample
from tinyhall.data import images
from tinyhall.data.images import quantised
from tinyhall.data.mnist import DigitOracle
from tinyhall.datasets import MNIST, SimpleShapes
from tinyhall.lab import experiments, pictures
from tinyhall.lab.artifact import Artifact, available, histories
from tinyhall.lab.draws import ImageDraw
from tinyhall.lab.experiment import Lab, folder
from tinyhall.lab.reproduce import reproduce
from tinyhall.lab.summary import generation_summary, of_shapes
from tinyhall.store.checkpoint import fingerprint
from tinyhall.store.files import read_json, read_tensors


def test_eight_bits_and_back() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0])
    q = images.quantised(x)
    assert q.dtype == torch.uint8
    assert q.tolist()[:2] == [0, 0]
    assert q.tolist()[-2:] == [255, 255]
    torch.testing.assert_close(images.restored(q), x.clamp(-1, 1), rtol=0, atol=1.001 / 255)
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(images.quantised(images.restored(every)), every)


def test_local_maximum_is_the_brightest_patch() -> None:
    variance = torch.zeros(2, 1, 16, 16)
    variance[0, 0, 4:8, 8:12] = 3.0
    variance[1] = 1.0
    assert images.local_maximum(variance, 4).tolist() == [3.0, 1.0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    place = tmp_path_factory.mktemp("images")
    experiment = experiments.get("shapes", "smoke")
    return reproduce(experiment, root=place / "a", runs=place / "r", device="cpu", progress=False), place


def test_an_experiment_from_end_to_end(made: tuple[Artifact, Path]) -> None:
    artifact, place = made
    experiment = artifact.experiment
    by_step = artifact.metrics["by_step"]
    assert [m["step"] for m in by_step] == [5 * (i + 1) for i in range(8)]
    assert [m["fraction"]["any"][3] for m in by_step] == [min(experiment.samples, experiment.drawn_at_stage)] * 8
    assert artifact.metrics["small"]["n"] == experiment.samples
    assert artifact.metrics["full"]["n"] == experiment.samples // 8
    assert artifact.fraction("small", "any").n == experiment.samples
    kept = artifact.samples("small")
    assert kept["x"].shape == (experiment.samples, 1, 32, 32)
    assert kept["log10_denoising"].shape == (experiment.samples, len(pictures.DENOISED))
    # What is kept was drawn by the weights that are kept.
    g, config = stream(artifact.info["seed"], "samples"), SampleConfig(sampler=ddpm("small", experiment.respace))
    data, schedule = experiment.data(), experiment.schedule()
    again = ImageDraw.make(artifact.net, data, schedule, experiment.samples, generator=g, config=config)
    assert int((images.quantised(again.x).int() - kept["x"].int()).abs().max()) <= 1
    assert ("shapes", "smoke", 0) in available(place / "a")


def test_the_weights_kept_are_the_moving_average(made: tuple[Artifact, Path]) -> None:
    artifact, place = made
    tensors, _ = read_tensors(folder(place / "r", artifact.experiment, 0) / "checkpoint.safetensors")
    average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    assert same_bits({k: v.half().float() for k, v in average.items()}, artifact.net.state_dict())
    assert not same_bits(average, {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})


def test_a_second_call_repeats_nothing(made: tuple[Artifact, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, place = made
    monkeypatch.setattr(pictures, "sample", None)  # stages are read
    again = reproduce(artifact.experiment, root=place / "b", runs=place / "r", device="cpu", progress=False)
    assert again.metrics == artifact.metrics
    assert same_bits(again.samples("small"), artifact.samples("small"))


def test_stages_end_in_the_bits_of_one_run(made: tuple[Artifact, Path], tmp_path: Path) -> None:
    artifact, _ = made
    net, _ = artifact.experiment.trained(Lab(0, tmp_path, tmp_path, torch.device("cpu"), False))
    assert same_bits({k: v.half().float() for k, v in net.state_dict().items()}, artifact.net.state_dict())


@pytest.mark.parametrize("kept", ["checkpoint.safetensors", "*"])
def test_stages_are_not_drawn_from_a_checkpoint_that_is_ahead(
    made: tuple[Artifact, Path], kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn in the middle of a training cannot be drawn at its end; by another sampler it has not been drawn."""
    artifact, place = made
    runs = folder(tmp_path, artifact.experiment, 0)
    runs.mkdir(parents=True)
    for path in folder(place / "r", artifact.experiment, 0).glob(kept):
        shutil.copy(path, runs)
    if kept == "*":
        monkeypatch.setitem(experiments.EXPERIMENTS, "shapes", dataclasses.replace(artifact.experiment, respace=10))
    with pytest.raises(TinyhallError) as caught:
        reproduce(experiments.get("shapes", "smoke"), root=tmp_path / "a", runs=tmp_path, device="cpu", progress=False)
    one_line(caught.value, "checkpoint", "at most 5 steps", "got 40", f"{runs}/checkpoint.safetensors", "move it away")
    assert not (tmp_path / "a").exists()


def test_commands(tmp_path: Path, made: tuple[Artifact, Path]) -> None:
    _, place = made
    out = tmp_path / "s.safetensors"
    done = run_python(
        "-m", "tinyhall", "sample", "shapes", "--scale", "smoke", "--n", "4", "--out", str(out), "--runs", str(place / "r"),
        "--quiet", JAXTYPING_DISABLE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors, note = read_tensors(out)
    assert note["sampler"] == "small"
    assert tensors["x"].shape == (4, 1, 32, 32)
    wrong = run_python(
        "-m", "tinyhall", "sample", "shapes", "--scale", "smoke", "--sampler", "large", "--runs", str(place / "r")
    )
    assert wrong.returncode == 2
    assert "small, ddim, full" in wrong.stderr


def test_generations_of_images(tmp_path: Path) -> None:
    experiment = experiments.get("shapes-recursion", "smoke")
    assert experiment.draw > experiment.n
    artifact = reproduce(experiment, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    told = histories("shapes-recursion", "smoke", tmp_path / "a")
    assert list(told) == ["none", "random-0.100", "variance-0.100"]
    for name in ("hallucinated", "two of a shape", "malformed", "handed on", "distinct"):
        assert told["none"][name].shape == (1, 2)
    first = [told[arm]["hallucinated"][0, 0] for arm in told]
    assert first[0] == first[1] == first[2]  # the first generation is one for all
    kept = artifact.samples("arms")
    assert kept["none.2"].dtype == torch.uint8
    assert kept["none.2"].shape == (60, 1, 32, 32)  # of all that were drawn


def test_figures_of_a_generation_of_images() -> None:
    data = SimpleShapes(32)
    x = data.sample(700, seeded())
    x[:7] = -1.0
    figures = of_shapes(data, x) | {"passed_on": [0.5], "auroc": None}
    assert figures["fraction"]["blank"].value == figures["fraction"]["any"].value == 0.01
    assert sum(figures["share"]) == 693
    told = generation_summary(figures)
    assert told["hallucinated"] == told["blank"] == 0.01
    assert told["imbalance"] < 0.1  # the seven sets of shapes are equally likely
    assert told["handed on"] == 0.5
    shares = torch.tensor(figures["share"]) / 693
    assert told["imbalance"] == pytest.approx(0.5 * float((shares - 1 / 7).abs().sum()))
    assert math.isnan(generation_summary(figures | {"share": [0] * 7})["imbalance"])  # of nothing in support
    assert told["distinct"] == len(x.flatten(1).unique(dim=0)) / 700


def test_generations_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    test_set = MNIST(train=False)
    fewer = DigitOracle.calibrated(test_set.classifier, test_set.images(slice(0, 3_000)), test_set.images(slice(3_000, 4_000)))
    monkeypatch.setattr(MNIST, "oracle", property(lambda self: fewer))
    experiment = experiments.get("mnist", "smoke")
    assert experiment.draw / experiment.n == pytest.approx(65 / 60, abs=0.01)
    artifact = reproduce(experiment, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    told = histories("mnist", "smoke", tmp_path / "a")
    assert list(told) == ["none", "random-0.077", "variance-0.077"]
    for name in ("hallucinated", "fid", "precision", "recall", "coverage", "agreement", "imbalance", "width"):
        assert told["variance-0.077"][name].shape == (1, 2)
        assert bool(torch.isfinite(told["variance-0.077"][name]).all())
    assert artifact.metrics["floor"]["fid"] < told["none"]["fid"].min()
    assert 0.8 < artifact.metrics["floor"]["width"] < 1.2  # real digits over real digits
    shown = artifact.samples("arms")
    assert shown["random-0.077.2"].shape[1:] == (1, 28, 28)
    assert shown["label"].shape == (60,)
    # What the filter liked least, worst first; and the model of the real data can be drawn from.
    drawn, _ = read_tensors(next((tmp_path / "r").rglob("1/samples.safetensors")))
    score = next(v for k, v in drawn.items() if k.startswith("score."))
    assert torch.equal(shown["variance-0.077.1.worst"], quantised(drawn["x"][score.argsort(descending=True)[:40]]))
    again = sample(
        artifact.net,
        experiment.schedule(),
        2,
        label=torch.tensor([3, 4]),
        guidance=1.5,
        sampler=ddpm("small", 10),
        generator=seeded(),
    )
    assert again.x.shape == (2, 1, 28, 28)
    state = read_json(next((tmp_path / "r").rglob("recursion.json")))
    assert state["guidance"] == experiment.guidance
    assert state["label"].startswith("(60,)")


@pytest.mark.parametrize("name", ["mnist-wide", "mnist-unguided", "mnist-real50", "mnist-accumulated"])
def test_generations_of_digits_with_one_thing_changed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one changes arrives: what generation 2 learned from, made again here from the real digits and what 1 drew."""
    monkeypatch.chdir(ROOT)
    experiment, plain = experiments.get(name, "smoke"), experiments.get("mnist", "smoke")
    assert experiment.draw == plain.draw
    artifact = reproduce(experiment, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    assert [len(history) for history in artifact.metrics["arms"].values()] == [2] * len(experiment.arms)
    assert not (tmp_path / "a" / f"{name}-smoke" / "seed0" / "model.safetensors").exists()
    real, label = MNIST().draw(60, stream(0, "data"))
    place = tmp_path / "r" / f"{name}-smoke" / "seed0"
    kept, _ = read_tensors(place / "1" / "checkpoint.safetensors")
    net = experiment.net(0, "weights/1").eval()
    net.load_state_dict({key.removeprefix("ema."): v for key, v in kept.items() if key.startswith("ema.")})
    sampler = ddpm("large" if name == "mnist-wide" else "small", 10)
    asked = label[torch.arange(65) % 60]
    first = sample(
        net, experiment.schedule(), 65, label=asked, guidance=1.0 if name == "mnist-unguided" else 1.5, sampler=sampler,
        generator=stream(0, "generation/1"),
    ).x  # fmt: skip
    learned = {"mnist-real50": torch.cat([real[:30], first[:30]]), "mnist-accumulated": torch.cat([real, first[:60]])}
    state = read_json(next(place.glob("none-*/2/state.json")))
    assert state["learned_from"] == fingerprint(learned.get(name, first[:60]))
