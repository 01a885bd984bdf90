"""What every test starts from: English, whatever the machine or the test before it speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from holdfast.i18n import set_language


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    before = os.environ.get("LANGUAGE")
    set_language("en")
    yield
    set_language("en")
    if before is None:
        os.environ.pop("LANGUAGE", None)
    else:
        os.environ["LANGUAGE"] = before
