"""Drawn hands: seeded, varied, and countable; what is made wrong is seen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import one_line, run_python, seeded
from PIL import Image, ImageDraw

from tinyhall.core._check import TinyhallError
from tinyhall.data.fingers import DETACHED, IN_SUPPORT, KINDS, MERGED, UNCLEAR, WRONG_COUNT, finger_tips
from tinyhall.data.hands import HandPhotos, Hands
from tinyhall.data.images import quantised, restored
from tinyhall.lab import experiments, pictures
from tinyhall.lab.reproduce import reproduce

HANDS = Hands(64)


@pytest.fixture(scope="module")
def five() -> torch.Tensor:
    return HANDS.sample(120, seeded(1))


def test_hands_are_seeded_images(five: torch.Tensor) -> None:
    assert (five.shape, five.dtype) == ((120, 3, 64, 64), torch.float32)
    assert float(five.min()) >= -1
    assert float(five.max()) <= 1
    assert torch.equal(HANDS.sample(120, seeded(1)), five)
    assert not torch.equal(HANDS.sample(120, seeded(2)), five)
    assert HANDS.sample(2, seeded()).shape[1:] == HANDS.shape
    assert Hands(32).sample(3, seeded()).shape == (3, 3, 32, 32)


def test_no_two_hands_are_alike(five: torch.Tensor) -> None:
    far = torch.cdist(five.flatten(1), five.flatten(1)) + 1e9 * torch.eye(120)
    assert float(far.min()) > 0.15 * float(far[far < 1e8].mean())


def test_left_and_right(five: torch.Tensor) -> None:
    """The thumb, the lowest finger, is on either side."""
    lefts = 0
    for image in five[:40]:
        tips = finger_tips(image)
        thumb = tips[tips[:, 1].argmax()]
        lefts += bool(thumb[0] < tips[:, 0].mean())
    assert 8 < lefts < 32


def counted_right(fingers: int, n: int) -> None:
    """Without noise and with as much as a network leaves, at the rates that the counter promises."""
    x = HANDS.sample(n, seeded(fingers), fingers=fingers)
    for noise in (0.0, 0.06):
        verdict = HANDS.judge(x + noise * torch.randn(x.shape, generator=seeded(9)))
        right = (verdict.fingers == fingers) & (verdict.kind == (IN_SUPPORT if fingers == 5 else WRONG_COUNT))
        assert float(right.double().mean()) >= (0.995 if fingers == 5 else 0.99)


@pytest.mark.parametrize("fingers", [3, 4, 5, 6, 7])
def test_fingers_are_counted(fingers: int) -> None:
    counted_right(fingers, 100)


@pytest.mark.slow
@pytest.mark.parametrize(("fingers", "n"), [(5, 5000), (3, 1000), (4, 1000), (6, 1000), (7, 1000)])
def test_fingers_of_thousands_are_counted(fingers: int, n: int) -> None:
    counted_right(fingers, n)


def test_fingers_run_together_are_seen(five: torch.Tensor) -> None:
    """Filled with skin between two neighbours, up to their tips: never five fingers, and mostly named for what it is."""
    seen = []
    for image in five[:60]:
        tips = finger_tips(image)
        gap = torch.cdist(tips, tips) + 1e9 * torch.eye(len(tips))
        a, b = divmod(int(gap.argmin()), len(tips))
        middle = torch.tensor([32.0, 36.0])
        corners = [tips[a], tips[b], tips[b] + 0.55 * (middle - tips[b]), tips[a] + 0.55 * (middle - tips[a])]
        picture = Image.fromarray(quantised(image).permute(1, 2, 0).numpy())
        at = [tuple(c.tolist()) for c in corners]
        tone = picture.getpixel((32, 36))
        ImageDraw.Draw(picture).polygon(at, fill=tone)
        seen.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
    kind = HANDS.judge(torch.stack(seen)).kind
    assert float((kind == IN_SUPPORT).double().mean()) <= 0.02
    assert float((kind == MERGED).double().mean()) >= 0.5


def test_a_ragged_arm_has_no_fingers(five: torch.Tensor) -> None:
    """A network's arms have corners and bumps where they leave the picture."""
    x = five[:60].clone()
    skin = (x[:, :, 62] - x[:, :, 62, :1]).abs().amax(1) > 0.3  # the arm in the row above the last
    for image, arm in zip(x, skin, strict=True):
        left, right = int(arm.nonzero()[0]), int(arm.nonzero()[-1])
        tone = image[:, 62, (left + right) // 2, None, None]
        image[:, 58:, max(left - 5, 0) : left] = tone
        image[:, 52:57, right : right + 5] = tone
    assert float((HANDS.judge(x).fingers == 5).double().mean()) >= 0.98


def test_tips_lie_on_the_hand_s_outline(five: torch.Tensor) -> None:
    for image in five[:10]:
        tips = finger_tips(image)
        assert tips.shape == (5, 2)
        assert bool(((tips >= 0) & (tips < 64)).all())
        assert float(torch.pdist(tips).min()) > 4


def test_what_is_no_hand_is_unclear() -> None:
    blank = torch.full((1, 3, 64, 64), 0.9)
    noise = torch.randn(4, 3, 64, 64, generator=seeded()).clamp(-1, 1)
    nothing = torch.full((1, 3, 64, 64), torch.nan)
    assert HANDS.judge(torch.cat([blank, nothing])).fingers.tolist() == [-1, -1]
    assert set(HANDS.judge(torch.cat([blank, nothing, noise])).kind.tolist()) <= {UNCLEAR, DETACHED}
    assert not bool(HANDS.in_support(torch.cat([blank, nothing, noise])).any())


def test_a_piece_apart_is_seen(five: torch.Tensor) -> None:
    x = five[:40].clone()
    x[:, :, 2:9, 2:9] = torch.tensor([-0.2, -0.5, -0.6])[:, None, None]  # where no finger reaches
    kind = HANDS.judge(x).kind
    assert float(((kind == DETACHED) | (kind == UNCLEAR)).double().mean()) >= 0.9


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: Hands(16), ("size", "at least 32")),
        (lambda: HANDS.sample(2, seeded(), fingers=1), ("fingers", "2 to 7")),
        (lambda: HANDS.judge(torch.zeros(1, 3, 32, 32)), ("x", "[n, 3, 64, 64]")),
        (lambda: HANDS.sample(0, seeded()), ("n",)),
        (lambda: HANDS.sample(2, 0), ("generator", "torch.Generator", "0 (int)")),
        (lambda: HandPhotos("nowhere").sample(2, None), ("generator", "torch.Generator", "None")),
    ],
)
def test_errors(call, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        call()
    one_line(caught.value, *parts)


def test_names() -> None:
    assert len(KINDS) == 5
    assert HANDS.kinds == KINDS


def photographs(folder: Path, n: int = 8) -> torch.Tensor:
    """11k Hands as its users have it, with drawings in the place of photographs; returns those."""
    (folder / "Hands").mkdir(parents=True)
    drawn = HANDS.sample(n, seeded(5))
    with (folder / "HandInfo.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["id", "age", "gender", "skinColor", "accessories", "nailPolish", "aspectOfHand", "imageName", "irregularities"]
        )
        for i, image in enumerate(drawn):
            name = f"Hand_{i:07}.jpg"
            aspect = f"{('dorsal', 'palmar')[i % 2]} {('left', 'right')[i // 2 % 2]}"
            table.writerow([i, 30, "female", "medium", int(i == 0), 0, aspect, name, 0])
            square = Image.fromarray(quantised(image).permute(1, 2, 0).numpy()).resize((300, 300), Image.Resampling.BICUBIC)
            wide = Image.new("RGB", (400, 300), square.getpixel((2, 2)))
            wide.paste(square, (50, 0))
            wide.save(folder / "Hands" / name, quality=95)
    return drawn


def test_photographs_are_read_cut_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = photographs(tmp_path / "11k")
    hands = HandPhotos(tmp_path / "11k", accessories=True, cache=tmp_path)
    assert (len(hands), hands.skipped, hands.shape) == (8, 0, (3, 64, 64))
    x = hands.sample(8, seeded(1))
    assert x.dtype == torch.float32
    far = torch.cdist(x.flatten(1), drawn.flatten(1)).argmin(1)
    assert sorted(far.tolist()) == list(range(8))  # each drawing once, in another order
    assert float((x - drawn[far]).abs().mean()) < 0.03
    assert torch.equal(x, hands.sample(8, seeded(1)))
    assert hands.in_support(x).all()
    monkeypatch.setattr("tinyhall.data.hands._photograph", None)
    assert torch.equal(HandPhotos(tmp_path / "11k", accessories=True, cache=tmp_path).sample(8, seeded(1)), x)  # from the file


def test_a_photograph_that_comes_later_is_seen(tmp_path: Path) -> None:
    photographs(tmp_path, 4)
    last = tmp_path / "Hands" / "Hand_0000003.jpg"
    whole = last.read_bytes()
    last.unlink()
    assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (2, 1)
    last.write_bytes(whole[: len(whole) // 2])  # as far as it has come
    assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (2, 1)
    last.write_bytes(whole)
    assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (3, 0)


def test_photographs_are_chosen_by_the_table(tmp_path: Path) -> None:
    photographs(tmp_path)
    assert len(HandPhotos(tmp_path)) == 7  # one wears a ring
    assert HandPhotos(tmp_path, aspect="palmar").names == [f"Hand_{i:07}.jpg" for i in (1, 3, 5, 7)]
    assert HandPhotos(tmp_path, aspect="dorsal", side="right").names == [f"Hand_{i:07}.jpg" for i in (2, 6)]
    assert HandPhotos(tmp_path, size=32).sample(2, seeded()).shape == (2, 3, 32, 32)


def test_a_damaged_photograph_is_skipped_and_counted(tmp_path: Path) -> None:
    photographs(tmp_path)
    whole = (tmp_path / "Hands" / "Hand_0000003.jpg").read_bytes()
    (tmp_path / "Hands" / "Hand_0000003.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "Hands" / "Hand_0000004.jpg").write_bytes(b"not a picture")
    (tmp_path / "Hands" / "Hand_0000005.jpg").unlink()
    hands = HandPhotos(tmp_path)
    assert (len(hands), hands.skipped) == (4, 3)
    assert HandPhotos(tmp_path).skipped == 3  # the file remembers


def test_the_experiment_of_photographs_looks_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path)
    monkeypatch.setenv("TINYHALL_HANDS", str(tmp_path))
    experiment = experiments.get("hand-photos", "smoke")
    assert str(experiment.data().folder) == str(tmp_path)
    assert len(experiment.data()) == 7
    assert experiment.net(0).shape == experiment.data().shape


def _table(text: str, encoding: str = "utf-8") -> Any:
    def make(to: Path) -> HandPhotos:
        (to / "HandInfo.csv").write_text(text, encoding=encoding)
        return HandPhotos(to)

    return make


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda to: HandPhotos(to / "none"), ("folder", "HandInfo.csv", "11khands")),
        (lambda to: HandPhotos(to, size=16), ("size", "at least 32")),
        (lambda to: HandPhotos(to, aspect="side"), ("aspect", "dorsal, palmar")),
        (lambda to: HandPhotos(to, side="up"), ("side", "left, right")),
        (_table("id,imageName\n1,a.jpg\n"), ("folder", "accessories, aspectOfHand")),
        (_table("imageName,aspectOfHand,accessories\na.jpg,dorsal left,1\n"), ("folder", "none of 1")),
        (_table("imageName,aspectOfHand,accessories\n../a.jpg,dorsal left,0\n"), ("folder", "../a.jpg")),
        (_table("imageName,aspectOfHand,accessories\na.jpg,dorsal left,0\n"), ("folder", "none of 1 that can be read")),
        (_table(""), ("folder", "imageName")),
        (_table("imageName,aspectOfHand,accessories\né.jpg,dorsal left,0\n", "latin-1"), ("folder", "UTF-8", "HandInfo.csv")),
        (_table("imageName,aspectOfHand,accessories\na.jpg,dorsal left,0\nb.jpg\n"), ("folder", "every column", "line 3")),
    ],
)
def test_bad_folders(tmp_path: Path, make: Any, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        len(make(tmp_path))
    one_line(caught.value, *parts)
    assert not list(tmp_path.glob("*.safetensors"))


def test_more_photographs_than_there_are(tmp_path: Path) -> None:
    photographs(tmp_path, 3)
    with pytest.raises(TinyhallError) as caught:
        HandPhotos(tmp_path).sample(9, seeded())
    one_line(caught.value, "n", "at most 2")


def test_a_model_of_hands_from_end_to_end(tmp_path: Path) -> None:
    experiment = experiments.get("hands", "smoke")
    made = reproduce(experiment, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    kept = made.samples("small")
    assert kept["x"].shape == (experiment.samples, 3, 32, 32)
    verdict = experiment.data().judge(restored(kept["x"]))
    assert kept["fingers"].shape == verdict.fingers.shape
    assert len(made.metrics["by_step"]) == pictures.STAGES
    assert sum(made.metrics["small"]["fraction"][name][0] for name in KINDS[1:]) == pytest.approx(
        made.metrics["small"]["fraction"]["any"][0]
    )
    assert made.net(torch.zeros(1, 3, 32, 32), torch.tensor([5])).shape == (1, 3, 32, 32)


def test_photographs_are_trained_on_by_one_command(tmp_path: Path) -> None:
    photographs(tmp_path / "11k", 30)
    command = ("-m", "tinyhall", "reproduce", "hand-photos", "--scale", "smoke", "--quiet")
    where = ("--root", str(tmp_path / "a"), "--runs", str(tmp_path / "r"))
    few = run_python(*command, *where, TINYHALL_HANDS=str(tmp_path / "11k"))
    assert few.returncode == 2
    one_line(Exception(few.stderr.strip()), "n: expected at most 29")
    none = run_python(*command, *where, TINYHALL_HANDS=str(tmp_path / "nowhere"))
    assert none.returncode == 2
    one_line(Exception(none.stderr.strip()), "folder: expected HandInfo.csv")
