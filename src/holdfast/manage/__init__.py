"""List, show, compare, prove, clean, pack and watch over the runs on a disk: the desk.

It reads manifests and never imports torch when it is loaded. `__all__` names the modules that other
rooms may import.
"""

__all__ = [
    "choosing",
    "cleaning",
    "compare",
    "doctor",
    "history",
    "listing",
    "output",
    "packing",
    "pin",
    "progress",
    "rollback",
    "rundir",
    "showing",
    "story",
    "supervising",
    "verify",
]
