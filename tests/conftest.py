"""What every test can ask for: the real small model, a GPU or a reason to skip, a working directory for a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esmflow.checkpoint.convert import convert_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
DATA = PROJECT / "tests" / "data"
SCRIPTS = PROJECT / "workflow" / "scripts"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu():
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU, and torch sees none here"


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """The real 8M encoder that the golden file was made with, in Hugging Face format."""
    command = [sys.executable, str(SCRIPTS / "fetch_small_model.py"), "--package", "--cache", "resources/models"]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return PROJECT / found.stdout.strip()


@pytest.fixture(scope="session")
def real_checkpoint(real_model_folder, tmp_path_factory) -> Path:
    """The same, converted."""
    target = tmp_path_factory.mktemp("checkpoint") / "8m.safetensors"
    convert_checkpoint(real_model_folder, target, "real 8M")
    return target


@pytest.fixture(scope="session")
def golden():
    """What transformers gives for 40 proteins with the real 8M encoder."""
    return np.load(DATA / "golden_esm2_8m.npz")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
