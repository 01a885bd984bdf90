"""The adapters: the engine under other people's training loops.

Each module imports its framework itself, so that nothing is loaded here, and uses the public faces
of `checkpoint` and `protection` only. None of them knows the trainer of this package.
"""

from __future__ import annotations

__all__ = ["data", "transformers"]
