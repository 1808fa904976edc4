"""The timeline of slots accounts for every second of every lease."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from esmflow.embedding.run_record import LeasedSlot, RunRecord, ShardResult, WorkerRecord
from esmflow.report.timeline import MOST_PIECES, drawable, kind_seconds, slot_name, slot_pieces

SLOT = LeasedSlot("0", "GPU-1", "NVIDIA H100", "cuda")


def make_run(group="0", shards=3, start=100.0, host="node"):
    """Leased for 5 s before the first shard; shards of 10 s, 2 s of it writing, 1 s apart; released 4 s after."""
    made = [
        ShardResult(
            f"shard-{n:05d}.fasta", "", 10, 500, 0, 4096, "fp32", start + 5 + 11 * n, start + 15 + 11 * n,
            write_seconds=2.0, model_load_seconds=3.0, worker=7,
        )
        for n in range(shards)
    ]  # fmt: skip
    released = (made[-1].ended if made else start) + 4
    return RunRecord(group=group, host=host, shards=tuple(made), workers=(WorkerRecord(SLOT, start, released),))


def test_every_second_of_a_lease_is_load_compute_write_or_idle():
    run = make_run()
    pieces = slot_pieces([run])
    assert kind_seconds(pieces) == pytest.approx({"load": 5, "compute": 24, "write": 6, "idle": 6})
    for one, next in itertools.pairwise(pieces):
        assert one.ended == pytest.approx(next.started)
    assert pieces[0].started == run.workers[0].leased
    assert pieces[-1].ended == run.workers[0].released


def test_of_many_shards_what_a_slot_did_most_is_drawn_and_every_second_is_counted():
    runs = [make_run(str(n), shards=MOST_PIECES // 4, start=1e5 * n) for n in range(4)]
    pieces = slot_pieces(runs)
    total = sum(run.workers[0].released - run.workers[0].leased for run in runs)
    assert sum(kind_seconds(pieces).values()) == pytest.approx(total)
    few = drawable(pieces)
    assert len(few) <= MOST_PIECES < len(pieces)
    assert {piece.group for piece in few} == set("0123")
    kinds = Counter(piece.kind for piece in few)
    assert kinds["compute"] > 0.9 * len(few)
    # Of 11 seconds 8 are computing.
    assert float(few[1].what.split("%")[0]) == pytest.approx(100 * 8 / 11, abs=4)


def test_each_worker_of_a_job_has_its_own_shards():
    run = make_run(shards=4)
    one = run.workers[0]
    workers = (one, replace(one, device=1, slot=replace(SLOT, token="1")))
    run = replace(
        run, workers=workers, shards=tuple(replace(shard, device=n % 2) for n, shard in enumerate(run.shards))
    )
    worked = [(piece.slot, piece.what[:11]) for piece in slot_pieces([run]) if piece.kind == "compute"]
    assert sorted(worked) == [
        ("GPU 0 on node", "shard-00000"),
        ("GPU 0 on node", "shard-00002"),
        ("GPU 1 on node", "shard-00001"),
        ("GPU 1 on node", "shard-00003"),
    ]


def test_a_lease_without_a_finished_shard_is_idle():
    (piece,) = slot_pieces([make_run(shards=0)])
    assert (piece.kind, piece.seconds) == ("idle", 4.0)


def test_a_group_with_nothing_to_do_held_no_slot():
    assert slot_pieces([RunRecord(group="0", host="node")]) == []


def test_slots_of_different_hosts_have_different_names():
    assert slot_name("a", SLOT) == "GPU 0 on a"
    assert slot_name("b", SLOT) != slot_name("a", SLOT)
