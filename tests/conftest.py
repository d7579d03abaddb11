"""Shapes and types in tinyhall's signatures are checked while the tests run.

Set JAXTYPING_DISABLE=1 to run without: needed where speed is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TINYHALL_PRECISION", "float32")  # what a test sees should not depend on the processor

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

HERE = Path(__file__).resolve().parent
for path in (HERE, HERE.parent):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

if not config.jaxtyping_disable:
    # The numeric tower: an int does where a float is asked for, as in PEP 484.
    install_import_hook("tinyhall", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("tinyhall", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tinyhall")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The tensors here are tiny, and sums split over threads could differ in the last bit.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _global_state_untouched() -> Iterator[None]:
    """No test, and so nothing that a test calls, may draw from or seed the global generator."""
    before = torch.get_rng_state()
    yield
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(before, after), "the global generator was touched"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the type checks off: the package's own messages are what a user without them sees."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by Playwright; a test that asks for it is skipped where either is missing."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        real = browser.new_page

        def new_page(**options: Any) -> Any:
            page = real(**options)
            page.set_default_timeout(300_000)  # a guard against hanging; a busy machine takes a minute for a page
            return page

        browser.new_page = new_page  # type: ignore[method-assign]
        yield browser
        browser.close()
