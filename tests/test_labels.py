"""Labels by eye: what is kept, what is refused, how raters agree, and the figure in which they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import one_line, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.data.fingers import IN_SUPPORT, UNCLEAR, WRONG_COUNT
from tinyhall.figures.labels import CHOICES, Labeller, agreement, judged, read_labels, write_labels

SAID = {0: "5", 3: "6+", 1: "unclear", 7: "4"}


def images(n: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=seeded()) * 2 - 1


def test_labels_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_labels(path, SAID)
    assert read_labels(path) == SAID
    assert path.read_text().splitlines() == ["image,label", "0,5", "1,unclear", "3,6+", "7,4"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.csv"]


def test_labels_speak_as_the_counter_does() -> None:
    rows, verdict = judged(SAID)
    assert rows.tolist() == [0, 1, 3, 7]
    assert verdict.kind.tolist() == [IN_SUPPORT, UNCLEAR, WRONG_COUNT, WRONG_COUNT]
    assert verdict.fingers.tolist() == [5, -1, 6, 4]
    rows, verdict = judged({})
    assert all(v.dtype == torch.int64 and len(v) == 0 for v in (rows, *verdict))


def test_agreement_is_scikit_learn_s() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    g = seeded(1)
    names = list(CHOICES)
    first = {i: names[int(k)] for i, k in enumerate(torch.randint(5, (60,), generator=g))}
    second = {i: (c if i % 3 else names[i % 5]) for i, c in first.items() if i != 11} | {99: "5"}
    told = agreement(first, second)
    both = [i for i in first if i in second]
    assert told.n == len(both) == 59
    assert told.kappa == pytest.approx(sklearn.cohen_kappa_score([first[i] for i in both], [second[i] for i in both]))
    assert told.agree.value == pytest.approx(sum(first[i] == second[i] for i in both) / 59)
    assert agreement(first, first).kappa == pytest.approx(1)
    assert agreement({0: "5"}, {0: "5"}).kappa != agreement({0: "5"}, {0: "5"}).kappa  # NaN: chance explains it all


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("number,label\n", ("columns image and label",)),
        ("", ("columns image and label",)),
        ("image,label\n0,five\n", ("'five'", "line 2")),
        ("image,label\n0,5\n0,4\n", ("line 3",)),
        ("image,label\n-1,5\n", ("line 2",)),
        ("image,label\n0\n", ("line 2",)),
    ],
)
def test_bad_files(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TinyhallError) as caught:
        read_labels(path)
    one_line(caught.value, "path", *parts)


@pytest.mark.parametrize("content", [b"image,label\n0,\xff\n", b"image,label\n\xe9", b"\xff\xfe"])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(TinyhallError) as caught:
        read_labels(tmp_path / "bad.csv")
    one_line(caught.value, "path", "UTF-8", "bad.csv")


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda to: read_labels(to / "none.csv"), ("path", "none.csv")),
        (lambda to: agreement(SAID, {50: "5"}), ("second", "got none of 1")),
        (lambda to: Labeller(images()[0]), ("images", "shape")),
    ],
)
def test_errors(tmp_path: Path, call: Any, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        call(tmp_path)
    one_line(caught.value, *parts)


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    write_labels(tmp_path / "mine.csv", {20: "5"})
    with pytest.raises(TinyhallError) as caught:
        Labeller(images(), tmp_path / "mine.csv")
    one_line(caught.value, "path", "8 images", "20")


def test_every_label_is_saved_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    first = Labeller(images(), path)
    assert first.labels == {}
    assert not path.exists()
    first.widget.answers = ["5", None, None, "4", None, None, None, None]
    assert read_labels(path) == first.labels == {0: "5", 3: "4"}
    first.widget.answers = ["5", *[None] * 7]  # undone
    assert read_labels(path) == {0: "5"}
    second = Labeller(images(), path)
    assert second.labels == {0: "5"}
    assert second.widget.answers[0] == "5"
    assert "1 of which are" in second.still


def test_it_is_used_with_mouse_and_keys(browser: Any) -> None:
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_content(f"<!doctype html><html><body>{Labeller(images()).html}</body></html>")
    told = page.locator("output")
    assert "0 of 8 labelled; now image 0" in told.text_content()
    page.get_by_role("button", name="5 [5]").click()
    page.keyboard.press("6")
    page.keyboard.press("u")
    assert "3 of 8 labelled; now image 3" in told.text_content()
    assert [page.get_by_role("button", name=f"image {i}:").text_content() for i in range(4)] == ["5", "6+", "unclear", ""]
    page.keyboard.press("z")
    page.get_by_role("button", name="undo [z]").click()
    assert "1 of 8 labelled; now image 1" in told.text_content()
    page.get_by_role("button", name="image 5:").press("Enter")
    page.keyboard.press("4")
    assert "2 of 8 labelled; now image 6" in told.text_content()
    for _ in range(9):  # more than there are: the last is labelled anew
        page.keyboard.press("3")
    assert "8 of 8 labelled" in told.text_content()
    assert wrong == []
    page.close()
