"""Batches in an order that is gone on with at any one of them, from a DataLoader of PyTorch.

Nothing of a checkpoint is known here: the loader is an object with a `state_dict`.
"""

from __future__ import annotations

from holdfast.adapters.data.loader import ResumableLoader

__all__ = ["ResumableLoader"]
