"""Open a page in a headless Chromium, and see what a person would see."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Opened:
    """dom: the document after its scripts ran, as HTML. console: what they wrote to the browser's console."""

    dom: str
    console: list[str]


def find_chromium() -> str:
    """The browser's path; skips the test where there is none that starts."""
    for name in NAMES:
        path = shutil.which(name)
        # Some systems have a command that only says how to install it.
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip("needs Chromium to open the report in: none of " + ", ".join(NAMES) + " is here")


def open_page(page: Path, *options: str) -> Opened:
    """Opens a file without a network, lets its scripts run for some (virtual) seconds, and closes the browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
                "--enable-logging=stderr", "--virtual-time-budget=8000", *options, "--dump-dom", page.as_uri(),
            ],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Opened(done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\]\s*(.*)", done.stderr))
