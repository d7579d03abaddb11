"""Many samples of a model: drawn as `sample` draws them, scored over many windows, and what is kept of them."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from common import seeded

from tinyhall.core.metrics import TrajectoryVariance, spelled
from tinyhall.core.noise import Supply, stream
from tinyhall.core.sampling import SampleConfig, ddim, ddpm, reverse, sample
from tinyhall.core.schedule import Schedule
from tinyhall.data.images import local_maximum
from tinyhall.datasets import GaussianMixture, SimpleShapes
from tinyhall.lab import draws
from tinyhall.lab.draws import EDGES, WINDOWS, ImageDraw, PointDraw, detected, visited
from tinyhall.measure.filtering import detection
from tinyhall.measure.stats import fraction, fraction_by_kind
from tinyhall.nets import UNet

SCHEDULE = Schedule.linear(1e-4, 0.3, 60)


def network(size: int = 32) -> UNet:
    """Small, and no longer predicting 0."""
    net = UNet(size=size, widths=(8, 8), blocks=1, generator=seeded()).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=seeded(len(p)))
    return net


def test_fractions_by_kind_count_every_kind() -> None:
    told = fraction_by_kind(torch.tensor([0, 0, 2, 1, 1]), ("in support", "a", "b", "c"))
    assert {k: v.value for k, v in told.items()} == {"any": 0.6, "a": 0.4, "b": 0.2, "c": 0.0}
    assert all(v.n == 5 for v in told.values())


def drawn_images(n: int, seed: int = 0, sampler=ddpm("small")) -> ImageDraw:  # noqa: B008 (frozen)
    config = SampleConfig(sampler=sampler)
    return ImageDraw.make(network(), SimpleShapes(32), SCHEDULE, n, generator=stream(seed, "samples"), config=config)


def test_windows_hold_two_steps_at_least() -> None:
    schedule, every = Schedule.linear(1e-4, 0.02, 1000), list(combinations(EDGES, 2))

    def times(sampler) -> list[int]:
        return [c.t for c in sampler(schedule)]

    assert visited(every, times(ddpm())) == every and len(every) == 12 * 13 // 2
    ten = visited(every, times(ddim(sample_steps=10)))  # t = 0, 111, 222, ...
    assert (0, 10) not in ten
    assert (0, 200) in ten
    assert (100, 300) in ten


def test_the_paper_s_windows_are_scored() -> None:
    """Its text's on a line and in the plane, its appendix's with t = 8 and without it, and its code's."""
    assert {(0, 15), (0, 20), (0, 8), (0, 9), (0, 10)} <= set(WINDOWS)
    assert len(set(WINDOWS)) == len(WINDOWS)


@pytest.mark.parametrize(("bad", "good", "told"), [(20, 20, True), (19, 100, False), (100, 19, False)])
def test_a_detection_asks_for_twenty_of_a_kind(bad: int, good: int, told: bool) -> None:
    labels = torch.arange(bad + good) < bad
    score = torch.rand(bad + good, generator=seeded())
    found = detected(score, labels, 0.8)
    assert found == (detection(score, labels, 0.8)._asdict() if told else None)


def test_a_detection_takes_half_a_million_others_at_most() -> None:
    n = 520_000
    bad = torch.arange(n) % 5_000 == 4_999  # 104, the last of them behind the first half million
    score = torch.randn(n, generator=seeded()) + 2 * bad
    score[-4_000:] = torch.where(bad[-4_000:], score[-4_000:], -math.inf)  # of others, beyond what is taken
    first = int((~bad).nonzero()[499_999, 0]) + 1
    rows = torch.cat([torch.arange(first), first + bad[first:].nonzero()[:, 0]])
    assert int(bad[rows].sum()) == 104 and int((~bad[rows]).sum()) == 500_000
    found = detected(score, bad, 0.95)
    assert found == detection(score[rows], bad[rows], 0.95)._asdict()
    assert found["kept"].n == 500_104 and found["removed"].n == 104


def test_windows_end_where_the_schedule_does() -> None:
    assert max(b for _, b in drawn_images(2).windows) == 60
    assert drawn_points(50).windows == [*((0, end) for end in (2, 3, 5, 8, 9, 10, 15, 20, 50)), (10, 20), (20, 60)]


def test_a_draw_of_images_scores_as_the_metric_does() -> None:
    data, net, sampler = SimpleShapes(32), network(), ddpm("small", 30)
    drawn = drawn_images(6, 3, sampler)
    meters = [TrajectoryVariance(window) for window in drawn.windows]
    noise = Supply(6, 32 * 32, stream(3, "samples"), torch.device("cpu")).of(0, 6)
    for step in reverse(net, SCHEDULE, (6, 1, 32, 32), sampler=sampler, generator=noise):
        for meter in meters:
            meter.update(step)
    assert torch.equal(drawn.x, step.x)
    torch.testing.assert_close(drawn.mean, torch.stack([m.score() for m in meters], 1), rtol=1e-5, atol=1e-9)
    local = torch.stack([local_maximum(m.per_dimension(), 8) for m in meters], 1)
    torch.testing.assert_close(drawn.local, local, rtol=1e-5, atol=1e-9)
    assert bool((drawn.local >= drawn.mean * 0.999).all())
    assert torch.equal(drawn.verdict["kind"], data.judge(step.x).kind)


def test_traces_belong_to_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_IMAGES", 4)
    drawn = drawn_images(10)
    assert drawn.trace_t.tolist() == sorted(drawn.trace_t.tolist(), reverse=True)
    assert drawn.trace_t[-1] == 0
    # At t = 0 the sampler ends in what the network predicts.
    torch.testing.assert_close(drawn.traces[:, -1], drawn.x[drawn.trace_rows], rtol=1e-4, atol=1e-4)
    assert len(drawn.trace_rows.unique()) == len(drawn.trace_rows)


def test_report_and_tensors_of_images() -> None:
    drawn = drawn_images(8)
    assert drawn.report(0.95)["windows"] == {}  # too few for a threshold
    n = 400
    bad = torch.arange(n) % 4 == 0
    score = torch.where(bad, 2.0, 1.0)[:, None]
    fake = ImageDraw(
        drawn.kinds, drawn.x[:1].expand(n, -1, -1, -1), {"kind": bad.long()}, [(0, 10)], score, -score,
        drawn.trace_rows, drawn.trace_t, drawn.traces,
    )  # fmt: skip
    report = fake.report(0.8)
    assert report["fraction"]["any"].value == report["fraction"]["two of a shape"].value == 0.25
    assert report["windows"]["[0,10)"]["mean"]["auroc"].value == 1
    assert report["windows"]["[0,10)"]["mean"]["removed"].value == report["windows"]["[0,10)"]["mean"]["kept"].value == 1
    assert report["windows"]["[0,10)"]["local"]["auroc"].value == 0
    assert report["windows"]["[0,10)"]["local"] == detection(-score[:, 0], bad, 0.8)._asdict()
    fewer = drawn.tensors(3, pictures=1)
    assert (len(fewer["x"]), len(fewer["kind"]), len(fewer["log10_mean"]), len(fewer["traces"])) == (1, 3, 3, 0)
    kept = drawn.tensors(3)
    assert len(kept["x"]) == len(kept["kind"]) == len(kept["log10_mean"]) == 3
    assert bool((kept["trace_of"] < 3).all())
    assert len(kept["traces"]) == len(kept["trace_of"])
    assert kept["x"].dtype == torch.uint8


# Points.

LINE = GaussianMixture.line((-1.0, 1.0), std=0.1)
WIDE = GaussianMixture(LINE.means, 0.25)  # a model whose modes are too wide, so that a few in a hundred are hallucinated


def drawn_points(n: int, sampler=ddpm()) -> PointDraw:  # noqa: B008 (frozen)
    config = SampleConfig(sampler=sampler)
    return PointDraw.make(WIDE.denoiser(SCHEDULE), LINE, SCHEDULE, n, generator=stream(3, "samples"), config=config)


def test_a_draw_of_points_is_that_of_sample() -> None:
    drawn, meters = drawn_points(700), [TrajectoryVariance(w) for w in ((0, 10), (20, 60))]
    plain = sample(WIDE.denoiser(SCHEDULE), SCHEDULE, 700, shape=(1,), metrics=meters, generator=stream(3, "samples"))
    assert torch.equal(drawn.x, plain.x)
    for window in ((0, 10), (20, 60)):
        score = drawn.scores[:, drawn.windows.index(window)]
        torch.testing.assert_close(score, plain.scores[f"variance{spelled(window)}"], rtol=1e-5, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(drawn.verdict, LINE.judge(plain.x), strict=True))


def test_points_do_not_depend_on_the_parts_they_are_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn_points(700)
    monkeypatch.setattr(draws, "_POINTS", 150)
    parts = drawn_points(700)
    assert torch.equal(whole.x, parts.x)
    assert torch.equal(whole.scores, parts.scores)
    assert len(parts.trace_rows) == len(parts.trace_rows.unique())
    bad = (parts.verdict.kind != 0).nonzero()[:, 0]
    assert torch.equal(parts.trace_rows[: len(bad)], bad)  # from all parts, before the others
    for drawn in (whole, parts):
        assert drawn.traces.shape[1:] == (60, 1)
        torch.testing.assert_close(drawn.traces[:, -1], drawn.x[drawn.trace_rows], rtol=1e-4, atol=1e-4)


def test_report_and_tensors_of_points() -> None:
    drawn = drawn_points(4_000)
    report, kept = drawn.report(0.9), drawn.tensors()
    distance = LINE.judge(drawn.x).distance
    assert {w: e.value for w, e in report["fraction"].items()} == {
        w: float((distance > float(w)).double().mean()) for w in ("4", "5", "6", "8")
    }
    assert list(report["windows"]) == [spelled(window) for window in drawn.windows]
    score, bad = drawn.scores[:, drawn.windows.index((0, 10))], distance > 5
    assert report["windows"]["[0,10)"]["5"] == detection(score, bad, 0.9)._asdict()
    assert "8" not in report["windows"]["[0,10)"]  # fewer than twenty
    assert fraction(int((distance > 8).sum()), 4_000) == report["fraction"]["8"]
    assert len(kept["x"]) == len(kept["log10_scores"]) == len(kept["distance"]) == 4_000
    assert kept["windows"].tolist() == [list(window) for window in drawn.windows]
    count = int((kept["kind"] != 0).sum())
    assert bool((kept["kind"][:count] != 0).all())  # the hallucinated first
    rows = kept["trace_of"]
    at = rows >= 0
    torch.testing.assert_close(kept["x"][rows[at]], drawn.x[drawn.trace_rows[at]])
    assert int(kept["counts"].sum()) == int(((drawn.x > kept["edges"][0]) & (drawn.x < kept["edges"][-1])).sum())
