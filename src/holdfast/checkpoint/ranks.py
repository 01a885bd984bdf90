"""Several ranks of one training: refused in words, since a manager saves one process only."""

from __future__ import annotations

import os

import torch.distributed as dist

from holdfast.errors import ConfigError


def refuse() -> None:
    """Raise `ConfigError` where this process is one rank of several.

    A manager on every rank would fight for the directory. One on rank 0 alone would be worse: after
    a resume the other ranks go on with an empty optimizer, and nothing fails.
    """
    world, rank = _of_torch() or _of_environment()
    if world > 1:
        raise ConfigError(
            "This is rank {rank} of {world}. Holdfast saves and restores the state of one "
            "process: saved on rank 0 alone, the other ranks would go on from a resume with an "
            "empty optimizer and random streams of their own. Train in one process (without "
            "torchrun; unset RANK and WORLD_SIZE), or save with torch.distributed.checkpoint.",
            rank=rank,
            world=world,
        )


def _of_torch() -> tuple[int, int] | None:
    """Return world size and rank of torch.distributed; None before it is initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.get_world_size(), dist.get_rank()


def _of_environment() -> tuple[int, int]:
    """Return what torchrun tells the processes that it starts; one rank where nothing is said."""
    try:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    except (KeyError, ValueError):
        return 1, 0
