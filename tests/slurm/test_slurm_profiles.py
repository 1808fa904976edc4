"""The Slurm profiles on a real Slurm: the demo, cancelled as a whole, started again, one job killed; a whole node.

The story is told once, by a fixture, since every start of a run takes its time; each test looks at one side of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import h5py
import pyarrow.parquet as pq
import pytest
import yaml
from made_up import proteins, write_fasta
from one_node_slurm import Allocation, OneNodeSlurm
from workflow_run import PROJECT, Hold, demo_folder, groups, wait_until

from esmflow.plan.shards import list_shards, read_shard, shard_name

pytestmark = pytest.mark.timeout(600)

GROUPS = 5
# What depends on this Slurm, not on the profile: no accounting to ask, and nobody else to spare.
SITE = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10")


@dataclass(frozen=True)
class Story:
    """What happened. Segments are names; `killed` is the shard group whose job was cancelled alone."""

    printed: str
    before: set[str]
    killed: str
    killed_job: str
    killed_had: set[str]
    allocations: list[Allocation]
    groups: dict[str, dict]
    results: Path


class Demo:
    """The demo in a folder of its own."""

    def __init__(self, folder: Path, model: Path, slurm: OneNodeSlurm) -> None:
        self.folder = demo_folder(folder)
        self.results = folder / "results" / "demo"
        self.slurm = slurm
        self.before: set[str] = set()
        changes = [f"model={model}", f"groups={GROUPS}", "shard_residues=1000", "device=cpu"]
        changes += [f"slot_lock_folder={folder}/slots", "report=false"]
        profile = ["--profile", "profiles/slurm", "--configfile", "config/demo/config.yaml"]
        self.command = [sys.executable, "-m", "snakemake", *profile, "--config", *changes, *SITE]

    def start(self, hold: Hold) -> subprocess.Popen:
        with open(self.folder / "snakemake.out", "ab") as output:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.slurm.environment, **hold.environment},
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        return (self.folder / "snakemake.out").read_text()

    def segments(self) -> set[str]:
        return {path.stem for path in self.results.glob("store/*/*.safetensors")}

    def shards_of(self, group: str) -> set[str]:
        """The names that the group's segments have once they are there."""
        folder = self.results / "plan" / "shards" / f"group-{group}"
        return {shard_name(digest for digest, _ in read_shard(path)) for path in list_shards(folder)}

    def in_the_middle(self) -> str | None:
        """A shard group whose job is held, has committed something since `before`, and has most of its way to go."""
        done = self.segments()
        for comment in self.slurm.running():
            group = comment.rpartition("_")[2]
            shards = self.shards_of(group)
            new = (shards & done) - self.before
            if new and len(shards - done) >= len(shards) / 2:
                return group
        return None


@pytest.fixture(scope="module")
def story(slurm, made_up_model, tmp_path_factory):
    demo = Demo(tmp_path_factory.mktemp("demo"), made_up_model, slurm)
    process = demo.start(Hold(demo.folder))
    try:
        wait_until(demo.in_the_middle, 200, "a job in the middle")
        # A user who stops: cancels every job, then the run itself.
        slurm.cancel(*slurm.queued())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) != 0
        slurm.cancel_everything()
        demo.before = demo.segments()
        assert not (demo.results / "summary.txt").exists()

        hold = Hold(demo.folder, segments=len(demo.before) + 2)
        process = demo.start(hold)
        killed = wait_until(demo.in_the_middle, 200, "a job in the middle again")
        (job,) = [job for comment, job in slurm.running().items() if comment.endswith(f"_{killed}")]
        slurm.cancel(job)
        wait_until(lambda: job not in slurm.queued(), 60, "the end of the cancelled job")
        had = demo.segments() & demo.shards_of(killed)
        hold.release()
        assert process.wait(300) == 0, demo.printed
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    by_name = {group["group"]: group for group in groups(demo.results)}
    return Story(demo.printed, demo.before, killed, job, had, slurm.allocations(), by_name, demo.results)


def leases(story: Story):
    """(slot, leased, released, shard group) of every worker, as `run.json` has them."""
    return [
        (worker["slot"]["token"], worker["leased"], worker["released"], name)
        for name, group in story.groups.items()
        for worker in group["workers"]
    ]


def test_every_job_used_the_slot_that_slurm_gave_it(story):
    used = leases(story)
    assert len(used) >= 4
    for slot, leased, released, name in used:
        (given,) = [
            allocation
            for allocation in story.allocations
            if allocation.comment.endswith(f"_{name}") and allocation.started <= leased <= released <= allocation.ended
        ]
        assert given.gpus == (slot,)


def test_no_slot_was_ever_shared_and_all_four_were_used(story):
    for (slot, start, end, _), (other, other_start, other_end, _) in combinations(leases(story), 2):
        assert slot != other or end <= other_start or other_end <= start
    # The certificate's job asks for no GPU on a CPU: Slurm gives it none.
    assert {gpu for allocation in story.allocations for gpu in allocation.gpus} - {""} == {"0", "1", "2", "3"}


def test_a_job_killed_with_scancel_is_tried_again_and_keeps_what_it_had(story):
    group = story.groups[story.killed]
    assert f"SLURM-job '{story.killed_job}' failed, SLURM status is: 'CANCELLED'" in story.printed
    assert group["attempt"] == 2
    assert story.killed_had
    assert set(group["segments_reused"]) == story.killed_had
    assert story.killed_had.isdisjoint(group["segments_written"])
    assert {group["attempt"] for name, group in story.groups.items() if name != story.killed} == {1}


def test_after_scancel_of_everything_the_same_command_resumes(story):
    reused = {name for group in story.groups.values() for name in group["segments_reused"]}
    written = {name for group in story.groups.values() for name in group["segments_written"]}
    assert story.before
    assert story.before <= reused
    assert story.before.isdisjoint(written)


def test_the_run_ends_complete_and_in_its_place(story):
    statuses = pq.read_table(story.results / "manifest.parquet").column("status").to_pylist()
    assert (len(statuses), statuses.count("embedded"), statuses.count("rejected")) == (232, 228, 4)
    with h5py.File(story.results / "embeddings" / "mean_layer2" / "embeddings.h5") as file:
        assert file["embeddings"].shape == (228, 32)
    assert (PROJECT / "results").resolve() not in story.results.resolve().parents


def test_nothing_is_left_behind(story, slurm):
    assert slurm.queued() == []
    assert not list(story.results.rglob("*.part"))


def test_whole_node_jobs_of_the_command_work_on_every_gpu_that_slurm_gave_them(slurm, real_model_folder, tmp_path):
    write_fasta(tmp_path / "some.faa", ((f"p{n}", protein) for n, protein in enumerate(proteins(160, 40, 80))))
    profile = yaml.safe_load((PROJECT / "profiles" / "slurm-whole-node" / "config.yaml").read_text())
    assert profile["config"] == ["gpus_per_job=4"]
    profile |= {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 1, "latency-wait": 10}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_text(yaml.safe_dump(profile))
    # So slow that the work is worth two jobs, as `groups: auto` has it.
    settings = [
        "device=cpu",
        "threads=1",
        "shard_residues=1000",
        "verify.sample=0",
        "report=false",
        "device_tflops=0.00045",
    ]
    settings.append(f"slot_lock_folder={tmp_path}/slots")
    command = [sys.executable, "-c", "from esmflow.cli.main import main; main()", "embed", "some.faa", "-o", "out"]
    command += ["--profile", "site", "--model", str(real_model_folder), *(f"--set={setting}" for setting in settings)]
    paths = os.pathsep.join([str(PROJECT / "workflow" / "scripts"), os.environ["PYTHONPATH"]])
    environment = {**os.environ, **slurm.environment, "PYTHONPATH": paths}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "160 embedded" in ran.stdout + ran.stderr
    ran_groups = groups(tmp_path / "out" / "results")
    assert len(ran_groups) == 2
    given = [allocation for allocation in slurm.allocations() if allocation.gpus != ("",)][-2:]
    assert {allocation.gpus for allocation in given} == {("0", "1", "2", "3")}
    for group in ran_groups:
        assert tuple(worker["slot"]["token"] for worker in group["workers"]) == ("0", "1", "2", "3")
        assert sum(worker["processed"] for worker in group["workers"]) == len(group["shards"]) > 4
