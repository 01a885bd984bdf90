"""Let a training that `holdfast run` starts again go on, whatever it was told at first.

A first start may have been told to begin anew (`--fresh`, `--checkpoint`, `--resume FILE`). Obeyed
again after a crash, that would throw away what has been trained since.
"""

from __future__ import annotations

import os

# The id of the newest checkpoint from before the first start, "" for none; set at restarts only.
RESTART = "HOLDFAST_RESTART"


def goes_on(newest: str | None) -> bool:
    """Return True at a restart if `newest`, the id of the newest checkpoint, is an earlier start's.

    An earlier start under the same supervisor that left no checkpoint has its orders obeyed again.
    """
    before = os.environ.get(RESTART)
    return before is not None and newest is not None and newest != before
