"""The command line: bad input is one line on stderr and exit code 2; an experiment runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, environment, run_python

pytest.importorskip("tyro")

from tinyhall.__main__ import main
from tinyhall.lab.experiments import get
from tinyhall.store.files import read_tensors


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train", "line321"], ("experiment", "line321", "line123")),
        (["train", "line123", "--scale", "huge"], ("scale", "huge", "smoke, laptop, paper")),
        (["sample", "line123", "--scale", "smoke", "--n", "0"], ("n", "at least 1", "0")),
        (["sample", "line123", "--scale", "smoke", "--batch-size", "0"], ("batch_size", "at least 1", "0")),
        (["sample", "line123", "--scale", "smoke", "--sampler", "euler"], ("sampler", "euler", "large")),
        (["sample", "line123", "--scale", "smoke", "--out", "."], ("out", "a file", "'.'")),
        (["sample", "line123", "--scale", "smoke", "--out", "/"], ("out", "a file", "'/'")),
        (["sample", "line123", "--scale", "smoke", "--out", "/dev/null/x"], ("out", "a folder", "/dev/null/x")),
        (["train", "recursion", "--scale", "smoke"], ("experiment", "a single model", "reproduce")),
        (["train", "line123", "--scale", "smoke", "--device", "abacus"], ("device", "abacus", "cpu")),
    ],
)
def test_bad_input_exits_with_2(
    argv: list[str], parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for part in ("tinyhall: ", *parts):
        assert part in error
    assert not (tmp_path / "runs").exists()  # refused before anything is trained


@pytest.mark.parametrize(
    "argv", [["fly"], ["train"], ["train", "line123", "--steps", "5"], ["train", "line123", "--seed", "x"]]
)
def test_a_command_that_does_not_parse_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err


def test_exit_code_reaches_the_shell() -> None:
    done = run_python("-m", "tinyhall", "train", "line321")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tinyhall", "info"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=1800)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--root", str(tmp_path)])
    out = capsys.readouterr().out
    assert "line123" in out
    assert "torch" in out


def test_train_then_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None) -> None:
    common = ["line123", "--scale", "smoke", "--quiet", "--runs", str(tmp_path / "runs")]
    main(["train", *common])
    assert f"{get('line123', 'smoke').steps} steps" in capsys.readouterr().out
    drawn = []
    for n in (1, 2):
        main(["sample", *common, "--n", "40", "--sampler", "ddim-50", "--out", str(tmp_path / f"{n}")])
        drawn.append(read_tensors(tmp_path / f"{n}"))
    tensors, note = drawn[0]
    assert tensors["x"].shape == (40, 1)
    assert tensors["score"].shape == tensors["hallucinated"].shape == (40,)
    assert note["card"] == get("line123", "smoke").hash
    assert (tensors["x"] == drawn[1][0]["x"]).all()


@pytest.mark.slow
def test_reproduce_at_smoke_scale(tmp_path: Path) -> None:
    command = ("-m", "tinyhall", "reproduce", "line123", "--scale", "smoke", "--quiet")
    done = run_python(*command, "--runs", str(tmp_path / "runs"), "--root", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    place = tmp_path / "out" / "line123-smoke" / "seed0"
    info = json.loads((place / "card.json").read_text())
    assert info["hash"] == get("line123", "smoke").hash
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics["large"]["n"] == get("line123", "smoke").samples
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_reproduce_a_recursion_at_smoke_scale(tmp_path: Path) -> None:
    command = ("-m", "tinyhall", "reproduce", "recursion", "--scale", "smoke", "--quiet")
    command += ("--runs", str(tmp_path / "runs"), "--root", str(tmp_path / "out"))
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == ["none", "random-0.024", "variance-0.024"]
    again = run_python(*command)  # finds every generation made
    assert again.stdout == done.stdout
    changed = run_python(*command, "--seed", "1")
    assert changed.stdout != done.stdout
