"""Drawn hands: seeded, varied, and countable; what is made wrong is seen."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import one_line, run_python, seeded
from PIL import Image, ImageDraw

from tinyhall.core._check import TinyhallError
from tinyhall.data.fingers import DETACHED, IN_SUPPORT, KINDS, MERGED, UNCLEAR, WRONG_COUNT, HandJudgement, finger_tips
from tinyhall.data.hands import HandPhotos, Hands
from tinyhall.data.images import quantised, restored
from tinyhall.lab import experiments
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


@pytest.mark.parametrize(
    ("kinds", "countable", "miscounted"),
    [
        ([IN_SUPPORT] * 6 + [WRONG_COUNT] * 2 + [MERGED, DETACHED], (0.8, 10), (0.25, 8)),
        ([IN_SUPPORT, UNCLEAR], (0.5, 2), (0.0, 1)),
        ([WRONG_COUNT], (1.0, 1), (1.0, 1)),
        ([UNCLEAR, MERGED, DETACHED], (0.0, 3), None),
    ],
)
def test_first_whether_it_can_be_counted_then_whether_it_is_miscounted(
    kinds: list[int], countable: tuple[float, int], miscounted: tuple[float, int] | None
) -> None:
    rates = HandJudgement(torch.tensor(kinds), torch.full((len(kinds),), 4)).counting_rates()
    assert (rates.countable.value, rates.countable.n) == countable
    assert rates.countable.low <= rates.countable.value <= rates.countable.high
    assert (rates.miscounted and (rates.miscounted.value, rates.miscounted.n)) == miscounted


def test_of_no_images_there_are_no_rates() -> None:
    with pytest.raises(TinyhallError) as caught:
        HandJudgement(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).counting_rates()
    one_line(caught.value, "kind", "at least one image")


def test_hands_with_six_fingers_are_countable(five: torch.Tensor) -> None:
    blank = torch.full((5, 3, 64, 64), 0.9)
    rates = HANDS.judge(torch.cat([five[:15], HANDS.sample(5, seeded(6), fingers=6), blank])).counting_rates()
    assert rates.countable.value == 20 / 25
    assert rates.miscounted is not None
    assert rates.miscounted.value == 5 / 20


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
    monkeypatch.setattr("tinyhall.data.photos._photograph", None)
    assert torch.equal(HandPhotos(tmp_path / "11k", accessories=True, cache=tmp_path).sample(8, seeded(1)), x)  # from the file


def test_a_photograph_that_comes_later_is_seen(tmp_path: Path) -> None:
    photographs(tmp_path, 4)
    last = tmp_path / "Hands" / "Hand_0000003.jpg"
    whole = last.read_bytes()
    last.unlink()
    with pytest.warns(UserWarning, match="1 not found"):
        assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (2, 1)
    last.write_bytes(whole[: len(whole) // 2])  # as far as it has come
    with pytest.warns(UserWarning, match="1 found, but damaged"):
        assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (2, 1)
    last.write_bytes(whole)
    assert (len(HandPhotos(tmp_path)), HandPhotos(tmp_path).skipped) == (3, 0)


def test_photographs_are_chosen_by_the_table(tmp_path: Path) -> None:
    photographs(tmp_path)
    assert len(HandPhotos(tmp_path)) == 7  # one wears a ring
    assert HandPhotos(tmp_path, aspect="palmar").names == [f"Hand_{i:07}.jpg" for i in (1, 3, 5, 7)]
    assert HandPhotos(tmp_path, aspect="dorsal", side="right").names == [f"Hand_{i:07}.jpg" for i in (2, 6)]
    assert HandPhotos(tmp_path, size=32).sample(2, seeded()).shape == (2, 3, 32, 32)


def test_what_is_missing_and_what_is_damaged_are_told_apart(tmp_path: Path) -> None:
    photographs(tmp_path)
    whole = (tmp_path / "Hands" / "Hand_0000003.jpg").read_bytes()
    (tmp_path / "Hands" / "Hand_0000003.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "Hands" / "Hand_0000004.jpg").write_bytes(b"not a picture")
    (tmp_path / "Hands" / "Hand_0000005.jpg").unlink()
    for hands in (HandPhotos(tmp_path), HandPhotos(tmp_path)):  # the file remembers
        assert hands.missing == ["Hand_0000005.jpg"]  # which needs no picture opened
        with pytest.warns(UserWarning) as told:
            assert hands.unreadable == ["Hand_0000003.jpg", "Hand_0000004.jpg"]
        assert (len(hands), hands.skipped) == (4, 3)
        assert len(told) == 1
        one_line(
            Exception(told[0].message),
            "3 of 7 photographs are left out",
            f"1 not found in {tmp_path}, its Hands/ or its Hands/Hands/ (the first is Hand_0000005.jpg)",
            "2 found, but damaged or no picture (the first is Hand_0000003.jpg)",
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    for path in (tmp_path / "Hands").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TinyhallError) as caught:
        len(HandPhotos(tmp_path))
    one_line(caught.value, "none of 7", "1 not found in", "Hands/Hands/", "6 found, but damaged", "Hand_0000001.jpg")


def test_the_small_copy_does_not_outlive_a_change_in_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path, 2)
    assert len(HandPhotos(tmp_path)) == 1
    monkeypatch.setattr(f"{HandPhotos.__module__}._READING", 1)
    assert len(HandPhotos(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


HEAD = "imageName,aspectOfHand,accessories\n"
UPRIGHT = np.stack(np.broadcast_arrays(np.arange(40) * 6, np.arange(32)[:, None] * 7, 60), -1).astype(np.uint8)  # [32, 40, 3]


def seen(folder: Path, **files: Callable[[Path], Any]) -> np.ndarray:
    """The one photograph of a folder made of `files`, `[32, 32, 3]` in 0..255; a name's last underscore is its point."""
    folder.mkdir(exist_ok=True)
    for name, save in files.items():
        save(folder / ".".join(name.rsplit("_", 1)))
    names = [".".join(name.rsplit("_", 1)) for name in files]
    (folder / "HandInfo.csv").write_text(HEAD + "".join(f"{name},dorsal left,0\n" for name in names))
    return quantised(HandPhotos(folder, 32).sample(1, seeded())[0]).permute(1, 2, 0).numpy()


def saved(pixels: np.ndarray, **options: Any) -> Callable[[Path], Any]:
    return lambda path: Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)


# Where the row 0 and the column 0 of the file are seen (EXIF 2.3, 4.6.4 A): top left in 1, and so on.
TURNED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],  # top right
    3: UPRIGHT[::-1, ::-1],  # bottom right
    4: UPRIGHT[::-1],  # bottom left
    5: UPRIGHT.transpose(1, 0, 2),  # left top
    6: np.rot90(UPRIGHT),  # right top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right bottom
    8: np.rot90(UPRIGHT, -1),  # left bottom
}


@pytest.mark.parametrize("orientation", TURNED)
def test_photographs_are_set_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    middle = UPRIGHT[:, 4:36]
    for kind in ("png", "tif"):
        assert np.array_equal(seen(tmp_path / kind, **{f"a_{kind}": saved(TURNED[orientation], exif=exif)}), middle)
    blocks = seen(tmp_path / "jpg", a_jpg=saved(TURNED[orientation], exif=exif, quality=100, subsampling=0))
    assert np.abs(blocks.astype(int) - middle).max() <= 4


def test_a_damaged_note_costs_no_photograph(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0  # a resolution, as text below: what Pillow reads, and cannot write

    def save(path: Path) -> None:
        saved(TURNED[6], exif=exif, quality=100, subsampling=0)(path)
        path.write_bytes(path.read_bytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"))

    assert np.abs(seen(tmp_path, a_jpg=save).astype(int) - UPRIGHT[:, 4:36]).max() <= 4


RAMP = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)


def png_of_16_bits(pixels: np.ndarray, colour: int) -> Callable[[Path], Any]:
    """Pillow writes none in colour. Of chunks, see the PNG specification, 5.3."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    high, wide = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 16, colour, 0, 0, 0))
    whole = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(whole)


@pytest.mark.parametrize(
    "file",
    [
        {"a_png": saved(RAMP)},
        {"a_tif": saved(RAMP)},
        {"a_tif": saved(RAMP.astype(">u2"))},
        {"a_png": png_of_16_bits(np.stack([RAMP] * 3, -1), 2)},
        {"a_png": png_of_16_bits(np.stack([RAMP] * 3 + [np.full_like(RAMP, 65535)], -1), 6)},
    ],
)
def test_pictures_of_16_bits_keep_their_greys(tmp_path: Path, file: dict[str, Callable[[Path], Any]]) -> None:
    x = seen(tmp_path, **file).astype(int)
    assert np.abs(x - RAMP[..., None] / 257).max() <= 1
    assert (x.min(), x.max()) == (0, 255)


CLEAR = np.zeros((32, 32), np.uint8)
CLEAR[8:24, 8:24] = 255
CLEAR[0] = 128
GREY = np.arange(1024, dtype=np.uint32).reshape(32, 32).astype(np.uint8)


def palette(path: Path) -> None:
    picture = Image.fromarray(np.where(CLEAR == 255, 1, 0).astype(np.uint8), "L").convert("P")
    picture.putpalette([0, 0, 0, 200, 150, 100])
    picture.save(path, transparency=0)


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    """And not the black that is under it; half of it is half white."""
    alpha = CLEAR[..., None] / 255
    colours = UPRIGHT[:, :32]
    for name, pixels in (("rgba", np.dstack([colours, CLEAR])), ("la", np.dstack([GREY, CLEAR]))):
        x = seen(tmp_path / name, a_png=saved(pixels))
        on_white = alpha * pixels[..., :-1] + (1 - alpha) * 255
        whole = np.broadcast_to(alpha, x.shape) != 128 / 255
        assert np.array_equal(x[whole], np.broadcast_to(on_white, x.shape)[whole])
        assert np.abs(x - on_white).max() <= 1
    x = seen(tmp_path / "p", a_png=palette)
    assert (x[0, 0].tolist(), x[16, 16].tolist()) == ([255, 255, 255], [200, 150, 100])


def test_numbers_without_a_white_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(TinyhallError, match="1 found, but damaged or no picture"):
        seen(tmp_path, a_tif=saved(RAMP.astype(np.float32)))


@pytest.mark.parametrize(
    ("table", "photograph"),
    [
        ("HandInfo.csv", "a.jpg"),
        ("HandInfo.csv", "Hands/a.jpg"),
        ("HandInfo.csv", "Hands/Hands/a.jpg"),
        ("Hands/HandInfo.csv", "Hands/a.jpg"),
        ("Hands/HandInfo.csv", "Hands/Hands/a.jpg"),
        ("Hands/Hands/HandInfo.csv", "Hands/Hands/a.jpg"),
        ("handinfo.CSV", "hands/a.jpg"),
        ("HandInfo.csv", "Hands/A.JPG"),
        ("HandInfo.csv", "a.jpeg"),
        ("HandInfo.csv", "A.JPEG"),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "A.JPG", "a", " a.jpeg"])
def test_folders_as_people_have_them(tmp_path: Path, table: str, photograph: str, name: str) -> None:
    for path in (tmp_path / table, tmp_path / photograph):
        path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / table).write_text(HEAD + f"{name},Dorsal left,0\n,,\n")
    saved(UPRIGHT)(tmp_path / photograph)
    assert len(HandPhotos(tmp_path, 32, aspect="dorsal")) == 1


def test_the_very_name_comes_before_one_like_it(tmp_path: Path) -> None:
    (tmp_path / "Hands").mkdir()
    saved(UPRIGHT * 0)(tmp_path / "a.jpeg")
    saved(UPRIGHT * 0 + 255)(tmp_path / "Hands" / "a.jpg")
    (tmp_path / "HandInfo.csv").write_text(HEAD + "a.jpg,dorsal left,0\n")
    assert float(HandPhotos(tmp_path, 32).sample(1, seeded()).min()) == 1
    (tmp_path / "Hands" / "a.jpg").unlink()
    assert float(HandPhotos(tmp_path, 32).sample(1, seeded()).max()) == -1


def test_accessories_in_the_words_of_programs(tmp_path: Path) -> None:
    bare, worn = ("0", "0.0", "False", "false", "no"), ("1", "1.0", "True", "true", "yes")
    (tmp_path / "HandInfo.csv").write_text(HEAD + "".join(f"{word}.jpg,dorsal left,{word}\n" for word in bare + worn))
    assert HandPhotos(tmp_path).names == [f"{word}.jpg" for word in bare]
    assert len(HandPhotos(tmp_path, accessories=True).names) == 10


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
        (
            _table("imageName,aspectOfHand,accessories\na.jpg,dorsal left,0\n"),
            ("folder", "none of 1 that can be read", "1 not found in", "Hands/Hands/", "a.jpg"),
        ),
        (
            _table("imageName,aspectOfHand,accessories\na.jpg,dorsal left,ring\n"),
            ("folder", "0.0, false, no", "'ring' for a.jpg"),
        ),
        (_table("imageName,aspectOfHand,accessories\n,dorsal left,0\n"), ("folder", "file names", "''")),
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
    assert len(made.metrics["by_step"]) == made.experiment.stages
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
