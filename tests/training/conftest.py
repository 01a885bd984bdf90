"""The trainer's tests train for its logic: with 0.1 M parameters instead of 3.2 M a checkpoint is
1.5 MB instead of 37. Shapes as they ship are for those that ask, and for tests/e2e."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.training.models import SHAPES
from tests.training.runs import SMALL

SHIPPED = SHAPES["tiny"]


@pytest.fixture(autouse=True, scope="module")
def small_shape() -> Iterator[None]:
    """What is called "tiny" is SMALL in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", SMALL)
        yield


@pytest.fixture
def shape_as_shipped(small_shape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "tiny" is what users get: for a test about its size, or one that starts real processes."""
    monkeypatch.setitem(SHAPES, "tiny", SHIPPED)
