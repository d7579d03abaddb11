"""What an artifact says of itself, and what is said where it was made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from common import one_line

from tinyhall import cards, experiments
from tinyhall._check import TinyhallError


@pytest.mark.parametrize(
    ("metrics", "asked", "parts"),
    [
        ({"losses": [1.0], "large": {"fraction": {"5": [0.1, 0, 1, 9]}}}, ("larg",), ("sampler", "one of large", "'larg'")),
        ({"large": {"fraction": {"5": [0.1, 0, 1, 9]}}}, ("large", "7"), ("width", "one of 5", "'7'")),
        ({"arms": {"none": []}}, ("large",), ("sampler", "recursion", "'large'")),
    ],
)
def test_a_fraction_that_was_not_measured(metrics: dict, asked: tuple[str, ...], parts: tuple[str, ...]) -> None:
    made = experiments.Artifact(Path("nowhere"), cards.get("line123"), {}, metrics)
    with pytest.raises(TinyhallError) as caught:
        made.fraction(*asked)
    one_line(caught.value, *parts)
    if "large" in metrics:
        assert made.fraction("large").value == 0.1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_revision_is_of_the_package_and_not_of_what_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    place = tmp_path / "site-packages" / "experiments.py"
    place.parent.mkdir()
    place.touch()
    monkeypatch.setattr(experiments, "__file__", str(place))
    git("init", "-q")
    (tmp_path / ".gitignore").write_text("site-packages\n")
    git("add", ".gitignore")
    git("commit", "-qm", "another project")
    assert experiments.revision() == "unknown"
    git("add", "-f", "site-packages")
    git("commit", "-qm", "its own")
    assert len(found := experiments.revision()) == 12
    place.write_text("changed")
    assert experiments.revision() == found + "+"
