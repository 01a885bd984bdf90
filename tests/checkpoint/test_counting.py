"""One start looks into the run directory once."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoint.counting import counted
from tests.support import Toy, make_run


def test_a_strangers_loop_scans_once_and_reads_the_history_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 3)

    def start() -> None:
        toy = Toy(seed=5)
        manager = toy.manager(run)
        assert manager.resume() is not None

    counts = counted(run, start)
    assert (counts["scans"], counts["history"]) == (1, 1), counts
