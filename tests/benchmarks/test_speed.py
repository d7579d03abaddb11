"""What is timed against each other computes the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import speed

from tinyhall.core.metrics import TrajectoryVariance
from tinyhall.core.sampling import reverse
from tinyhall.core.schedule import Schedule
from tinyhall.datasets import GaussianMixture
from tinyhall.nets import MLP


def test_networks_side_by_side_train_as_each_would_alone() -> None:
    together = speed.side_by_side(3, 64)
    alone = [
        speed.plain_train(MLP(2, generator=speed.generator(s)), (2,), 64, speed.plain_scheduler(), speed.generator(s))
        for s in range(3)
    ]
    for _ in range(20):
        torch.testing.assert_close(together(), torch.tensor([step() for step in alone]), rtol=1e-3, atol=1e-4)


def test_both_ways_multiply_in_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, speed.Spec]] = []

    def rounds(specs: dict[str, speed.Spec], count: int, *_: object) -> dict[str, list[float]]:
        asked.append(specs)
        return {name: [1.0] * count for name in specs}

    monkeypatch.setattr(speed, "rounds", rounds)
    monkeypatch.setenv("TINYHALL_PRECISION", "bfloat16")  # as on a processor that gains by it
    rows = speed.measure_own(5, 1, quick=True)
    trained = [(specs["base"][3:], specs["training step"][5:]) for specs in asked if "training step" in specs]
    assert trained == [((), ()), ((True,), (True,))]  # in float32, and in bfloat16
    assert [r["products"] for r in rows if r["what"] == "training step"] == ["float32", "bfloat16"]
    assert all(True not in spec[3:] for specs in asked for spec in specs.values() if spec[0] == "one by one")
    halves = []
    for bf16 in (False, True):
        step = speed.plain_train(
            MLP(2, generator=speed.generator()), (2,), 64, speed.plain_scheduler(), speed.generator(), bf16
        )
        halves.append([step() for _ in range(3)])
    assert halves[0] != halves[1]
    torch.testing.assert_close(halves[0], halves[1], rtol=0.05, atol=0.01)


def test_what_a_gpu_is_timed_with_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BATCH", 40)
    monkeypatch.setattr(speed, "SMALL", 10)
    asked: list[speed.Spec] = []

    def rounds(specs: dict[str, speed.Spec], count: int, *_: object) -> dict[str, list[float]]:
        asked.extend(specs.values())
        return {way: [0.001 * (i + 1)] * count for i, way in enumerate(specs)}

    monkeypatch.setattr(speed, "rounds", rounds)
    told = speed.measure_gpu(Path("of the paper"), 5, torch.device("cpu"))
    page = speed._gpu_table({"gpu": told}).splitlines()
    head, *rows = (line.strip("|").split("|") for line in page if line.startswith("| "))
    assert len({len(row) for row in (head, *rows)}) == 1 and len(told["rows"]) == 7
    assert len(rows) == sum(len(row["ms"]) for row in told["rows"]) == len(asked)
    assert rows[0][1:] == [" eager ", " 1.00 ", " 1.0 ", " 4.0 "] and rows[3][1:4] == [" the paper's code ", " 4.00 ", " 0.2 "]
    assert speed._gpu_goals({row["what"]: row["ms"] for row in told["rows"]}) == []  # nothing was captured
    step = {"compiled, captured": 0.5, "the paper's code": 4.5}
    goals = speed._gpu_goals({f"training step, {dim}D, 40 points": step for dim in (1, 2)})
    steps = 3 * (7 * 50_000 + 3 * 100_000)  # of the line's models and of the plane's, three seeds
    assert "| 9.0 to 9.0 | no |" in goals[2] and f"| {steps * 0.5 / 60_000:.0f} minutes of training" in goals[3]
    assert goals[3].endswith("| no |") and "the 10 models" in goals[3]
    for kind, *rest in asked:
        if kind.startswith("paper."):
            assert callable(getattr(speed.Paper, kind.removeprefix("paper.")))
        elif kind != "train" or not rest[1]:  # compiling takes longer than all else here
            speed.WORKS[kind](*rest)()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="`make bench` runs on any machine")
def test_works_run_where_they_are_told() -> None:
    specs: dict[str, speed.Spec] = {"train": ("train", 2, False, 100), "floor": ("floor", 100, True, True)}
    for values in speed.rounds(specs, 2, None, 2, torch.device("cuda")).values():
        assert len(values) == 2 and min(values) > 0


def test_the_plain_loop_samples_and_scores_the_same() -> None:
    schedule, metric, k = Schedule.linear(timesteps=speed.STEPS), TrajectoryVariance(speed.WINDOW), speed.WINDOW[1]
    net = GaussianMixture.grid().denoiser(schedule)  # exact, so that states stay of the size of data
    ours = list(reverse(net, schedule, (64, 2), generator=speed.generator()))
    *plain, (x, total, squares) = speed.plain_reverse(net, (2,), 64, speed.plain_scheduler(), speed.generator(), window=k)
    for step in ours:
        metric.update(step)
    assert len(ours) == len(plain) + 1
    torch.testing.assert_close(ours[-1].x, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metric.score(), (squares / k - (total / k).square()).mean(1).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("work", [name for name in speed.WORKS if "whole" in name])
def test_the_whole_way_ends_in_a_finite_score_for_each_point(work: str) -> None:
    scores = speed.WORKS[work](5, 8, 100)()
    assert scores.shape == (8,) and bool(scores.isfinite().all())


def test_both_precisions_are_held_against_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setenv("TINYHALL_PRECISION", "float32")  # put back when the test ends
    rows = speed.precision(2, "smoke")
    assert [(r["seed"], r["precision"]) for r in rows] == [(s, p) for s in (0, 1) for p in ("float32", "bfloat16")]
    assert all(r["excess"] > 0 for r in rows)
    assert rows[0]["excess"] != rows[1]["excess"]
    assert speed._precision_table({"precision": rows}).count("\n") == 4 + 4
