"""Names for records in formats that are keyed by id: safe in any file system and HDF5, and never the same twice."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

log = logging.getLogger(__name__)

# Everything printable but the percent sign, which is the escape, and the slash; other characters are kept as they are.
_SAFE = "".join(chr(code) for code in range(33, 127) if chr(code) not in "%/")
# File systems allow 255 bytes, of which suffixes and numbers need some.
_LONGEST = 200


def safe_name(identifier: str) -> str:
    """The id where it can be a name; else with `/`, `%`, a leading dot and control characters as `%2F` and so on.

    `urllib.parse.unquote` gives the id back, unless it was longer than 200 bytes: then it is cut, and ends in `~` and a
    digest of the whole. An empty id is `unnamed`.
    """
    if not identifier:
        return "unnamed"
    name = "".join(c if ord(c) > 127 and c.isprintable() else quote(c, safe=_SAFE) for c in identifier)
    if name.startswith("."):
        name = "%2E" + name[1:]
    encoded = name.encode("utf-8")
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).hexdigest()
    return f"{encoded[: _LONGEST - 17].decode('utf-8', 'ignore')}~{digest}"


class NameGiver:
    """Gives every record a name of its own: the safe id, and `~2`, `~3`, … after it where that is taken.

    taken: whether a name is in use. Only ids that occur more than once are remembered.
    """

    def __init__(self, taken: Callable[[str], bool]) -> None:
        self.repeated = 0
        self._taken = taken
        self._last: dict[str, int] = {}

    def name(self, identifier: str) -> str:
        """A name that is not taken, for a record with this id."""
        name = safe_name(identifier)
        if not self._taken(name):
            return name
        self.repeated += 1
        number = self._last.get(name, 1) + 1
        while self._taken(f"{name}~{number}"):
            number += 1
        self._last[name] = number
        return f"{name}~{number}"


def warn_of_repeated_ids(path: Path, repeated: int, what_became: str) -> None:
    """Says how many records of a file have an id that had occurred, if any, and what they are named instead."""
    if repeated:
        log.warning("%s: the ids of %d records occurred before%s", path, repeated, what_became)
