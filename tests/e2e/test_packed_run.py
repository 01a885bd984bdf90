"""A training that is packed in the middle goes on where it was unpacked, to the last bit.

The archive is written by a process of its own while the trainer is at work.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from holdfast.checkpoint import Catalog
from holdfast.training import loop
from holdfast.training.trainer import Trainer
from tests.manage.runs import desk, desk_json
from tests.training.runs import config_for, difference, final_state, train, write_corpus

PACK_AT = 30  # in the second epoch; the newest that is durable is older


def test_packed_in_the_middle_both_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, here, archive = write_corpus(tmp_path), tmp_path / "run", tmp_path / "run.tar.zst"
    options = {"temp_every_steps": 4}
    after_step = loop.after_step

    def packing(self: Trainer) -> None:
        after_step(self)
        if self.progress.step == PACK_AT:
            done = desk("pack", here, archive)
            assert (done.returncode, done.stderr) == (0, "")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "after_step", packing)
        train(config_for(here, corpus, **options))
    straight = final_state(here)

    there = tmp_path / "another place" / "同一个训练"
    told = desk_json("unpack", archive, there)
    newest = Catalog(there).scan().newest
    assert newest is not None and newest.step == told["step"]
    assert PACK_AT - 8 < newest.step <= PACK_AT < straight["global_step"]
    assert newest.names[0].startswith("temp/"), "in the middle of an epoch"
    moved = tmp_path / "another place" / "data.txt"
    shutil.move(corpus, moved)
    shutil.rmtree(here)
    shutil.rmtree(tmp_path / "cache")
    said = train(config_for(there, moved, **options))
    assert str(newest.step) in said
    assert difference(straight, final_state(there)) is None
