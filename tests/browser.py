"""A browser for tests of pages: the one that is installed, without a window, or the test skips."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A Browser of playwright, driven from the thread of the test."""
    api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("HOLDFAST_BROWSER") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if program is None:
        pytest.skip("there is no browser: install chromium or set HOLDFAST_BROWSER")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()
