"""However a step is asked to end, it says so in a sentence, with the status for it, and leaves nothing half done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from collected_run import CollectedRun, MadeUpRecord, random_segment
from made_up import proteins, write_fasta
from workflow_run import PROJECT, wait_until

from esmflow.arrays import Outputs

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{PROJECT / 'workflow/scripts'}:{PROJECT / 'tests' / 'support'}"}

# A step may be held for ever where it has begun to write: what goes on meanwhile is all real.
HELD = """
import sys, time
from pathlib import Path
from esmflow.step import logged_step
folder = Path(sys.argv[1])

def held(*arguments):
    (folder / "begun").touch()
    time.sleep(3600)
"""
PLAN = (
    HELD
    + """
from stage_settings import plan_settings
from esmflow.checkpoint.models import ModelDimensions
from esmflow.inputs.sheet import InputFile
from esmflow.method import LongSequences
from esmflow.plan import planning
from esmflow.plan.cost import CostModel

planning.BYTES_PER_PROCESS = 1
if sys.argv[2:] == ["held"]:
    planning.Candidates.offer_block = held
cost = CostModel(ModelDimensions(6, 320, 20, True, True), LongSequences(1022))
inputs = [InputFile("a", str(folder / "a.fasta"))]
with logged_step(str(folder / "step.log"), []):
    planning.deal_inputs(plan_settings(folder / "out", inputs, [folder / "out" / "group-0"], cost, processes=3))
"""
)
COLLECT = (
    HELD
    + """
from stage_settings import collect_settings
from esmflow.collect import collecting
from esmflow.plan.run_plan import Plan
from esmflow.report.run_files import read_fingerprint

if sys.argv[2:] == ["held"]:
    collecting.VectorStream.add = held
(described,) = folder.glob("store/*")
formats = ["h5", "h5_per_protein", "npy", "parquet", "h5ad", "pt", "esm"]
with logged_step(str(folder / "step.log"), []):
    collecting.collect(collect_settings(folder, folder / "out", read_fingerprint(described), formats=formats))
"""
)


def made_ready(step: str, folder: Path) -> None:
    sequences = proteins(40, 20, 30)
    if step == PLAN:
        write_fasta(folder / "a.fasta", [(f"p{n}", sequence) for n, sequence in enumerate(sequences)])
    else:
        outputs = Outputs((1,), ("mean",))
        records = [MadeUpRecord("a.fasta", f"p{n}", sequence) for n, sequence in enumerate(sequences)]
        CollectedRun(folder, records, [random_segment(sequences, outputs)], outputs)


def start(step: str, folder: Path, *how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", step, str(folder), *how]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def fill(disk: Path, room: int) -> None:
    """Leaves so many bytes of a disk."""
    with open(disk / "filler", "ab", buffering=0) as handle:
        while (free := os.statvfs(disk)).f_bavail * free.f_frsize > room:
            handle.write(bytes(4096))


@pytest.mark.parametrize("room", [24_000, 0])
def test_collecting_on_a_full_disk_ends_with_a_sentence_and_leaves_nothing_half_written(tmp_path, small_disk, room):
    made_ready(COLLECT, tmp_path)
    for name in ("out", "step.log"):
        (tmp_path / name).symlink_to(small_disk / name)
    (small_disk / "out").mkdir()
    (small_disk / "step.log").touch()
    fill(small_disk, room)
    process = start(COLLECT, tmp_path)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert re.fullmatch(r"esmflow: .*No space left on device.*\n", printed), printed
    assert {path.name for path in small_disk.rglob("*") if path.is_file()} == {"filler", "step.log"}


@pytest.mark.parametrize("step", [PLAN, COLLECT], ids=["plan", "collect"])
def test_sigterm_to_every_process_of_a_step_again_and_again_ends_it_with_143_and_a_sentence(tmp_path, step):
    made_ready(step, tmp_path)
    process = start(step, tmp_path, "held")
    try:
        wait_until((tmp_path / "begun").exists, what="the step at work")
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("spawn_main" in " ".join(child.cmdline()) for child in family) == (step == PLAN)
        for _ in range(20):
            # As schedulers do it, and the children first.
            for member in [*family, process]:
                if psutil.pid_exists(member.pid):
                    member.send_signal(signal.SIGTERM)
            time.sleep(0.005)
        printed = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, printed
    assert printed.splitlines() == ["esmflow: asked to end (SIGTERM); what is finished is kept"]
    assert "Traceback" not in (tmp_path / "step.log").read_text()
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == []
    wait_until(lambda: not any(child.is_running() for child in family), what="the end of all processes")
