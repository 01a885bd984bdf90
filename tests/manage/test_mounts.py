"""Which file system a path lies on, and why "durable" is hollow there."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from holdfast.manage.doctor.mounts import Mount, concerns, mount_of, mounted


def mount(point: str, kind: str, source: str = "/dev/vda", *options: str) -> Mount:
    return Mount(point, kind, source, frozenset({"rw", "relatime", *options}))


EXT4 = mount("/", "ext4")
OVERLAY = mount("/", "overlay", "overlay", "lowerdir=/a", "upperdir=/u")
WSL2 = mount("/mnt/c", "9p", "C:\\", "aname=drvfs;path=C:\\;uid=1000;gid=1000")
NFS4 = mount("/data", "nfs4", "server:/export/data", "vers=4.2")
SSHFS = mount("/home/me/far away", "fuse.sshfs", "me@server:/home/me")
TMPFS = mount("/dev/shm", "tmpfs", "tmpfs")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (EXT4, []),
        (mount("/media/disk", "fuseblk", "/dev/sdb2"), []),
        (OVERLAY, ["overlay"]),
        (WSL2, ["windows"]),
        (mount("/mnt/d", "drvfs", "D:"), ["windows"]),
        (mount("/mnt/c", "virtiofs", "drvfsCID0"), ["windows"]),
        (mount("/host", "9p", "host0", "trans=virtio"), ["network"]),
        (NFS4, ["network"]),
        (SSHFS, ["network"]),
        (mount("/x", "fuse.something"), ["fuse"]),
        (TMPFS, ["memory"]),
        (mount("/media/stick", "vfat"), ["small"]),
        (mount("/", "ext4", "/dev/vda", "barrier=0"), ["barrier"]),
        (mount("/", "virtiofs"), ["shared"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Mount) else None,
)
def test_where_durable_is_hollow(where: Mount, names: list[str]) -> None:
    found = concerns(where)
    assert [concern.name for concern in found] == names
    assert all(concern.reason and concern.advice for concern in found)
    assert not any("{" in concern.reason + concern.advice for concern in found)


def test_the_reason_names_what_is_mounted_and_how() -> None:
    (barrier,) = concerns(mount("/", "ext4", "/dev/vda", "barrier=0"))
    assert "barrier=0" in barrier.reason and "barrier=0" in barrier.advice
    assert "fuse.sshfs" in concerns(SSHFS)[0].reason


def test_every_path_of_this_machine_lies_on_a_mount() -> None:
    found = mount_of(PurePosixPath("/"), mounted())
    assert found is not None and found.kind and found.options


@pytest.mark.parametrize(
    ("path", "point"),
    [
        ("/", "/"),
        ("/home/me", "/"),
        ("/data", "/data"),
        ("/data/runs/a", "/data"),
        ("/database", "/"),
        ("/dev/shm/x", "/dev/shm"),
        ("/home/me/far away/x", "/home/me/far away"),
    ],
)
def test_the_deepest_mount_counts(path: str, point: str) -> None:
    found = mount_of(PurePosixPath(path), [NFS4, SSHFS, TMPFS, EXT4])
    assert found is not None and found.point == point


def test_of_two_mounts_on_one_point_the_later_one_counts() -> None:
    found = mount_of(PurePosixPath("/x"), [EXT4, OVERLAY])
    assert found is not None and found.kind == "overlay"


def test_no_mount_is_no_answer() -> None:
    assert mount_of(PurePosixPath("/x"), [TMPFS]) is None
