"""Drawn hands: seeded, varied, and countable; what is made wrong is seen."""

from __future__ import annotations

import pytest
import torch
from common import one_line, seeded

from tinyhall._check import TinyhallError
from tinyhall.hands import DETACHED, IN_SUPPORT, KINDS, UNCLEAR, WRONG_COUNT, Hands, count_fingers, finger_tips

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


@pytest.mark.parametrize("fingers", [3, 4, 5, 6])
def test_fingers_are_counted(fingers: int) -> None:
    x = HANDS.sample(100, seeded(fingers), fingers=fingers)
    right = (count_fingers(x) == fingers).double().mean()
    noisy = x + 0.05 * torch.randn(x.shape, generator=seeded(9))
    still = (count_fingers(noisy) == fingers).double().mean()
    assert min(float(right), float(still)) >= 0.97
    kind = HANDS.judge(x).kind
    assert float((kind == (IN_SUPPORT if fingers == 5 else WRONG_COUNT)).double().mean()) >= 0.95


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
        (lambda: HANDS.sample(2, seeded(), fingers=1), ("fingers", "2 to 8")),
        (lambda: HANDS.judge(torch.zeros(1, 3, 32, 32)), ("x", "[n, 3, 64, 64]")),
        (lambda: HANDS.sample(0, seeded()), ("n",)),
    ],
)
def test_errors(call, parts: tuple[str, ...], unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        call()
    one_line(caught.value, *parts)


def test_names() -> None:
    assert len(KINDS) == 5
    assert HANDS.kinds == KINDS
