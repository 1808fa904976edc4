"""Many processes use one store at once, while its segments are damaged under their hands."""

import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest

from esmflow.method import Fingerprint
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Segment, Store

METHOD = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")
SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"
SEGMENTS, ROWS, ROUNDS = 12, 20, 40


def segment(number: int) -> Segment:
    """What every process computes for the shard of this number."""
    values = np.random.default_rng(number)
    digests = values.integers(0, 256, (ROWS, 16), np.uint8)
    vectors = values.standard_normal((ROWS, 64)).astype(np.float32)
    return Segment(digests, np.ones(ROWS, np.int64), {"mean_layer6": vectors}, "fp32")


def spoil(path: Path, choose: random.Random) -> None:
    """Truncates a segment, flips a bit in it, or deletes it, without a word to anyone."""
    try:
        content, how = bytearray(path.read_bytes()), choose.randrange(3)
        if how == 0:
            path.unlink()
            return
        if how == 1:
            del content[choose.randrange(len(content)) :]
        else:
            content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        # Not in place: what another process was given and has mapped must stay what it was.
        spoiled = path.with_name(f".spoiled-{os.getpid()}")
        spoiled.write_bytes(content)
        spoiled.rename(path)
    except FileNotFoundError:
        pass


def use(folder: str, seed: int, report) -> None:
    """Looks segments up, makes those that are missing, and looks at what it was given, as runs do."""
    try:
        choose, store = random.Random(seed), Store(folder, METHOD)
        store.create()
        for _ in range(ROUNDS):
            number = choose.randrange(SEGMENTS)
            name, expected = f"{number:032x}", segment(number)
            found = store.find(name, check=True)
            if found is None:
                store.write(name, expected)
            else:
                assert np.array_equal(found.digests, expected.digests)
                assert np.array_equal(found.arrays["mean_layer6"], expected.arrays["mean_layer6"])
            if choose.random() < 0.2:
                stored = StoredSequences(store)
                assert {stored.names[n] for n in stored.find(expected.digests) if n >= 0} <= {name}
            if seed % 5 == 1:
                spoil(store.path(name), choose)
        report.put(None)
    except BaseException:
        report.put(traceback.format_exc())


@pytest.mark.parametrize("processes", [2, 10])
def test_a_store_that_many_processes_use_and_damage_ends_consistent(tmp_path, processes):
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    users = [context.Process(target=use, args=(str(tmp_path), seed, report)) for seed in range(processes)]
    for user in users:
        user.start()
    assert [problem for problem in (report.get(timeout=120) for _ in users) if problem] == []
    for user in users:
        user.join()
    store = Store(tmp_path, METHOD)
    stored = StoredSequences(store)
    for number in range(SEGMENTS):
        name, expected = f"{number:032x}", segment(number)
        found = store.find(name, check=True)
        if found is None:
            # Spoiled by the last to use it, and noticed now: computed again, as a run would.
            store.write(name, expected)
            found = store.find(name, check=True)
        assert np.array_equal(found.arrays["mean_layer6"], expected.arrays["mean_layer6"])
        assert {stored.names[n] for n in stored.find(expected.digests) if n >= 0} <= {name}
    assert len(StoredSequences(store)) == SEGMENTS * ROWS
    assert not list(store.folder.glob(".*.part"))


ONE_OF_A_GROUP = """
import os, sys
from test_shared_store import METHOD, segment
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Store
from esmflow.verify.agreement import Agreement
from esmflow.verify.remembered import add_verified, read_verified
# Imports come first: another user may not be able to read this one's Python.
written = segment(int(sys.argv[5]))
user, group, mask, folder, name = (*map(int, sys.argv[1:4]), *sys.argv[4:])
os.setgroups([group])
os.setgid(user)
os.setuid(user)
os.umask(mask)
store = Store(folder, METHOD)
store.create()
before = len(StoredSequences(store))
store.write(name, written)
for other in store.names():
    assert store.find(other, check=True) is not None
numbers = {number: f"of {number}" for number in "123"}
verified = read_verified(store, numbers)
add_verified(store, numbers, {name: {"mean_layer6": Agreement(1.0, 0.0, 1.0)}})
assert name in read_verified(store, numbers)
print(before, len(StoredSequences(store)), *verified)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
@pytest.mark.parametrize("masks", [(0o077, 0o022), (0o022, 0o077)])
def test_two_users_with_umasks_of_their_own_share_a_store_of_their_group(masks):
    group = 65530
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        shared = folder / "store"
        shared.mkdir()
        os.chown(shared, 0, group)
        shared.chmod(0o2775)
        said = []
        for number, user in enumerate((65533, 65534, 65533), 1):
            mask = masks[user == 65534]
            command = [sys.executable, "-c", ONE_OF_A_GROUP, *map(str, (user, group, mask, shared, number))]
            environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}:{Path(__file__).parent}"}
            ended = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            said.append(ended.stdout.strip())
        assert said == [f"0 {ROWS}", f"{ROWS} {2 * ROWS} 1", f"{2 * ROWS} {3 * ROWS} 1 2"]
        files = [path for path in shared.rglob("*") if path.is_file()]
        assert {path.stat().st_gid for path in files} == {group}
        assert {stat.S_IMODE(path.stat().st_mode) & 0o770 for path in files} == {0o660}
    finally:
        shutil.rmtree(folder)
