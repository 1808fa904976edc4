"""Names for records in formats that are keyed by id: safe in any file system and HDF5, and never the same twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from esmflow.files import safe_name

log = logging.getLogger(__name__)


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
