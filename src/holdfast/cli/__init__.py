"""One command line over all of it: a file a command, with its arguments, questions and printing.

Nothing is computed here, and nothing heavy is imported before the command that needs it is known.
"""

__all__ = ["main"]
