"""Find what may go wrong with a run on this machine before it does.

`__all__` names the modules that other rooms may import.
"""

__all__ = ["disk_checks", "examine", "findings"]
