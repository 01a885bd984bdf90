"""Install wheel and sdist of `dist/` into empty environments and train with them: `make dist`."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ["-c", str(ROOT / "constraints.txt")]


def check_contents(wheel: Path, sdist: Path) -> None:
    """Raise AssertionError where an archive lacks a file or carries one that is not for users."""
    names = zipfile.ZipFile(wheel).namelist()
    ours = ("holdfast/", f"{wheel.name.partition('-py3')[0]}.dist-info/")
    strangers = [name for name in names if not name.startswith(ours)]
    assert not strangers, f"{wheel.name} carries {strangers[:5]}"
    for needed in (
        "holdfast/py.typed",
        "holdfast/locale/zh/LC_MESSAGES/holdfast.mo",
        "holdfast/samples/zh_sample.txt",
    ):
        assert needed in names, f"{wheel.name} lacks {needed}"
    assert any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} has no licence"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "train_chinese.py", "data/zh_sample.txt"} <= inside


def train_with(install: list[str], python: Path, archive: Path) -> None:
    """Install `archive` into the environment of `python` with `install`, and train a few steps."""
    # The pinned build first: a plain newer one would be gigabytes.
    subprocess.run([*install, *LIMITS, "torch"], check=True)
    subprocess.run([*install, *LIMITS, f"holdfast-train[train] @ {archive.as_uri()}"], check=True)
    with tempfile.TemporaryDirectory() as work:
        holdfast = str(python.with_name("holdfast"))
        for epochs in ("1", "2"):  # the second start goes on from the first
            command = [holdfast, "train", "--preset", "quick", "--checkpoint-dir", "run"]
            subprocess.run([*command, "--epochs", epochs], check=True, cwd=work)
        subprocess.run([holdfast, "verify", "run"], check=True, cwd=work)


def main() -> None:
    """Check what `python -m build` left in the directory that is the argument."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    (sdist,) = Path(sys.argv[1]).resolve().glob("*.tar.gz")
    check_contents(wheel, sdist)
    for archive, tool in ((wheel, "pip"), (sdist, "pip"), (wheel, "uv")):
        with tempfile.TemporaryDirectory() as place:
            python = Path(place) / "bin" / "python"
            if tool == "uv":
                subprocess.run(["uv", "venv", "--quiet", place, "--clear"], check=True)
                install = ["uv", "pip", "install", "--quiet", "--python", str(python)]
            else:
                subprocess.run([sys.executable, "-m", "venv", place], check=True)
                install = [str(python), "-m", "pip", "install", "--quiet"]
            train_with(install, python, archive)
        print(f"{archive.name} installed by {tool}: trained, resumed, verified")


if __name__ == "__main__":
    main()
