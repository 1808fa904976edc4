"""The kinds of input: FASTA files and tables, one by one, in folders, or matched by a glob."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from esmflow.errors import EsmflowError
from esmflow.fasta import BlockTask, ResiduePolicy, block_tasks
from esmflow.sequence_tables import is_table, table_block_tasks
from esmflow.streams import without_compression

# What a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
FASTA_SUFFIXES = (".fasta", ".fas", ".fa", ".faa", ".fsa", ".pep", ".aa")


class InputError(EsmflowError):
    """A place where no input is. The message names it and what was looked for."""


def input_tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields the tasks that make the blocks of records of a FASTA file or a table, in order."""
    return table_block_tasks(path, policy) if is_table(path) else block_tasks(path, policy)


def expand(place: str) -> list[str]:
    """The files that a path, a folder or a glob stands for, sorted. Raises InputError if there are none.

    Of a folder all files with a FASTA suffix, compressed or not, and none of its subfolders. A path that is neither a
    folder nor a glob is not looked at.
    """
    if os.path.isdir(place):
        found = sorted(entry.name for entry in os.scandir(place) if entry.is_file() and _is_fasta(entry.name))
        if not found:
            raise InputError(f"the folder {place} holds no FASTA file; their names end in {', '.join(FASTA_SUFFIXES)}, "
                             "and .gz, .bz2, .xz or .zst after that if they are compressed")  # fmt: skip
        return [os.path.join(place, name) for name in found]
    if is_glob(place):
        matched = sorted(glob.glob(place, recursive=True))
        if not matched:
            raise InputError(f"{place} matches no file")
        return matched
    return [place]


def is_glob(place: str) -> bool:
    """Whether this is a pattern, and not the name of a file with such letters in it."""
    return any(character in place for character in "*?[") and not os.path.exists(place)


def _is_fasta(name: str) -> bool:
    return not name.startswith(".") and Path(without_compression(name)).suffix.lower() in FASTA_SUFFIXES
