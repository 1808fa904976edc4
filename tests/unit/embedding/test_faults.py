"""What goes wrong around an embed job, made to happen: docs/faults.md has a row for each of these tests."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from made_up import proteins, random_model, with_digests, write_converted
from stage_settings import cpu_slots, embed_settings
from workflow_run import wait_until

from esmflow.checkpoint.file import CheckpointError, read_checkpoint_info
from esmflow.embedding import job as job_module
from esmflow.embedding.job import EmbedError, embed_group
from esmflow.files import read_json
from esmflow.method import ARITHMETIC, Fingerprint
from esmflow.plan.shards import shard_name, write_shard
from esmflow.store.segments import SegmentError, Store
from esmflow.workers.manager import BatchQueueManager

PROJECT = Path(__file__).resolve().parents[3]
SHARDS = 8


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


class Job:
    """A shard group with its checkpoint and its store, and what is left after it was run."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.checkpoint = write_converted(folder / "model.safetensors", random_model())
        self.names = {}
        for number in range(SHARDS):
            sequences = with_digests(proteins(20, 200, 300, seed=number))
            write_shard(folder / "shards" / f"shard-{number:05d}.fasta", sequences)
            self.names[f"shard-{number:05d}.fasta"] = shard_name(digest for digest, _ in sequences)
        fingerprint = Fingerprint(
            checkpoint=read_checkpoint_info(self.checkpoint).digest,
            layers=(2,),
            include=("per_residue",),
            per_residue_precision="fp32",
            engine="packed",
            arithmetic=ARITHMETIC["packed", "fp32"],
            precision="fp32",
            long_sequences="truncate",
            max_residues=1022,
            window_overlap=None,
            invalid_residues="reject",
        )
        self.settings = embed_settings(
            folder,
            self.checkpoint,
            fingerprint,
            slots=cpu_slots(folder, 2),
            token_budget=2000,
            grace_seconds=10,
            last_attempt=2,
        )

    @property
    def store(self) -> Store:
        return Store(self.settings.store, self.settings.fingerprint)

    def run(self, **changes) -> dict:
        """Runs the job here and returns its `run.json`."""
        embed_group(replace(self.settings, **changes))
        return read_json(self.folder / "run.json")

    def whole_segments(self) -> set[str]:
        return {name for name in self.store.names() if self.store.find(name, check=True) is not None}

    def assert_the_next_run_does_only_what_is_missing(self) -> None:
        committed = self.whole_segments()
        run = self.run()
        assert set(run["segments_reused"]) == committed
        assert set(run["segments_written"]) == set(self.names.values()) - committed
        assert self.whole_segments() == set(self.names.values())


def workers_of_this_process() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@contextmanager
def meanwhile(action):
    """Runs `action` in a thread during the block; what it raises is raised here."""
    raised = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not raised, raised


def named_in_the_documentation() -> set[str]:
    return set(re.findall(r"`(test_\w+)`", (PROJECT / "docs" / "faults.md").read_text()))


def test_every_row_of_the_documentation_names_a_test_that_is_there():
    found = {
        name
        for file in (PROJECT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named_in_the_documentation()) > 10
    assert named_in_the_documentation() <= found


def test_a_full_disk_ends_the_job_with_a_sentence_and_keeps_what_was_committed(job, small_disk):
    job.settings = replace(job.settings, store=str(small_disk / "store"))
    with pytest.raises(EmbedError, match="No space left on device"):
        job.run()
    committed = job.whole_segments()
    assert 0 < len(committed) < SHARDS
    assert set(job.store.names()) == committed
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    job.assert_the_next_run_does_only_what_is_missing()


def test_a_store_that_cannot_be_written_ends_the_job_with_a_sentence(job, small_disk):
    job.settings = replace(job.settings, store=str(small_disk / "store"))
    job.store.create()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(EmbedError, match="Read-only file system"):
        job.run()
    subprocess.run(["mount", "-o", "remount,rw,size=64m", small_disk], check=True)
    job.assert_the_next_run_does_only_what_is_missing()


def test_a_store_that_disappears_under_way_fails_the_attempt_and_the_next_one_computes_again(job):
    def remove() -> None:
        wait_until(lambda: job.store.names(), what="the first segment")
        shutil.rmtree(job.settings.store, ignore_errors=True)

    with meanwhile(remove), pytest.raises((SegmentError, EmbedError)):
        job.run()
    job.assert_the_next_run_does_only_what_is_missing()


def test_a_checkpoint_deleted_before_the_job_is_named_and_no_slot_is_taken(job):
    aside = job.folder / "aside"
    job.checkpoint.rename(aside)
    with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors"):
        job.run()
    assert not (job.folder / "slots").exists()
    shutil.copy2(aside, job.checkpoint)
    job.assert_the_next_run_does_only_what_is_missing()


def test_a_checkpoint_deleted_under_way_does_not_disturb_a_worker_that_has_loaded_it(job):
    def remove() -> None:
        wait_until(lambda: job.store.names(), what="the first segment")
        job.checkpoint.unlink()

    with meanwhile(remove):
        run = job.run()
    assert set(run["segments_written"]) == set(job.names.values())
    assert job.whole_segments() == set(job.names.values())


def test_a_worker_killed_at_its_start_is_replaced_and_nothing_fails(job):
    with meanwhile(lambda: wait_until(workers_of_this_process, what="a worker")[0].kill()):
        run = job.run()
    (death,) = run["workers"][0]["exits"]
    assert (death["signal"], death["in_hand"]) == ("SIGKILL", [])
    assert set(run["segments_written"]) == set(job.names.values())


def test_a_worker_killed_while_it_writes_leaves_no_half_segment_and_its_shard_is_tried_again(job):
    def strike() -> None:
        parts = wait_until(lambda: writing(job), what="a file being written")
        workers_of_this_process()[0].kill()
        assert parts

    with meanwhile(strike):
        run = job.run()
    assert [death["signal"] for death in run["workers"][0]["exits"]] == ["SIGKILL"]
    assert job.whole_segments() == set(job.names.values())
    assert sorted(shard["segment"] for shard in run["shards"]) == sorted(job.names.values())


def writing(job, seconds=5.0):
    """The store's temporary files, as soon as there is one."""
    folder = job.store.folder
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if folder.exists() and (found := [name for name in os.listdir(folder) if ".safetensors." in name]):
            return found
    return []


def test_a_worker_that_hangs_is_ended_and_its_shard_tried_again(job, monkeypatch):
    managers = []

    class Known(BatchQueueManager):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            managers.append(self)

    monkeypatch.setattr(job_module, "BatchQueueManager", Known)

    def strike() -> None:
        wait_until(lambda: job.store.names(), what="the first segment")
        (stopped,) = workers_of_this_process()
        stopped.send_signal(signal.SIGSTOP)

        def ended() -> bool:
            if stopped.is_running():
                # As after an hour in which it said nothing.
                managers[0]._workers[0].silent_seconds = 3600.0
            return not stopped.is_running()

        wait_until(ended, what="the end of the worker that hangs")

    with meanwhile(strike):
        run = job.run(hang_seconds=600)
    (death,) = run["workers"][0]["exits"]
    assert "no progress for 600 seconds" in death["how"]
    assert job.whole_segments() == set(job.names.values())


def test_a_damaged_segment_is_set_aside_and_its_shard_computed_again(job):
    job.run()
    flipped, truncated = sorted(job.names.values())[:2]
    with open(job.store.path(flipped), "r+b") as handle:
        handle.seek(-1000, os.SEEK_END)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 16]))
    os.truncate(job.store.path(truncated), job.store.path(truncated).stat().st_size // 2)
    run = job.run()
    assert set(run["segments_written"]) == {flipped, truncated}
    assert len(list(job.store.folder.glob("*.damaged-*"))) == 2


def test_a_segment_under_the_name_of_another_is_set_aside_and_its_shard_computed_again(job):
    job.run()
    one, another = sorted(job.names.values())[:2]
    shutil.copy2(job.store.path(one), job.store.path(another))
    run = job.run()
    assert run["segments_written"] == [another]
    assert len(list(job.store.folder.glob(f"{another}*.damaged-*"))) == 1
    lost = job.run()
    assert (lost["segments_written"], len(lost["segments_reused"])) == ([], SHARDS)
    assert job.store.read(one).sequences().isdisjoint(job.store.read(another).sequences())


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a_clock_that_jumps_neither_ends_nor_stalls_a_job(job, monkeypatch, seconds):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + (seconds if job.store.names() else 0))
    run = job.run(hang_seconds=60)
    assert abs(run["ended"] - run["started"] - seconds) < 1000
    assert run["workers"][0]["exits"] == []
    assert job.whole_segments() == set(job.names.values())


def test_two_jobs_at_once_over_the_same_shards_and_one_store_both_finish(job):
    def run(number: int) -> None:
        folder = job.folder / f"run{number}"
        places = {"run": folder / "run.json", "failures": folder / "failures.tsv", "log_file": folder / "job.log"}
        embed_group(replace(job.settings, **{name: str(path) for name, path in places.items()}))

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=run, args=(number,)) for number in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    assert job.whole_segments() == set(job.names.values())
    assert not list(job.store.folder.glob("*.part"))
    slots = [read_json(job.folder / f"run{number}" / "run.json")["workers"] for number in range(2)]
    assert len({worker["slot"]["token"] for workers in slots for worker in workers}) == sum(map(len, slots))
