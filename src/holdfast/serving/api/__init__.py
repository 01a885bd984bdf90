"""The OpenAI API in words: what a request may say, what is refused, how an answer is told.

No checkpoint and no socket may enter. `__all__` names the modules that other rooms may import.
"""

__all__ = ["answers", "chatting", "limits", "protocol", "rendering"]
