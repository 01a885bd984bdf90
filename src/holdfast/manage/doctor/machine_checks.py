"""The machine that a training runs on: memory, shared memory, limits, versions, GPU.

torch is imported only where it is asked about, last of all.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system import available_memory, disabled
from holdfast.formatting import format_bytes
from holdfast.i18n import _
from holdfast.manage.doctor.findings import BAD, OK, UNKNOWN, WARN, Finding, unknown
from holdfast.version import __version__

SNAPSHOTS = 3  # in shared memory; the engine's own number would import torch
_OLDEST_TORCH = (2, 10)
_EXTRAS = {
    "train": ("transformers", "tokenizers", "psutil", "pyarrow", "zstandard"),
    "tensorboard": ("tensorboard",),
}
_SMALL_SHM = 64 << 20  # what Docker gives a container
_LITTLE = 1 << 30  # bytes of memory that a training needs for itself, at the very least
_LOGIND = ("/usr/lib/systemd/logind.conf", "/etc/systemd/logind.conf")
_NVIDIA = Path("/proc/driver/nvidia/version")


def machine_checks(needed: int) -> Iterator[Finding]:
    """Check this machine; `needed` as in `disk_checks`."""
    yield main_memory(available_memory(), needed)
    yield snapshots_in_memory(needed)
    yield from removal_at_logout()
    yield python()
    yield extras()
    yield from torch_and_gpu()


# ----------------------------------------------------------------------------------------- memory


def main_memory(free: int, needed: int) -> Finding:
    """Check that a copy of the state fits beside the training."""
    if free >= 1 << 61:
        return unknown("memory")
    found = _("{free} available", free=format_bytes(free))
    advice = _("close other programs, or choose a smaller --model")
    if needed:
        found += _("; a snapshot of this run takes {size}", size=format_bytes(needed))
    if free < needed:
        return Finding("memory", BAD, found, advice)
    return (
        Finding("memory", WARN, found, advice)
        if free < _LITTLE + needed
        else Finding("memory", OK, found)
    )


def snapshots_in_memory(needed: int) -> Finding:
    """Check the room for three snapshots where they outlive a killed training."""
    if not sys.platform.startswith("linux"):
        return unknown("shared_memory")
    advice = _(
        "give it more (docker run --shm-size, mount -o remount,size=…); without it a kill "
        "costs the steps since the last save to the disk"
    )
    if disabled("sharedmemory"):
        return Finding("shared_memory", WARN, _("switched off by HOLDFAST_DISABLE"))
    if not shared_memory.usable():
        found = _("{path} cannot be written", path=shared_memory.PLACE)
        return Finding("shared_memory", WARN, found, advice)
    free = shared_memory.free_bytes()
    size = format_bytes(_size_of(shared_memory.PLACE))
    found = _(
        "{free} free of {size} in {path}",
        free=format_bytes(free),
        size=size,
        path=shared_memory.PLACE,
    )
    wanted = SNAPSHOTS * needed
    if needed:
        found += _("; three snapshots of this run take {size}", size=format_bytes(wanted))
    short = free < wanted or free <= _SMALL_SHM
    return Finding("shared_memory", WARN if short else OK, found, advice if short else "")


def _size_of(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_blocks * found.f_frsize


def removal_at_logout() -> Iterator[Finding]:
    """systemd removes a user's shared memory when the last session ends, unless told otherwise."""
    if not Path("/run/systemd/system").is_dir() or not shared_memory.usable():
        return
    import pwd

    uid = os.getuid()
    if uid < 1000:  # of the system: logind leaves it alone
        return
    name = pwd.getpwuid(uid).pw_name
    lingers = Path("/var/lib/systemd/linger", name).exists()
    if lingers or not removes_ipc(_read_configuration()):
        yield Finding("removal_at_logout", OK, _("stays"))
    else:
        yield Finding(
            "removal_at_logout",
            WARN,
            _("systemd removes it when you log out, and the snapshots in it"),
            f"loginctl enable-linger {name}",
        )


def removes_ipc(configuration: str) -> bool:
    """Return True if a logind.conf says so; RemoveIPC= is yes by default (logind.conf(5))."""
    said = re.findall(r"(?mi)^\s*RemoveIPC\s*=\s*(\S+)", configuration)
    return not said or said[-1].lower() not in ("no", "false", "0", "off")


def _read_configuration() -> str:
    """logind's settings, the ones that win last."""
    parts = [path for place in _LOGIND for path in sorted(Path(f"{place}.d").glob("*.conf"))]
    texts = []
    for path in (*map(Path, _LOGIND), *parts):
        try:
            texts.append(path.read_text("utf-8", "replace"))
        except OSError:
            continue
    return "\n".join(texts)


# --------------------------------------------------------------------------------------- versions


def python() -> Finding:
    found = _(
        "{version} on {system}; holdfast {holdfast}",
        version=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        holdfast=__version__,
    )
    return Finding("python", OK, found)


def extras() -> Finding:
    """Name the optional packages that are missing; a training loop of one's own needs none."""
    parts, absent = [], []
    for extra, names in _EXTRAS.items():
        lacking = [name for name in names if _version(name) is None]
        if lacking:
            absent.append(extra)
            parts.append(_("{extra}: missing {names}", extra=extra, names=", ".join(lacking)))
        else:
            parts.append(_("{extra}: installed", extra=extra))
    state = WARN if "train" in absent else OK
    advice = f"pip install 'holdfast-train[{','.join(absent)}]'" if absent else ""
    return Finding("extras", state, "; ".join(parts), advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_and_gpu() -> Iterator[Finding]:
    """PyTorch as it really loads, and the accelerator as it really sees it."""
    advice = "pip install 'torch>=2.10'"
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that it needs is missing or broken
        yield Finding("torch", BAD, _("cannot be loaded: {reason}", reason=error), advice)
        yield Finding("gpu", UNKNOWN, _("not known without PyTorch"))
        return
    version = str(torch.__version__)
    yield torch_version(version)
    yield gpu(torch, version)


def torch_version(version: str) -> Finding:
    """Older ones have a weights_only that runs code (CVE-2025-32434, CVE-2026-24747)."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _OLDEST_TORCH:
        return Finding(
            "torch",
            BAD,
            _("{version}: its torch.load is not safe", version=version),
            "pip install 'torch>=2.10'",
        )
    return Finding("torch", OK, version)


def gpu(torch: Any, version: str) -> Finding:
    driver = nvidia_driver()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        count = torch.cuda.device_count()
        found = _(
            "{name}, {free} free of {total}; driver {driver}, CUDA {cuda}",
            name=properties.name if count == 1 else f"{count} × {properties.name}",
            free=format_bytes(free),
            total=format_bytes(total),
            driver=driver or "?",
            cuda=torch.version.cuda or torch.version.hip or "?",
        )
        return Finding("gpu", OK, found)
    if torch.backends.mps.is_available():
        return Finding("gpu", OK, _("Apple's, through Metal"))
    if driver:
        return Finding(
            "gpu",
            WARN,
            _(
                "an NVIDIA driver {driver} is here, and PyTorch {version} cannot use it",
                driver=driver,
                version=version,
            ),
            _("install the PyTorch build for this driver: https://pytorch.org/get-started"),
        )
    return Finding("gpu", OK, _("none: trains on the CPU"))


def nvidia_driver(path: Path = _NVIDIA) -> str | None:
    """The version of the kernel's NVIDIA driver, as it says itself."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None
