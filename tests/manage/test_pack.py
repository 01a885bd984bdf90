"""`holdfast pack`: one file, links kept, read back, of a run that may be trained meanwhile."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from holdfast import load
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.system import drafts, filesystem
from holdfast.errors import ConfigError, DamagedCheckpoint, HoldfastError, RunLocked
from holdfast.manage import locking
from holdfast.manage.packing.archive import MANIFEST, SUMS
from holdfast.manage.packing.pack import Packed, pack, target_of
from holdfast.manage.progress import Progress
from tests.manage.runs import Training, copy_without_links, cut, flip, make_run
from tests.support import die, in_child


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def names_of(packed: Packed) -> set[str]:
    return {item.name for item in packed.contents.items}


def test_one_file_holds_the_run_with_its_links_and_checksums(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "notes").mkdir()
    (run / "notes" / "笔记 1.txt").write_text("三步", "utf-8")
    packed = pack(run, tmp_path / "a.tar")
    found = {m.name: m for m in members(tmp_path / "a.tar")}
    own = {"run/model_epoch_4.pt", "run/model_epoch_3.pt", "run/model_epoch_2.pt"}
    assert all(found[name].isreg() and found[name].mode == 0o444 for name in own)
    assert found["run/latest.pt"].islnk()
    assert found["run/latest.pt"].linkname == "run/model_epoch_4.pt"
    assert found["run/best_model.pt"].linkname == "run/model_epoch_2.pt"
    assert {"run/events.jsonl", "run/notes/笔记 1.txt"} <= found.keys()
    assert not {".run.lock", ".catalog.lock", "metadata.json"} & names_of(packed)
    assert (packed.contents.step, packed.contents.epoch) == (400, 4)
    size = (run / "latest.pt").stat().st_size
    assert 4 * size < packed.size < 4 * size + 40_000, "links cost nothing"
    with tarfile.open(tmp_path / "a.tar") as tar:
        first, last = tar.getmembers()[0], tar.getmembers()[-1]
        assert (first.name, last.name) == (f"run/{MANIFEST}", f"run/{SUMS}")
        sums = tar.extractfile(last)
        assert sums is not None
        stated = dict(reversed(line.split("  ", 1)) for line in sums.read().decode().splitlines())
    data = (run / "model_epoch_3.pt").read_bytes()
    assert stated["model_epoch_3.pt"] == xxhash.xxh3_128(data).hexdigest()
    assert not list(tmp_path.glob(".holdfast-*"))


def test_a_run_that_has_lost_its_links_packs_one_copy_of_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    copy = copy_without_links(run, tmp_path / "copy" / "run")
    a, b = pack(run, tmp_path / "a.tar"), pack(copy, tmp_path / "b.tar")
    assert names_of(a) == names_of(b)
    links = {item.name: item.link for item in b.contents.items if item.link}
    assert links == {item.name: item.link for item in a.contents.items if item.link}
    assert links["model.pt"] == "model_epoch_4.pt"


def test_of_copies_one_damaged_does_not_matter(tmp_path: Path) -> None:
    copy = copy_without_links(make_run(tmp_path / "run"), tmp_path / "copy")
    flip(copy / "latest.pt")
    packed = pack(copy, tmp_path / "b.tar")
    assert not packed.damaged and "latest.pt" in names_of(packed)
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert load(tmp_path / "out" / "copy" / "latest.pt")["epoch"] == 4


def test_a_damaged_checkpoint_is_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "model_epoch_1.pt")  # its manifest is whole: seen when its bytes pass by
    cut(run / "model_epoch_3.pt")
    packed = pack(run, tmp_path / "a.tar")
    assert packed.damaged and packed.contents.step == 400
    assert {"model_epoch_1.pt", "model_epoch_3.pt"}.isdisjoint(names_of(packed))
    out = dict(packed.left_out)
    assert out["model_epoch_1.pt"] == "the content of record checkpoint/data/8 has changed"
    assert "its end is missing" in out["model_epoch_3.pt"]


def test_where_all_are_damaged_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0,))
    flip(run / "latest.pt")
    with pytest.raises(DamagedCheckpoint, match="has changed"):
        pack(run, tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_slim_has_the_newest_and_the_best_and_all_small_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "archive" / "generation_1").mkdir(parents=True)
    os.link(run / "model_epoch_1.pt", run / "archive" / "generation_1" / "model_epoch_1.pt")
    (run / "others.pt").write_bytes(b"somebody else's")
    full, slim = pack(run, tmp_path / "a.tar"), pack(run, tmp_path / "s.tar", slim=True)
    assert {"archive/generation_1/model_epoch_1.pt", "others.pt"} <= names_of(full)
    assert {name for name in names_of(slim) if name.endswith(".pt")} == {
        "model_epoch_4.pt", "latest.pt", "model.pt", "model_epoch_2.pt", "best_model.pt"
    }  # fmt: skip
    assert "events.jsonl" in names_of(slim)
    assert dict(slim.left_out) == {"archive/": "set aside"}


def test_what_is_no_file_of_the_run_stays_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "link.pt").symlink_to("/etc/passwd")
    (run / "elsewhere").symlink_to("/etc")
    os.mkfifo(run / "pipe")
    (run / ".holdfast-1-ab.tmp").write_bytes(b"half")
    (run / "quarantine").mkdir()
    (run / "quarantine" / "x.pt").write_bytes(b"rot")
    packed = pack(run, tmp_path / "a.tar")
    assert {name for name, _why in packed.left_out} == {
        "link.pt", "elsewhere", "pipe", "quarantine/"
    }  # fmt: skip
    assert dict(packed.left_out)["link.pt"] == "a symbolic link"
    assert not any("holdfast-1" in name or "x.pt" in name for name in names_of(packed))


def test_a_training_goes_on_meanwhile_and_what_it_prunes_is_packed(tmp_path: Path) -> None:
    """Everything is linked before the first byte is read: what was there then is in the file."""
    run = tmp_path / "run"
    with Training(run, keep=2) as training:
        for number in (1, 2, 3):
            training.epoch(number, 4.0 - number)
        saved: list[int] = []

        def save_meanwhile(_progress: Progress) -> None:
            if not saved:
                saved.extend((4, 5, 6))
                for number in saved:
                    training.epoch(number, 5.0)
                assert not (run / "model_epoch_2.pt").exists()

        packed = pack(run, tmp_path / "a.tar", show=save_meanwhile)
    assert saved and packed.contents.step == 300 and not packed.damaged
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert load(tmp_path / "out" / "run" / "latest.pt")["epoch"] == 3
    assert load(tmp_path / "out" / "run" / "model_epoch_2.pt")["epoch"] == 2
    assert not (run / ".packing").exists()


def test_what_a_killed_packing_has_linked_goes_with_the_next_start(tmp_path: Path) -> None:
    """Its links would hold the data of checkpoints that retention removes."""
    run = make_run(tmp_path / "run")

    def killed() -> None:
        pack(run, tmp_path / "a.tar", show=lambda _progress: die())

    assert in_child(killed) == -signal.SIGKILL
    assert len(list((run / ".packing").iterdir())) == 1
    with Training(run):
        assert not (run / ".packing").exists()


def test_without_hard_links_copies_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    packed = pack(run, tmp_path / "a.tar")
    assert packed.contents.step == 400 and not packed.damaged
    assert not (run / ".packing").exists()


def test_what_was_written_since_the_scan_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file gets its name before the engine takes the lock to link it."""
    run = make_run(tmp_path / "run")
    walk = os.walk

    def written(top: Any, *given: Any, **more: Any) -> Any:
        if top == run and not (tmp_path / "other").exists():
            make_run(tmp_path / "other", (1.0, 1.0, 1.0, 1.0, 0.5))
            os.link(tmp_path / "other" / "model_epoch_5.pt", run / "model_epoch_5.pt")
        return walk(top, *given, **more)

    monkeypatch.setattr(os, "walk", written)
    assert pack(run, tmp_path / "a.tar").contents.step == 500


def test_a_lock_that_is_held_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(locking, "WAIT", 0.1)
    with Catalog(run).lock(), pytest.raises(RunLocked, match="is changing"):
        pack(run, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_a_directory_that_cannot_be_written_is_packed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    open_ = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if path == run / ".catalog.lock" and flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert pack(run, tmp_path / "a.tar").contents.step == 400


def test_an_archive_that_is_there_stays_unless_it_was_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    target = tmp_path / "a.tar"
    target.write_bytes(b"precious")
    with pytest.raises(HoldfastError, match="--force"):
        pack(run, target)
    flip(run / "model_epoch_4.pt")
    flip(run / "model_epoch_2.pt")
    for name in ("model_epoch_1.pt", "model_epoch_3.pt"):
        (run / name).unlink()
    with pytest.raises(DamagedCheckpoint):
        pack(run, target, force=True)
    assert target.read_bytes() == b"precious", "as it was where packing fails"


def test_force_replaces_it(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    target.write_bytes(b"old")
    pack(make_run(tmp_path / "run"), target, force=True)
    assert members(target)[0].name == f"run/{MANIFEST}"


@pytest.mark.parametrize("stage", ["reading", "reading back"])
def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "run")

    def show(progress: Progress) -> None:
        if (progress.number == progress.of) == (stage == "reading back") and progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(run, tmp_path / "a.tar", show=show)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_the_disk_has_changed_is_found_before_the_archive_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    sync = filesystem.sync_file
    changed: list[int] = []

    def rot(fd: int) -> None:
        sync(fd)
        if os.fstat(fd).st_size > 100_000 and not changed:  # the archive
            changed.append(fd)
            os.pwrite(fd, b"\xff\xff", 60_000)

    monkeypatch.setattr(filesystem, "sync_file", rot)
    with pytest.raises(DamagedCheckpoint, match=r"a\.tar is damaged: the content of model_epoch"):
        pack(run, tmp_path / "a.tar")
    assert changed and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_compressed_one_is_a_standard_zstandard_stream(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    run = make_run(tmp_path / "run")
    packed = pack(run, tmp_path / "a.tar.zst")
    plain = pack(run, tmp_path / "a.tar")
    assert packed.size < plain.size
    with (tmp_path / "a.tar.zst").open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            assert [m.name for m in tar] == [m.name for m in members(tmp_path / "a.tar")]


def test_without_zstandard_it_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    original = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "zstandard":
            raise ModuleNotFoundError(name=name)
        return original(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"holdfast-train\[desk\].*plain \.tar"):
        pack(run, tmp_path / "a.tar.zst")
    assert pack(run, tmp_path / "a.tar").contents.step == 400


def test_where_the_archive_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    assert target_of(run, None) == Path("run.tar")
    assert target_of(run, str(tmp_path)) == tmp_path / "run.tar"
    assert target_of(run, "x/y.tar.zst") == Path("x/y.tar.zst")
    monkeypatch.chdir(run)
    assert target_of(".", "../a.tar") == Path("../a.tar")
    wrong: list[tuple[Callable[[], Path], str]] = [
        (lambda: target_of(".", "a.zip"), "something.tar"),
        (lambda: target_of(".", None), "outside"),
        (lambda: target_of(run, str(run / "logs" / "a.tar")), "outside"),
    ]
    for call, words in wrong:
        with pytest.raises(ConfigError, match=words):
            call()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HoldfastError, match="There is no checkpoint in"):
        pack(tmp_path / "empty", tmp_path / "a.tar")
    assert not list((tmp_path / "empty").iterdir()), "and no lock is left in it"
    with pytest.raises(HoldfastError, match="There is no directory"):
        pack(tmp_path / "gone", tmp_path / "a.tar")


def test_memory_stays_flat(tmp_path: Path) -> None:
    """64 MiB pass through; what is held at once is a few MiB."""
    run = make_run(tmp_path / "run", (1.0,))
    with (run / "large.bin").open("wb") as file:
        for _i in range(64):
            file.write(os.urandom(1 << 20))
    tracemalloc.start()
    pack(run, tmp_path / "a.tar")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 << 20


def test_a_snapshot_that_only_memory_holds_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    class Left:
        order, step = (1, 999), 450

    monkeypatch.setattr(shared_memory, "left_by", lambda *_given: [Left])
    assert pack(run, tmp_path / "a.tar").unsaved == 450
    Left.order = (1, 0)
    assert pack(run, tmp_path / "b.tar").unsaved is None


def test_it_packs_beside_a_training_that_saves_all_the_time(tmp_path: Path) -> None:
    run, stop = tmp_path / "run", threading.Event()
    errors: list[BaseException] = []
    steps: list[int] = []

    def disturb() -> None:
        while not stop.is_set():
            try:
                packed = pack(run, tmp_path / "a.tar", force=True)
                steps.append(packed.contents.step or 0)
                assert not packed.damaged and not packed.left_out
            except BaseException as error:  # noqa: BLE001 - told by the test
                errors.append(error)
                return

    with Training(run, keep=1) as training:
        training.epoch(1, 9.0)
        thread = threading.Thread(target=disturb)
        thread.start()
        for number in range(2, 30):
            training.epoch(number, 9.0 - 0.1 * number)
        stop.set()
        thread.join()
    assert not errors, errors[0]
    assert len(steps) > 2 and steps == sorted(steps)
    assert json.loads((run / "metadata.json").read_text())["files"]


def test_what_a_killed_pack_has_left_goes_with_the_next_one_and_a_living_ones_stays(
    tmp_path: Path,
) -> None:
    run, target = tmp_path / "run", tmp_path / "run.tar"
    make_run(run)
    script = (
        "import os, pathlib, signal, sys; from holdfast.manage.packing import pack\n"
        "pack.check = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack.pack(*map(pathlib.Path, sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", script, run, target], check=False)
    (left,) = tmp_path.glob(".holdfast-*")
    assert left.stat().st_size > 0 and not target.exists()
    living = tmp_path / f".holdfast-pack-{os.getpid()}-0.tmp"
    living.touch()
    with drafts.held(living):
        pack(run, target)
    assert list(tmp_path.glob(".holdfast-*")) == [living]
