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


def test_a_worker_whose_parent_is_not_the_one_that_started_it_ends_at_once():
    code = (
        "import sys; from esmflow.workers.lifetime import die_with_parent\n"
        "die_with_parent(int(sys.argv[1])); print('on')"
    )
    for parent, status, said in ((os.getpid(), 0, "on\n"), (2**22, 1, "")):
        ended = subprocess.run(
            [sys.executable, "-c", code, str(parent)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        assert (ended.returncode, ended.stdout) == (status, said)


def test_jobs_import_the_library_of_their_workflow_whatever_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    lifetime.jobs_import_from(tmp_path)
    assert os.environ["PYTHONPATH"] == "elsewhere"
    (tmp_path / "esmflow").mkdir()
    lifetime.jobs_import_from(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}elsewhere"
