"""What every test can ask for: the real small model, a GPU or a reason to skip, a working directory for a run."""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_up import fetch, random_model, stored_tensors, with_made_up_head, write_fair_esm

PROJECT = Path(__file__).resolve().parent.parent
DATA = PROJECT / "tests" / "data"
SCRIPTS = PROJECT / "workflow" / "scripts"

# What `started/sitecustomize.py` does to every process that a test starts.
STARTED = PROJECT / "tests" / "support" / "started"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTED), os.environ.get("PYTHONPATH")]))
# A process of tests has much to look through at its end, too.
atexit.register(gc.freeze)


# The folders that take longest come first: the last ones to be handed out to a worker should be short.
ORDER = ("slurm", "workflow", "project", "unit", "gpu")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(PROJECT / "tests").parts[0]))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


# What a test may lack even in CI: a GPU, and environments of other tools that are made by hand.
MAY_LACK = ("GPU", "scikit-bio", "transformers")


def _reason(report) -> str:
    return report.longrepr[2].removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where `ESMFLOW_CI` is set, a test that lacks what it needs has failed."""
    report = yield
    if os.environ.get("ESMFLOW_CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = _reason(report)
        if reason.startswith("needs ") and not any(word in reason for word in MAY_LACK):
            report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped where everything must be: {reason}"
    return report


def pytest_terminal_summary(terminalreporter):
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    terminalreporter.section(f"{reasons.total()} tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} × {reason}")


def pytest_collection_finish():
    # What was imported stays: collecting garbage, as the engine does whenever memory runs out, need not look at it.
    gc.freeze()


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
    """The same, converted, in a folder with its `model.json`: what the rule `model` makes."""
    return fetch(real_model_folder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def made_up_model(tmp_path_factory) -> Path:
    """A checkpoint of two narrow layers with random weights, and beside it what the rule `model` makes of it."""
    path = tmp_path_factory.mktemp("made_up") / "made_up.pt"
    write_fair_esm(path, stored_tensors(random_model(2, 32, 2)))
    fetch(path, path.parent)
    return path


@pytest.fixture(scope="session")
def real_with_head(real_checkpoint, tmp_path_factory) -> Path:
    """The real encoder, converted, under a made-up language model head: its own was not published with it."""
    return with_made_up_head(real_checkpoint, tmp_path_factory.mktemp("head") / "checkpoint.safetensors")


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
