"""Write one value to one file without a run directory: the smallest step from `torch.save`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import Reader, image
from holdfast.checkpoint.state import codec, normalise
from holdfast.checkpoint.system import filesystem
from holdfast.errors import ConfigError, DamagedCheckpoint, SaveFailed


def save_file(obj: Any, path: str | os.PathLike[str]) -> None:
    """Save `obj` as the file `path`, in the place of `torch.save(obj, path)`.

        holdfast.save({"model": model, "step": step}, "out/model.pt")
        state = holdfast.load("out/model.pt")       # or torch.load(..., weights_only=True)

    The file is on the device and was read back before it takes the place of an older one, so at
    every moment `path` is the whole old file or the whole new one. Missing folders are made, and a
    link is followed.

    Args:
        obj: a tensor, a plain value, an object with `state_dict`, or containers of those.
        path: the file, `~` expanded.

    Raises:
        ConfigError: `path` is no path of a file.
        UnsupportedValue: `obj` holds something that a checkpoint cannot; its path is named.
        SaveFailed: the file was damaged when it was read back; `path` is as it was.
        OSError: the disk refuses it; `path` is as it was.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            "save(obj, path) writes to a path, such as {example}; this is a {kind}.",
            example='"out/model.pt"',
            kind=type(path).__name__,
        )
    target = Path(os.path.realpath(Path(os.fsdecode(path)).expanduser()))
    if target.is_dir():
        raise ConfigError("{path} is a directory; save(obj, path) needs a file name.", path=target)
    tree = normalise(obj)
    made = image.build(tree.payloads(), codec.to_json(tree))
    filesystem.make_directory(target.parent)
    draft = filesystem.temporary_name(target)
    try:
        filesystem.write_file(draft, made.pieces, made.size, mode=0o644)
        with Reader(draft) as reader:
            reader.verify()
        filesystem.rename(draft, target)
    except DamagedCheckpoint as error:
        raise SaveFailed(
            "{path} was not saved: what was written was read back damaged ({why}). An older file "
            "of that name is as it was.",
            path=target,
            why=error.why,
        ) from error
    finally:  # after the rename there is none
        with contextlib.suppress(OSError):
            filesystem.remove(draft)
    filesystem.sync_directory(target.parent)
