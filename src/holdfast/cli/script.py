"""Find a Python that has the packages: for the scripts in the root of a clone.

People type `python train_cli.py` with the Python of their system after `make` has put the packages
into `.venv`. Only the standard library may be imported here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_NEEDED = ("torch", "numpy", "rich")  # of the core; the command line names what an extra lacks


def find_packages(root: Path) -> None:
    """Return if this Python has the packages; else start the script again with `root/.venv`.

    Exits with status 2 and one line that says what to type where there is no such environment.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if not missing:
        return
    windows = os.name == "nt"
    python = root / ".venv" / ("Scripts/python.exe" if windows else "bin/python")
    # Compare prefixes: the executable of an environment may be a link to the system's Python.
    if python.exists() and Path(sys.prefix) != root / ".venv":
        command = [str(python), *sys.argv]
        if windows:  # exec there returns to the shell while the script goes on
            sys.exit(subprocess.run(command, check=False).returncode)
        os.execv(python, command)
    from holdfast.i18n import _, detect_language, set_language

    set_language(detect_language())
    line = _(
        "holdfast: {python} lacks {names}. Install everything with: make -C {root} install",
        python=sys.executable,
        names=", ".join(missing),
        root=shlex.quote(str(root)),
    )
    print(line, file=sys.stderr)
    sys.exit(2)
