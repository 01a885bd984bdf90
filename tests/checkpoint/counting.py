"""Count what a start asks of the file system: through audit hooks, which Python cannot take off
again, so only in a forked child."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support import in_child


def counted(run: Path, start: Callable[[], None]) -> Counter[str]:
    """Call `start` in a child. Return how often it listed `run`, read events.jsonl from its
    beginning or looked for what has come, and opened each checkpoint."""
    result = run.with_name("counted.json")

    def child() -> None:
        counts: Counter[str] = Counter()
        counting = True

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if not counting or event not in ("os.listdir", "os.scandir", "open"):
                return
            path = arguments[0]
            if not isinstance(path, str | bytes | os.PathLike):
                return
            name = Path(os.fsdecode(path)).absolute()
            if event != "open":
                counts["scans"] += name == run
            elif name == run / "events.jsonl":
                flags = arguments[2]
                assert isinstance(flags, int)
                counts["history"] += flags & os.O_ACCMODE == os.O_RDONLY
            elif name.parent == run and name.suffix == ".pt":
                counts["checkpoints"] += 1

        sys.addaudithook(hook)
        start()
        counting = False
        result.write_text(json.dumps(counts))

    assert in_child(child) == 0
    return Counter(json.loads(result.read_text()))
