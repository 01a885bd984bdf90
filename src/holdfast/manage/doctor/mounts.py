"""File systems: which one a path lies on, and where "durable" is a hollow word on it.

What fsync(2) promises depends on who carries it out. Text of /proc/self/mountinfo in, plain facts
out (proc(5) has the format); nothing here touches a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from holdfast.i18n import N_, _

MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    point: str
    kind: str  # "ext4", "fuse.sshfs", ...
    source: str
    options: frozenset[str]  # of the mount and of the file system

    @property
    def read_only(self) -> bool:
        return "ro" in self.options


_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"}
_WINDOWS = {"drvfs", "wslfs"}
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "ncpfs", "coda", "9p", "lustre",
    "gpfs", "beegfs", "orangefs", "glusterfs", "davfs", "fuse.sshfs", "fuse.glusterfs",
    "fuse.ceph-fuse", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs", "fuse.davfs2",
    "fuse.curlftpfs", "fuse.mount-s3", "fuse.blobfuse2", "fuse.smbnetfs", "fuse.moosefs",
}  # fmt: skip
_SHARED = {"vboxsf", "vmhgfs", "fuse.vmhgfs-fuse", "prl_fs", "virtiofs", "fuse.virtiofsd",
           "fuse.grpcfuse", "fuse.osxfs", "fakeowner"}  # fmt: skip
_SMALL_FILES = {"vfat", "msdos"}  # FAT32 holds files below 4 GiB
_NO_BARRIER = {"nobarrier", "barrier=0", "barrier=none", "fsync_mode=nobarrier"}

_MEMORY_ADVICE = N_("choose a directory on a disk")
_HOLLOW = {
    "memory": (
        N_("{kind} lies in memory: everything there is gone when the machine goes off"),
        _MEMORY_ADVICE,
    ),
    "overlay": (
        N_("a container's own layer: it goes with the container, whatever is durable in it"),
        N_("choose a directory of a volume, as docker run -v or a persistent volume claim give"),
    ),
    "volatile": (
        N_("an overlay that was mounted as volatile leaves out every fsync"),
        N_("choose a directory of a volume"),
    ),
    "windows": (
        N_("a Windows drive under WSL: fsync ends at a translator, and files are slow there"),
        N_("choose a directory of the Linux file system, such as ~/runs"),
    ),
    "network": (
        N_("{kind} is a network file system: fsync is as good as the server's word, and a broken "
           "line stops saving"),
        N_("train on a local disk, and copy finished checkpoints"),
    ),
    "shared": (
        N_("a folder of the host machine ({kind}): the host decides what an fsync does"),
        N_("choose a directory of this machine's own disk"),
    ),
    "fuse": (
        N_("{kind} is a file system in user space: its program decides what an fsync does"),
        N_("choose a directory on a disk, or make sure that its program syncs"),
    ),
    "barrier": (
        N_("mounted with {option}: the disk's own cache is not flushed, and a power cut may take "
           "what was durable"),
        N_("mount it without {option}, unless the disk's cache has a battery"),
    ),
    "writeback": (
        N_("mounted with data=writeback: after a power cut the history and the metrics may hold "
           "old blocks; checkpoints are synced and hashed"),
        N_("mount it with data=ordered"),
    ),
    "soft": (
        N_("an NFS mount with {option} gives up on a slow server, and a write may be lost"),
        N_("mount it with hard"),
    ),
    "nostrictsync": (
        N_("mounted with nostrictsync: the server is never asked to flush its cache"),
        N_("mount it with strictsync"),
    ),
    "small": (
        N_("{kind} holds no file of 4 GiB or more, and has no hard links"),
        N_("choose a disk with ext4, XFS, Btrfs, NTFS or APFS"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Concern:
    """A reason why "durable" is hollow somewhere: a key, what is so, and what to do."""

    name: str
    reason: str
    advice: str


def parse(text: str) -> list[Mount]:
    """The mounts of a mountinfo text, in its order; lines that make no sense are passed over."""
    found = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not dash or len(before) < 6 or len(after) < 2:
            continue
        options = {*before[5].split(","), *(after[2] if len(after) > 2 else "").split(",")}
        found.append(Mount(_plain(before[4]), after[0], _plain(after[1]), frozenset(options)))
    return found


def mount_of(path: PurePath, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that `path`, absolute and without links, lies on: the deepest, and of several on
    one point the last."""
    found: Mount | None = None
    for mount in mounts:
        if path == PurePath(mount.point) or PurePath(mount.point) in path.parents:
            deeper = found is None or len(PurePath(mount.point).parts) >= len(
                PurePath(found.point).parts
            )
            found = mount if deeper else found
    return found


def concerns(mount: Mount) -> list[Concern]:
    """Why "durable" is hollow on `mount`; empty where nothing is known against it."""
    names = [name for name in (_place(mount),) if name]
    options, kind = mount.options, mount.kind
    found = [_concern(name, mount) for name in names]
    for option in sorted(options & _NO_BARRIER):
        found.append(_concern("barrier", mount, option))
    if "data=writeback" in options:
        found.append(_concern("writeback", mount))
    if kind.startswith("nfs"):
        found += [
            _concern("soft", mount, option) for option in sorted(options & {"soft", "softerr"})
        ]
    if "nostrictsync" in options:
        found.append(_concern("nostrictsync", mount))
    if kind in _SMALL_FILES:
        found.append(_concern("small", mount))
    return found


def _place(mount: Mount) -> str:
    kind, options = mount.kind, mount.options
    rules = (
        ("memory", kind in _IN_MEMORY),
        ("volatile", kind == "overlay" and "volatile" in options),
        ("overlay", kind in ("overlay", "overlayfs", "aufs", "fuse.fuse-overlayfs")),
        ("windows", kind in _WINDOWS or _is_drvfs(mount)),
        ("network", kind in _NETWORK),
        ("shared", kind in _SHARED),
        ("fuse", kind.startswith("fuse.") or kind == "fuse"),
    )
    return next((name for name, holds in rules if holds), "")


def _is_drvfs(mount: Mount) -> bool:
    """WSL 2 reaches the drives of Windows through 9p or virtiofs, and says so in its own words."""
    if mount.kind not in ("9p", "virtiofs"):
        return False
    words = " ".join([mount.source, *mount.options])
    return "drvfs" in words or re.match(r"[A-Za-z]:(\\|$)", mount.source) is not None


def _concern(name: str, mount: Mount, option: str = "") -> Concern:
    reason, advice = _HOLLOW[name]
    return Concern(
        name, _(reason, kind=mount.kind, option=option), _(advice, kind=mount.kind, option=option)
    )


def _plain(text: str) -> str:
    """Mountinfo writes blanks, tabs, newlines and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
