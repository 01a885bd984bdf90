"""Import a model from elsewhere, and export a checkpoint in forms that other tools read.

Nothing of a server may enter. `__all__` names the modules that other rooms may import.
"""

__all__ = ["export", "importing"]
