"""A run in a browser: the dashboard, a server that only reads, and the report, one file.

`__all__` names the modules that other rooms may import.
"""

__all__ = ["app", "hub", "report"]
