"""Runs the tests that start real runs and kill, hold or watch their processes, again and again on a busy machine.

Two busy loops take what processors there are. One line is printed for each round; what a round that failed printed is
kept beside it. The end is 0 only if every round passed.

    python tests/stress/twenty_rounds.py --rounds 20
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
POLICIES = "tests/workflow/test_failure_policies.py::"
TESTS = [
    "tests/workflow/test_slots.py",
    "tests/workflow/test_several_workers.py",
    "tests/workflow/test_status.py",
    "tests/workflow/test_resume.py",
    f"{POLICIES}test_a_shard_that_ends_two_workers_on_the_last_attempt_is_recorded_and_the_others_are_embedded",
    f"{POLICIES}test_a_shard_that_failed_is_tried_again_with_half_the_tokens_and_more_memory_and_time",
    "tests/workflow/test_profiles.py::test_with_the_generic_profile_a_killed_job_is_noticed_and_tried_again",
    "tests/unit/embedding/test_faults.py",
    "tests/unit/workers",
    "tests/unit/slots",
]


@contextmanager
def busy(loops: int):
    """Keeps so many processors busy during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("tests", nargs="*", default=TESTS)
    arguments = parser.parse_args()
    # A shell starts what it puts in the background deaf to Ctrl-C, which tests send to the runs they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kept = Path(tempfile.mkdtemp(prefix="esmflow-rounds-"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    failed = 0
    with busy(arguments.loops):
        for number in range(1, arguments.rounds + 1):
            began = time.monotonic()
            ran = subprocess.run(
                [*command, *arguments.tests],
                cwd=PROJECT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            last = ran.stdout.strip().rpartition("\n")[2]
            line = f"{number:2d}. {time.monotonic() - began:4.0f} s, load {os.getloadavg()[0]:.1f}: {last}"
            if ran.returncode:
                failed += 1
                path = kept / f"round-{number}.txt"
                path.write_text(ran.stdout)
                names = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
                line += f"; {', '.join(names)} ({path})"
            print(line, flush=True)
    print(f"{arguments.rounds - failed} of {arguments.rounds} rounds passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
