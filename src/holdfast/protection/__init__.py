"""Protect anybody's training loop with three lines, in whatever framework it is written.

    run = holdfast.protect("runs/a", model=model, optimizer=optimizer)
    step, best, batch = run.resume(0, inf, next(data))     # what the loop rebinds
    while step < total:
        ...train...
        step += 1
        run.step(step, best, batch)

It stands on the public face of the engine and knows of no framework.
"""

from __future__ import annotations

from holdfast.protection.protected import Protected, protect, tell

__all__ = ["Protected", "protect", "tell"]
