"""The command that a run was started with, as a person would type it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence


def command_of(words: Sequence[str]) -> str:
    """The `snakemake …` command of a process, given its words, as a person would type it."""
    names = [os.path.basename(word) for word in words[:3]]
    if "snakemake" not in names:
        return "snakemake"
    at = names.index("snakemake")
    if at and words[at - 1] == "-m":
        return shlex.join([_as_typed(words[0]), *words[1:]])
    return shlex.join([_as_typed(words[at]), *words[at + 1 :]])


def _as_typed(program: str) -> str:
    """The program's name where that is enough, its path from here where it is below, else its whole path."""
    if shutil.which(os.path.basename(program)) == program:
        return os.path.basename(program)
    below = os.path.relpath(program)
    return program if below.startswith("..") else below
