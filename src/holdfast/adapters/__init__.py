"""The adapters: the engine under other people's training loops.

Each module imports its framework itself, so that nothing is loaded here, and uses the public faces
of `checkpoint` and `protection` only. None of them knows the trainer of this package;
`classic.train_model` takes its models and tokenizer.
"""

from __future__ import annotations

__all__ = ["classic", "data", "lightning", "transformers"]
