"""File systems: which one a path lies on, and where "durable" is a hollow word on it.

What fsync(2) promises depends on what carries it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from holdfast.i18n import N_, _


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system and where it is mounted."""

    point: str
    kind: str  # "ext4", "fuse.sshfs", ...
    source: str
    options: frozenset[str]  # of the mount and of the file system

    @property
    def read_only(self) -> bool:
        return "ro" in self.options


_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"}
_WINDOWS = {"drvfs", "wslfs"}
_NETWORK = re.compile(
    "nfs4?|cifs|smb3|smbfs|afs|ceph|ncpfs|coda|9p|lustre|gpfs|beegfs|orangefs|glusterfs|davfs|"
    "fuse.(sshfs|glusterfs|ceph-fuse|rclone|s3fs|gcsfuse|juicefs|davfs2|curlftpfs|mount-s3|"
    "blobfuse2|smbnetfs|moosefs)"
)
_SHARED = re.compile(
    "vboxsf|vmhgfs|prl_fs|virtiofs|fakeowner|fuse.(vmhgfs-fuse|virtiofsd|grpcfuse|osxfs)"
)
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
    "windows": (
        N_("a Windows drive under WSL: fsync ends at a translator, and files are slow there"),
        N_("choose a directory of the Linux file system, such as ~/runs"),
    ),
    "network": (
        N_(
            "{kind} is a network file system: fsync is as good as the server's word, and a broken "
            "line stops saving"
        ),
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
        N_(
            "mounted with {option}: the disk's own cache is not flushed, and a power cut may take "
            "what was durable"
        ),
        N_("mount it without {option}, unless the disk's cache has a battery"),
    ),
    "small": (
        N_("{kind} holds no file of 4 GiB or more, and has no hard links"),
        N_("choose a disk with ext4, XFS, Btrfs, NTFS or APFS"),
    ),
}


@dataclass(frozen=True, slots=True)
class Concern:
    """A reason why "durable" is hollow somewhere: a key, what is so, and what to do."""

    name: str
    reason: str
    advice: str


def mounted() -> list[Mount]:
    """Return what is mounted on this machine, in the order of mounting; nothing without psutil."""
    try:
        import psutil
    except ModuleNotFoundError:
        return []
    return [
        Mount(part.mountpoint, part.fstype, part.device, frozenset(part.opts.split(",")))
        for part in psutil.disk_partitions(all=True)
    ]


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
    """Return why "durable" is hollow on `mount`; empty where nothing is known against it."""
    place = _place(mount)
    found = [_concern(place, mount)] if place else []
    found += [_concern("barrier", mount, option) for option in sorted(mount.options & _NO_BARRIER)]
    if mount.kind in _SMALL_FILES:
        found.append(_concern("small", mount))
    return found


def _place(mount: Mount) -> str:
    kind = mount.kind
    rules = (
        ("memory", kind in _IN_MEMORY),
        ("overlay", kind in ("overlay", "overlayfs", "aufs", "fuse.fuse-overlayfs")),
        ("windows", kind in _WINDOWS or _is_drvfs(mount)),
        ("network", _NETWORK.fullmatch(kind)),
        ("shared", _SHARED.fullmatch(kind)),
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
