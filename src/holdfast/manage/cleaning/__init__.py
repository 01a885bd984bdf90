"""Decide what may go from a run directory and from shared memory, and remove it.

`__all__` names the modules that other rooms may import. No torch is imported here.
"""

__all__ = ["clean", "leftovers"]
