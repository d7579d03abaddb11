"""Scoring must fit a laptop: under 1 GB above the imports at a million samples, and flat in the steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory import peak

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")


def test_memory_is_flat_in_the_number_of_steps() -> None:
    short, long = (peak(100_000, steps)["peak_mb"] for steps in (10, 300))
    # Storing x0_hat alone would add 0.8 MB a step, 232 MB here. The allocator's own moods are some MB.
    assert long < short + 30


@pytest.mark.slow
def test_a_million_samples_through_the_network_stay_under_a_gigabyte() -> None:
    assert peak(1_000_000, 3, network=True)["peak_mb"] < 1000
