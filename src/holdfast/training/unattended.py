"""What `holdfast run` tells a training that it starts again: go on, whatever you were first told.

A first start may have been told to begin anew (`--fresh`, `--checkpoint`, `--resume FILE`). Obeyed
again after a crash, that would throw away what has been trained since.
"""

from __future__ import annotations

import os

# The id of the newest checkpoint from before the first start, "" for none; set at restarts only.
RESTART = "HOLDFAST_RESTART"


def goes_on(newest: str | None) -> bool:
    """Whether this is a restart and `newest`, the id of the newest checkpoint, is the work of an
    earlier start under the same supervisor. Where that has left nothing, its orders still hold."""
    before = os.environ.get(RESTART)
    return before is not None and newest is not None and newest != before
