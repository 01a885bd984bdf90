"""A browser that is installed, for tests of pages; they skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window: `$HOLDFAST_BROWSER`, else what PATH has."""
    wanted = os.environ.get("HOLDFAST_BROWSER")
    path = next((p for p in map(shutil.which, [wanted] if wanted else _NAMES) if p), None)
    if path is None:
        pytest.skip(f"no browser: none of {wanted or ', '.join(_NAMES)} is in PATH")
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox; the pages are our own.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
