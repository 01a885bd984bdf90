"""A run on a terminal: live on one screen, as one snapshot of text, its curve in characters.

`__all__` names the modules that other rooms may import.
"""

__all__ = ["plot", "screen", "snapshot", "watcher", "words"]
