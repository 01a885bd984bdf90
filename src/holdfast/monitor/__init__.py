"""Show a run while it trains: on a terminal, as a page, as a report. It only reads.

`run_view` is what all of them look at. `__all__` names the modules that other rooms may import.
"""

__all__ = ["curves", "machine", "run_view", "terminal", "web"]
