"""A folder that looks like a fresh clone of the project: for what a user would type at its root."""

from __future__ import annotations

import shutil
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
# What a run makes at the root, and what belongs to this machine.
_NOT_CLONED = {".git", ".snakemake", "results", "logs", "shared"}


def make_clone(folder: Path, copied: tuple[str, ...] = ()) -> Path:
    """Links everything at the project's root into `folder`, the folders named in `copied` as copies."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in PROJECT.iterdir():
        if path.name in copied:
            shutil.copytree(path, folder / path.name)
        elif path.name not in _NOT_CLONED:
            (folder / path.name).symlink_to(path)
    return folder
