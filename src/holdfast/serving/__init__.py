"""Serve trained models: an OpenAI-compatible API and a page to talk to them.

`__all__` names the modules that other rooms may import.
"""

__all__ = ["library", "server"]
