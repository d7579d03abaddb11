"""MNIST: the files are what they should be or are refused by name; the classifier; the oracle on digits made wrong."""

from __future__ import annotations

import gzip
import hashlib
import math
from pathlib import Path

import pytest
import torch
from common import ROOT, one_line, seeded

from tinyhall.core._check import TinyhallError
from tinyhall.data import mnist
from tinyhall.data.mnist import MNIST, Classifier, DigitOracle
from tinyhall.store.files import write_json

HOME = ROOT / "book" / "data" / "mnist"
LABELS = "t10k-labels-idx1-ubyte"
IMAGES = "t10k-images-idx3-ubyte"


@pytest.fixture(scope="module")
def test_set() -> MNIST:
    return MNIST(HOME, train=False)


@pytest.fixture(scope="module")
def classifier(test_set: MNIST) -> Classifier:
    return test_set.classifier


def test_every_file_is_mnist_s() -> None:
    for name, (digest, shape) in mnist.FILES.items():
        assert hashlib.sha256(gzip.decompress((HOME / f"{name}.gz").read_bytes())).hexdigest() == digest
        assert mnist._read(HOME, name).shape == shape


def test_digits(test_set: MNIST) -> None:
    x = test_set.images()
    assert (x.shape, x.dtype, float(x.min()), float(x.max())) == ((10_000, 1, 28, 28), torch.float32, -1, 1)
    assert test_set.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]  # the first of the test set, as everyone knows them
    assert torch.bincount(test_set.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len(test_set) == 10_000
    assert len(MNIST(HOME)) == 60_000


def test_a_margin_is_black(test_set: MNIST) -> None:
    wide = MNIST(HOME, train=False, size=32)
    x = wide.images(torch.tensor([3, 1]))
    assert wide.shape == tuple(x.shape[1:]) == (1, 32, 32)
    assert torch.equal(x[:, :, 2:-2, 2:-2], test_set.images()[[3, 1]])
    assert float(x[:, :, :2].max()) == float(x[:, :, :, -2:].max()) == -1


def test_a_draw_is_of_different_digits_with_their_labels(test_set: MNIST) -> None:
    x, label = test_set.draw(300, seeded())
    again = test_set.sample(300, seeded())
    assert torch.equal(x, again)
    assert len(x.flatten(1).unique(dim=0)) == 300
    rows = [int((test_set.images() == one).flatten(1).all(1).nonzero()[0]) for one in x[:5]]
    assert test_set.labels[rows].tolist() == label[:5].tolist()
    with pytest.raises(TinyhallError) as caught:
        test_set.draw(10_001, seeded())
    one_line(caught.value, "n", "at most 10000")


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_other_layouts(place: str, packed: bool, tmp_path: Path, test_set: MNIST) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LABELS, IMAGES):
        raw = (HOME / f"{name}.gz").read_bytes()
        (folder / (f"{name}.gz" if packed else name)).write_bytes(raw if packed else gzip.decompress(raw))
    other = MNIST(tmp_path, train=False)
    assert torch.equal(other.labels, test_set.labels)
    assert torch.equal(other.images(slice(0, 5)), test_set.images(slice(0, 5)))


def flipped(raw: bytes) -> bytes:
    plain = bytearray(gzip.decompress(raw))
    plain[5_000] ^= 1
    return gzip.compress(bytes(plain))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flipped, "damaged"),
        (lambda raw: raw[: len(raw) // 2], "gzip"),
        (lambda raw: raw[:40] + b"\xff" * 40 + raw[80:], "gzip"),
        (lambda raw: b"", "damaged"),
        (lambda raw: b"not a gzip file", "gzip"),
        (lambda raw: gzip.compress(b""), "damaged"),
    ],
)
def test_a_damaged_file_is_named(spoil, said: str, tmp_path: Path) -> None:
    (tmp_path / f"{LABELS}.gz").write_bytes(spoil((HOME / f"{LABELS}.gz").read_bytes()))
    with pytest.raises(TinyhallError) as caught:
        _ = MNIST(tmp_path, train=False).labels
    one_line(caught.value, "root", f"{LABELS}.gz", said)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TinyhallError) as caught:
        _ = MNIST(tmp_path).labels
    one_line(caught.value, "root", "train-labels-idx1-ubyte", str(tmp_path))
    with pytest.raises(TinyhallError) as caught:
        MNIST(tmp_path, size=30)
    one_line(caught.value, "size", "28 or 32")


def test_the_classifier_reads_99_of_100_test_digits(classifier: Classifier, test_set: MNIST) -> None:
    seen = classifier.read(test_set.images())
    assert seen.features.shape == (10_000, 84)
    assert float((seen.digit == test_set.labels).double().mean()) >= 0.99
    wide = MNIST(HOME, train=False, size=32).images(slice(0, 50))
    torch.testing.assert_close(classifier.read(wide).features, seen.features[:50])
    assert torch.equal(classifier(wide).argmax(1), seen.digit[:50])
    torch.testing.assert_close(seen.signature.square().sum(1), torch.full((10_000,), 3.0))
    assert (HOME / "classifier.safetensors").stat().st_size < 2**20


def test_training_a_classifier_is_seeded_and_learns(test_set: MNIST) -> None:
    class Few(MNIST):
        def __len__(self) -> int:
            return 2_000

    few = Few(HOME, train=False)
    first, second = (mnist.train_classifier(few, seed=1, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    seen = slice(0, 1_000)
    assert float((first.read(test_set.images(seen)).digit == test_set.labels[seen]).double().mean()) > 0.5


@pytest.fixture(scope="module")
def data(classifier: Classifier) -> MNIST:
    """The test digits, judged by fewer than all."""
    digits = MNIST(HOME, train=False)
    digits.__dict__["oracle"] = DigitOracle.calibrated(
        classifier, MNIST(HOME).images(slice(0, 20_000)), digits.images(slice(0, 3_000))
    )
    return digits


def test_the_oracle_s_border_is_a_share_of_the_test_digits(data: MNIST) -> None:
    assert float(data.in_support(data.images(slice(0, 3_000))).double().mean()) == pytest.approx(0.99, abs=1e-3)
    others = float(data.in_support(data.images(slice(7_000, None))).double().mean())
    assert 0.98 < others < 1


def test_the_distance_is_that_of_the_nearest(data: MNIST) -> None:
    seen = data.classifier.read(data.images(slice(0, 5)))
    nearest = torch.cdist(seen.signature.double(), data.oracle.known.double()).amin(1)
    torch.testing.assert_close(data.oracle.distance(seen.signature).double(), nearest, rtol=1e-4, atol=1e-4)
    silent = seen.signature.clone()
    silent[:, :400] = 0  # a layer that answers nothing
    nearest = torch.cdist(silent.double(), data.oracle.known.double()).amin(1)
    torch.testing.assert_close(data.oracle.distance(silent).double(), nearest, rtol=1e-4, atol=1e-4)
    told = data.judge(MNIST(HOME).images(slice(0, 50)))  # training digits themselves
    assert float(told.distance.max()) < 1e-2
    assert told.digit.tolist()[:5] == [5, 0, 4, 1, 9]


def damage(x: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Digits made wrong on purpose, by kind."""
    other, size = x.roll(1, 0), x.shape[-1]
    rows = torch.arange(size)[:, None]
    holes = torch.ones_like(x)
    for image, (down, right) in zip(
        holes, torch.randint(size // 4, size // 2, (len(x), 2), generator=generator).tolist(), strict=True
    ):
        image[:, down : down + size // 4, right : right + size // 4] = 0
    blobs = torch.nn.functional.interpolate(
        torch.randn(len(x), 1, 7, 7, generator=generator), size=(size, size), mode="bicubic"
    )
    return {
        "two digits overlaid": torch.maximum(x, other),
        "halves of two digits": torch.where(rows < size // 2, x, other),
        "a hole": torch.where(holes > 0, x, torch.tensor(-1.0)),
        "blobs": (2 * blobs).clamp(-1, 1),
        "blank": torch.full_like(x, -1.0),
        "upside down": x.flip(2),
    }


def test_digits_made_wrong_fall_out_of_support(data: MNIST) -> None:
    """Not all of them: the layers of a classifier that never saw such images are a blunt instrument."""
    x, _ = data.draw(400, seeded())
    flagged = {name: 1 - float(data.in_support(wrong).double().mean()) for name, wrong in damage(x, seeded(1)).items()}
    assert flagged["blank"] == 1
    assert flagged["blobs"] > 0.9
    assert flagged["two digits overlaid"] > 0.1
    assert min(flagged[name] for name in ("halves of two digits", "upside down", "a hole")) > 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, 1e38])
def test_what_is_not_finite_or_huge_is_no_digit(value: float, data: MNIST) -> None:
    x = MNIST(HOME).images(slice(0, 3))
    x[1, 0, 14, 14] = value
    assert data.in_support(x).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 1, 27, 27), (2, 3, 28, 28), (2, 28, 28), (0, 1, 28, 28)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], data: MNIST, unchecked: None) -> None:
    with pytest.raises(TinyhallError) as caught:
        data.judge(torch.zeros(shape))
    one_line(caught.value, "x", "[n, ", str(shape))


@pytest.mark.slow
def test_the_oracle_of_all_digits() -> None:
    whole = MNIST(HOME, train=False)
    assert float(whole.in_support(whole.images()).double().mean()) == pytest.approx(0.99, abs=1e-3)


def test_the_project_s_own_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (ROOT, ROOT / "book", ROOT / "book" / "evidence"):
        monkeypatch.chdir(place)
        assert MNIST(train=False).labels[:3].tolist() == [7, 2, 1]
    monkeypatch.chdir(ROOT / "tests")
    with pytest.raises(TinyhallError) as caught:
        _ = MNIST().labels
    one_line(caught.value, "root", "data/mnist")


def test_images_come_to_the_processor_to_be_judged(data: MNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        """Stands for images on another device: the classifier gets them once they have been brought here."""

        def cpu(self) -> torch.Tensor:
            return brought

    brought = data.images(slice(0, 3))
    read = Classifier.read
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Classifier, "read", lambda self, x: seen.append(x) or read(self, x))
    told = data.judge(brought.clone().as_subclass(Elsewhere))
    assert seen[0] is brought
    assert torch.equal(told.distance, data.judge(brought).distance)


def test_the_classifier_reads_where_it_is() -> None:
    """A device that only keeps shapes stands for a GPU."""
    with torch.device("meta"):
        net = Classifier(torch.Generator())
    assert net.read(torch.zeros(3, 1, 28, 28)).features.device.type == "meta"


def test_oracle_errors(classifier: Classifier, test_set: MNIST) -> None:
    x = test_set.images(slice(0, 10))
    with pytest.raises(TinyhallError) as caught:
        DigitOracle.calibrated(classifier, x, x, share=1.5)
    one_line(caught.value, "share", "(0, 1)")


def test_a_border_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "classifier.json", {"seed": 0})
    with pytest.raises(TinyhallError) as caught:
        _ = MNIST(tmp_path).oracle
    one_line(caught.value, "border", "None", "classifier.json")
