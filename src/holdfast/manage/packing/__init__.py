"""Write a run into one file and make a run directory of such a file.

`__all__` names the modules that other rooms may import. No torch is imported here.
"""

__all__ = ["archive", "pack", "unpack"]
