"""List, show, compare, prove, clean, pack and watch over the runs on a disk: the desk.

It reads manifests and never imports torch when it is loaded. `__all__` names the modules that other
rooms may import.
"""

__all__ = [
    "choosing",
    "clean",
    "compare",
    "disk_checks",
    "doctor",
    "drift",
    "drift_table",
    "findings",
    "history",
    "leftovers",
    "listing",
    "output",
    "pack",
    "pin",
    "rollback",
    "rundir",
    "service",
    "show",
    "show_text",
    "story",
    "supervisor",
    "table",
    "unpack",
    "values",
    "verify",
]
