"""Generations on disk: what each leaves, that a broken-off run ends as an unbroken one, and what is said of them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import ROOT, environment, one_line, same_bits, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import TrajectoryVariance
from tinyhall.core.noise import stream
from tinyhall.core.recursion import ARMS, needed, select
from tinyhall.core.sampling import ddim, ddpm
from tinyhall.core.schedule import Schedule
from tinyhall.datasets import GaussianMixture
from tinyhall.lab import experiments
from tinyhall.lab.artifact import histories
from tinyhall.lab.chains import Oracle
from tinyhall.lab.experiment import SCALES, Lab
from tinyhall.lab.reproduce import reproduce
from tinyhall.lab.summary import generation_summary, of_points, refit
from tinyhall.measure.density import exact_std
from tinyhall.measure.stats import fraction
from tinyhall.store.checkpoint import fingerprint
from tinyhall.store.files import read_json, read_tensors, write_json, write_tensors
from tinyhall.store.generations import Generation, recurse

QUICK = Schedule.linear(1e-3, 0.3, 60)
DATA = GaussianMixture.line((-1.0, 1.0), std=0.1).sample(80, seeded(3))


def exact(data: torch.Tensor, generation: int, checkpoint: Path):
    """A model that needs no training: the mixture of two modes at the data's own places."""
    low, high = data[data < 0].double(), data[data >= 0].double()
    means = torch.stack([low.mean(), high.mean()])[:, None]
    return GaussianMixture(means, max(float(high.std()), 1e-3)).denoiser(QUICK)


def run(folder: Path, learn=exact, **changes) -> list[Generation]:
    arguments = {"arm": "variance", "drop": 0.2, "generations": 3, "seed": 5} | changes
    return list(recurse(DATA, learn, QUICK, folder=folder, **arguments))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# The loop, and what it leaves.


@pytest.mark.parametrize("arm", ARMS)
def test_each_generation_learns_from_what_was_kept(arm: str, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        assert generation == len(seen) + 1
        seen.append(data)
        return exact(data, generation, checkpoint)

    made = run(tmp_path, learn, arm=arm)
    assert [m.number for m in made] == [1, 2, 3]
    assert torch.equal(seen[0], DATA)
    for before, data in zip(made, seen[1:], strict=False):
        samples = before.samples()
        assert len(samples) == (80 if arm == "none" else 100)
        kept = select(samples, arm, 80, 0.2, stream(5, f"lot/{before.number}"))
        assert torch.equal(before.kept, kept)
        assert torch.equal(data, samples.x[kept])


def test_states_allow_an_audit(tmp_path: Path) -> None:
    made = run(tmp_path, evaluate=lambda s: {"mean": float(s.x.mean())})
    for number, (this, before) in enumerate(zip(made, [None, *made], strict=False), start=1):
        state = read_json(this.folder / "state.json")
        assert (state["generation"], state["seed"]) == (number, 5)
        assert state["drew"] == fingerprint(this.samples().x)
        assert state["metrics"] == this.metrics == {"mean": float(this.samples().x.mean())}
        if before is None:
            assert (state["learned_from"], state["kept"]) == (fingerprint(DATA), None)
            continue
        indices = select(before.samples(), "variance", 80, 0.2, seeded())
        assert state["learned_from"] == fingerprint(before.samples().x[indices])
        assert state["kept"] == hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]


def test_metrics_are_those_of_the_file_from_the_first(tmp_path: Path) -> None:
    first, again = (run(tmp_path, evaluate=lambda s: {"share": fraction(1, 3), "by": {5: 1}}) for _ in range(2))
    assert [repr(made.metrics) for made in first] == [repr(made.metrics) for made in again]
    assert first[0].metrics == {"share": list(fraction(1, 3)), "by": {"5": 1}}


class Place:
    """Scores a sample by where it lies, as `kind` has it."""

    name = "place"

    def __init__(self, kind) -> None:
        self.kind = kind

    def check(self, schedule: Schedule, times: list[int]) -> None: ...

    def reset(self) -> None: ...

    def update(self, step) -> None:
        self.x = step.x

    def score(self) -> torch.Tensor:
        return self.kind(self.x[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scores_of_any_floating_type_are_kept_in_that_of_the_samples(dtype: torch.dtype, tmp_path: Path) -> None:
    made = run(tmp_path, metric=Place(lambda x: x.to(dtype)))
    assert next(iter(made[0].samples().scores.values())).dtype == torch.float32
    again = run(tmp_path, never, metric=Place(lambda x: x.to(dtype)))
    assert [g.kept.tolist() for g in again] == [g.kept.tolist() for g in made]


@pytest.mark.parametrize("kind", [torch.Tensor.long, lambda x: x[:, None], lambda x: x * math.nan])
def test_scores_that_are_none_are_refused_before_they_are_kept(kind, tmp_path: Path, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, metric=Place(kind))
    one_line(caught.value, "metric place", "floating score of shape [100]")
    assert list(files(tmp_path)) == ["recursion.json"]


def test_the_first_generation_is_shared(tmp_path: Path) -> None:
    calls: list[int] = []

    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        calls.append(generation)
        return exact(data, generation, checkpoint)

    for arm in ARMS:
        run(tmp_path, learn, arm=arm, draw=100)
    assert calls == [1, 2, 3, 2, 3, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "none-80", "random-100", "recursion.json", "variance-100"]


def test_the_filter_is_the_metric_s(tmp_path: Path) -> None:
    late = run(tmp_path / "a", metric=TrajectoryVariance((0, 3)))
    assert list(late[0].samples().scores) == ["variance[0,3)"]
    early = run(tmp_path / "b", metric=TrajectoryVariance((30, 60)))
    assert torch.equal(late[0].samples().x, early[0].samples().x)
    assert not torch.equal(late[1].samples().x, early[1].samples().x)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)

    def never(*_):
        raise AssertionError("trained again")

    run(tmp_path, never)
    assert files(tmp_path) == before
    longer = run(tmp_path, generations=4)
    assert files(tmp_path).items() > before.items()
    assert longer[3].number == 4


@pytest.mark.parametrize("point", ["1", "variance-100/2", "variance-100/3"])
@pytest.mark.parametrize("lost", [("state.json",), ("state.json", "samples.safetensors")])
def test_an_unfinished_generation_is_made_to_the_same_bits(point: str, lost: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path)
    whole = files(tmp_path)
    for name in lost:
        (tmp_path / point / name).unlink()
    run(tmp_path)
    assert files(tmp_path) == whole


def test_two_processes_do_not_make_one_generation(tmp_path: Path) -> None:
    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        with pytest.raises(TinyhallError) as caught:
            run(tmp_path)  # locks are of open files: a process is no exception
        one_line(caught.value, str(checkpoint.parent.parent), "another process")
        return exact(data, generation, checkpoint)

    run(tmp_path, learn)
    run(tmp_path / "alone")
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith("alone")} == files(tmp_path / "alone")
    arms = [recurse(DATA, exact, QUICK, folder=tmp_path / "arms", arm=arm, draw=96) for arm in ("none", "random")]
    assert len(list(zip(*arms, strict=True))) == 5  # arms may advance side by side


# Errors: nothing lost, one line.


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": 6}, ("seed", "expected 5", "got 6")),
        ({"note": "another card"}, ("note", "another card")),
        ({"draw": 120}, ("draw", "expected 100", "got 120")),
        ({"metric": TrajectoryVariance((0, 5))}, ("metric", "variance[0,10)", "variance[0,5)")),
        ({"sampler": ddpm("small")}, ("sampler", "60 moves")),
        ({"sampler": ddim(sample_steps=10)}, ("sampler", "10 moves")),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes: dict, parts: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, **changes)
    one_line(caught.value, *parts)
    assert files(tmp_path) == before


def test_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(TinyhallError) as caught:
        list(recurse(DATA + 1, exact, QUICK, folder=tmp_path, drop=0.2, seed=5))
    one_line(caught.value, "data", "sha256")


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(TinyhallError) as caught:
        list(recurse(DATA, exact, Schedule.linear(1e-3, 0.4, 60), folder=tmp_path, drop=0.2, seed=5))
    one_line(caught.value, "schedule", "linear(0.001, 0.4, 60)")


def spoil_samples(place: Path) -> None:
    tensors, note = read_tensors(place / "samples.safetensors")
    tensors["x"][7] += 1
    write_tensors(place / "samples.safetensors", tensors, note)


def cut_samples(place: Path) -> None:
    path = place / "samples.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(place: Path, change) -> None:
    tensors, note = read_tensors(place / "samples.safetensors")
    score = tensors.pop("score.variance[0,10)")
    write_tensors(place / "samples.safetensors", tensors | change(score), note)


def rename_tensor(place: Path) -> None:
    tensors, note = read_tensors(place / "samples.safetensors")
    tensors["y"] = tensors.pop("x")
    write_tensors(place / "samples.safetensors", tensors, note)


def swap_origin(place: Path) -> None:
    state = read_json(place / "state.json")
    write_json(place / "state.json", state | {"learned_from": "elsewhere"})


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_samples, ("samples", "sha256")),
        (cut_samples, ("whole safetensors file",)),
        (rename_tensor, ("samples", "tensor x")),
        (lambda place: rewrite(place, lambda score: {}), ("samples", "a score for each")),
        (lambda place: rewrite(place, lambda score: {"score.variance[0,10)": score[1:]}), ("samples", "a score for each")),
        (
            lambda place: rewrite(place, lambda score: {"score.variance[0,10)": score * math.nan}),
            ("samples", "a score for each"),
        ),
        (
            lambda place: rewrite(place, lambda score: {"score.variance[0,5)": score}),
            ("scores variance[0,10)", "variance[0,5)"),
        ),
        (lambda place: (place / "samples.safetensors").unlink(), ("expected a file", "samples.safetensors")),
        (swap_origin, ("learned_from", "elsewhere")),
        (lambda place: (place / "state.json").write_text("[]"), ("state of a generation",)),
        (lambda place: (place / "state.json").write_text("{"), ("JSON",)),
    ],
)
def test_damage_is_named(spoil, parts: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path)
    spoil(tmp_path / "variance-100" / "2")
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path)
    one_line(caught.value, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"arm": "best"}, ("arm", "none, random, variance")),
        ({"drop": 1.0}, ("drop", "1.0")),
        ({"draw": 99}, ("draw", "at least 100", "got 99")),
        ({"draw": 0}, ("draw", "at least 1")),
        ({"generations": 0}, ("generations", "at least 1")),
        ({"metric": TrajectoryVariance((0, 61))}, ("window", "60")),
    ],
)
def test_bad_arguments_leave_nothing(changes: dict, parts: tuple[str, ...], tmp_path: Path, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path / "new", **changes)
    one_line(caught.value, *parts)
    assert not (tmp_path / "new").exists()


# An experiment, run from end to end; a killed one.

SMALL = {"steps": 20, "timesteps": 60, "beta_end": 0.3, "n": 200, "draw": 205, "generations": 3}
SMOKE = dataclasses.replace(experiments.get("recursion", "smoke"), **SMALL)
SCRIPT = f"""
import dataclasses, sys
from pathlib import Path
import torch
from tinyhall.lab import experiments
from tinyhall.lab.experiment import Lab
experiment = dataclasses.replace(experiments.get("recursion", "smoke"), **{SMALL!r})
place = Path(sys.argv[1])
experiment.make(Lab(1, place / "root", place / "runs", torch.device("cpu"), False), (), (0, None))
"""


def made_in(place: Path, experiment=SMOKE) -> dict:
    """An experiment that is not the one of its name makes no artifact: what `reproduce` has it do, without that."""
    return experiment.make(Lab(1, place / "root", place / "runs", torch.device("cpu"), False), (), (0, None))


def test_a_killed_recursion_ends_in_the_same_bits(tmp_path: Path) -> None:
    made_in(tmp_path / "whole")
    whole = files(tmp_path / "whole" / "runs")
    place = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place)], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    # In the middle of the first arm: its second generation has begun, the third is not done.
    while not (place / "runs" / "recursion-smoke" / "seed1" / "none-200" / "2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "root").exists()
    made_in(place)
    ours = files(place / "runs")
    assert ours.keys() == whole.keys()
    for name in whole:
        if not name.endswith("checkpoint.safetensors"):  # a checkpoint holds its wall time
            assert ours[name] == whole[name], name
        else:
            a = read_tensors(place / "runs" / name)[0]
            assert same_bits(a, read_tensors(tmp_path / "whole" / "runs" / name)[0])
    assert not list(place.rglob("*.part"))


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    command = ["recursion", "--scale", "smoke", "--quiet", "--runs", str(tmp_path / "runs"), "--root", str(tmp_path / "root")]
    limited = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a checkpoint is larger
from tinyhall.__main__ import main
main(["reproduce", *{command!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", limited], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "checkpoint.safetensors" in done.stderr
    assert [Path(name).name for name in files(tmp_path)] == ["recursion.json"]
    experiment = experiments.get("recursion", "smoke")
    made = reproduce(experiment, 0, root=tmp_path / "root", runs=tmp_path / "runs", progress=False)
    assert len(made.metrics["arms"]["none"]) == 3


def test_a_changed_experiment_is_named(tmp_path: Path) -> None:
    made_in(tmp_path)
    before = files(tmp_path)
    other = dataclasses.replace(SMOKE, lr=2e-3)
    with pytest.raises(TinyhallError) as caught:
        made_in(tmp_path, other)
    one_line(caught.value, f"card {SMOKE.training_hash}", f"card {other.training_hash}")
    assert files(tmp_path) == before


def test_a_recursion_is_not_one_model_to_train(tmp_path: Path) -> None:
    with pytest.raises(TinyhallError) as caught:
        SMOKE.trained(Lab(0, tmp_path, tmp_path, torch.device("cpu")))
    one_line(caught.value, "experiment", "recursion", "reproduce")
    assert not list(tmp_path.iterdir())


def test_reading_a_generation_by_hand() -> None:
    line = GaussianMixture.line((0, 1, 2), std=0.01)
    x = torch.tensor([[0.0], [0.01], [0.07], [1.0]])
    said = generation_summary(of_points(line, x))
    assert said["hallucinated"] == 0.25
    assert said["beyond 8 std"] == 0
    assert said["modes alive"] == 2
    assert said["imbalance"] == pytest.approx(0.5 * (0.75 - 1 / 3 + 1 / 3 - 0.25 + 1 / 3))
    assert said["width"] == pytest.approx(0.5**0.5, rel=1e-4)  # of 0 and 0.01; the third is too far off, the mode at 1 alone
    assert all(math.isnan(said[key]) for key in ("handed on", "AUROC", "distance"))


def test_recursion_experiments() -> None:
    experiment = experiments.get("recursion", "paper")
    assert (experiment.n, experiment.draw, experiment.generations, experiment.steps) == (100_000, 102_500, 5, 100_000)
    assert experiment.arms == (("none", 0.0), ("random", 2_500 / 102_500), ("variance", 2_500 / 102_500))
    assert all(needed(100_000, drop) <= experiment.draw for _, drop in experiment.arms)
    for name in ("recursion", "recursion-sweep", "recursion-oracle", "recursion-fine"):
        for scale in SCALES:
            one = experiments.get(name, scale)
            assert one.draw == max(needed(one.n, drop) for _, drop in one.arms) or scale == "paper"
    longer = dataclasses.replace(experiment, generations=7, arms=(("none", 0.0),), draw=100_000)
    assert longer.training_hash == experiment.training_hash
    assert dataclasses.replace(experiment, window=(0, 5)).training_hash != experiment.training_hash


def test_an_artifact_of_a_recursion(tmp_path: Path) -> None:
    experiment = experiments.get("recursion", "smoke")
    made = reproduce(experiment, 0, root=tmp_path / "root", runs=tmp_path / "runs", progress=False)
    assert list(made.metrics["arms"]) == ["none", "random-0.024", "variance-0.024"]
    for name, history in made.metrics["arms"].items():
        assert len(history) == 3
        assert history[0]["fraction"] == made.metrics["arms"]["none"][0]["fraction"]  # the first generation is shared
        for number, figures in enumerate(history, start=1):
            x = made.samples("arms")[f"{name}.{number}"].float()
            assert x.shape == (512, 2)
            share = float((~experiment.data().in_support(x)).float().mean())
            assert figures["fraction"]["6"][0] == pytest.approx(
                share, abs=0.01
            )  # half precision moves a point across the border
            assert figures["passed_on"][3] == 500
            assert figures["distance"] > made.metrics["distance_floor"] > 0
    told = histories("recursion", "smoke", tmp_path / "root")
    assert list(told) == list(made.metrics["arms"])
    for name, history in made.metrics["arms"].items():
        assert told[name]["hallucinated"].tolist() == [[m["fraction"]["6"][0] for m in history]]
        assert told[name]["handed on"].tolist() == [[m["passed_on"][0] for m in history]]
    with pytest.raises(TinyhallError) as caught:
        histories("recursion", "laptop", tmp_path / "root")
    one_line(caught.value, "artifact", "recursion", "laptop")


def test_the_exact_denoiser_narrows_each_generation_as_the_closed_form_says(tmp_path: Path) -> None:
    grid = GaussianMixture.grid()
    schedule = Schedule.linear()

    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        return refit(grid, data).denoiser(schedule)

    std = grid.std
    for made in recurse(
        grid.sample(2_000, seeded()), learn, schedule, folder=tmp_path, arm="none", generations=3, seed=1, sampler=ddpm("large")
    ):
        std = exact_std(std, schedule)
        said = of_points(grid, made.samples().x)
        assert said["fraction"]["5"][0] == said["fraction"]["6"][0] == 0  # no hallucination, and yet
        # What a generation is off by, the next enlarges: the narrower, the steeper.
        assert sum(said["std_ratio"]) / 25 * grid.std == pytest.approx(std, rel=0.03 if made.number < 3 else 0.1)
    assert std < 0.1 * grid.std


def test_the_oracle_drops_the_hallucinated_and_no_others(tmp_path: Path) -> None:
    line = GaussianMixture.line((-1.0, 1.0), std=0.1)
    wide = GaussianMixture(line.means, 0.3)  # a model whose modes are three times too wide
    seen: list[torch.Tensor] = []

    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        seen.append(data)
        return wide.denoiser(QUICK)

    first, _ = recurse(DATA, learn, QUICK, folder=tmp_path, drop=0.3, generations=2, metric=Oracle(line), arm="variance")
    x = first.samples().x
    inside = line.in_support(x)
    assert 0.01 < float((~inside).float().mean()) < 0.3
    assert torch.equal(seen[1], x[inside][:80])


def test_refit_finds_the_mixture() -> None:
    grid = GaussianMixture.grid(side=3)
    shifted = GaussianMixture(grid.means + 0.5 * grid.std, 0.7 * grid.std)
    found = refit(grid, shifted.sample(90_000, seeded()))
    assert found.std == pytest.approx(0.7 * grid.std, rel=0.01)
    assert float((found.means - shifted.means).abs().max()) < 0.02 * grid.std
    few = refit(grid, grid.sample(900, seeded())[::9])  # every ninth point: one mode alone
    assert len(few.means) == 1
    with pytest.raises(TinyhallError) as caught:
        refit(grid, torch.full((10, 2), 50.0))
    one_line(caught.value, "x", "points near the modes")


def test_figures_equal_a_count_by_hand() -> None:
    line = GaussianMixture.line((1, 2, 4))
    x = torch.tensor([[1.0], [1.1], [1.49], [2.0], [2.1], [2.99], [3.1], [9.0]])
    said = of_points(line, x)
    assert said["fraction"]["6"][0] == said["fraction"]["5"][0] == 4 / 8
    assert said["interpolated"][0] == 3 / 8
    assert said["pairs"] == {"0-1": 1, "1-2": 2}
    assert said["share"] == [3, 3, 2]
    assert said["std_ratio"][0] == pytest.approx(0.1 / 2**0.5 / 0.05, rel=1e-4)
    assert said["offset"][0] == pytest.approx(1.0, rel=1e-4)
    assert said["std_ratio"][2] is None
    assert said["offset"][2] is None


# Classes.


LABELS = (DATA[:, 0] >= 0).long()


class OneModeEach:
    """Knows that class 0 lies at -1 and class 1 at 1; without a class, or with -1, it knows neither."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        places = torch.zeros(len(x)) if label is None else torch.tensor([-1.0, 1.0])[label]
        bar = QUICK.alpha_bar[t][:, None].float()
        return (x - bar.sqrt() * places[:, None]) / (1 - bar).sqrt()


def never(*_: object) -> OneModeEach:
    raise AssertionError("what is there is not learned again")


@pytest.mark.parametrize("arm", ARMS)
def test_each_sample_is_learned_under_the_class_it_was_asked_for(arm: str, tmp_path: Path) -> None:
    told = []

    def learn(data: torch.Tensor, generation: int, checkpoint: Path, label: torch.Tensor) -> OneModeEach:
        told.append((data, label))
        return OneModeEach()

    made = run(tmp_path, learn, arm=arm, label=LABELS, draw=110)
    assert torch.equal(told[0][1], LABELS)
    for data, label in told[1:]:
        assert torch.equal((data[:, 0] > 0).long(), label)
    drawn = made[0].samples()
    assert drawn.label is not None
    assert torch.equal(drawn.label, LABELS[torch.arange(110) % 80])
    assert torch.equal(told[1][1], drawn.label[made[0].kept])
    before = files(tmp_path)
    assert [g.kept.tolist() for g in run(tmp_path, never, arm=arm, label=LABELS, draw=110)] == [g.kept.tolist() for g in made]
    assert files(tmp_path) == before


def test_guidance_reaches_the_sampler(tmp_path: Path) -> None:
    made = run(tmp_path, lambda *_: OneModeEach(), label=LABELS, guidance=3.0, arm="none", generations=1)
    place = made[0].samples().x[:, 0].abs().mean()
    assert float(place) == pytest.approx(3, abs=0.1)  # 0 + 3 (1 - 0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"label": LABELS[:5]}, ("label", "int64 of shape [80]")),
        ({"label": LABELS.int()}, ("label", "int64 of shape [80]")),
        ({"guidance": 2.0}, ("guidance", "label")),
        ({"label": LABELS, "guidance": "2"}, ("guidance", "finite number", "'2'")),
        ({"label": LABELS, "guidance": math.nan}, ("guidance", "finite number", "nan")),
    ],
)
def test_labels_that_do_not_fit(changes: dict, parts: tuple[str, ...], tmp_path: Path, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, lambda *_: OneModeEach(), **changes)
    one_line(caught.value, *parts)
    assert not files(tmp_path)


def test_a_window_that_the_sampler_skips_is_refused(tmp_path: Path) -> None:
    for arm in ARMS:  # all score their samples, also those that do not filter by it
        with pytest.raises(TinyhallError) as caught:
            run(tmp_path, sampler=ddim(sample_steps=4), metric=TrajectoryVariance((0, 10)), arm=arm)
        one_line(caught.value, "window", "2 steps", "got 1 with t in [0,10)")
        assert not files(tmp_path)
    run(tmp_path, sampler=ddim(sample_steps=4), metric=TrajectoryVariance((0, 30)), generations=1)


def test_a_folder_knows_its_labels(tmp_path: Path) -> None:
    run(tmp_path, lambda *_: OneModeEach(), label=LABELS, generations=1)
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, lambda *_: OneModeEach(), label=1 - LABELS, generations=1)
    one_line(caught.value, "label")
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, lambda *_: OneModeEach(), label=LABELS, guidance=2.0, generations=1)
    one_line(caught.value, "guidance")
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, generations=1)
    one_line(caught.value, "label", "(80,) sha256", "got None")
    run(tmp_path / "none", generations=1)
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path / "none", lambda *_: OneModeEach(), label=LABELS, generations=1)
    one_line(caught.value, "label", "expected None", "(80,) sha256")


class Elsewhere(torch.Tensor):
    """Stands for a tensor of another device."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_data_of_another_device_are_brought_here(tmp_path: Path) -> None:
    def learn(data: torch.Tensor, generation: int, checkpoint: Path, label: torch.Tensor) -> OneModeEach:
        assert type(data) is type(label) is torch.Tensor and not data.requires_grad
        return OneModeEach()

    data, label = DATA.clone().as_subclass(Elsewhere).requires_grad_(), LABELS.as_subclass(Elsewhere)
    for accumulate in (False, True):
        there = recurse(data, learn, QUICK, folder=tmp_path / "there", label=label, accumulate=accumulate, seed=5, drop=0.2)
        assert len(list(there)) == 5
        run(tmp_path / "here", learn, label=LABELS, accumulate=accumulate, generations=5)
    assert files(tmp_path / "there") == files(tmp_path / "here")


def seen_by(folder: Path, **changes) -> list[torch.Tensor]:
    """What each generation learned from."""
    seen: list[torch.Tensor] = []

    def learn(data: torch.Tensor, generation: int, checkpoint: Path):
        seen.append(data)
        return exact(data, generation, checkpoint)

    made = run(folder, learn, **changes)
    return [*seen, *[m.samples().x for m in made]]


def test_real_data_take_the_place_of_samples(tmp_path: Path) -> None:
    first, second, third, drawn1, drawn2, _ = seen_by(tmp_path, arm="none", real=0.25)
    assert torch.equal(first, DATA)
    assert torch.equal(second, torch.cat([DATA[:20], drawn1[:60]]))
    assert torch.equal(third, torch.cat([DATA[:20], drawn2[:60]]))
    assert (tmp_path / "none-80-real20" / "3" / "state.json").exists()


def test_all_that_came_before_accumulates(tmp_path: Path) -> None:
    first, second, third, drawn1, drawn2, _ = seen_by(tmp_path, accumulate=True)
    keep = [made.kept for made in run(tmp_path, accumulate=True)]
    assert torch.equal(second, torch.cat([first, drawn1[keep[0]]]))
    assert torch.equal(third, torch.cat([second, drawn2[keep[1]]]))
    assert (len(second), len(third)) == (160, 240)


def test_mixing_narrows_as_the_closed_form_says(tmp_path: Path) -> None:
    """Variances mix: v becomes (1 - r) s(v)^2 + r v0, where s is the exact denoiser's width after one generation."""
    mixture, r = GaussianMixture.line((-1.0, 1.0), std=0.1), 0.3
    data = mixture.sample(20_000, seeded(1))

    def learn(x: torch.Tensor, generation: int, checkpoint: Path):
        return refit(mixture, x).denoiser(QUICK)

    made = list(recurse(data, learn, QUICK, folder=tmp_path, arm="none", generations=3, real=r))
    variance = mixture.std**2
    for generation in made:
        width = exact_std(variance**0.5, QUICK, ddpm())
        x = generation.samples().x
        assert float((x - x.sign()).std()) == pytest.approx(width, rel=0.03)
        variance = (1 - r) * width**2 + r * mixture.std**2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"real": 1.0}, ("real", "[0, 1)")),
        ({"real": -0.1}, ("real", "[0, 1)")),
        ({"real": 0.1, "accumulate": True}, ("real", "0 beside accumulate")),
    ],
)
def test_bad_mixtures(changes: dict, parts: tuple[str, ...], tmp_path: Path, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        run(tmp_path, **changes)
    one_line(caught.value, *parts)
    assert not list(tmp_path.iterdir())
