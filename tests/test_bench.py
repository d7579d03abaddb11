"""Detectors and cures against closed forms, and the bench from end to end on a small model."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, run_python, same_t, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import TrajectoryVariance, parsed
from tinyhall.core.sampling import ddim, ddpm, reverse, watched
from tinyhall.core.schedule import Schedule
from tinyhall.datasets import MNIST, GaussianMixture
from tinyhall.lab import bench, detectors, experiments, mitigations
from tinyhall.lab.artifact import load
from tinyhall.lab.mitigations import quadratic
from tinyhall.lab.recorders import StatesAt, WindowSweep
from tinyhall.lab.reproduce import reproduce
from tinyhall.measure.denoising import PostHocVariance, denoising_error
from tinyhall.store.files import read_json, write_json

QUICK = Schedule.linear(1e-3, 0.3, 60)
LONE = GaussianMixture(torch.tensor([[0.5, -0.2]], dtype=torch.float64), 0.1)
PAIR = GaussianMixture.line((-1.0, 1.0), std=0.1)


def seen(data: GaussianMixture, n: int = 50, sampler=ddpm(), other=ddim(), at: int = 20) -> detectors.Seen:  # noqa: B008 (frozen)
    net, sweep, states = data.denoiser(QUICK), WindowSweep([(0, 5), (5, 20), (20, 60)]), StatesAt([at])
    x = watched(reverse(net, QUICK, (n, data.dim), sampler=sampler, generator=seeded()), [sweep, states]).x
    return detectors.Seen(net, QUICK, other, data, data.sample(300, seeded(1)), x, states.states, sweep)


# Detectors


def test_the_trajectory_variance_is_that_of_its_window() -> None:
    meter = TrajectoryVariance((0, 20))
    for step in reverse(PAIR.denoiser(QUICK), QUICK, (50, 1), generator=seeded()):
        meter.update(step)
    torch.testing.assert_close(detectors.trajectory_variance(seen(PAIR), (0, 20), seeded()), meter.score())


def test_the_intrinsic_dimension_is_the_denoising_error() -> None:
    s = seen(PAIR)
    told = detectors.intrinsic_dimension(s, 3, seeded(2))
    assert torch.equal(told, denoising_error(s.net, QUICK, s.x, [3], generator=seeded(2))[:, 0])


@pytest.mark.parametrize(("window", "k"), [((5, 20), 10), ((5, 9), 4)])
def test_the_post_hoc_variance_is_that_of_the_measure_and_costs_its_values_of_t(window: tuple[int, int], k: int) -> None:
    s, asked = seen(PAIR), []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return s.net(x, t)

    told = detectors.post_hoc_variance(s._replace(net=counted), window, seeded(2))
    assert torch.equal(told, PostHocVariance(window, k).of(s.net, QUICK, s.x, generator=seeded(2)))
    detector = detectors.DETECTORS["post hoc variance"]
    assert detector.calls(window, asked) == k == len(asked)
    for a, b in detector.settings([20, 9, 1], list(range(60))):
        assert 0 <= a < b - 1 < 60


def test_the_curvature_beside_a_lone_mode() -> None:
    # There eps is linear in x, with slope sqrt(1 - abar) / (abar std^2 + 1 - abar), whichever way one goes.
    bar = float(QUICK.alpha_bar[20])
    slope = math.sqrt(1 - bar) / (bar * LONE.std**2 + 1 - bar)
    told = detectors.curvature(seen(LONE), 20, seeded())
    torch.testing.assert_close(told, torch.full((50,), slope**2), rtol=1e-3, atol=0)


def test_ends_apart_is_nothing_for_the_same_sampler_without_noise() -> None:
    s = seen(PAIR, sampler=ddim())
    assert float(detectors.ends_apart(s, 20, seeded()).max()) < 1e-10
    assert float(detectors.ends_apart(s._replace(other=ddpm()), 20, seeded()).min()) > 0


def test_ends_apart_beside_a_lone_mode() -> None:
    # The way without noise is linear: from x_t to mu + scale (x_t - sqrt(abar) mu).
    s, scale = seen(LONE), 1.0
    for step in ddim()(QUICK):
        if step.t <= 20:
            bar = float(QUICK.alpha_bar[step.t])
            scale *= step.x + step.eps * math.sqrt(1 - bar) / (bar * LONE.std**2 + 1 - bar)
    mean = LONE.means.float()
    end = mean + scale * (s.states[20] - float(QUICK.alpha_bar[20].sqrt()) * mean)
    torch.testing.assert_close(detectors.ends_apart(s, 20, seeded()), (end - s.x).square().mean(1), rtol=1e-3, atol=1e-7)


def test_the_baselines() -> None:
    s = seen(PAIR)
    torch.testing.assert_close(detectors.negative_log_density(s, None, seeded()), -PAIR.log_density(s.x))
    near = (s.x - s.real.T).abs().amin(1)
    told = detectors.nearest_train_distance(s, None, seeded())
    torch.testing.assert_close(told, near, rtol=1e-5, atol=0)  # also of points next to each other
    images = s._replace(x=s.x[:, :, None, None], real=s.real[:, :, None, None])
    told = detectors.nearest_train_distance(images, None, seeded())
    torch.testing.assert_close(told, near, rtol=0, atol=1e-3)  # goes by squares


def test_levels_are_steps_that_the_sampler_makes() -> None:
    at = detectors.levels(QUICK, ddpm(sample_steps=7))
    assert at == sorted(set(at), reverse=True)
    assert set(at) <= {c.t for c in ddpm(sample_steps=7)(QUICK)}


# Cures


@pytest.mark.parametrize("t", [0, 10, 40])
def test_guidance_of_strength_1_leaves_one_mode(t: int) -> None:
    # eps = -sqrt(1 - abar) grad log p(x_t), and log p(x_t) + log p(k | x_t) = log p(x_t | k) + const.
    x = torch.linspace(-1.5, 1.5, 30)[:, None]
    net = PAIR.denoiser(QUICK)
    steered = mitigations.guided(net, QUICK, lambda x, t, eps: mitigations.log_modes(PAIR, QUICK, x, t[:1]), strength=1.0)
    for rows, mean in ((x > 0, 1.0), (x < 0, -1.0)):
        alone = GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), PAIR.std).denoiser(QUICK)
        part = x[rows[:, 0]]
        torch.testing.assert_close(steered(part, same_t(t, len(part))), alone(part, same_t(t, len(part))), rtol=1e-4, atol=1e-4)


def test_log_modes_are_shares() -> None:
    x = PAIR.sample(20, seeded())
    each = mitigations.log_modes(PAIR, QUICK, x, torch.full((20,), 30))
    torch.testing.assert_close(each, mitigations.log_modes(PAIR, QUICK, x, torch.tensor([30])))
    torch.testing.assert_close(each.exp().sum(1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(
        mitigations.log_modes(PAIR, QUICK, x, torch.tensor([59])).exp(), torch.full((20, 2), 0.5).double(), atol=0.2, rtol=0
    )


def test_quenching_moves_x0_towards_the_mode_and_only_late() -> None:
    net, x, t = LONE.denoiser(QUICK), torch.tensor([[1.5, 0.6]]).repeat(200, 1), same_t(5, 200)
    steered = mitigations.quenched(net, QUICK, at=3, below=10, strength=0.1, generator=seeded())
    before, after = (QUICK.predict_x0(x, t[:1], f(x, t)) for f in (net, steered))
    gap_before, gap_after = ((v - LONE.means.float()).norm(dim=1).mean() for v in (before, after))
    assert float(gap_after) < float(gap_before)
    assert torch.equal(steered(x, same_t(10, 200)), net(x, same_t(10, 200)))
    still = mitigations.quenched(net, QUICK, at=3, below=10, strength=0.0, generator=seeded())
    torch.testing.assert_close(still(x, t), net(x, t), rtol=1e-4, atol=1e-4)


def test_digits_are_classified_where_they_are_drawn() -> None:
    """A device that only keeps shapes stands for a GPU."""
    digits = MNIST(ROOT / "book" / "data" / "mnist")
    classes = mitigations.log_classes(digits, QUICK, torch.device("meta"))
    x = torch.zeros(2, 1, 28, 28, device="meta")
    assert classes is not None and classes(x, same_t(3, 2), x).device.type == "meta"
    assert digits.classifier.out.weight.device.type == "cpu"  # the data's own stays where it judges


def test_quadratic_times() -> None:
    schedule = Schedule.linear(1e-4, 0.02, 1000)
    times = quadratic(schedule, 50)
    assert len(times) == 50 and times[0] == 800 and times[-1] == 0
    assert all(a > b for a, b in pairwise(times))
    assert [c.t for c in ddim(sample_steps=times)(schedule)] == list(times)
    assert quadratic(QUICK, 48)[0] < QUICK.timesteps  # as dense as can be
    for bad in (1, 801):
        with pytest.raises(TinyhallError) as caught:
            quadratic(schedule, bad)
        one_line(caught.value, "sample_steps", str(bad), "2 to 800")


@pytest.mark.parametrize("steps", [(), (3, 3), (1, 2), (60,), (2, -1)])
def test_times_that_do_not_fall_within_the_schedule(steps: tuple[int, ...]) -> None:
    with pytest.raises(TinyhallError) as caught:
        ddim(sample_steps=steps)(QUICK)
    one_line(caught.value, "sample_steps", "falling values of t in 0..59")


def test_the_setting_is_the_best_that_keeps_the_coverage() -> None:
    tried = {"weak": ([0.3], 0.97), "strong": ([0.1], 0.96), "ruinous": ([0.0], 0.4)}
    told = {k: {"fraction": f, "coverage": c} for k, (f, c) in tried.items()}
    assert bench._choose(told, 1.0) == "strong"
    assert bench._choose({"a": told["ruinous"], "b": told["ruinous"] | {"coverage": 0.5}}, 1.0) == "b"


# From end to end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small model that hallucinates, under the name of a task's experiment."""
    place = tmp_path_factory.mktemp("bench")
    small = {"timesteps": 60, "beta_start": 1e-3, "beta_end": 0.3, "steps": 700, "samples": 300, "layout": "grid3", "n": 500}
    experiment = dataclasses.replace(experiments.get("grid", "smoke"), **small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experiments.EXPERIMENTS, "grid", experiment)
        reproduce(experiment, root=place, runs=place / "runs", progress=False)
        bench.run("square", "smoke", root=place, progress=False)
    return place


@pytest.fixture
def small(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fields = read_json(made / "grid-smoke" / "seed0" / "card.json")["card"]
    experiment = type(experiments.get("grid"))(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    monkeypatch.setitem(experiments.EXPERIMENTS, "grid", experiment)
    return made


def test_the_bench_measures_every_detector_and_cure(small: Path) -> None:
    told = bench.results("smoke", root=small)["square"]
    assert told["n"] == [400, 400]
    assert told["detectors"].keys() == bench.DETECTORS.keys()
    # Farther from every mode than 6 std and less likely than any other: the same samples.
    assert told["detectors"]["exact density"]["auroc"][0] > 0.99
    for detector in told["detectors"].values():
        assert detector["tried"][str(detector["setting"])] == max(detector["tried"].values())
        assert detector["filtered"] is None or detector["filtered"]["calls"] >= told["before"]["calls"]
    assert {"fixed-small variance", "DDIM", "eta", "intrinsic quenching", "dynamic guidance"} <= told["cures"].keys()
    assert told["cures"]["DDIM"]["calls"] == told["before"]["calls"] == 60
    assert told["cures"]["intrinsic quenching"]["calls"] > 60
    for cure in told["cures"].values():
        assert cure["setting"] in cure["tried"]
        assert 0 <= cure["coverage"] <= 1
    lines = bench.table({"square": told})
    assert "square:" in lines[0] and any("trajectory variance" in line for line in lines)


def test_the_bench_ends_the_same_again(small: Path, tmp_path: Path) -> None:
    (tmp_path / "grid-smoke").symlink_to(small / "grid-smoke")
    again = bench.run("square", "smoke", root=tmp_path, progress=False)
    before = bench.results("smoke", root=small)["square"]
    varying = ("seconds", "revision")
    stored = read_json(tmp_path / "bench-smoke" / "seed0" / "square.json")
    assert {k: v for k, v in stored.items() if k not in varying} == {k: v for k, v in before.items() if k not in varying}
    assert again["seconds"] > 0


def test_a_detector_s_row_joins_a_stored_result_as_if_all_had_been_measured(small: Path, tmp_path: Path) -> None:
    (tmp_path / "grid-smoke").symlink_to(small / "grid-smoke")
    whole = read_json(small / "bench-smoke" / "seed0" / "square.json")
    file, one = tmp_path / "bench-smoke" / "seed0" / "square.json", "post hoc variance"
    write_json(file, whole | {"detectors": {k: d for k, d in whole["detectors"].items() if k != one}})
    told = bench.run("square", "smoke", root=tmp_path, progress=False, only=[one])
    stored = read_json(file)
    assert told["added"].keys() == stored.pop("added").keys() == {one}
    assert stored == whole
    write_json(file, whole | {"before": whole["before"] | {"fraction": [0.999, 0.998, 1.0, 400]}})
    with pytest.raises(TinyhallError) as caught:
        bench.run("square", "smoke", root=tmp_path, progress=False, only=[one])
    one_line(caught.value, "only", "hallucinated of the stored square")
    with pytest.raises(TinyhallError) as caught:
        bench.run("square", "smoke", root=tmp_path, progress=False, only=["a guess"])
    one_line(caught.value, "only", "a guess", "post hoc variance")


def test_a_row_joins_by_the_rule_of_its_result(small: Path, tmp_path: Path) -> None:
    (tmp_path / "grid-smoke").symlink_to(small / "grid-smoke")
    first = read_json(small / "bench-smoke" / "seed0" / "square.json")
    assert first["within"] == 6
    write_json(tmp_path / "bench-smoke" / "seed0" / "square.json", {k: v for k, v in first.items() if k != "within"})
    assert bench.results("smoke", root=tmp_path)["square"]["within"] == 5  # as the first results were judged
    model = bench.Model(load("grid", "smoke", root=small), torch.device("cpu"), 5.0)
    x = model.data.means[:1].float() + torch.tensor([[5.5, 0.0]]) * model.data.std
    assert model.bad(x).tolist() == [True]
    assert bench.Model(load("grid", "smoke", root=small), torch.device("cpu")).bad(x).tolist() == [False]


def test_what_the_bench_refuses(small: Path, tmp_path: Path) -> None:
    with pytest.raises(TinyhallError) as caught:
        bench.run("circle", "smoke", root=small)
    one_line(caught.value, "tasks", "circle", "square")
    with pytest.raises(TinyhallError) as caught:
        bench.results("smoke", root=tmp_path)
    one_line(caught.value, "bench", f"python -m tinyhall bench --scale smoke --seed 0 --root {tmp_path}`")
    write_json(tmp_path / "bench-smoke" / "seed0" / "square.json", {"hash": "of another"})
    with pytest.raises(TinyhallError) as caught:
        bench.results("smoke", root=tmp_path)
    one_line(caught.value, "square", "of another", experiments.get("grid", "smoke").training_hash)


def test_settings_are_spelled_as_they_come_back_from_a_file() -> None:
    for setting, told in (((0, 6), "[0,6)"), (6, 6), (None, None), ("[0,6)", "[0,6)"), ([0, 6], "[0,6)"), ("(0, 6)", "[0,6)")):
        assert bench.spelling(setting) == told
        assert json.loads(json.dumps(bench.spelling(setting))) == told
        assert bench.spelling(told) == told
        assert json.loads(json.dumps({str(told): 1})) == {str(told): 1}


def test_every_setting_finds_its_row_in_every_stored_result() -> None:
    for task, told in bench.results("laptop", root=ROOT / "book" / "artifacts").items():
        for name, detector in told["detectors"].items():
            assert detector["tried"][str(detector["setting"])] == max(detector["tried"].values()), (task, name)


def test_a_result_in_either_spelling_reads_the_same(small: Path, tmp_path: Path) -> None:
    """As JSON once had a window: a list in `setting`, and the text of a tuple among `tried`."""
    new = read_json(small / "bench-smoke" / "seed0" / "square.json")

    def older(setting: str | int | None) -> list[int] | int | None:
        return list(parsed(setting)) if isinstance(setting, str) else setting

    old = {
        name: told
        | {"setting": older(told["setting"])}
        | {"tried": {str(tuple(older(s))) if s.startswith("[") else s: area for s, area in told["tried"].items()}}
        for name, told in new["detectors"].items()
    }
    assert old["trajectory variance"]["setting"] != new["detectors"]["trajectory variance"]["setting"]
    write_json(tmp_path / "bench-smoke" / "seed0" / "square.json", new | {"detectors": old})
    assert bench.results("smoke", root=tmp_path)["square"]["detectors"] == new["detectors"]


@pytest.mark.parametrize(
    ("name", "field", "value", "stands"),
    [
        ("grid", "samples", 7, True), ("grid", "steps", 7, False), ("grid", "timesteps", 7, False),
        ("shapes", "samples", 7, True), ("shapes", "respace", 7, False), ("shapes", "lr", 7.0, False),
        ("mnist", "generations", 7, True), ("mnist", "respace", 7, False), ("mnist", "guidance", 7.0, False),
    ],
)  # fmt: skip
def test_a_result_outlives_what_its_model_does_not_rest_on(name: str, field: str, value: float, stands: bool) -> None:
    experiment = experiments.get(name, "laptop")
    other = dataclasses.replace(experiment, **{field: value})
    assert (other.drawing_hash == experiment.drawing_hash) == stands


def test_a_model_without_a_good_sample_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianMixture, "in_support", lambda self, x, width: torch.zeros(len(x), dtype=torch.bool))
    with pytest.raises(TinyhallError) as caught:
        bench.run("square", "smoke", root=small, progress=False)
    one_line(caught.value, "both kinds", "400 of 400")


def test_the_command_refuses_a_task_before_it_starts() -> None:
    told = run_python("-m", "tinyhall", "bench", "--tasks", "square", "circle", "--scale", "smoke")
    assert told.returncode == 2
    assert told.stdout == "" and told.stderr.startswith("tinyhall: tasks: expected one of 1D, square")


def test_digits_keep_their_labels_and_guidance() -> None:
    model = bench.Model(load("mnist", "laptop", root=ROOT / "book" / "artifacts"), torch.device("cpu"))
    guidance = model.experiment.guidance
    assert model.seed == 0
    assert guidance is not None and model.experiment.features(model.real[:3]).shape == (3, 84)
    net = model.labelled(3, seeded())
    label = torch.randint(10, (3,), generator=seeded())
    x, t = torch.randn(3, 1, 28, 28, generator=seeded(1)), same_t(100, 3)
    with torch.no_grad():
        without, of = model.net(x, t), model.net(x, t, label)
        torch.testing.assert_close(net(x, t), without + guidance * (of - without))
        classes = mitigations.log_classes(model.data, model.schedule, model.device)
        assert classes is not None
        steered = mitigations.guided(net, model.schedule, classes, strength=1.0)
        late, early = (same_t(k, 3) for k in (20, 400))
        assert torch.equal(steered(x, early), net(x, early))
        assert not torch.equal(steered(x, late), net(x, late))
