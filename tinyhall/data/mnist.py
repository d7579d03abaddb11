"""MNIST, a small classifier of it, and what that classifier's features say of digits that a model drew."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..core import _check
from ..core._typing import Float, Int, Tensor
from ..store.files import load_weights, read_json
from .images import Squares, drawn, restored

FILES = {  # name: SHA-256 of the uncompressed file, shape
    "train-images-idx3-ubyte": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60_000,)),
    "t10k-images-idx3-ubyte": ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10_000,)),
}


def _read(root: Path, name: str) -> Tensor:
    """One IDX file, uint8: as it is or with gzip, in `root` or where torchvision puts it."""
    places = [folder / f"{name}{end}" for folder in (root, root / "MNIST" / "raw") for end in (".gz", "")]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise _check.TinyhallError(f"root: expected {name}, plain or .gz, in {root} or {root}/MNIST/raw, got none")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _check.TinyhallError(f"root: expected a whole gzip file, got {path} ({error})") from error
    digest, shape = FILES[name]
    if hashlib.sha256(raw).hexdigest() != digest:
        raise _check.TinyhallError(f"root: expected MNIST's {name}, got other bytes in {path}; it is damaged or another file")
    head = 4 + 4 * len(shape)  # a magic number, then each length, all in 4 bytes
    return torch.frombuffer(bytearray(raw[head:]), dtype=torch.uint8).reshape(shape)


IN_SUPPORT, OUT_OF_SUPPORT = range(2)
KINDS = ("in support", "out of support")


class DigitJudgement(NamedTuple):
    """What MNIST says of images, each field of length n."""

    kind: Int[Tensor, " n"]  # IN_SUPPORT 0, OUT_OF_SUPPORT 1
    digit: Int[Tensor, " n"]  # what the classifier reads
    distance: Float[Tensor, " n"]  # to the nearest training digit, between signatures


def home() -> Path:
    """Where the project's own copy lies, seen from the book, from the top of the project or from a page of evidence."""
    places = [Path("data/mnist"), Path("book/data/mnist"), Path("../data/mnist")]
    return next((place for place in places if place.is_dir()), places[0])


@dataclass(frozen=True)
class MNIST(Squares):
    """The 60,000 training digits, or the 10,000 test digits, float32 in -1..1.

    Args:
        root: a folder with the IDX files, or one in which torchvision has put `MNIST/raw`; None for the project's own copy.
            Files are checked when read.
        train: which of the two sets.
        size: 28, or 32 with a black margin of two pixels, which more networks can halve.

    Raises:
        TinyhallError: another size; on first use, a file that is missing or damaged.
    """

    root: str | Path | None = None
    train: bool = True
    size: int = 28
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        if self.size not in (28, 32):
            raise _check.fail("size", self.size, "28 or 32")

    @property
    def place(self) -> Path:
        """The folder with the files."""
        return home() if self.root is None else Path(self.root)

    def __len__(self) -> int:
        return 60_000 if self.train else 10_000

    @cached_property
    def _bytes(self) -> Tensor:
        return _read(self.place, f"{'train' if self.train else 't10k'}-images-idx3-ubyte")

    @cached_property
    def labels(self) -> Int[Tensor, " n"]:
        """The digits, int64."""
        return _read(self.place, f"{'train' if self.train else 't10k'}-labels-idx1-ubyte").long()

    def images(self, rows: Int[Tensor, " m"] | slice = slice(None)) -> Float[Tensor, "m 1 size size"]:
        """Those rows, in their order; all without any."""
        margin = (self.size - 28) // 2
        return F.pad(restored(self._bytes[rows][:, None]), (margin,) * 4, value=-1.0)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n 1 size size"], Int[Tensor, " n"]]:
        """n images and their digits, none twice.

        Raises:
            TinyhallError: more than there are.
        """
        rows = drawn(n, len(self), generator)
        return self.images(rows), self.labels[rows]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 1 size size"]:
        """The images of `draw`."""
        return self.draw(n, generator)[0]

    @cached_property
    def classifier(self) -> Classifier:
        """The one that the project measures with, from `classifier.safetensors` beside the digits; on the processor.

        Raises:
            TinyhallError: no such file, or a damaged one.
        """
        net = Classifier()
        load_weights(net, self.place / "classifier.safetensors")
        return net.eval()

    @cached_property
    def oracle(self) -> DigitOracle:
        """Of all training digits; its border was set by the test digits, and lies with the classifier in `classifier.json`.

        Raises:
            TinyhallError: no such file, or one without a border.
        """
        path = self.place / "classifier.json"
        told = read_json(path)
        border = told.get("border") if isinstance(told, dict) else None
        if not isinstance(border, float):
            raise _check.TinyhallError(f"artifact: expected a border, a number, got {border!r} in {path}")
        return DigitOracle(self.classifier, MNIST(self.root).images(), border)

    def judge(self, x: Float[Tensor, "n 1 size size"]) -> DigitJudgement:
        """Whether each image is like a digit, by `oracle`, and which one, on the processor. What is not finite is like none, at
        distance inf.

        Raises:
            TinyhallError: images of another shape.
        """
        x = self._checked(x).cpu()
        seen = self.classifier.read(x)
        distance = self.oracle.distance(seen.signature)
        # A comparison with NaN is false, so NaN would pass for a digit.
        distance[~torch.isfinite(x).flatten(1).all(1) | distance.isnan()] = math.inf
        return DigitJudgement((distance > self.oracle.border).long(), seen.digit, distance)


class Reading(NamedTuple):
    """What the classifier makes of images."""

    features: Float[Tensor, "n 84"]  # the last hidden layer
    signature: Float[Tensor, "n 604"]  # all three layers, each scaled to length 1
    digit: Int[Tensor, " n"]  # the most likely one


class Classifier(nn.Module):
    """After LeNet-5 (LeCun et al. 1998), with ReLU and max pooling: 61,706 weights."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # modules draw from the global state before we overwrite it
            self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
            self.hidden, self.last, self.out = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        for module in self.children():
            nn.init.kaiming_uniform_(module.weight, generator=generator or torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def layers(self, x: Float[Tensor, "n 1 size size"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the last convolution and both hidden layers answer: `[n, 400]`, `[n, 120]`, `[n, 84]`. A margin is cut off."""
        margin = (x.shape[-1] - 28) // 2
        h = x[:, :, margin : margin + 28, margin : margin + 28]
        h = F.max_pool2d(F.relu(self.conv1(h)), 2)
        seen = F.max_pool2d(F.relu(self.conv2(h)), 2).flatten(1)
        hidden = F.relu(self.hidden(seen))
        return seen, hidden, F.relu(self.last(hidden))

    def forward(self, x: Float[Tensor, "n 1 size size"]) -> Float[Tensor, "n 10"]:
        """Logits."""
        return self.out(self.layers(x)[-1])

    @torch.no_grad()
    def read(self, x: Float[Tensor, "n 1 size size"]) -> Reading:
        """What it makes of images, in chunks, on the device where it is."""
        parts = []
        for part in x.split(2_000):
            layers = self.layers(part.to(self.out.weight.device))
            signature = torch.cat([F.normalize(layer) for layer in layers], 1)
            parts.append(Reading(layers[-1], signature, self.out(layers[-1]).argmax(1)))
        return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def train_classifier(data: MNIST, *, seed: int = 0, epochs: int = 8, batch_size: int = 128, lr: float = 2e-3) -> Classifier:
    """Adam with a falling rate, on digits shifted by up to two pixels."""
    g = torch.Generator().manual_seed(seed)
    net = Classifier(g)
    per_epoch = len(data) // batch_size
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * per_epoch)
    x, labels = F.pad(data.images(), (2, 2, 2, 2), value=-1.0), data.labels
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=g)[: per_epoch * batch_size].split(batch_size):
            down, right = torch.randint(5, (2,), generator=g).tolist()  # one shift a batch: cheap, and enough of them
            loss = F.cross_entropy(net(x[rows, :, down : down + 28, right : right + 28]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return net.eval()


class DigitOracle:
    """Calls a digit out of support when it lies farther from the training set than 99% of test digits do.

    The distance is that between signatures, to the nearest training digit. Of the ways tried this one caught most digits that
    were damaged on purpose: scaled layers rather than plain ones, three rather than one.

    Args:
        classifier: whose layers.
        train: real digits, which fill the support.
        border: the distance beyond which a digit is out of it; `calibrated` finds it.
    """

    def __init__(self, classifier: Classifier, train: Tensor, border: float) -> None:
        self.known, self.border = classifier.read(train).signature, border

    @classmethod
    def calibrated(cls, classifier: Classifier, train: Tensor, test: Tensor, share: float = 0.99) -> DigitOracle:
        """One whose border keeps that share of the test digits in support."""
        if not 0 < share < 1:
            raise _check.fail("share", share, "a share in (0, 1)")
        oracle = cls(classifier, train, math.inf)
        told = oracle.distance(classifier.read(test).signature).sort().values
        oracle.border = float(told[min(math.ceil(share * len(told)), len(told)) - 1])
        return oracle

    def distance(self, signature: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """To the nearest training digit."""
        # Those of real digits are of one length, sqrt(3), so the nearest is the one with the largest product. Others may be
        # shorter: a layer that answers nothing, or overflows, has no length.
        product = torch.cat([(part @ self.known.T).amax(1) for part in signature.split(500)])
        return (signature.square().sum(1) + 3 - 2 * product).clamp(min=0).sqrt()
