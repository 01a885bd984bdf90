"""What every test starts from: English, whatever the machine or the test before it speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Two workers of pytest share two cores: threads of torch that spin for each other would make every
# test ten times as slow. Inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
