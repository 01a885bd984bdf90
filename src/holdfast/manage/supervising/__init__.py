"""Keep a training going: start it again when it crashes, and at every boot.

`__all__` names the modules that other rooms may import. No torch is imported here.
"""

__all__ = ["service", "supervisor"]
