"""Show one checkpoint in full, whole or damaged, ours or not.

`__all__` names the modules that other rooms may import. No torch is imported here.
"""

__all__ = ["show", "text"]
