"""Whether the embeddings are still as they were written: Snakemake sees a folder, and no file in it.

So collecting leaves a note of its files, and its rule has a parameter that changes when one of them is gone or has
another size. Then the same command collects again. The rules import this, in environments without NumPy.
"""

from __future__ import annotations

import os
from pathlib import Path

from esmflow.files import read_json, write_json


def write_note(path: str | os.PathLike[str], number: int, embeddings: str | os.PathLike[str]) -> None:
    """Notes the sizes of the files. Of a folder with a file for each record, its index stands for all.

    The note must survive the outputs of collecting, so Snakemake does not know of it.
    """
    files = {}
    for folder, _, names in os.walk(embeddings):
        for name in ["index.tsv"] if "index.tsv" in names else names:
            file = Path(folder, name)
            files[os.path.relpath(file, embeddings)] = file.stat().st_size
    write_json(path, {"number": number, "files": files})


def note_number(path: str | os.PathLike[str], embeddings: str | os.PathLike[str]) -> int:
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
