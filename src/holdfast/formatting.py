"""Numbers as people read them: bytes, durations, ages, losses and times, each with its unit.

Pure functions in the language in force; every message of the house that shows a number comes here.
"""

from __future__ import annotations

import datetime
import math
import re

from holdfast.i18n import _

NOTHING = "-"  # where there is no value: one plain character, easy to find for a script
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: int) -> str:
    """`count` bytes in binary units with three significant digits: 1.42 GiB, 40.0 KiB, 512 B."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    unit = ""
    for unit in _UNITS:
        value /= 1024
        if abs(value) < 1023.5 or unit == _UNITS[-1]:  # 1023.7 KiB is 1.00 MiB, not 1024 KiB
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration with its two largest units: 0.32 s, 8.4 s, 42 s, 4 min 24 s, 1 h 05 min, 2 d 03 h.

    A negative one (a clock was set back) is shown as 0; one that is not finite as a dash.
    """
    if not math.isfinite(seconds):
        return NOTHING
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return _("{seconds} s", seconds=f"{seconds:.{2 if seconds < 0.995 else 1}f}")
    minutes, whole = divmod(round(seconds), 60)
    if not minutes:
        return _("{seconds} s", seconds=whole)
    if minutes < 60:
        return _("{minutes} min {seconds} s", minutes=minutes, seconds=f"{whole:02d}")
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return _("{hours} h {minutes} min", hours=hours, minutes=f"{minutes:02d}")
    days, hours = divmod(round(seconds / 3600), 24)
    return _("{days} d {hours} h", days=days, hours=f"{hours:02d}")


def format_age(seconds: float) -> str:
    """Format an age in the one unit that matters, rounded down: 12 s, 3 min, 5 h, 12 d, 2 y."""
    if not math.isfinite(seconds):
        return NOTHING
    whole = max(0, int(seconds))
    if whole < 60:
        return _("{seconds} s", seconds=whole)
    if whole < 3600:
        return _("{minutes} min", minutes=whole // 60)
    if whole < 48 * 3600:
        return _("{hours} h", hours=whole // 3600)
    days = whole // 86400
    return _("{days} d", days=days) if days < 730 else _("{years} y", years=days // 365)


def format_loss(value: float | None) -> str:
    """A loss or another metric: 4.8934, 2981.0, 3.100e-05; nan and the infinities by name."""
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return str(float(value))
    if not 1e-2 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def parse_time(text: object) -> datetime.datetime | None:
    """A time of a manifest or the history, ISO 8601 with its zone; None where it is none."""
    try:
        time = datetime.datetime.fromisoformat(text)  # type: ignore[arg-type]
        return time.astimezone()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def seconds_of(text: object) -> float:
    """Return a time of a manifest or the history in seconds since 1970; 0 where it is none."""
    time = parse_time(text)
    return 0.0 if time is None else time.timestamp()


def format_time(text: object) -> str:
    """A time of a manifest or the history as the local one: 2026-03-01 18:05:00 +0800."""
    time = parse_time(text)
    return NOTHING if time is None else time.strftime("%Y-%m-%d %H:%M:%S %z")


# A space; or a command in backquotes, a word or a wide character, with the punctuation that may not
# end a line before it, and that which may not begin one behind it.
_OPENING, _CLOSING = "（《「『【", "，。、；：！？）》」』】"
_NARROW = r"[^\s`\u2e80-\uffef]"
_UNIT = re.compile(
    rf"\s+|[{_OPENING}]*(?:(?:{_NARROW}*`[^`]*`)+{_NARROW}*|{_NARROW}+|[`\u2e80-\uffef])[{_CLOSING}]*"
    rf"|[{_OPENING}]+"
)


def wrap_cells(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` terminal cells; a longer word has a line of its own."""
    from rich.cells import cell_len

    lines = [""]
    for unit in _UNIT.findall(" ".join(text.split())):
        if lines[-1] and cell_len(lines[-1] + unit.rstrip()) > width:
            lines.append("")
        if lines[-1] or unit != " ":
            lines[-1] += unit
    return [line.rstrip() for line in lines]
