"""Runs from end to end at smoke scale: an artifact drawn anew, one of the exact denoiser, and chains of the paper's figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from common import one_line, same_bits

from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import spelled
from tinyhall.core.sampling import sample
from tinyhall.lab import experiments
from tinyhall.lab.artifact import Artifact, available, load
from tinyhall.lab.experiment import Lab
from tinyhall.lab.pictures import fifths, forms
from tinyhall.lab.provenance import describe_device, revision
from tinyhall.lab.reproduce import redraw, reproduce
from tinyhall.measure.denoising import PostHocVariance
from tinyhall.store.files import read_json, read_tensors, write_json

QUICK = {"timesteps": 60, "beta_end": 0.3, "steps": 60, "samples": 500}


def quick(patch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """The experiment of that name at smoke scale, with fewer steps."""
    small = dataclasses.replace(experiments.get(name, "smoke"), **QUICK | changes)
    patch.setitem(experiments.EXPERIMENTS, name, small)


def made(name: str, place: Path, **options: Any) -> Artifact:
    experiment = experiments.get(name, "smoke")
    return reproduce(experiment, root=place / "a", runs=place / "r", device="cpu", progress=False, **options)


# An artifact drawn anew.


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """One of another machine and an older package, whose integral is known, and whose runs are gone."""
    quick(monkeypatch, "line123")
    told = made("line123", tmp_path, samplers=["large", "small"])
    for path in sorted((tmp_path / "r").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "r").rmdir()
    metrics = {name: told.metrics[name] | {"integral": {"6": 0.25}} for name in ("large", "small")}
    write_json(told.folder / "metrics.json", told.metrics | metrics)
    write_json(told.folder / "card.json", told.info | {"device": "an older one", "revision": "0" * 12})
    return load("line123", "smoke", 0, tmp_path / "a")


def test_one_sampler_is_drawn_anew_and_nothing_is_trained(
    line: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = {"n": 1, "fraction": {"5": [1.0, 0.0, 1.0, 1]}, "windows": {"[0,10)": {}}, "integral": {"6": 0.25}}
    write_json(line.folder / "metrics.json", line.metrics | {"small": stale})
    before = read_tensors(line.folder / "samples-small.safetensors")
    large = (line.folder / "samples-large.safetensors").read_bytes()
    weights = (line.folder / "model.safetensors").read_bytes()
    (line.folder / "samples-small.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    found = redraw("line123", "smoke", root=tmp_path / "a", device="cpu", samplers=["small"], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # no folder of runs
    assert found.metrics == line.metrics  # the same network and seed; and the integral, which needs no draw, stays
    assert found.metrics["small"]["integral"] == {"6": 0.25}
    again = found.samples("small")
    assert again.keys() == before[0].keys()
    assert same_bits(again, before[0])
    assert (line.folder / "samples-large.safetensors").read_bytes() == large
    assert (line.folder / "model.safetensors").read_bytes() == weights
    # It says who drew, and still who trained.
    here = {"device": describe_device(torch.device("cpu")), "revision": revision(), "torch": torch.__version__}
    assert found.info["drawn"] == here
    kept = {key: value for key, value in line.info.items() if key != "sample_seconds"}
    assert {key: value for key, value in found.info.items() if key not in ("drawn", "sample_seconds")} == kept
    assert (found.info["device"], found.info["revision"]) == ("an older one", "0" * 12)
    assert "drawn" not in line.info


def test_a_sampler_that_was_never_drawn_joins_the_others(line: Artifact, tmp_path: Path) -> None:
    found = redraw("line123", "smoke", root=tmp_path / "a", device="cpu", samplers=["ddim-50"], progress=False)
    assert found.metrics.keys() == {*line.metrics, "ddim-50"}
    assert {name: told for name, told in found.metrics.items() if name != "ddim-50"} == line.metrics
    assert found.fraction("ddim-50").n == QUICK["samples"] // 10
    assert available(tmp_path / "a") == [("line123", "smoke", 0)]


def test_the_command_draws_every_sampler_anew(line: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    from tinyhall.__main__ import main

    command = ["reproduce", "line123", "--scale", "smoke", "--quiet", "--device", "cpu", "--root", str(tmp_path / "a")]
    main([*command, "--runs", str(tmp_path / "none"), "--redraw"])
    lines = capsys.readouterr().out.splitlines()
    assert [told.split(":")[0] for told in lines[:-1]] == ["ddim", "ddim-50", "large", "small"]
    assert lines[-1].endswith(f"; in {line.folder}")
    assert not (tmp_path / "none").exists()
    assert "drawn" in load("line123", "smoke", 0, tmp_path / "a").info
    for argv, parts in (
        ([*command, "--redraw", "--seed", "3"], ("artifact", "got nothing there", "--seed 3")),
        (["reproduce", "recursion", *command[2:], "--redraw"], ("artifact", "got nothing there", "reproduce recursion")),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert all(part in error for part in ("tinyhall: ", *parts)), error


def test_what_cannot_be_drawn_anew(line: Artifact, tmp_path: Path) -> None:
    card = read_json(line.folder / "card.json")
    with pytest.raises(TinyhallError) as caught:
        redraw("line123", "smoke", root=tmp_path / "a", samplers=["large", "euler"], progress=False)
    one_line(caught.value, "samplers", "some of large, small, ddim, ddim-50", "'euler'")
    with pytest.raises(TinyhallError) as caught:
        redraw("line123", "smoke", 1, root=tmp_path / "a")
    one_line(caught.value, "artifact", "got nothing there", "--seed 1")
    with pytest.raises(TinyhallError) as caught:
        redraw("line321", "smoke", root=tmp_path / "a")
    one_line(caught.value, "experiment", "'line321'")
    assert read_json(line.folder / "card.json") == card  # and nothing was written


def test_images_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sampler = "simple-shapes", "small"
    small = dataclasses.replace(experiments.get(name, "smoke"), steps=4, samples=6, respace=20)
    monkeypatch.setitem(experiments.EXPERIMENTS, name, small)
    told = made(name, tmp_path)
    before = told.samples(sampler)
    (told.folder / f"samples-{sampler}.safetensors").unlink()
    found = redraw(name, "smoke", root=tmp_path / "a", device="cpu", samplers=[sampler], progress=False)
    assert found.metrics == told.metrics  # by the weights in half precision that are kept
    assert same_bits(found.samples(sampler), before)
    assert found.info["drawn"]["revision"] == revision()


def test_simple_shapes_keep_what_the_paper_s_window_is_judged_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(experiments.get("simple-shapes", "smoke"), steps=6, samples=6, respace=20)
    monkeypatch.setitem(experiments.EXPERIMENTS, "simple-shapes", small)
    found = made("simple-shapes", tmp_path, samplers=["small", "ddim"])
    kept, few = found.samples("small"), found.samples("ddim")
    assert torch.equal(kept["white"].long(), (kept["x"] > 127).flatten(1).sum(1))
    assert len(few["white"]) == 3 and found.metrics["ddim"]["n"] == 3
    assert kept["changed"][:, -1].eq(0).all() and kept["changed_t"].diff().lt(0).all()
    lab = Lab(0, tmp_path / "a", tmp_path / "r", torch.device("cpu"), False)
    x = sample(
        found.net, small.schedule(), 6, shape=(1, 32, 32), generator=lab.stream("samples"), sampler=small.sampler()
    ).x  # fmt: skip
    for name, one in (("post_hoc", False), ("post_hoc_one", True)):
        for i, window in enumerate(kept["post_hoc_windows"].tolist()):
            metric = PostHocVariance(tuple(window), one_noise=one)
            score = metric.of(found.net, small.schedule(), x, generator=lab.stream("post hoc"))
            assert torch.equal(kept[f"log10_{name}"][:, i], score.clamp_min(1e-12).log10().half())
    told = forms(found, (700, 850))
    assert {name: (by, len(score)) for name, (by, score) in told.items()} == {
        "DDPM run": ("small", 6), "DDIM run": ("ddim", 3), "post hoc, fresh noise": ("small", 6),
        "post hoc, one noise": ("small", 6),
    }  # fmt: skip
    assert torch.equal(told["post hoc, one noise"][1], kept["log10_post_hoc_one"][:, 3].double())
    assert list(forms(found, (0, 1000))) == ["DDPM run", "DDIM run"]


def test_fifths_are_of_about_equal_size() -> None:
    white = torch.arange(50).flip(0)
    assert torch.equal(fifths(white), (white.float() / 10).floor().long())
    assert fifths(torch.zeros(7)).unique().numel() == 1


# Denoisers in closed form in the network's place.


def test_near_sighted_denoisers_draw_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "simple-shapes-local"
    small = dataclasses.replace(experiments.get(name, "smoke"), n=20, samples=3, patches=(7, 33))
    monkeypatch.setitem(experiments.EXPERIMENTS, name, small)
    found = made(name, tmp_path)
    assert set(found.metrics) == {"patch7", "patch33"}
    assert found.fraction("patch33", "any").value == 0  # the whole image in view: it repeats its training set
    train, _ = small.real_data(0)
    drawn = found.samples("patch33")["x"]
    assert torch.cdist((drawn.flatten(1) / 127.5 - 1), train.flatten(1)).amin(1).max() < 0.2
    stamp = (found.folder / "samples-patch7.safetensors").stat().st_mtime_ns
    assert made(name, tmp_path).metrics == found.metrics  # a patch that is drawn is not drawn again
    assert (found.folder / "samples-patch7.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(TinyhallError) as caught:
        found.net  # noqa: B018
    one_line(caught.value, "experiment", "one with a network", "LocalDenoiser")


@pytest.mark.parametrize("name", ["line123-exact", "grid-exact"])
def test_an_artifact_of_the_exact_denoiser_has_no_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, name)
    told = made(name, tmp_path)
    assert sorted(path.name for path in told.folder.iterdir()) == [
        "card.json", "metrics.json", "samples-large.safetensors", "samples-small.safetensors",
    ]  # fmt: skip
    assert not (tmp_path / "r").exists()
    found = load(name, "smoke", 0, tmp_path / "a")
    assert found.metrics == told.metrics and found.info["train_seconds"] == 0
    table = found.table()
    assert set(table["sampler"]) == {"large", "small"} and (table["n"] == QUICK["samples"]).all()
    assert found.fraction("large").value == found.fraction("small").value == 0  # as in the paper: it does not hallucinate
    assert len(found.samples("large")["x"]) == QUICK["samples"]
    assert "the exact denoiser instead of a network" in found.measured
    for ask in (
        lambda: found.net,
        lambda: redraw(name, "smoke", root=tmp_path / "a", progress=False),
        lambda: found.experiment.trained(Lab(0, tmp_path / "a", tmp_path / "r", torch.device("cpu"), False)),
    ):
        with pytest.raises(TinyhallError) as caught:
            ask()
        one_line(caught.value, "experiment", "one with a network", "denoiser", repr(name))
    assert not (tmp_path / "r").exists()


def test_the_exact_denoiser_s_draw_is_that_of_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "grid-exact")
    found = made("grid-exact", tmp_path, samplers=["large"])
    experiment = found.experiment
    lab = Lab(0, tmp_path, tmp_path, torch.device("cpu"), False)
    x = sample(
        experiment.data().denoiser(experiment.schedule()), experiment.schedule(), 500, shape=(2,),
        generator=lab.stream("samples"), sampler=experiment.samplers()["large"],
    ).x  # fmt: skip
    assert torch.equal(found.samples("large")["x"], x)
    assert list(found.metrics) == ["large"]


# Chains, and a line of two modes.


def test_two_modes_on_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "line12")
    found = made("line12", tmp_path, samplers=["large"])
    assert found.experiment.data().means[:, 0].tolist() == [1, 2]
    assert len(found.metrics["large"]["share"]) == 2
    assert found.fraction("large").n == 500
    assert {w for w in found.metrics["large"]["windows"] if w.startswith("[0,")} >= {"[0,10)", "[0,15)"}


def chain(name: str, place: Path, *, arms: list[str], generations: int) -> Artifact:
    found = made(name, place)
    assert list(found.metrics["arms"]) == arms
    n = found.experiment.n
    for history in found.metrics["arms"].values():
        assert len(history) == generations
        assert all(told["passed_on"][3] == n for told in history)
        assert history[0]["fraction"] == found.metrics["arms"]["none"][0]["fraction"]
    table = found.table()
    assert sorted(table["generation"].unique()) == list(range(1, generations + 1)) and set(table["sampler"]) == set(arms)
    with pytest.raises(TinyhallError) as caught:
        redraw(name, "smoke", root=place / "a", progress=False)
    one_line(caught.value, "experiment", "a single model", "reproduce", repr(name))
    return found


def test_a_chain_in_the_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(experiments.get("grid-recursion", "smoke"), steps=20, generations=2)
    monkeypatch.setitem(experiments.EXPERIMENTS, "grid-recursion", small)
    found = chain("grid-recursion", tmp_path, arms=["none", "random-0.024", "variance-0.024"], generations=2)
    assert len(found.metrics["arms"]["none"][0]["share"]) == 25
    assert found.samples("arms")["variance-0.024.2"].shape == (512, 2)


def test_a_chain_of_the_paper_s_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(experiments.get("simple-shapes-recursion", "smoke"), n=19, draw=20, steps=3)
    monkeypatch.setitem(experiments.EXPERIMENTS, "simple-shapes-recursion", small)
    found = chain("simple-shapes-recursion", tmp_path, arms=["none", "random-0.050", "variance-0.050"], generations=2)
    assert set(found.metrics["arms"]["none"][0]["fraction"]) == {"any", *small.data().kinds[1:]}
    assert found.samples("arms")["none.2"].dtype == torch.uint8


def test_a_chain_of_digits_is_filtered_post_hoc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = (("none", 0.0), ("variance", 5_000 / 65_000))
    small = dataclasses.replace(experiments.get("digits", "smoke"), n=24, draw=26, steps=3, arms=arms)
    monkeypatch.setitem(experiments.EXPERIMENTS, "digits", small)
    asked: list[str] = []
    score = PostHocVariance.score
    monkeypatch.setattr(PostHocVariance, "score", lambda self: asked.append(spelled(self.window)) or score(self))
    found = chain("digits", tmp_path, arms=["none", "variance-0.077"], generations=2)
    assert set(asked) == {"[100,150)"}
    kept = found.samples("arms")
    assert kept["variance-0.077.1.worst"].shape[0] == 26 and len(kept["label"]) == 24
    # Unlike those of points, it keeps the model of the real data.
    assert found.net.shape == small.data().shape
