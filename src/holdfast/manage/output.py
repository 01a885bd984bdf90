"""Files that a person names for what a command has to give: a table, a picture, a page."""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoint.system import filesystem


def write_output(path: Path, data: bytes) -> None:
    """Write `data` to `path`: as a whole and durably where it is a file, or is none yet.

    A pipe, a device and a link (`/dev/stdout` is one) are written through, never replaced.
    Raises OSError as it comes.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("wb") as file:
            file.write(data)
        return
    try:
        filesystem.write_file(path, [(0, data)], len(data), mode=0o644)
    except OSError as error:  # of the file that was named, not of the one that stands in for it
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
