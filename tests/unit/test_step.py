"""What every script shares: an error that no further attempt can mend ends the others at once, with its sentence."""

import os
import subprocess
import sys

from workflow_run import PROJECT

ATTEMPTS = """
import sys
from esmflow.errors import EsmflowError
from esmflow.slots.gpus import SlotError
from esmflow.slots.leases import SlotTimeoutError
from esmflow.step import logged_step

log_file, error = sys.argv[1], {"no GPU": SlotError, "busy": SlotTimeoutError, "gone": FileNotFoundError}[sys.argv[2]]
for attempt in (1, 2, 1):
    try:
        with logged_step(log_file, [], attempt):
            print("working")
            raise error(sys.argv[2])
    except SystemExit as end:
        print("ended with", end.code)
"""


def attempts(folder, error):
    """What three attempts do, the last of them of another run."""
    command = [sys.executable, "-c", ATTEMPTS, folder / "logs" / "job.log", error]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "workflow" / "scripts")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines(), (folder / "logs" / "job.log").read_text()


def test_what_no_attempt_can_mend_is_not_tried_again_until_the_next_run(tmp_path):
    did, log = attempts(tmp_path, "no GPU")
    assert did == ["working", "ended with 1", "ended with 1", "working", "ended with 1"]
    assert "no GPU" in log


def test_what_another_attempt_may_mend_is_tried_again(tmp_path):
    assert attempts(tmp_path, "busy")[0] == ["working", "ended with 1"] * 3
    assert attempts(tmp_path, "gone")[0] == ["working", "ended with 1"] * 3


STEP = """
import sys
import pyarrow as pa
from esmflow.step import logged_step

with logged_step(sys.argv[1], []):
    table = pa.table({"a": pa.array(["x", "y"]).dictionary_encode()})
    print("pandas" in sys.modules, table.to_pandas()["a"].tolist())
"""


def test_a_step_imports_pandas_only_where_it_is_asked_for(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "workflow" / "scripts")}
    scripts = "import sys, collect, embed, fetch_model, finish, plan, report, verify; sys.exit('pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", scripts], check=True, env=environment)
    command = [sys.executable, "-c", STEP, tmp_path / "job.log"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False ['x', 'y']\n"
