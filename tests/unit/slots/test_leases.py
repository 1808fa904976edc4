"""Leases: exclusive, never stale, and all or nothing for a job that wants several."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import pytest
from workflow_run import wait_until

from esmflow.slots import leases
from esmflow.slots.gpus import SlotError, candidate_slots
from esmflow.slots.leases import leased_slots

CPU = candidate_slots("cpu", 1, {})

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"


def lease(candidates, folder, count=1, **options):
    """Leases and gives back at once."""
    with leased_slots(candidates, count, lock_folder=folder, **options):
        pass


HOLDER = """
import json, sys, time
from esmflow.slots.gpus import candidate_slots
from esmflow.slots.leases import leased_slots
folder, seconds, log, slots, count = sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
candidates = candidate_slots("cpu", slots, {})
with leased_slots(candidates, count, lock_folder=folder, purpose="a test", wait_seconds=60) as leases:
    leased = time.time()
    print(*(lease.slot.token for lease in leases), flush=True)
    time.sleep(seconds)
    with open(log, "a") as handle:
        for lease in leases:
            handle.write(json.dumps([lease.slot.token, leased, time.time()]) + "\\n")
"""


def start_holder(folder, seconds, log="/dev/null", slots=2, count=1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds), str(log), str(slots), str(count)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_on_two_slots_never_hold_one_at_the_same_time(tmp_path):
    log = tmp_path / "held"
    holders = [start_holder(tmp_path / "slots", 0.3, log) for _ in range(8)]
    assert [holder.wait(60) for holder in holders] == [0] * 8
    held = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(held) == 8
    assert {slot for slot, _, _ in held} == {"CPU-0", "CPU-1"}
    assert_no_overlap(held)


def test_a_killed_holder_frees_its_slot_at_once(tmp_path):
    holder = start_holder(tmp_path, 60)
    assert holder.stdout.readline().strip() == "CPU-0"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with leased_slots(candidate_slots("cpu", 2, {}), lock_folder=tmp_path, wait_seconds=0) as (lease,):
        assert lease.slot.token == "CPU-0"


def test_waiting_ends_with_an_error_that_says_who_holds_the_slots(tmp_path):
    holder = start_holder(tmp_path, 60)
    holder.stdout.readline()
    try:
        started = time.monotonic()
        with pytest.raises(SlotError, match=f"within 1 seconds.*CPU-0 held by process {holder.pid} .*a test"):
            lease(candidate_slots("cpu", 1, {}), tmp_path, wait_seconds=1)
        assert time.monotonic() - started >= 1
    finally:
        holder.kill()
        holder.wait()


def test_waiting_is_logged_with_the_holder(tmp_path, caplog):
    caplog.set_level("INFO")
    candidates = candidate_slots("cpu", 1, {})
    with leased_slots(candidates, lock_folder=tmp_path, purpose="shard group 3"), pytest.raises(SlotError):
        lease(candidates, tmp_path, wait_seconds=0.5)
    assert f"waiting for a GPU slot: CPU-0 held by process {os.getpid()}" in caplog.text
    assert "shard group 3" in caplog.text


def test_a_lock_file_that_a_cleaner_removed_does_not_let_two_in(tmp_path):
    candidates = candidate_slots("cpu", 1, {})
    lease(candidates, tmp_path)
    (tmp_path / candidates[0].lock_name).unlink()
    with leased_slots(candidates, lock_folder=tmp_path, wait_seconds=0), pytest.raises(SlotError):
        lease(candidates, tmp_path, wait_seconds=0)


def test_a_held_lease_keeps_its_file_young(tmp_path):
    with leased_slots(candidate_slots("cpu", 1, {}), lock_folder=tmp_path) as (held,):
        path = tmp_path / held.slot.lock_name
        os.utime(path, (0, 0))
        held.keep()
        assert time.time() - path.stat().st_mtime < 60


def test_an_unusable_lock_folder_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlotError, match="slot_lock_folder"):
        lease(candidate_slots("cpu", 1, {}), tmp_path / "file")


def assert_no_overlap(held):
    for (slot, start, end), (other, other_start, other_end) in combinations(held, 2):
        assert slot != other or end <= other_start or other_end <= start


def test_jobs_that_want_several_slots_at_once_never_wait_for_one_anothers_half(tmp_path):
    log = tmp_path / "held"
    wanted = [4, 2, 3, 1, 2, 4, 3, 2]
    holders = [start_holder(tmp_path / "slots", 0.2, log, slots=4, count=count) for count in wanted]
    assert [holder.wait(60) for holder in holders] == [0] * len(wanted)
    held = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(held) == sum(wanted)
    assert {slot for slot, _, _ in held} == {f"CPU-{n}" for n in range(4)}
    assert_no_overlap(held)


def test_a_job_that_waits_for_several_slots_holds_none_of_them(tmp_path):
    candidates = candidate_slots("cpu", 4, {})
    with leased_slots(candidates[:1], lock_folder=tmp_path):
        waiting = start_holder(tmp_path, 0, slots=4, count=4)
        try:
            time.sleep(1)
            assert waiting.poll() is None
            # Each of the others can be had meanwhile: the one that waits only looks in.
            lease(candidates[1:], tmp_path, count=3, wait_seconds=30)
        finally:
            waiting.kill()
            waiting.wait()


def test_more_slots_than_there_are_is_an_error_at_once_that_names_the_key(tmp_path):
    with pytest.raises(SlotError, match=r"gpus_per_job.*lease 4 slots.*2 here \(CPU-0, CPU-1\)"):
        lease(candidate_slots("cpu", 2, {}), tmp_path, count=4)


# The lock folder is everybody's


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the umask, for the test only."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0])
def test_no_umask_locks_other_users_out(tmp_path, umask, mask):
    umask(mask)
    folder = tmp_path / "node" / "slots"
    lease(CPU, folder)
    assert mode(folder / CPU[0].lock_name) == 0o644
    assert mode(folder) == 0o1777
    assert mode(folder.parent) == 0o755


def test_a_lock_file_that_an_earlier_version_left_private_is_opened_to_others(tmp_path):
    path = tmp_path / CPU[0].lock_name
    path.touch(0o600)
    lease(CPU, tmp_path)
    assert mode(path) == 0o644


def test_the_mode_of_a_folder_that_was_there_is_left_as_it_is(tmp_path):
    private = tmp_path / "private"
    private.mkdir(0o700)
    lease(CPU, private)
    assert mode(private) == 0o700


@pytest.mark.parametrize("there", [True, False])
def test_no_link_is_followed(tmp_path, there):
    victim = tmp_path / "private"
    if there:
        victim.write_text("secret")
        victim.chmod(0o600)
    (tmp_path / "slots").mkdir()
    (tmp_path / "slots" / CPU[0].lock_name).symlink_to(victim)
    with pytest.raises(SlotError, match="cannot be opened as a lock file"):
        lease(CPU, tmp_path / "slots", wait_seconds=0)
    assert victim.exists() == there
    if there:
        assert (victim.read_text(), mode(victim)) == ("secret", 0o600)


def test_a_second_name_of_a_private_file_leaves_its_content_and_mode_alone(tmp_path):
    victim = tmp_path / "private"
    victim.write_text("secret")
    victim.chmod(0o600)
    os.link(victim, tmp_path / CPU[0].lock_name)
    lease(CPU, tmp_path)
    assert (victim.read_text(), mode(victim)) == ("secret", 0o600)


def test_a_link_as_folder_is_refused(tmp_path):
    (tmp_path / "target").mkdir(0o700)
    (tmp_path / "slots").symlink_to(tmp_path / "target")
    with pytest.raises(SlotError, match=r"slot_lock_folder.*is a link"):
        lease(CPU, tmp_path / "slots")
    assert mode(tmp_path / "target") == 0o700


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / CPU[0].lock_name)
    with pytest.raises(SlotError, match="no regular file"):
        lease(CPU, tmp_path, wait_seconds=60)


OTHER_USER = """
import os, sys, time
from esmflow.slots.gpus import SlotError, candidate_slots
from esmflow.slots.leases import leased_slots
user, mask, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([])
os.setgid(user)
os.setuid(user)
os.umask(mask)
with leased_slots(candidate_slots("cpu", 1, {}), lock_folder=folder, purpose=f"user {user}", wait_seconds=60) as (it,):
    print("leased", flush=True)
    sys.stdin.readline()
    it.keep()
print("released", flush=True)
"""


@pytest.fixture
def public_folder():
    """A folder that every user may enter, as `/tmp` is."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_two_users_share_one_lock_folder_and_wait_for_one_another(public_folder, mask):
    def start(user):
        return subprocess.Popen(
            [sys.executable, "-c", OTHER_USER, str(user), str(mask), str(public_folder / "slots")],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first, second = start(65533), None
    try:
        assert first.stdout.readline() == "leased\n"
        second = start(65534)
        time.sleep(2)
        assert second.poll() is None
        assert (public_folder / "slots").stat().st_uid == 65533
        assert first.communicate("\n", timeout=60)[0] == "released\n"
        # The file is the first one's, and a long job of the second one's keeps it young in the only way it may.
        assert second.stdout.readline() == "leased\n"
        assert second.communicate("\n", timeout=60)[0] == "released\n"
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()


# Lock files that are removed under way


def is_free(path):
    with open(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_file_that_is_removed_between_opening_and_locking_is_no_lease(tmp_path, monkeypatch):
    path = tmp_path / CPU[0].lock_name
    real, removed = fcntl.flock, []

    def remove_first(descriptor, how):
        if not removed:
            removed.append(path.read_text())
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with leased_slots(CPU, lock_folder=tmp_path, wait_seconds=10) as (held,):
        assert os.fstat(held.descriptor).st_ino == path.stat().st_ino
        assert not is_free(path)
    assert removed


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_holder_makes_a_removed_lock_file_again_and_says_so(tmp_path, caplog, what):
    folder = tmp_path / "slots"
    with leased_slots(CPU, lock_folder=folder, purpose="group 7") as (held,):
        shutil.rmtree(folder) if what == "folder" else (folder / CPU[0].lock_name).unlink()
        held.keep()
        assert "was removed under way" in caplog.text
        with pytest.raises(SlotError, match=r"held by process.*group 7"):
            lease(CPU, folder, wait_seconds=0)
        caplog.clear()
        os.utime(folder / CPU[0].lock_name, (0, 0))
        held.keep()
        assert caplog.text == ""
        assert (folder / CPU[0].lock_name).stat().st_mtime > 0
    lease(CPU, folder, wait_seconds=0)


def test_a_holder_whose_slot_another_job_has_leased_too_says_so_once(tmp_path, caplog):
    folder = tmp_path / "slots"
    with leased_slots(CPU, lock_folder=folder) as (held,):
        shutil.rmtree(folder)
        with leased_slots(CPU, lock_folder=folder, purpose="another job"):
            held.keep()
            held.keep()
            assert caplog.text.count("has leased the slot too") == 1
            assert "another job" in caplog.text
        # Once that has ended, the file is this holder's again.
        held.keep()
        assert not is_free(folder / CPU[0].lock_name)


def test_a_job_that_waits_makes_a_removed_folder_again(tmp_path, monkeypatch):
    folder, waits = tmp_path / "slots", []

    def remove(seconds):
        waits.append(seconds)
        shutil.rmtree(folder)

    monkeypatch.setattr(leases.time, "sleep", remove)
    with (
        leased_slots(CPU, lock_folder=folder) as (first,),
        leased_slots(CPU, lock_folder=folder, wait_seconds=5) as (second,),
    ):
        assert len(waits) == 1
        assert os.fstat(second.descriptor).st_ino == (folder / CPU[0].lock_name).stat().st_ino
        assert os.fstat(first.descriptor).st_nlink == 0


def test_a_lock_folder_that_can_no_longer_be_written_ends_no_job_that_has_its_slot(tmp_path, caplog):
    with leased_slots(CPU, lock_folder=tmp_path) as (held,):
        (tmp_path / CPU[0].lock_name).unlink()
        mounted = subprocess.run(["mount", "--bind", tmp_path, tmp_path], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", tmp_path], check=True)
            held.keep()
            held.keep()
        finally:
            subprocess.run(["umount", "-l", tmp_path], check=True)
    assert caplog.text.count("was removed under way") == caplog.text.count("no lock file can be made") == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.ESTALE, errno.EIO])
def test_no_error_of_its_file_system_ends_a_job_that_has_its_slot(tmp_path, monkeypatch, number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    with leased_slots(CPU, lock_folder=tmp_path) as (held,):
        with monkeypatch.context() as broken:
            broken.setattr(os, "utime", fail)
            broken.setattr(os, "pread", fail)
            held.keep()
        assert not is_free(tmp_path / CPU[0].lock_name)


def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with leased_slots(CPU, lock_folder=tmp_path) as (held,):
        open_files = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(SlotError, match=r"^slot_lock_folder: .*No locks available.*local to each node"):
            lease(CPU, tmp_path)
        (tmp_path / CPU[0].lock_name).unlink()
        held.keep()
        assert len(os.listdir("/proc/self/fd")) == open_files


def test_what_another_user_wrote_into_a_lock_file_does_not_reach_a_terminal_as_a_command(tmp_path):
    purpose = "\x1b]0;owned\x07\x1b[2J\u202egroup"
    with leased_slots(CPU, lock_folder=tmp_path, purpose=purpose), pytest.raises(SlotError) as error:
        lease(CPU, tmp_path, wait_seconds=0)
    assert str(error.value).isprintable()
    assert r"(\x1b]0;owned\x07\x1b[2J\u202egroup)" in str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
def test_a_folder_in_which_a_user_may_make_no_lock_file_is_named_with_what_to_do(public_folder):
    private = public_folder / "slots"
    private.mkdir(0o755)
    ended = subprocess.run(
        [sys.executable, "-c", OTHER_USER, "65534", "18", str(private)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"slot_lock_folder: no lock file can be made in {private} ([Errno 13] Permission denied" in ended.stderr


WAITING = """
import sys
from esmflow.slots.gpus import candidate_slots
from esmflow.slots.leases import leased_slots
from esmflow.step import logged_step
with logged_step(sys.argv[1], []), leased_slots(candidate_slots("cpu", 1, {}), lock_folder=sys.argv[2]):
    pass
"""


def test_sigterm_ends_a_job_that_waits_for_a_slot_with_143_and_a_sentence(tmp_path):
    log = tmp_path / "log"
    with leased_slots(CPU, lock_folder=tmp_path / "slots"):
        job = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(log), str(tmp_path / "slots")],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        )
        try:
            wait_until(lambda: log.exists() and "waiting for a GPU slot" in log.read_text(), what="the wait")
            job.terminate()
            assert job.wait(20) == 143
        finally:
            job.kill()
            job.wait()
    assert "asked to end (SIGTERM); what is finished is kept" in log.read_text()
    assert "Traceback" not in log.read_text()
