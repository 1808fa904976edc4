"""What a run counts on and Snakemake does not watch: segments in the store, inputs whose time is not newer, embeddings.

Snakemake sees that a file is newer than what was made of it. It does not see that somebody emptied the store, that a
damaged segment was set aside, or that an input was replaced by one with an older time, as `mv`, `cp -p` and `rsync -a`
do. So a plan leaves a note of what it is based on, and the plan rule has a parameter that changes when the note is no
longer true. Then the same command plans again, whatever happened. In the same way collecting leaves a note of the files
that it wrote, of which Snakemake sees no more than their folder. The rules import this, in environments without NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from esmflow.files import JsonFile, file_stamp, read_json, write_json
from esmflow.store import SEGMENT_SUFFIX


@dataclass(frozen=True)
class PlanNote(JsonFile):
    """What a plan counts on.

    number: how many plans before it had to be made again. stored_segments: those that the store had. inputs: the
    input files with their stamps, taken before they were read.
    """

    number: int
    fingerprint: str
    stored_segments: tuple[str, ...] = field(metadata={"key": "held_segments"})
    inputs: dict[str, tuple[int, ...]]


class Run(Protocol):
    """What counts of a `RunRecord`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def segments(self) -> tuple[str, ...]: ...


def input_stamps(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The stamp of each file."""
    return {file: file_stamp(file) for file in files}


def note_path(plan: str | os.PathLike[str]) -> Path:
    """Where the note on a plan is. It must survive the plan's own outputs, so Snakemake does not know of it."""
    return Path(plan).with_name("basis.json")


def plan_number(plan: str | os.PathLike[str], inputs: Sequence[str], runs: Iterable[Run], store: str) -> int:
    """The number of the last plan if what it counts on is still there, else one more. 0 if there was no plan.

    runs: of the groups that have run; looked at only if there was a plan.
    """
    path = note_path(plan)
    try:
        note = PlanNote.read(path)
        outdated = _lacks_a_segment(note, runs, Path(store)) or _changed_unnoticed(note.inputs, inputs, path)
    except (OSError, ValueError):
        return 0
    return note.number + outdated


def _lacks_a_segment(note: PlanNote, runs: Iterable[Run], store: Path) -> bool:
    named = set(note.stored_segments)
    for run in runs:
        if run.fingerprint == note.fingerprint:
            named.update(run.segments)
    try:
        there = set(os.listdir(store / note.fingerprint))
    except FileNotFoundError:
        there = set()
    return any(f"{name}{SEGMENT_SUFFIX}" not in there for name in named)


def _changed_unnoticed(stamps: Mapping[str, tuple[int, ...]], inputs: Sequence[str], note: Path) -> bool:
    """Whether an input's content may have changed though its time is older than the plan. A touch is none of this."""
    planned = os.stat(note).st_mtime_ns
    for file in inputs:
        try:
            now = size, time = file_stamp(file)
        except OSError:
            continue
        before = stamps.get(file, now)
        if size != before[0] or (now != before and time < planned):
            return True
    return False


def write_embeddings_note(path: str | os.PathLike[str], number: int, embeddings: str | os.PathLike[str]) -> None:
    """Notes the sizes of the files. Of a folder with a file for each record, its index stands for all.

    The note must survive the outputs of collecting, so Snakemake does not know of it.
    """
    files = {}
    for folder, _, names in os.walk(embeddings):
        for name in ["index.tsv"] if "index.tsv" in names else names:
            file = Path(folder, name)
            files[os.path.relpath(file, embeddings)] = file.stat().st_size
    write_json(path, {"number": number, "files": files})


def embeddings_number(path: str | os.PathLike[str], embeddings: str | os.PathLike[str]) -> int:
    """The number of the last note if it is still true, else one more. 0 if there is none."""
    try:
        note = read_json(path)
        number, files = int(note["number"]), dict(note["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return number if all(_size(Path(embeddings, name)) == size for name, size in files.items()) else number + 1


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
