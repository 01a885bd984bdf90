"""The disk as `holdfast doctor` measures it: rooms, thresholds, fast paths on and off."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.filesystem import RESERVE
from holdfast.manage.doctor import disk_checks, mounts
from holdfast.manage.doctor.disk_checks import disk_checks as check_disk
from holdfast.manage.doctor.findings import BAD, OK, UNKNOWN, WARN, Finding, worst
from tests.support import fail_with

EXT4 = mounts.Mount("/", "ext4", "/dev/vda", frozenset({"rw"}))
TMPFS = mounts.Mount("/tmp", "tmpfs", "tmpfs", frozenset({"rw"}))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with little: these tests are not about the disk they run on."""
    monkeypatch.setattr(disk_checks, "FIRST_PROBE", 1 << 20)
    monkeypatch.setattr(disk_checks, "PROBE", 2 << 20)
    monkeypatch.setattr(disk_checks, "SYNCS", 5)


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}  # type: ignore[attr-defined]


def test_everything_is_looked_at_and_nothing_is_left(tmp_path: Path) -> None:
    found = by_name(check_disk(tmp_path, needed=10 << 20))
    assert set(found) == {
        "free_space", "free_names", "file_system", "directory", "write_speed", "fsync",
        "hard_links",
    }  # fmt: skip
    assert "/s past the page cache" in found["write_speed"].found
    assert "a checkpoint of this run in about" in found["write_speed"].found
    assert " µs" in found["fsync"].found
    assert list(tmp_path.iterdir()) == []
    assert all(finding.line().startswith(("✓", "⚠", "✗", "-")) for finding in found.values())


@pytest.mark.parametrize(
    ("free", "needed", "state"),
    [
        (RESERVE - 1, 0, BAD),
        (RESERVE, 0, WARN),
        (1 << 30, 0, OK),
        (RESERVE + 99, 100, BAD),
        (RESERVE + 100, 100, WARN),
        (RESERVE + 300, 100, OK),
    ],
)
def test_free_space(free: int, needed: int, state: str) -> None:
    found = disk_checks.free_space(free, needed)
    assert (found.state, bool(found.advice)) == (state, state != OK)


@pytest.mark.parametrize(("count", "state"), [(15, BAD), (16, WARN), (999, WARN), (1000, OK)])
def test_free_inodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, state: str
) -> None:
    values = (4096, 4096, 10, 10, 10, 5000, count, count, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))
    assert disk_checks.free_names(tmp_path).state == state


def test_a_file_system_that_counts_no_inodes_has_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (4096, 4096, 10, 10, 10, 0, 0, 0, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))
    assert disk_checks.free_names(tmp_path).state == OK


@pytest.mark.parametrize(
    ("microseconds", "mount", "state"),
    [(19.9, EXT4, WARN), (20.1, EXT4, OK), (1, TMPFS, OK), (1, None, WARN), (900, None, OK)],
)
def test_an_fsync_faster_than_any_device_is_not_believed(
    microseconds: float, mount: mounts.Mount | None, state: str
) -> None:
    assert disk_checks.fsync(microseconds * 1e-6, mount).state == state


def test_an_fsync_that_does_nothing_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "sync_file", lambda _fd: None)
    seconds = disk_checks.fsync_seconds(tmp_path)
    assert 0 < seconds < 1e-3


def test_the_file_system_is_named_with_all_that_is_wrong() -> None:
    assert disk_checks.file_system(EXT4) == Finding(
        "file_system", OK, "ext4 on /dev/vda, mounted at /"
    )
    hollow = disk_checks.file_system(
        mounts.Mount("/", "ext4", "/dev/vda", frozenset({"nobarrier"}))
    )
    assert hollow.state == WARN
    assert "nobarrier" in hollow.found
    assert disk_checks.file_system(None).state == UNKNOWN
    read_only = mounts.Mount("/", "ext4", "/dev/vda", frozenset({"ro"}))
    assert disk_checks.file_system(read_only).state == BAD


def test_hard_links_that_are_off_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    assert by_name(check_disk(tmp_path, 0))["hard_links"].state == WARN
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", fail_with(errno.EROFS))
    found = by_name(check_disk(tmp_path, 0))
    assert found["directory"].state == BAD and "Read-only" in found["directory"].found
    assert "write_speed" not in found, "nothing is measured"
    assert found["free_space"].state != UNKNOWN, "what can be known is"


def test_a_disk_that_fails_while_it_is_measured_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "sync_file", fail_with(errno.EIO))
    found = by_name(check_disk(tmp_path, 0))
    assert found["write_speed"].state == found["fsync"].state == BAD
    assert found["free_space"].state != UNKNOWN, "the other checks go on"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _place: 1 << 20)
    assert disk_checks.write_speed(tmp_path, 0).state == UNKNOWN


def test_the_nearest_existing_directory(tmp_path: Path) -> None:
    assert disk_checks.existing_parent(tmp_path / "a" / "b") == tmp_path.resolve()
    (tmp_path / "file").write_text("x")
    assert disk_checks.existing_parent(tmp_path / "file" / "b") == tmp_path.resolve()
    (tmp_path / "link").symlink_to(tmp_path / "later")
    assert disk_checks.existing_parent(tmp_path / "link") == tmp_path.resolve()


def test_the_worst_counts() -> None:
    findings = [Finding("fsync", state, "") for state in (OK, UNKNOWN)]
    assert worst(findings) == OK
    assert worst([*findings, Finding("fsync", WARN, "")]) == WARN
    assert worst([Finding("fsync", BAD, ""), Finding("fsync", WARN, "")]) == BAD
