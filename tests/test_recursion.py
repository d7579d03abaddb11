"""Which samples a generation hands on, and the loop in which models learn from models."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from common import one_line, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.core.recursion import Lesson, generations, lowest_k, needed, select
from tinyhall.core.sampling import Samples


def drawn(n: int = 10) -> Samples:
    return Samples(torch.zeros(n, 1), {"score": torch.tensor([3.0, 1, 2, 0, 9, 8, 7, 6, 5, 4])[:n]})


def test_variance_drops_the_highest_scores() -> None:
    assert select(drawn(), "variance", 8, 0.2, seeded()).tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert select(drawn(), "variance", 4, 0.2, seeded()).tolist() == [0, 1, 2, 3]  # of the first five


def test_scores_that_overflow_are_no_filter() -> None:
    """All the same, they would drop the last: as "none" does."""
    for score in (torch.full((10,), math.inf), torch.full((10,), math.nan)):
        with pytest.raises(TinyhallError) as caught:
            select(Samples(torch.zeros(10, 1), {"score": score}), "variance", 8, 0.2, seeded())
        one_line(caught.value, "scores", "8 finite")


def test_none_keeps_the_first() -> None:
    assert select(drawn(), "none", 8, 0.2, seeded()).tolist() == list(range(8))


def test_random_drops_as_many_by_lot() -> None:
    kept = [tuple(select(drawn(), "random", 8, 0.2, seeded(s)).tolist()) for s in range(20)]
    assert all(len(set(k)) == 8 and list(k) == sorted(k) for k in kept)
    assert len(set(kept)) > 10
    assert kept[0] == tuple(select(drawn(), "random", 8, 0.2, seeded(0)).tolist())


def test_the_paper_s_share() -> None:
    assert needed(100_000, 2_500 / 102_500) == 102_500
    assert needed(7, 0.0) == 7


@pytest.mark.parametrize(
    ("arm", "keep", "drop", "parts"),
    [
        ("best", 5, 0.1, ("arm", "none, random, variance", "'best'")),
        ("variance", 5, 1.0, ("drop", "[0, 1)", "1.0")),
        ("variance", 5, -0.1, ("drop", "-0.1")),
        ("variance", 0, 0.1, ("keep", "at least 1")),
        ("variance", 10, 0.1, ("draw", "at least 11", "got 10")),
    ],
)
def test_select_errors(arm: str, keep: int, drop: float, parts: tuple[str, ...]) -> None:
    with pytest.raises(TinyhallError) as caught:
        select(drawn(), arm, keep, drop, seeded())
    one_line(caught.value, *parts)


def test_a_lot_needs_a_generator(unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        select(drawn(), "random", 8, 0.2, None)  # type: ignore[arg-type]
    one_line(caught.value, "generator", "torch.Generator", "None")


def test_variance_keeps_the_lowest_k() -> None:
    scores = drawn().scores["score"]
    assert torch.equal(select(drawn(), "variance", 8, 0.2, seeded()), lowest_k(scores, 8))


# The loop.


class Told:
    """Draws samples that say which generation they are of, labelled in turn; hands every second one on."""

    def __init__(self, labels: bool) -> None:
        self.labels = labels

    def draw(self, lesson: Lesson) -> Samples:
        x = lesson.number * 10 + torch.arange(8.0)[:, None]
        return Samples(x, {}, torch.arange(8) % 3 if self.labels else None)

    def choose(self, lesson: Lesson, drawn: Samples) -> torch.Tensor:
        return torch.arange(0, 8, 2)


REAL = torch.tensor([[1.0], [2.0], [3.0], [4.0]])


def lessons(count: int, label: torch.Tensor | None = None, **changes) -> list[Lesson]:
    told = Told(label is not None)
    return [
        lesson for lesson, _, _ in islice(generations(Lesson(1, REAL, label, None), told.draw, told.choose, **changes), count)
    ]


def test_a_lesson_is_what_the_last_generation_handed_on() -> None:
    first, second, third = lessons(3)
    assert [lesson.number for lesson in (first, second, third)] == [1, 2, 3]
    assert (first.data is REAL, first.kept) == (True, None)
    assert second.data[:, 0].tolist() == [10, 12, 14, 16]
    assert third.data[:, 0].tolist() == [20, 22, 24, 26]
    assert second.kept is not None and second.kept.tolist() == [0, 2, 4, 6]
    assert first.label is second.label is third.label is None


def test_labels_go_with_their_samples() -> None:
    first, second, third = lessons(3, torch.tensor([5, 6, 7, 8]))
    assert first.label is not None and first.label.tolist() == [5, 6, 7, 8]
    for later in (second, third):
        assert later.label is not None and later.label.tolist() == [0, 2, 1, 0]


def test_real_data_stand_in_the_place_of_as_many_samples() -> None:
    _, second, third = lessons(3, torch.tensor([5, 6, 7, 8]), real=3)
    assert second.data[:, 0].tolist() == [1, 2, 3, 10] and third.data[:, 0].tolist() == [1, 2, 3, 20]
    assert third.label is not None and third.label.tolist() == [5, 6, 7, 0]


def test_lessons_accumulate() -> None:
    _, second, third = lessons(3, torch.tensor([5, 6, 7, 8]), accumulate=True)
    assert second.data[:, 0].tolist() == [1, 2, 3, 4, 10, 12, 14, 16]
    assert third.data[:, 0].tolist() == [*second.data[:, 0].tolist(), 20, 22, 24, 26]
    assert third.label is not None and third.label.tolist() == [5, 6, 7, 8, *[0, 2, 1, 0] * 2]


def test_the_loop_makes_a_generation_when_it_is_asked_for() -> None:
    asked: list[int] = []
    told = Told(False)

    def draw(lesson: Lesson) -> Samples:
        asked.append(lesson.number)
        return told.draw(lesson)

    made = generations(Lesson(1, REAL, None, None), draw, told.choose)
    assert asked == []
    next(made)
    assert asked == [1]
    next(made)
    assert asked == [1, 2]
