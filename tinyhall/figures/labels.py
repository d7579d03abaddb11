"""Labels by eye: a figure to give them in, a file to keep them in, and how far two people agree."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..data.fingers import IN_SUPPORT, UNCLEAR, WRONG_COUNT, HandJudgement
from ..measure import stats
from ..store.files import write
from .widgets import Explorer, sprite

CHOICES = {"3": "3", "4": "4", "5": "5", "6+": "6", "unclear": "u"}  # label: key


class Agreement(NamedTuple):
    """How far two raters agree on the images that both have labelled."""

    n: int
    agree: stats.Estimate  # share of images with the same label
    kappa: float  # Cohen's: what of the agreement chance does not explain; NaN where both gave one and the same label only


def read_labels(path: str | Path) -> dict[int, str]:
    """The labels in a file that `Labeller` wrote: the image's number, and one of `CHOICES`.

    Raises:
        TinyhallError: no such file, no table in UTF-8, other columns, a label or a number that is none, or one image twice.
    """
    path = Path(path)
    if not path.is_file():
        raise _check.TinyhallError(f"path: expected a file of labels, got none at {path}")
    with path.open(newline="", encoding="utf-8") as file:
        try:
            head, *rows = list(csv.reader(file)) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise _check.TinyhallError(f"path: expected a table in UTF-8, got something else in {path} ({error})") from error
    if head != ["image", "label"]:
        raise _check.TinyhallError(f"path: expected the columns image and label, got others in {path}")
    found: dict[int, str] = {}
    for line, row in enumerate(rows, 2):
        if len(row) != 2 or not row[0].isdecimal() or row[1] not in CHOICES or int(row[0]) in found:
            raise _check.TinyhallError(
                f"path: expected a new image's number and one of {', '.join(CHOICES)}, got {row} in line {line} of {path}"
            )
        found[int(row[0])] = row[1]
    return found


def write_labels(path: str | Path, labels: Mapping[int, str]) -> None:
    """Writes labels as CSV, beside and renamed, so that the file is whole at any moment."""

    def fill(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "label"))
            writer.writerows(sorted(labels.items()))

    write(path, fill)


def judged(labels: Mapping[int, str]) -> tuple[Int[Tensor, " m"], HandJudgement]:
    """The labelled images' numbers, rising, and what was said of them in the words of `Hands.judge`: whatever takes the
    counter's verdict takes this. "6+" counts as 6, "unclear" as -1."""
    rows = sorted(labels)
    fingers = [{"6+": 6, "unclear": -1}.get(labels[row]) or int(labels[row]) for row in rows]
    kind = [UNCLEAR if k < 0 else IN_SUPPORT if k == 5 else WRONG_COUNT for k in fingers]
    return torch.tensor(rows, dtype=torch.int64), HandJudgement(*(torch.tensor(v, dtype=torch.int64) for v in (kind, fingers)))


def agreement(first: Mapping[int, str], second: Mapping[int, str]) -> Agreement:
    """Two raters, on the images that both have labelled.

    Raises:
        TinyhallError: no image in common.
    """
    both = sorted(set(first) & set(second))
    if not both:
        raise _check.TinyhallError(f"second: expected labels of images that the first has, too, got none of {len(second)}")
    n = len(both)
    same = sum(first[i] == second[i] for i in both)
    # By chance: both draw their labels independently, each as often as they gave them.
    chance = sum(sum(first[i] == c for i in both) * sum(second[i] == c for i in both) for c in CHOICES) / n**2
    kappa = (same / n - chance) / (1 - chance) if chance < 1 else float("nan")
    return Agreement(n, stats.fraction(same, n), kappa)


class Labeller(Explorer):
    """A grid of images to be labelled, one after another, by keys or buttons; z takes the last one back.

    In a live notebook every label is written to `path` at once, and a file found there is gone on with. In a page without a
    kernel it works as well, and keeps nothing.

    Args:
        images: float32 `[n, channels, size, size]` in -1..1.
        path: the CSV file, one for each rater; None keeps nothing.
    """

    def __init__(self, images: Float[Tensor, "n channels size size"], path: str | Path | None = None) -> None:
        _check.floats("images", images, ndim=4)
        self.path = None if path is None else Path(path)
        labels = read_labels(self.path) if self.path is not None and self.path.exists() else {}
        if labels and max(labels) >= len(images):
            raise _check.TinyhallError(
                f"path: expected labels of {len(images)} images, got one of image {max(labels)} in {path}"
            )
        data = {
            "choices": list(CHOICES.items()),
            "answers": [labels.get(i) for i in range(len(images))],
            "n": len(images),
            "zoom": max(192 // images.shape[-1], 1),
            **sprite(images),
        }
        still = (
            f"{len(images)} images to be labelled, {len(labels)} of which are. With JavaScript, keys and buttons label them."
        )
        super().__init__("label", data, still, state=("answers",))

    @property
    def labels(self) -> dict[int, str]:
        """What has been said so far."""
        answers = self.widget.answers if "widget" in self.__dict__ else self.data["answers"]  # do not make one to ask it
        return _labels(answers)

    @cached_property
    def widget(self) -> Any:
        """The same module under anywidget; what it says is written to `path`."""
        widget = super().widget
        if self.path is not None:
            path = self.path
            widget.observe(lambda change: write_labels(path, _labels(change["new"])), names="answers")
        return widget


def _labels(answers: Sequence[str | None]) -> dict[int, str]:
    return {i: answer for i, answer in enumerate(answers) if answer is not None}
