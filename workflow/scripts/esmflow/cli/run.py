"""Run the workflow: the command, its process, its progress, and how it ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.cli.progress import Display
from esmflow.cli.project import DEFAULT_MODEL, SNAKEFILE, CommandError, configuration, find_inputs, write_run
from esmflow.collect.summary import Summary
from esmflow.files import PROJECT, results_folder
from esmflow.logs import last_lines
from esmflow.report.summary import Places, summary_lines
from esmflow.slots.gpus import SlotError, candidate_slots
from esmflow.verify.certificate import Certificate
from esmflow.workers.lifetime import check_system, die_with_parent

_RULE = re.compile(r"(?:local)?rule (\w+):")
_FAILED_LOG = re.compile(r"\s+log: (\S.*?) \(check log file")
_TAIL, _SHOWN = 200, 8
_LOCKED = "Directory cannot be locked"


@dataclass(frozen=True)
class Compute:
    """What to run on: None is whatever there is. profile: of Snakemake; it says how many there are."""

    gpus: int | None
    cores: int | None
    profile: str | None

    @property
    def cores_here(self) -> int:
        """The cores to use where no profile says it."""
        return self.cores or len(os.sched_getaffinity(0))


def embed_inputs(
    inputs: Sequence[str],
    out: str,
    options: Mapping[str, Any],
    settings: Sequence[str],
    compute: Compute,
    *,
    dry_run: bool,
) -> int:
    """Writes the folder of a run and runs it. Returns the exit status."""
    check_system()
    files = find_inputs(inputs)
    typed, checked = configuration(options, settings)
    gpus = _slots(compute, typed, checked)
    folder = Path(out).expanduser()
    write_run(folder, files, typed)
    if not options["model"] and not any(setting.startswith("model=") for setting in settings):
        _say(f"model {DEFAULT_MODEL}: a good choice for most uses that runs on any card; --model names another")
    command = _command(folder, gpus, compute)
    if dry_run:
        command.append("--dry-run")
    _say(f"runs  {shlex.join(command)}")
    if dry_run:
        return subprocess.run(command).returncode
    return _run(folder, command)


def _slots(compute: Compute, typed: dict[str, Any], checked: Mapping[str, Any]) -> int | None:
    """How many jobs with a slot may run at once; None leaves it to the profile. Without GPUs they run on the CPU."""
    on_cpu = compute.cores_here if checked["cpu_slots"] == "auto" else checked["cpu_slots"]
    if compute.gpus == 0:
        typed["device"] = "cpu"
        return None if compute.profile else on_cpu
    if compute.profile:
        return compute.gpus
    if compute.gpus and checked["device"] == "cpu":
        raise CommandError(f"--gpus {compute.gpus} and device: cpu say different things; leave one out")
    try:
        slots = candidate_slots(checked["device"], on_cpu)
    except SlotError as error:
        raise CommandError(f"{error}; --gpus 0 runs on the CPU") from error
    there = len(slots) if slots[0].device == "cuda" else 0
    if compute.gpus and compute.gpus > there:
        raise CommandError(f"--gpus {compute.gpus}: this machine has {there}; leave --gpus out to use what there is")
    return compute.gpus or len(slots)


def _command(folder: Path, gpus: int | None, compute: Compute, *more: str) -> list[str]:
    # -P: what lies where the command is typed may be called as a module of Python's is.
    words = [sys.executable, "-Pm", "snakemake", "--snakefile", str(SNAKEFILE), "--directory", str(folder)]
    # Ours and not one that happens to lie where the command is typed.
    words += ["--workflow-profile", str(PROJECT / "profiles" / "default")]
    if compute.profile:
        words += ["--profile", compute.profile]
    if compute.cores or not compute.profile:
        words += ["--cores", str(compute.cores_here)]
    if gpus is not None:
        words += ["--resources", f"gpu={gpus}"]
    return [*words, *more]


def _run(folder: Path, command: Sequence[str]) -> int:
    """Runs Snakemake and shows how far it is. Returns its exit status, 130 after Ctrl-C."""
    started = time.time()
    log = folder / "logs" / "snakemake.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as handle, Display(folder / "results") as display:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Else Ctrl-C would reach it twice, from the terminal and from here.
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        assert process.stdout is not None
        output = _Output(process.stdout, handle, display)
        stopped = _wait(process, display)
        output.join()
    if stopped:
        _say("stopped; what is finished is kept, and the same command goes on from there")
        return 128 + stopped
    if process.returncode:
        _say_why(folder, output.lines, log)
        return process.returncode if process.returncode > 0 else 1
    _show_summary(folder, command, started, computed=display.began)
    return 0


def _wait(process: subprocess.Popen[str], display: Display) -> int:
    """Waits for the end, and passes on the wish to stop. Returns the signal that asked for it, 0 if none did."""
    asked = 0

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = number
        display.say("stopping")
        # To its jobs too, as a terminal would.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        while process.poll() is None:
            display.refresh()
            with suppress(subprocess.TimeoutExpired):
                process.wait(display.seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return asked


class _Output(threading.Thread):
    """What Snakemake prints: all of it into the log, sentences for the user and the names of steps to the display."""

    def __init__(self, stream: IO[str], log: IO[str], display: Display) -> None:
        super().__init__(name="snakemake's output", daemon=True)
        self.lines: deque[str] = deque(maxlen=_TAIL)
        self._stream, self._log, self._display = stream, log, display
        self.start()

    def run(self) -> None:
        for line in self._stream:
            self._log.write(line)
            self._log.flush()
            self.lines.append(line.rstrip("\n"))
            if line.startswith("esmflow: "):
                self._display.say(line.removeprefix("esmflow: ").rstrip())
            elif rule := _RULE.match(line):
                self._display.step(rule[1])


def _say_why(folder: Path, lines: Sequence[str], log: Path) -> None:
    """Why a run failed: the end of the log of what failed, or else of Snakemake's output."""
    if any(_LOCKED in line for line in lines):
        unlock = shlex.join([*_command(folder, None, Compute(None, 1, None)), "--unlock"])
        _say(f"another run is at work in {folder}; if there is none, the last one was killed: {unlock}")
        return
    logs = dict.fromkeys(found[1] for line in lines if (found := _FAILED_LOG.match(line)))
    for path in list(logs)[-2:]:
        _say(f"the end of {folder / path}:")
        print("\n".join(f"  {line}" for line in last_lines(folder / path, _SHOWN)), file=sys.stderr)
    if not logs and not any(line.startswith("esmflow: ") for line in lines):
        print("\n".join(f"  {line}" for line in list(lines)[-_SHOWN:] if line.strip()), file=sys.stderr)
    _say(f"the run did not end well; all that was printed is in {log}. What is finished is kept: mend what is wrong, "
         "and the same command goes on from there")  # fmt: skip


def _show_summary(folder: Path, command: Sequence[str], started: float, *, computed: bool) -> None:
    results = folder / "results"
    summary = Summary.read(results / "summary.json")
    if not computed:
        _say("everything was there already")
        # What it says of speed is of an earlier run.
        summary = replace(summary, residues_per_second=None)
    certificate = results / "certificate.json"
    report = results / "report.html"
    model = CheckpointInfo.read(results / "model" / "model.json").name
    places = Places(
        embeddings=str(results / "embeddings"),
        manifest=str(results / "manifest.parquet"),
        report=str(report) if report.exists() else None,
        failures=str(results / "failures.tsv"),
        command=shlex.join(command),
    )
    lines = summary_lines(summary, Certificate.read(certificate) if certificate.exists() else None, model, places)
    lines.append(f'load       import esmflow; e = esmflow.open("{folder}")')
    print("\n".join([*lines, f"took       {time.time() - started:,.0f} s"]))


def show_report(out: str) -> int:
    """Prints how a run ended and where its report is, which is made if the run has none. Returns the exit status."""
    results = results_folder(out)
    if not (results / "summary.json").exists():
        raise CommandError(
            f"{out}: holds no finished run, and so no report; `esmflow status {out}` shows what is there"
        )
    report = results / "report.html"
    if not report.exists():
        if results.name != "results":
            raise CommandError(f"{out}: has no report; run it again with report: true")
        folder = results.parent
        command = _command(
            folder, None, Compute(None, 1, None), "--allowed-rules", "report", "--", "results/report.html"
        )
        _say(f"runs  {shlex.join(command)}")
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if made.returncode:
            print(made.stdout[-2000:], file=sys.stderr)
            return made.returncode
    summary = results / "summary.txt"
    print(summary.read_text(encoding="utf-8") if summary.exists() else "", end="")
    print(f"report     {report.absolute()}")
    return 0


def _say(line: str) -> None:
    print(f"esmflow: {line}", file=sys.stderr, flush=True)
