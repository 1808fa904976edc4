"""Numbers, sizes and times as a person reads them."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable


def bytes_in_words(size: float) -> str:
    """Such as `1.4 GB`, in powers of ten."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"


def duration(seconds: float) -> str:
    """Such as `38 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def plural(number: int, noun: str) -> str:
    """A count of things."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shown(text: str, longest: int = 200) -> str:
    """A text of others, such as an id, as a message can hold it: in one line, with escapes for what is not seen.

    That is control characters, and those that turn the direction of writing. No more letters than `longest`.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return seen if len(seen) <= longest and len(text) <= longest else f"{seen[: longest - 1]}…"


def record_name(file: str, record: int, identifier: str) -> str:
    """What a record is called in messages."""
    return f"{shown(file)}, record {record} ({shown(identifier) or 'no id'})"


def in_words(items: Iterable[str]) -> str:
    """Such as `a, b and c`."""
    *first, last = [*items] or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def percent(share: float) -> str:
    """Never 100% of what is not all, never 0% of something."""
    if 0.999 < share < 1:
        return f"{int(share * 10000) / 100:.2f}%"
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def span(started: float, ended: float) -> str:
    """From when to when; the day once, if it is one."""
    first, last = clock(started), clock(ended)
    return f"{first} to {last[11:] if last[:10] == first[:10] else last}"


def clock(seconds: float) -> str:
    """A time, given in seconds since 1970, in the zone of this machine."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of installed packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
