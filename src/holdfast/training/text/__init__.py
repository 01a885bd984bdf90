"""Text on its way to the model: files, encodings, documents, tokens, batches.

`prepare` is the way in: it reads, splits and tokenizes a data set once and opens the cached tokens
afterwards. No model, no training and no console may enter. `__all__` names the modules that other
rooms may import.
"""

__all__ = ["batches", "corpus", "damage", "formats", "prepare", "tokenizer"]
