"""Cards: the paper's figures by default, smaller ones by name, a hash that follows what it should."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, same_bits

import tinyhall
from tinyhall import bench, cards, experiments
from tinyhall._check import TinyhallError
from tinyhall.cards import CARDS, SCALES, GaussianCard, get, stream


def test_the_main_card_is_the_paper_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYHALL_SCALE", raising=False)
    card = get("line123")
    assert card.scale == "paper"
    assert (card.n, card.steps, card.batch_size, card.lr) == (50_000, 50_000, 10_000, 1e-3)
    assert (card.timesteps, card.beta_start, card.beta_end) == (1000, 1e-3, 0.2)
    assert (card.blocks, card.shared, card.window, card.samples) == (3, True, (0, 10), 10_000_000)
    assert card.data().means[:, 0].tolist() == [1, 2, 3]
    assert card.schedule().name == "linear(0.001, 0.2, 1000)"
    assert get("line1245").data().means[:, 0].tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("name", list(CARDS))
@pytest.mark.parametrize("scale", SCALES)
def test_every_card_builds_at_every_scale(name: str, scale: str) -> None:
    card = get(name, scale)
    assert (card.name, card.scale) == (name, scale)
    net, data = card.net(0), card.data()
    if isinstance(card, GaussianCard):
        assert net.dim == data.dim
        assert net.shared == card.shared
    else:
        assert net.shape == data.shape
    assert card.schedule().steps == card.timesteps
    assert card.window[1] <= card.timesteps
    paper = CARDS[name]
    assert (card.n <= paper.n, card.steps <= paper.steps, card.samples <= paper.samples) == (True, True, True)
    assert scale == "paper" or card.steps < paper.steps


def test_layouts() -> None:
    assert len(GaussianCard("g", layout="grid").data().means) == 25
    assert GaussianCard("d", layout="diamond").data().name.startswith("diamond")


def test_separate_card() -> None:
    assert not get("line123-separate", "paper").shared
    assert len(get("line123-separate", "paper").net(0).body) == 3


def test_scale_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYHALL_SCALE", "smoke")
    assert get("line123").scale == "smoke"
    assert get("line123", "laptop").scale == "laptop"
    monkeypatch.setenv("TINYHALL_SCALE", "galaxy")
    with pytest.raises(TinyhallError) as caught:
        get("line123")
    one_line(caught.value, "scale", "smoke, laptop, paper", "galaxy")


def test_hashes_differ_where_cards_do() -> None:
    hashes = [get(name, scale).hash for name in CARDS for scale in SCALES]
    assert len(set(hashes)) == len(hashes)
    card = get("line123", "paper")
    changed = {
        "n": 7, "steps": 7, "batch_size": 7, "lr": 0.5, "blocks": 2, "shared": False, "timesteps": 999, "beta_start": 0.01,
        "beta_end": 0.3, "means": (1.0,), "name": "x", "layout": "grid", "scale": "x",
    }  # fmt: skip
    for field, value in changed.items():
        other = dataclasses.replace(card, **{field: value})
        assert other.hash != card.hash, field
        assert other.training_hash != card.training_hash, field


def test_training_hash_outlives_the_drawing() -> None:
    card = get("line123", "paper")
    other = dataclasses.replace(card, samples=5, window=(0, 5))
    assert other.training_hash == card.training_hash
    assert other.hash != card.hash


def test_hash_is_of_the_values_and_not_of_the_process() -> None:
    card = get("line123", "smoke")
    assert card.hash == dataclasses.replace(card).hash
    assert len(card.hash) == 12
    assert int(card.hash, 16) >= 0


def test_cards_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get("line123", "smoke").n = 5


def test_streams_are_apart() -> None:
    numbers = {
        (s, p): int(torch.randint(2**62, (1,), generator=stream(s, p))) for s in (0, 1) for p in ("data", "weights", "samples")
    }
    assert len(set(numbers.values())) == 6
    assert numbers[0, "data"] == int(torch.randint(2**62, (1,), generator=stream(0, "data")))


def test_a_stream_s_seed_is_fixed_for_ever() -> None:
    # Stored artifacts were made with these numbers.
    digest = int.from_bytes(hashlib.sha256(b"3/training").digest()[:8], "big")
    assert stream(3, "training").initial_seed() == digest % 2**63


def test_a_card_s_network_follows_the_seed() -> None:
    card = get("line123", "smoke")
    assert same_bits(card.net(1).state_dict(), card.net(1).state_dict())
    assert not same_bits(card.net(1).state_dict(), card.net(2).state_dict())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: get("line321"), ("card", "line123", "'line321'")),
        (lambda: get("line123", "huge"), ("scale", "smoke, laptop, paper", "'huge'")),
        (lambda: get("line123", "smoke").at("laptop"), ("scale", "paper", "smoke")),
        (lambda: cards.CARDS["line123"].at("Paper"), ("scale", "'Paper'")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


@pytest.mark.parametrize("changes", [{"lr": 2e-3}, {"samples": 5}, {"name": "line321"}, {"scale": "huge"}])
def test_a_changed_card_replaces_no_artifact(changes: dict, tmp_path: Path) -> None:
    card = dataclasses.replace(get("line123", "smoke"), **changes)
    with pytest.raises(TinyhallError) as caught:
        experiments.reproduce(card, root=tmp_path / "a", runs=tmp_path / "r", progress=False)
    one_line(caught.value, "scale" if "scale" in changes else "card", "expected")
    assert not list(tmp_path.iterdir())


def test_at_its_own_scale_a_card_stays() -> None:
    card = get("line123", "smoke")
    assert card.at("smoke") is card


@pytest.mark.parametrize("chapter", sorted((ROOT / "book").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_a_chapter_s_switch_makes_artifacts_that_the_book_has(chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(chapter.read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "RETRAIN = False" in first
    made: list[tuple[str, str, int]] = []
    monkeypatch.setattr(tinyhall, "reproduce", lambda card, seed=0, **_: made.append((card.name, card.scale, seed)))
    monkeypatch.setattr(bench, "run", lambda task, scale, seed=0: made.append((bench.task(task).card, scale, seed)))
    monkeypatch.delenv("TINYHALL_SCALE", raising=False)
    monkeypatch.chdir(chapter.parent)
    exec(first.replace("RETRAIN = False", "RETRAIN = True"), {})
    assert made
    assert set(made) <= set(experiments.available())
