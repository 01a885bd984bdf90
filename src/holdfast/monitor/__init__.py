"""Show a run while it trains: on a terminal, as a page, as a report. It only reads.

`__all__` names the modules that other rooms may import.
"""

__all__ = [
    "curves",
    "machine",
    "report",
    "run_view",
    "snapshot",
    "terminal",
    "terminal_plot",
    "watcher",
    "web_app",
    "web_hub",
    "words",
]
