"""What is being written beside a target is left alone by others, and gone after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint.system import drafts
from holdfast.errors import ConfigError
from holdfast.exchange.target import making
from tests.support import die, in_child


def test_a_kill_leaves_nothing_at_the_target_and_the_next_call_sweeps_the_draft(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"

    def killed() -> None:
        with making(target, folder=True) as draft:
            (draft / "half").write_text("half")
            die()

    assert in_child(killed) < 0
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with making(target, folder=True) as draft:
        (draft / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_what_another_program_has_put_there_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(ConfigError, match="is there already"),
        making(target, folder=False) as draft,
    ):
        draft.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and list(tmp_path.iterdir()) == [target]


def test_a_draft_in_use_is_not_swept(tmp_path: Path) -> None:
    """Nor where its process is another machine's, of which the number says nothing."""
    place = tmp_path / ".unpacking-999999999-1"
    place.mkdir()
    with drafts.held(place):
        drafts.sweep(tmp_path, ".unpacking-")
        assert place.exists()
    drafts.sweep(tmp_path, ".unpacking-")
    assert not place.exists()
