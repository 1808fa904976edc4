"""What earlier runs verified: kept in the store, beside its index, so that no run computes it again.

`sequences.verified` is text with a line for each sequence: a checksum of the line, the sequence's digest, a digest of
the numbers that were verified, and how well they agreed. Numbers that are no longer the same were not verified. Any
number of runs append to the file at once. Where appending is not atomic (NFS), or a disk spoils it, a line that does
not match its checksum is passed over, and what it told is verified again: nothing else rests on it.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from esmflow.files import from_json, open_to_others
from esmflow.store.segments import Store
from esmflow.verify.agreement import Agreement

log = logging.getLogger(__name__)

VERIFIED_NAME = "sequences.verified"
# Raised by hand when the certificate looks at more than before: what an earlier one passed is then verified again.
_VERSION = 1


@dataclass(frozen=True)
class _Line:
    digest: str
    numbers: str
    agreements: dict[str, Agreement]
    version: int = _VERSION


def read_verified(store: Store, numbers: Mapping[str, str]) -> dict[str, dict[str, Agreement]]:
    """How well sequences agreed, by digest and array, that a run verified with the numbers that the store has now.

    numbers: by hexadecimal digest, a digest of the numbers that the store has.
    """
    try:
        content = (store.folder / VERIFIED_NAME).read_bytes()
    except OSError:
        return {}
    found = {}
    for text in content.splitlines():
        checksum, _, rest = text.partition(b" ")
        if checksum != _checksum(rest):
            continue
        content = json.loads(rest)
        # Of another version it may look like anything.
        if content.get("version") != _VERSION:
            continue
        line = from_json(_Line, content)
        if numbers.get(line.digest) == line.numbers:
            found[line.digest] = line.agreements
    return found


def add_verified(store: Store, numbers: Mapping[str, str], agreements: Mapping[str, dict[str, Agreement]]) -> None:
    """Remembers sequences, by digest, that were verified with these numbers. A read-only store stays as it is."""
    # Begins with a line of its own: what was written before may have been cut off.
    text = b"\n"
    for digest, agreement in agreements.items():
        rest = json.dumps(asdict(_Line(digest, numbers[digest], agreement))).encode()
        text += _checksum(rest) + b" " + rest + b"\n"
    path = store.folder / VERIFIED_NAME
    try:
        if not path.exists():
            path.touch()
            open_to_others(path)
        # In one call, so that on a local disk no other run's lines come between.
        with open(path, "ab", buffering=0) as file:
            file.write(text)
    except OSError as error:
        log.info("what was verified is not remembered: %s", error)


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
