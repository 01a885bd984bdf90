"""Replacing a folder is done, or undone by the next call, wherever a kill comes."""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoint.system import drafts
from holdfast.exchange.target import MARK, check_target, making
from tests.support import die, in_child


def write(target: Path, text: str) -> None:
    with making(target, folder=True, force=True) as draft:
        (draft / MARK).write_text(text)


def test_a_kill_between_the_two_moves_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for moment in (1, 2):
        write(target, "old")

        def killed(moment: int = moment) -> None:
            real, calls = Path.rename, 0

            def rename(self: Path, to: Path) -> Path:
                nonlocal calls
                calls += 1
                return die() if calls == moment else real(self, to)  # type: ignore[no-any-return]

            Path.rename = rename  # type: ignore[assignment]
            write(target, "new")

        assert in_child(killed) < 0
        check_target(target, force=True)
        assert (target / MARK).read_text() == "old"
        write(target, "newest")
        assert (target / MARK).read_text() == "newest"
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left behind"


def test_a_draft_in_use_is_not_swept(tmp_path: Path) -> None:
    """Nor where its process is another machine's, of which the number says nothing."""
    place = tmp_path / ".unpacking-999999999-1"
    place.mkdir()
    with drafts.held(place):
        drafts.sweep(tmp_path, ".unpacking-")
        assert place.exists()
    drafts.sweep(tmp_path, ".unpacking-")
    assert not place.exists()
