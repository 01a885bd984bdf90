"""A trained model in use: load it from a checkpoint, sample text from it, measure it on a text.

The training loop and its console may not enter.
"""

from holdfast.training.inference.generate import (
    RUINED,
    Sampling,
    TextStream,
    sample_text,
)
from holdfast.training.inference.loading import Loaded, find_checkpoint, load_for_inference
from holdfast.training.inference.side_by_side import (
    Continuation,
    Evaluation,
    continue_text,
    evaluate,
    read_text,
    shorten,
)

__all__ = [
    "RUINED",
    "Continuation",
    "Evaluation",
    "Loaded",
    "Sampling",
    "TextStream",
    "continue_text",
    "evaluate",
    "find_checkpoint",
    "load_for_inference",
    "read_text",
    "sample_text",
    "shorten",
]
