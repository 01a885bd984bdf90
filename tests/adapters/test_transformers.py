"""Trainer, Seq2SeqTrainer and SFTTrainer with LoRA, killed and started again: to the bit as if they
never had been. The proof fails where the protection is a wrong one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.trainings import FINAL, causal, run, seq2seq, sft_lora
from tests.support import assert_same


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What an undisturbed training comes to; each is trained once."""
    known: dict[str, dict[str, Any]] = {}

    def of(make: Callable[..., Any], **settings: Any) -> dict[str, Any]:
        name = f"{make.__name__} {settings}"
        if name not in known:
            out = tmp_path_factory.mktemp("straight")
            status, said = run(make, out, **settings)
            assert status == 0, said
            known[name] = final(out)
        return known[name]

    return of


def final(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / FINAL, weights_only=False)
    return state


KILLS = {
    "in the middle of an accumulation": ("substep_end", 3),
    "right after a save": ("step_begin", 4),
    "at the end of an epoch": ("epoch_end", 10),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_that_was_killed_ends_as_if_it_never_had_been(
    kill: tuple[str, int], workers: int, straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(causal, tmp_path, kill=kill, dataloader_num_workers=workers)
    assert status == -signal.SIGKILL, said
    status, said = run(causal, tmp_path, dataloader_num_workers=workers)
    assert status == 0, said
    assert_same(final(tmp_path), straight(causal))


@pytest.mark.parametrize("make", [seq2seq, sft_lora])
def test_others_that_were_killed_end_as_if_they_never_had_been(
    make: Callable[..., Any], straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(make, tmp_path, kill=("substep_end", 7))
    assert status == -signal.SIGKILL, said
    status, said = run(make, tmp_path)
    assert status == 0, said
    assert_same(final(tmp_path), straight(make))
