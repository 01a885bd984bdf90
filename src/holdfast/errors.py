"""Every error a user can cause or meet, one class for each thing they can do about it.

A message is one line in the user's language: what is wrong, where, what to do next. The command
line prints it and exits with `exit_code`; the traceback appears only with `--debug`.
"""

from __future__ import annotations

from holdfast.i18n import _


class HoldfastError(Exception):
    """Base of all errors raised on purpose.

    The message is translated here and its `{names}` are filled in with `values`.
    """

    exit_code = 1

    def __init__(self, message: str = "", /, **values: object) -> None:
        super().__init__(_(message, **values) if message else message)


class ConfigError(HoldfastError):
    """An option, a config file or a preset is wrong; all problems are reported at once."""

    exit_code = 2


class DataError(HoldfastError):
    """The training data is missing, unreadable or unusable."""

    exit_code = 3


class CheckpointError(HoldfastError):
    """Something about a checkpoint. `why` is what is wrong with it, for a line on which its file
    is named already: without the name and without a full stop."""

    exit_code = 4

    def __init__(self, message: str, /, *, why: str | None = None, **values: object) -> None:
        super().__init__(message, **values, **({} if why is None else {"why": why}))
        self.why = str(self).rstrip(".。") if why is None else why


class DamagedCheckpoint(CheckpointError):
    """The bytes of a checkpoint are not the bytes that were written."""


class ForeignCheckpoint(CheckpointError):
    """A file that holdfast did not write, where one that it wrote is needed."""


class UnsupportedValue(CheckpointError):
    """A state holds a value that cannot be saved so that any program can load it again."""


class StateMismatch(CheckpointError):
    """A checkpoint does not fit the objects it is to be loaded into; nothing was changed."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be made durable; what was there before is intact."""


class DirectoryLost(SaveFailed):
    """The run directory is no longer at its path; nothing was written."""


class RunLocked(HoldfastError):
    """Another process works in this run directory."""

    exit_code = 5


class ResourceError(HoldfastError):
    """Not enough disk or memory for what was asked, or no right to write there."""

    exit_code = 6


class GaveUp(HoldfastError):
    """A training crashed too often to be started again."""

    exit_code = 7


class Diverged(HoldfastError):
    """Training has come to a loss that it cannot learn from."""

    exit_code = 8


class Interrupted(HoldfastError):
    """A signal asked us to stop, and the state was saved: 128 + the signal's number."""

    def __init__(self, message: str, /, signal_number: int, **values: object) -> None:
        super().__init__(message, **values)
        self.exit_code = 128 + signal_number
