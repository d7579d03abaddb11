"""What is kept of images that a model drew: windows, scores, kinds, and a card's whole path."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, run_python, same_bits, seeded

from tinyhall import cards, experiments, images
from tinyhall._check import TinyhallError
from tinyhall.artifacts import read_json, read_tensors
from tinyhall.cards import stream
from tinyhall.datasets import MNIST, SimpleShapes
from tinyhall.images import quantised
from tinyhall.metrics import TrajectoryVariance
from tinyhall.mnist import DigitOracle
from tinyhall.nets import UNet
from tinyhall.sampling import Samples, ddim, ddpm, reverse, sample
from tinyhall.schedule import Schedule
from tinyhall.training import fingerprint

SCHEDULE = Schedule.linear(1e-4, 0.3, 60)


def network(size: int = 32) -> UNet:
    """Small, and no longer predicting 0."""
    net = UNet(size=size, widths=(8, 8), blocks=1, generator=seeded()).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=seeded(len(p)))
    return net


def test_eight_bits_and_back() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0])
    q = images.quantised(x)
    assert q.dtype == torch.uint8
    assert q.tolist()[:2] == [0, 0]
    assert q.tolist()[-2:] == [255, 255]
    torch.testing.assert_close(images.restored(q), x.clamp(-1, 1), rtol=0, atol=1.001 / 255)
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(images.quantised(images.restored(every)), every)


def test_tally_counts_every_kind() -> None:
    told = images.tally(torch.tensor([0, 0, 2, 1, 1]), ("in support", "a", "b", "c"))
    assert {k: v.value for k, v in told.items()} == {"any": 0.6, "a": 0.4, "b": 0.2, "c": 0.0}
    assert all(v.n == 5 for v in told.values())


def test_windows_hold_two_steps_at_least() -> None:
    schedule = Schedule.linear(1e-4, 0.02, 1000)
    assert len(images.windows_of(schedule, ddpm())) == 12 * 13 // 2
    ten = images.windows_of(schedule, ddim(steps=10))  # t = 0, 111, 222, ...
    assert (0, 10) not in ten
    assert (0, 200) in ten
    assert (100, 300) in ten
    short = images.windows_of(SCHEDULE, ddpm())
    assert max(b for _, b in short) == 60


def test_local_maximum_is_the_brightest_patch() -> None:
    variance = torch.zeros(2, 1, 16, 16)
    variance[0, 0, 4:8, 8:12] = 3.0
    variance[1] = 1.0
    assert images.local_maximum(variance, 4).tolist() == [3.0, 1.0]


def test_draw_scores_as_the_metric_does() -> None:
    data, net, sampler = SimpleShapes(32), network(), ddpm("small", 30)
    drawn = images.ImageDraw.make(net, data, SCHEDULE, sampler, 6, seed=3)
    meters = [TrajectoryVariance(window) for window in drawn.windows]
    for step in reverse(net, SCHEDULE, (6, 1, 32, 32), sampler=sampler, generator=cards.stream(3, "samples/0")):
        for meter in meters:
            meter.update(step)
    assert torch.equal(drawn.x, step.x)
    torch.testing.assert_close(drawn.mean, torch.stack([m.score() for m in meters], 1), rtol=1e-5, atol=1e-9)
    local = torch.stack([images.local_maximum(m.per_dimension(), 8) for m in meters], 1)
    torch.testing.assert_close(drawn.local, local, rtol=1e-5, atol=1e-9)
    assert bool((drawn.local >= drawn.mean * 0.999).all())
    assert torch.equal(drawn.verdict["kind"], data.judge(step.x).kind)


def test_traces_belong_to_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PART", 4)
    drawn = images.ImageDraw.make(network(), SimpleShapes(32), SCHEDULE, ddpm("small"), 10, seed=0)
    assert drawn.trace_t.tolist() == sorted(drawn.trace_t.tolist(), reverse=True)
    assert drawn.trace_t[-1] == 0
    # At t = 0 the sampler ends in what the network predicts.
    torch.testing.assert_close(drawn.traces[:, -1], drawn.x[drawn.trace_rows], rtol=1e-4, atol=1e-4)
    assert len(drawn.trace_rows.unique()) == len(drawn.trace_rows)


def test_report_and_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = images.ImageDraw.make(network(), SimpleShapes(32), SCHEDULE, ddpm("small"), 8, seed=0)
    assert drawn.report()["windows"] == {}  # too few for a threshold
    n = 400
    bad = torch.arange(n) % 4 == 0
    score = torch.where(bad, 2.0, 1.0)[:, None]
    fake = images.ImageDraw(
        drawn.kinds, drawn.x[:1].expand(n, -1, -1, -1), {"kind": bad.long()}, [(0, 10)], score, -score,
        drawn.trace_rows, drawn.trace_t, drawn.traces,
    )  # fmt: skip
    report = fake.report()
    assert report["fraction"]["any"].value == report["fraction"]["two of a shape"].value == 0.25
    assert report["windows"]["0-10"]["mean"]["auroc"].value == 1
    assert report["windows"]["0-10"]["mean"]["removed"].value == report["windows"]["0-10"]["mean"]["kept"].value == 1
    assert report["windows"]["0-10"]["local"]["auroc"].value == 0
    fewer = drawn.tensors(3, pictures=1)
    assert (len(fewer["x"]), len(fewer["kind"]), len(fewer["log10_mean"]), len(fewer["traces"])) == (1, 3, 3, 0)
    kept = drawn.tensors(3)
    assert len(kept["x"]) == len(kept["kind"]) == len(kept["log10_mean"]) == 3
    assert bool((kept["trace_of"] < 3).all())
    assert len(kept["traces"]) == len(kept["trace_of"])
    assert kept["x"].dtype == torch.uint8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[experiments.Artifact, Path]:
    place = tmp_path_factory.mktemp("images")
    card = cards.get("shapes", "smoke")
    return experiments.reproduce(card, root=place / "a", runs=place / "r", device="cpu", progress=False), place


def test_a_card_from_end_to_end(made: tuple[experiments.Artifact, Path]) -> None:
    artifact, place = made
    card = artifact.card
    by_step = artifact.metrics["by_step"]
    assert [m["step"] for m in by_step] == [5 * (i + 1) for i in range(8)]
    assert [m["fraction"]["any"][3] for m in by_step] == [min(card.samples, experiments._DRAWN_AT_STAGE)] * 8
    assert artifact.metrics["small"]["n"] == card.samples
    assert artifact.metrics["full"]["n"] == card.samples // 8
    assert artifact.fraction("small", "any").n == card.samples
    kept = artifact.samples("small")
    assert kept["x"].shape == (card.samples, 1, 32, 32)
    assert kept["log10_denoising"].shape == (card.samples, len(images.DENOISED))
    # What is kept was drawn by the weights that are kept.
    again = images.ImageDraw.make(
        artifact.net, card.data(), card.schedule(), ddpm("small", card.respace), card.samples, artifact.info["seed"]
    )
    assert int((images.quantised(again.x).int() - kept["x"].int()).abs().max()) <= 1
    assert ("shapes", "smoke", 0) in experiments.available(place / "a")


def test_the_weights_kept_are_the_moving_average(made: tuple[experiments.Artifact, Path]) -> None:
    artifact, place = made
    tensors, _ = read_tensors(experiments.folder(place / "r", artifact.card, 0) / "checkpoint.safetensors")
    average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    assert same_bits({k: v.half().float() for k, v in average.items()}, artifact.net.state_dict())
    assert not same_bits(average, {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})


def test_a_second_call_repeats_nothing(made: tuple[experiments.Artifact, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, place = made
    monkeypatch.setattr(experiments, "sample", None)  # stages are read
    again = experiments.reproduce(artifact.card, root=place / "b", runs=place / "r", device="cpu", progress=False)
    assert again.metrics == artifact.metrics
    assert same_bits(again.samples("small"), artifact.samples("small"))


def test_stages_end_in_the_bits_of_one_run(made: tuple[experiments.Artifact, Path], tmp_path: Path) -> None:
    artifact, _ = made
    net, _ = experiments.train_card(artifact.card, 0, runs=tmp_path, device="cpu", progress=False)
    assert same_bits({k: v.half().float() for k, v in net.state_dict().items()}, artifact.net.state_dict())


@pytest.mark.parametrize("kept", ["checkpoint.safetensors", "*"])
def test_stages_are_not_drawn_from_a_checkpoint_that_is_ahead(
    made: tuple[experiments.Artifact, Path], kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn in the middle of a training cannot be drawn at its end; by another sampler it has not been drawn."""
    artifact, place = made
    runs = experiments.folder(tmp_path, artifact.card, 0)
    runs.mkdir(parents=True)
    for path in experiments.folder(place / "r", artifact.card, 0).glob(kept):
        shutil.copy(path, runs)
    if kept == "*":
        monkeypatch.setitem(cards.CARDS, "shapes", dataclasses.replace(artifact.card, respace=10))
    with pytest.raises(TinyhallError) as caught:
        experiments.reproduce(cards.get("shapes", "smoke"), root=tmp_path / "a", runs=tmp_path, device="cpu", progress=False)
    one_line(caught.value, "checkpoint", "at most 5 steps", "got 40", f"{runs}/checkpoint.safetensors", "move it away")
    assert not (tmp_path / "a").exists()


def test_commands(tmp_path: Path, made: tuple[experiments.Artifact, Path]) -> None:
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
    card = cards.get("shapes-recursion", "smoke")
    assert card.draw > card.n
    artifact = experiments.reproduce(card, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    told = experiments.histories("shapes-recursion", "smoke", tmp_path / "a")
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
    figures = experiments._of_images(data, Samples(x)) | {"passed_on": [0.5], "auroc": None}
    assert figures["fraction"]["blank"].value == figures["fraction"]["any"].value == 0.01
    assert sum(figures["share"]) == 693
    told = experiments.read(figures)
    assert told["hallucinated"] == told["blank"] == 0.01
    assert told["imbalance"] < 0.1  # the seven sets of shapes are equally likely
    assert told["handed on"] == 0.5
    shares = torch.tensor(figures["share"]) / 693
    assert told["imbalance"] == pytest.approx(0.5 * float((shares - 1 / 7).abs().sum()))
    assert math.isnan(experiments.read(figures | {"share": [0] * 7})["imbalance"])  # of nothing in support
    assert told["distinct"] == len(x.flatten(1).unique(dim=0)) / 700


def test_generations_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    test_set = MNIST(train=False)
    fewer = DigitOracle.calibrated(test_set.classifier, test_set.images(slice(0, 3_000)), test_set.images(slice(3_000, 4_000)))
    monkeypatch.setattr(MNIST, "oracle", property(lambda self: fewer))
    card = cards.get("mnist", "smoke")
    assert card.draw / card.n == pytest.approx(65 / 60, abs=0.01)
    artifact = experiments.reproduce(card, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    told = experiments.histories("mnist", "smoke", tmp_path / "a")
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
        card.schedule(),
        2,
        label=torch.tensor([3, 4]),
        guidance=1.5,
        sampler=ddpm("small", 10),
        generator=seeded(),
    )
    assert again.x.shape == (2, 1, 28, 28)
    state = read_json(next((tmp_path / "r").rglob("recursion.json")))
    assert state["guidance"] == card.guidance
    assert state["label"].startswith("(60,)")


@pytest.mark.parametrize("name", ["mnist-wide", "mnist-unguided", "mnist-real50", "mnist-accumulated"])
def test_generations_of_digits_with_one_thing_changed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card changes arrives: what generation 2 learned from, made again here from the real digits and what 1 drew."""
    monkeypatch.chdir(ROOT)
    card, plain = cards.get(name, "smoke"), cards.get("mnist", "smoke")
    assert card.draw == plain.draw
    artifact = experiments.reproduce(card, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    assert [len(history) for history in artifact.metrics["arms"].values()] == [2] * len(card.arms)
    assert not (tmp_path / "a" / f"{name}-smoke" / "seed0" / "model.safetensors").exists()
    real, label = MNIST().draw(60, stream(0, "data"))
    place = tmp_path / "r" / f"{name}-smoke" / "seed0"
    kept, _ = read_tensors(place / "1" / "checkpoint.safetensors")
    net = card.net(0, "weights/1").eval()
    net.load_state_dict({key.removeprefix("ema."): v for key, v in kept.items() if key.startswith("ema.")})
    sampler = ddpm("large" if name == "mnist-wide" else "small", 10)
    asked = label[torch.arange(65) % 60]
    first = sample(
        net, card.schedule(), 65, label=asked, guidance=1.0 if name == "mnist-unguided" else 1.5, sampler=sampler,
        generator=stream(0, "generation/1"),
    ).x  # fmt: skip
    learned = {"mnist-real50": torch.cat([real[:30], first[:30]]), "mnist-accumulated": torch.cat([real, first[:60]])}
    state = read_json(next(place.glob("none-*/2/state.json")))
    assert state["learned_from"] == fingerprint(learned.get(name, first[:60]))
