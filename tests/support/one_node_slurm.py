"""A real Slurm on this machine, of one node with pretend GPUs: what the cluster profiles are tried on.

Each pretend GPU is a character device that every Linux has, so Slurm hands it out and sets `CUDA_VISIBLE_DEVICES` as it
would for a card. Nothing needs root: munge and both daemons run as the user who starts them, in a folder and on ports
of their own, beside any other Slurm. There is no accounting.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

import psutil
from workflow_run import wait_until

from esmflow.workers.lifetime import die_with_parent

PACKAGES = ("slurm-wlm", "slurm-wlm-basic-plugins", "munge")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# What Slurm itself says about the beginning and the end of a job, one line of JSON each.
_LEDGER = """#!/bin/sh
printf '{"what": "%s", "job": "%s", "comment": "%s", "gpus": "%s", "restarts": "%s", "time": %s}\\n' \\
  WHAT "$SLURM_JOB_ID" "$SLURM_JOB_COMMENT" "$SLURM_JOB_GPUS" "$SLURM_JOB_RESTART_COUNT" "$(date +%s.%N)" >>LEDGER
"""

# Inside a job the executor calls srun without most variables that begin with SLURM_, where this Slurm is to be found
# among them: it expects every node to have the configuration in /etc/slurm.
_SRUN = """#!/bin/sh
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""

# Memory is handed out like cores and GPUs, as on most clusters: a job that asks for none would get the whole node.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
Prolog={folder}/prolog
Epilog={folder}/epilog
PrologFlags=Alloc
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to one job, and from when to when (seconds since 1970; None while it runs)."""

    job: str
    comment: str
    gpus: tuple[str, ...]
    started: float
    ended: float | None


def why_no_slurm() -> str | None:
    """Why a Slurm cannot be started here, if it cannot."""
    if missing := [program for program in _PROGRAMS if not shutil.which(program, path=_PATH)]:
        return f"needs a Slurm to start, and {', '.join(missing)} are not here: apt-get install {' '.join(PACKAGES)}"
    return None


class OneNodeSlurm:
    """A running Slurm. `environment` is what a process needs to speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{_PATH}"}

    def ask(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout

    def running(self) -> dict[str, str]:
        """The jobs that run now: comment (the executor writes rule and wildcards there) to job id."""
        lines = self.ask("squeue", "--noheader", "--states=RUNNING", "--format=%k %i").splitlines()
        return dict(line.rsplit(" ", 1) for line in lines)

    def queued(self) -> list[str]:
        """The ids of all jobs that are not over."""
        return self.ask("squeue", "--noheader", "--format=%i").split()

    def cancel(self, *jobs: str) -> None:
        if jobs:
            self.ask("scancel", *jobs)

    def cancel_everything(self) -> None:
        """Cancels all jobs, and waits for the last process of the last one to be gone."""
        self.ask("scancel", "--user", getuser())
        wait_until(lambda: not self.queued(), 60, "the end of all jobs")

    def allocations(self) -> list[Allocation]:
        """Every job that was started so far, in Slurm's own words."""
        begun: dict[tuple[str, str], dict] = {}
        ended: dict[tuple[str, str], float] = {}
        for line in (self.folder / "ledger").read_text().splitlines():
            entry = json.loads(line)
            key = entry["job"], entry["restarts"]
            if entry["what"] == "begin":
                begun[key] = entry
            else:
                ended[key] = entry["time"]
        return [
            Allocation(job, entry["comment"], tuple(entry["gpus"].split(",")), entry["time"], ended.get((job, restart)))
            for (job, restart), entry in begun.items()
        ]


@contextmanager
def one_node_slurm(folder: Path, gpus: int = len(_DEVICES)) -> Iterator[OneNodeSlurm]:
    """Starts a Slurm in `folder` and ends every process of it, whatever happens."""
    slurm = OneNodeSlurm(folder)
    _configure(folder, gpus)
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with open(folder / f"{command[0]}.out", "wb") as output:
            parent = os.getpid()
            daemons.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **slurm.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=lambda: die_with_parent(parent),
                )
            )

    try:
        start("munged", "--foreground", "--force", *(f"--{name}={folder}/{file}" for name, file in _MUNGE.items()))
        wait_until((folder / "munge.socket").exists, 30, "munge's socket")
        start("slurmctld", "-D", "-f", slurm.environment["SLURM_CONF"])
        start("slurmd", "-D", "-f", slurm.environment["SLURM_CONF"])
        wait_until(lambda: _is_idle(slurm, daemons), 60, "an idle node")
        yield slurm
        slurm.cancel_everything()
    finally:
        # The last first: the node before its controller, and munge, which both speak through, at the end.
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_orphans(folder)


def _kill_orphans(folder: Path) -> None:
    """Kills what is left of cancelled jobs: without control groups Slurm loses sight of some of their processes."""
    for process in psutil.process_iter():
        try:
            if "SLURM_JOB_ID" in process.environ() and str(folder) in "".join(process.environ().values()):
                process.kill()
        except psutil.Error:
            continue


_MUNGE = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munge.seed",
}


def _configure(folder: Path, gpus: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "ledger").touch()
    for what, name in (("begin", "prolog"), ("end", "epilog")):
        _write_script(folder / name, _LEDGER.replace("WHAT", what).replace("LEDGER", str(folder / "ledger")))
    _write_script(folder / "bin" / "srun", _SRUN.format(folder=folder, srun=shutil.which("srun", path=_PATH)))
    host = socket.gethostname().partition(".")[0]
    controller_port, node_port = _free_ports(2)
    configuration = _CONFIGURATION.format(
        host=host, user=getuser(), folder=folder, gpus=gpus, controller_port=controller_port, node_port=node_port
    )
    (folder / "slurm.conf").write_text(configuration)
    devices = "".join(f"NodeName={host} Name=gpu File={device}\n" for device in _DEVICES[:gpus])
    (folder / "gres.conf").write_text(devices)


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _is_idle(slurm: OneNodeSlurm, daemons: list[subprocess.Popen]) -> bool:
    for daemon in daemons:
        if daemon.poll() is not None:
            said = "".join(path.read_text(errors="replace") for path in slurm.folder.glob("*.out"))
            raise AssertionError(f"{daemon.args[0]} ended with {daemon.returncode}: {said}")
    try:
        return "idle" in slurm.ask("sinfo", "--noheader", "--format=%T")
    except subprocess.CalledProcessError:
        return False
