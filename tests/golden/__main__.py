"""`python -m tests.golden record [WALK …]` records anew; without `record` it compares."""

from __future__ import annotations

import sys

from tests.golden import replay


def main(words: list[str]) -> int:
    new = words[:1] == ["record"]
    status = 0
    for name in words[1 if new else 0 :] or replay.WALKS:
        if new:
            replay.record(name)
            continue
        now = replay.walked(name)
        found = replay.made_with_others(name, now) or replay.first_difference(name, now)
        print(found or f"{name}: as recorded")
        status |= found is not None
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
