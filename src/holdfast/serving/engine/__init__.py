"""From prompts to tokens: texts that join and leave one batch of a model, and how they are drawn.

No request and no network may enter. `__all__` names the modules that other rooms may import.
"""

__all__ = ["engine", "json_text", "rows", "sampling", "streaming"]
