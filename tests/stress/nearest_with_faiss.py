"""Searches neighbours with FAISS and without it, compares, and runs the tests of `nearest` where it is installed.

FAISS is no dependency of the project: it is put into a folder of its own once (20 MB, from PyPI) and kept.

    python tests/stress/nearest_with_faiss.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esmflow" / "faiss"

SEARCH = """
import json, sys
import numpy as np
from esmflow.python.neighbours import Neighbours
vectors = np.random.default_rng(0).standard_normal((5000, 320))
vectors[7] = 0
found = Neighbours(vectors)
answers = [found.of(vectors[row], 10) for row in range(0, 5000, 100)]
print(json.dumps(["faiss" in sys.modules, [(a.tolist(), b.tolist()) for a, b in answers]]))
"""


def main() -> None:
    if not (FOLDER / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", FOLDER]
        subprocess.run([*pip, "faiss-cpu>=1.9"], check=True)
        (FOLDER / "complete").touch()
    library = str(PROJECT / "workflow" / "scripts")
    answers = {}
    for path in (library, os.pathsep.join((library, str(FOLDER)))):
        environment = os.environ | {"PYTHONPATH": path}
        printed = subprocess.check_output([sys.executable, "-c", SEARCH], env=environment, text=True)
        used, found = json.loads(printed)
        answers[used] = found
    assert answers.keys() == {True, False}
    for (cosines, rows), (expected, expected_rows) in zip(answers[True], answers[False], strict=True):
        assert rows == expected_rows
        assert max(abs(a - b) for a, b in zip(cosines, expected, strict=True)) < 1e-5
    print(f"{len(answers[True])} searches for 10 neighbours among 5,000: the same with FAISS and with scikit-learn")
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "nearest", "tests/unit/python/test_results.py"]
    sys.exit(subprocess.run(tests, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(FOLDER)}).returncode)


if __name__ == "__main__":
    main()
