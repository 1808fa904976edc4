"""A folder that looks like a fresh clone of the project: for what a user would type at its root."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
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
    if not (folder / ".venv").exists():
        (folder / ".venv").mkdir()
        (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    return folder


def make_recipe(clone: Path, target: str) -> str:
    """What `make TARGET` runs once the environment is there, with the model that the repository's figures are of."""
    printed = subprocess.run(
        ["make", "--no-print-directory", "-n", target], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    return printed[printed.index("model=") :].rstrip().replace("fetch_small_model.py", "fetch_small_model.py --package")
