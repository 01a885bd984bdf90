"""A training that is started again goes on, whatever its first start was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import CheckpointError
from holdfast.training import unattended
from holdfast.training.continuing import Start, decide
from holdfast.training.options.config import Config
from tests.support import make_run
from tests.training.runs import config_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that already holds a run of another kind of training."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    make_run(directory, 2)
    return directory


def orders(run: Path, **options: object) -> Config:
    return config_for(run, run.parent / "none.txt", **options)


def decided(config: Config, run: Path) -> Start:
    return decide(config, Catalog(run).scan(), None)


@pytest.mark.parametrize("option", ["fresh", "checkpoint", "resume"])
def test_an_order_to_begin_anew_holds_once(
    run: Path, option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_run(other, 1)
    value = {"fresh": True, "checkpoint": other / "latest.pt", "resume": other}[option]
    config = orders(run, **{option: value})
    newest = Catalog(run).scan().entries[0]

    def begins_anew() -> bool:
        try:
            return decided(config, run).anew
        except CheckpointError as error:  # --resume DIR was obeyed; a toy's state is no such run
            return "no run of this trainer" in str(error)

    monkeypatch.delenv(unattended.RESTART, raising=False)
    assert begins_anew(), "the first start"
    monkeypatch.setenv(unattended.RESTART, newest.id)
    assert begins_anew(), "the first start died before it had made anything of its own"
    monkeypatch.setenv(unattended.RESTART, "what was here before")
    assert decided(config, run) == decided(orders(run), run), "goes on"
    monkeypatch.setenv(unattended.RESTART, "")
    assert decided(config, run) == decided(orders(run), run), "goes on; nothing was here before"


def test_goes_on_only_from_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(unattended.RESTART, raising=False)
    assert not unattended.goes_on("a")
    monkeypatch.setenv(unattended.RESTART, "a")
    assert [unattended.goes_on(newest) for newest in ("a", "b", None)] == [False, True, False]
