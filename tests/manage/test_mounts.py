"""Which file system a path lies on, and why "durable" is hollow there, from literal mountinfo."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from holdfast.manage.doctor.mounts import concerns, mount_of, parse

EXT4 = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard"
OVERLAY = (
    "612 530 0:52 / / rw,relatime master:210 - overlay overlay "
    "rw,lowerdir=/var/lib/docker/overlay2/l/A:/b,upperdir=/u,workdir=/w"
)
VOLATILE = "612 530 0:52 / / rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/u,volatile"
WSL2 = (
    "101 75 0:60 / /mnt/c rw,noatime - 9p C:\\134 "
    "rw,dirsync,aname=drvfs;path=C:\\134;uid=1000;gid=1000;symlinkroot=/mnt/,mmap,access=client"
)
WSL1 = "16 1 0:14 / /mnt/d rw,noatime - drvfs D: rw,uid=1000,gid=1000"
WSL_VIRTIOFS = "90 75 0:44 / /mnt/c rw,noatime - virtiofs drvfsCID0 rw"
PLAIN_9P = "44 1 0:31 / /host rw,relatime - 9p host0 rw,trans=virtio"
NFS4 = (
    "88 27 0:48 / /data rw,relatime shared:50 - nfs4 server:/export/data "
    "rw,vers=4.2,rsize=1048576,wsize=1048576,soft,proto=tcp,timeo=600"
)
SSHFS = (
    "95 27 0:55 / /home/me/far\\040away rw,nosuid,nodev,relatime shared:60 - fuse.sshfs "
    "me@server:/home/me rw,user_id=1000,group_id=1000"
)
TMPFS = "25 24 0:23 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw,size=24684084k"
CIFS = "70 27 0:40 / /nas rw,relatime - cifs //nas/share rw,vers=3.1.1,soft,nostrictsync"
FAT = "60 27 8:17 / /media/stick rw,nosuid - vfat /dev/sdb1 rw,fmask=0022"
NTFS_3G = "61 27 8:18 / /media/disk rw,nosuid - fuseblk /dev/sdb2 rw,user_id=0,blksize=4096"
BIND = "120 27 254:0 /srv/runs /home/me/runs rw,relatime - ext4 /dev/vda rw"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (EXT4, []),
        (BIND, []),
        (NTFS_3G, []),
        (OVERLAY, ["overlay"]),
        (VOLATILE, ["volatile"]),
        (WSL2, ["windows"]),
        (WSL1, ["windows"]),
        (WSL_VIRTIOFS, ["windows"]),
        (PLAIN_9P, ["network"]),
        (NFS4, ["network", "soft"]),
        (SSHFS, ["network"]),
        (SSHFS.replace("fuse.sshfs", "fuse.something"), ["fuse"]),
        (TMPFS, ["memory"]),
        (CIFS, ["network", "nostrictsync"]),
        (FAT, ["small"]),
        (EXT4 + ",barrier=0", ["barrier"]),
        (EXT4 + ",nobarrier,data=writeback", ["barrier", "writeback"]),
        (EXT4 + ",data=ordered", []),
        (EXT4.replace("ext4", "virtiofs"), ["shared"]),
    ],
)
def test_where_durable_is_hollow(line: str, names: list[str]) -> None:
    (mount,) = parse(line)
    found = concerns(mount)
    assert [concern.name for concern in found] == names
    assert all(concern.reason and concern.advice for concern in found)
    assert not any("{" in concern.reason + concern.advice for concern in found)


def test_the_reason_names_what_is_mounted_and_how() -> None:
    (barrier,) = concerns(*parse(EXT4 + ",barrier=0"))
    assert "barrier=0" in barrier.reason and "barrier=0" in barrier.advice
    assert "fuse.sshfs" in concerns(*parse(SSHFS))[0].reason


def test_a_line_is_read_whole() -> None:
    (mount,) = parse(SSHFS)
    assert (mount.point, mount.kind, mount.source) == (
        "/home/me/far away", "fuse.sshfs", "me@server:/home/me",
    )  # fmt: skip
    assert {"nosuid", "user_id=1000"} <= mount.options
    assert not mount.read_only
    assert parse(EXT4.replace("rw,relatime", "ro,relatime"))[0].read_only
    assert parse(EXT4.replace("/dev/vda rw", "/dev/vda ro"))[0].read_only
    assert parse(WSL2)[0].source == "C:\\"


def test_nonsense_is_passed_over() -> None:
    assert parse("") == []
    assert [m.kind for m in parse(f"hello\n1 2 3\n- - -\n{EXT4}\n\n9 9 - ext4")] == ["ext4"]
    assert [m.source for m in parse("1 0 0:1 / / rw - proc none")] == ["none"], "no options"


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
    mounts = parse("\n".join([NFS4, SSHFS, TMPFS, EXT4]))
    found = mount_of(PurePosixPath(path), mounts)
    assert found is not None and found.point == point


def test_of_two_mounts_on_one_point_the_later_one_counts() -> None:
    found = mount_of(PurePosixPath("/x"), parse(f"{EXT4}\n{OVERLAY}"))
    assert found is not None and found.kind == "overlay"


def test_no_mount_is_no_answer() -> None:
    assert mount_of(PurePosixPath("/x"), parse(TMPFS)) is None
