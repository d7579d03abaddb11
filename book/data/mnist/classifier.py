"""Trains the classifier that the book measures digits with, and writes it beside the digits."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from tinyhall.data.mnist import MNIST, DigitOracle, train_classifier
from tinyhall.lab.provenance import describe_device, revision
from tinyhall.store.files import write_json, write_tensors

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    net = train_classifier(MNIST(HERE), seed=0)
    seconds = round(time.perf_counter() - began, 1)
    weights = {name: value.half() for name, value in net.state_dict().items()}
    write_tensors(HERE / "classifier.safetensors", weights)
    test = MNIST(HERE, train=False)
    right = float((test.classifier.read(test.images()).digit == test.labels).double().mean())  # of the weights as they are kept
    border = DigitOracle.calibrated(test.classifier, MNIST(HERE).images(), test.images()).border
    card = {
        "seed": 0,
        "test_accuracy": right,
        "border": border,
        "device": describe_device(torch.device("cpu")),
        "revision": revision(),
    }
    write_json(HERE / "classifier.json", card | {"train_seconds": seconds, "torch": torch.__version__})
    print(f"{right:.2%} of the test digits, in {seconds} s")
