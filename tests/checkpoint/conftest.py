"""What every test of the engine gets: English messages, and no idle fast path switched off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from holdfast.checkpoint.system import filesystem
from holdfast.i18n import language, set_language


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The tensors are tiny, and on a busy machine every barrier between threads takes long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HOLDFAST_DISABLE", raising=False)
    monkeypatch.setattr(filesystem, "said", set())
    before = language()
    set_language("en")
    yield
    set_language(before)
