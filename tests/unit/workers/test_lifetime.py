"""A job's script ends with the run that it belongs to, however that ends and whenever."""

import os
import signal
import subprocess
import sys

import psutil
from workflow_run import wait_until

from esmflow.workers import lifetime

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(lifetime.__file__).rsplit("/", 3)[0]}
JOB = (
    "import os, time; from esmflow.workers.lifetime import end_with_run; "
    "end_with_run(lambda: os._exit(7)); time.sleep(120)"
)
RUN = f"""
import subprocess, sys, time
from esmflow.workers.lifetime import note_run
note_run()
print(subprocess.Popen([sys.executable, "-c", {JOB!r}], start_new_session=True).pid, flush=True)
time.sleep(120)
"""


def test_a_job_ends_when_its_run_is_killed():
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    job = psutil.Process(int(run.stdout.readline()))
    wait_until(lambda: job.num_threads() > 1, what="the watch")
    run.send_signal(signal.SIGKILL)
    run.communicate()
    wait_until(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, what="the job's end")


def test_a_job_whose_run_was_killed_before_it_began_ends_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**ENVIRONMENT, "ESMFLOW_RUN": f"{gone.pid} {os.readlink('/proc/self/ns/pid')}"}
    assert subprocess.run([sys.executable, "-c", JOB], env=environment, timeout=60).returncode == 7


def test_a_job_that_cannot_see_its_run_because_it_is_in_a_container_goes_on():
    environment = {**ENVIRONMENT, "ESMFLOW_RUN": "1 pid:[1]"}
    job = JOB.replace("time.sleep(120)", "time.sleep(1)")
    assert subprocess.run([sys.executable, "-c", job], env=environment, timeout=60).returncode == 0
