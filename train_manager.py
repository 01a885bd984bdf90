"""`holdfast list`, `history`, `compare`, `clean` … for those who start scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from holdfast.cli.script import find_packages

if __name__ == "__main__":
    find_packages(Path(__file__).resolve().parent)
    from holdfast.cli.main import main

    sys.exit(main(prog="train_manager.py"))
