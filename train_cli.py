"""`holdfast train` for those who start scripts: python train_cli.py --preset quick."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from holdfast.cli.script import find_packages

if __name__ == "__main__":
    find_packages(Path(__file__).resolve().parent)
    from holdfast.cli.main import train_main

    sys.exit(train_main(prog="train_cli.py"))
