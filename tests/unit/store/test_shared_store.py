"""Many processes use one store at once, while its segments are damaged under their hands."""

import multiprocessing
import os
import random
import traceback
from pathlib import Path

import numpy as np
import pytest

from esmflow.method import Fingerprint
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Segment, Store

METHOD = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")
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
