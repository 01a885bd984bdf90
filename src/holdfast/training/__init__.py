"""Train a Chinese language model from text with one command, on top of the engine.

`session` is one start of it, `trainer` its loop. Nothing of the desk, of pages or of servers may
enter. `__all__` names the modules that other rooms may import.
"""

__all__ = [
    "console",
    "dry_run",
    "inference",
    "models",
    "options",
    "plan",
    "plausible",
    "proving",
    "session",
    "text",
    "unattended",
]
