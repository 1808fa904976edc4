"""What a plan counts on and Snakemake does not watch: the segments in the store, and inputs whose time is not newer.

Snakemake sees that a file is newer than what was made of it. It does not see that somebody emptied the store, that a
damaged segment was set aside, or that an input was replaced by one with an older time, as `mv`, `cp -p` and `rsync -a`
do. So a plan leaves a note of what it is based on, and the plan rule has a parameter that changes when the note is no
longer true. Then the same command plans again, whatever happened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from esmflow.files import read_json, write_json
from esmflow.store import SEGMENT_SUFFIX

Stamps = dict[str, list[int]]


def input_stamps(files: Iterable[str]) -> Stamps:
    """Size and modification time (nanoseconds) of each file. To be taken before the files are read."""
    stamps = {}
    for file in files:
        status = os.stat(file)
        stamps[file] = [status.st_size, status.st_mtime_ns]
    return stamps


def write_basis(
    path: str | os.PathLike[str], number: int, fingerprint: str, held: Sequence[str], inputs: Stamps
) -> None:
    """Notes what a plan is based on. The file must survive the plan's own outputs, so Snakemake does not know of it."""
    write_json(path, {"number": number, "fingerprint": fingerprint, "held_segments": list(held), "inputs": inputs})


def basis_number(
    path: str | os.PathLike[str], inputs: Sequence[str], runs: Sequence[str | os.PathLike[str]], store: str
) -> int:
    """The number of the last plan's basis if it is still true, else one more. 0 if there was no plan.

    runs: the groups' `run.json` files; those that are not there are passed over.
    """
    try:
        basis = read_json(path)
        number = int(basis["number"])
        changed = _lacks_a_segment(basis, runs, Path(store)) or _changed_unnoticed(basis["inputs"], inputs, path)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return number + 1 if changed else number


def _lacks_a_segment(basis: dict[str, Any], runs: Sequence[str | os.PathLike[str]], store: Path) -> bool:
    named = set(basis["held_segments"])
    for path in runs:
        try:
            run = read_json(path)
        except (OSError, ValueError):
            continue
        if run["fingerprint"] == basis["fingerprint"]:
            named.update(run["segments_written"], run["segments_reused"])
    try:
        there = set(os.listdir(store / basis["fingerprint"]))
    except FileNotFoundError:
        there = set()
    return any(f"{name}{SEGMENT_SUFFIX}" not in there for name in named)


def _changed_unnoticed(stamps: Stamps, inputs: Sequence[str], path: str | os.PathLike[str]) -> bool:
    """Whether an input's content may have changed though its time is older than the plan. A touch is none of this."""
    planned = os.stat(path).st_mtime_ns
    for file in inputs:
        try:
            status = os.stat(file)
        except OSError:
            continue
        now = [status.st_size, status.st_mtime_ns]
        before = stamps.get(file, now)
        if now[0] != before[0] or (now != before and now[1] < planned):
            return True
    return False
