"""What a store has is found by its segments' digests, and nothing damaged is ever counted on."""

import json
import logging
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from esmflow.method import Fingerprint
from esmflow.store import lookup
from esmflow.store.lookup import INDEX_NAME, StoredSequences
from esmflow.store.segments import Segment, Store

METHOD = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, METHOD)
    store.create()
    return store


def digests_of(count: int, seed: int) -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)]


def write(store: Store, name: str, digests: list[bytes]) -> None:
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    vectors = np.ones((len(rows), 4), np.float32)
    store.write(name, Segment(rows, np.ones(len(rows), np.int64), {"mean_layer6": vectors}, "fp32"))


def segment_of(found: StoredSequences, digest: bytes) -> str | None:
    (number,) = found.find(np.frombuffer(digest, np.uint8).reshape(1, 16))
    return None if number < 0 else found.names[number]


def opened(monkeypatch) -> list[str]:
    """The segments that were opened, from now on."""
    names = []
    find = Store.find

    def note(self, name, **options):
        names.append(name)
        return find(self, name, **options)

    monkeypatch.setattr(Store, "find", note)
    return names


def test_every_sequence_is_found_and_a_stranger_is_not(store):
    parts = {name: digests_of(200, seed) for seed, name in enumerate("abc")}
    for name, digests in parts.items():
        write(store, name, digests)
    for found in (StoredSequences(store), StoredSequences(store)):
        assert len(found) == 600
        assert all(segment_of(found, digest) == name for name, digests in parts.items() for digest in digests)
        for stranger in (*digests_of(50, 9), bytes(16), b"\xff" * 16):
            assert segment_of(found, stranger) is None


def test_many_sequences_are_found_at_once_in_the_order_asked_for(store):
    parts = [digests_of(300, seed) for seed in range(3)]
    for name, digests in zip("abc", parts):
        write(store, name, digests)
    asked = [*parts[2], *digests_of(100, 9), *parts[0], *parts[0][:5]]
    found = StoredSequences(store).find(np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16))
    assert found.tolist() == [2] * 300 + [-1] * 100 + [0] * 305
    assert StoredSequences(store).find(np.empty((0, 16), np.uint8)).tolist() == []


def test_digests_that_share_a_half_are_told_apart(store):
    halves = digests_of(6, 0)
    inside = [halves[0][:8] + other[8:] for other in halves[:5]]
    write(store, "a", inside[::2])
    write(store, "b", inside[1::2])
    found = StoredSequences(store)
    assert [segment_of(found, digest) for digest in inside] == ["a", "b", "a", "b", "a"]
    assert segment_of(found, halves[0][:8] + halves[5][8:]) is None


def test_a_store_that_is_not_there_holds_nothing_and_is_not_made(tmp_path):
    store = Store(tmp_path / "none", METHOD)
    assert segment_of(StoredSequences(store), bytes(16)) is None
    assert not store.folder.exists()


def test_with_an_index_no_segment_is_opened_until_it_is_named(store, monkeypatch):
    first, second = digests_of(5, 0), digests_of(5, 1)
    write(store, "a", first)
    write(store, "b", second)
    StoredSequences(store)
    names = opened(monkeypatch)
    found = StoredSequences(store)
    assert names == []
    assert [segment_of(found, digest) for digest in first] == ["a"] * 5
    assert names == ["a"]


def test_the_index_follows_segments_that_come_go_and_change(store, monkeypatch):
    for seed, name in enumerate("abc"):
        write(store, name, digests_of(3, seed))
    StoredSequences(store)
    store.path("a").unlink()
    store.path("b").unlink()
    write(store, "b", digests_of(4, 7))
    write(store, "d", digests_of(2, 8))
    names = opened(monkeypatch)
    found = StoredSequences(store)
    assert names == ["b", "d"]
    assert len(found) == 3 + 4 + 2
    assert segment_of(found, digests_of(3, 0)[0]) is None
    assert segment_of(found, digests_of(3, 1)[0]) is None
    assert [segment_of(found, digests_of(n, seed)[0]) for n, seed in ((4, 7), (3, 2), (2, 8))] == ["b", "c", "d"]


def test_an_index_that_is_damaged_or_of_another_kind_is_built_again(store, caplog):
    digests = digests_of(50, 0)
    write(store, "a", digests)
    StoredSequences(store)
    path = store.folder / INDEX_NAME
    intact, expected = path.read_bytes(), load_file(path)
    for damaged in (intact[:-1], intact[:-1] + bytes([intact[-1] ^ 1]), b"", b"x" * 100, store.path("a").read_bytes()):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert [segment_of(StoredSequences(store), digest) for digest in digests] == ["a"] * 50
        mended = load_file(path)
        assert all(np.array_equal(mended[name], expected[name]) for name in ("high", "low", "segments"))
    assert "built again from the segments" in caplog.text


def test_an_index_that_cannot_be_written_is_done_without(store, monkeypatch):
    write(store, "a", digests_of(3, 0))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lookup, "write_tensors", refuse)
    assert segment_of(StoredSequences(store), digests_of(3, 0)[1]) == "a"
    assert not (store.folder / INDEX_NAME).exists()


def test_a_damaged_segment_is_set_aside_when_it_would_be_named_and_its_sequences_are_not_found(store, caplog):
    digests = digests_of(4, 0)
    write(store, "a", digests)
    write(store, "b", digests[:1])
    StoredSequences(store)
    path = store.path("a")
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(4, np.float32).tobytes())] ^= 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(content)
    # As bits flip on a disk: neither size nor time says so.
    os.utime(path, ns=(stamp, stamp))
    found = StoredSequences(store)
    # What another segment has too is found there.
    assert [segment_of(found, digest) for digest in digests] == ["b", None, None, None]
    assert "mean_layer6 does not match; its sequences will be computed again" in caplog.text
    assert store.names() == ["b"]
    assert len(list(store.folder.glob("a.safetensors.damaged-*"))) == 1


def test_a_truncated_segment_does_not_hide_the_others(store):
    write(store, "cut", digests_of(3, 0))
    write(store, "whole", digests_of(3, 1))
    os.truncate(store.path("cut"), 200)
    found = StoredSequences(store)
    assert [segment_of(found, digest) for digest in digests_of(3, 1)] == ["whole"] * 3
    assert len(found) == 3


def test_the_index_of_a_sequence_takes_20_bytes(store):
    write(store, "a", digests_of(10_000, 0))
    StoredSequences(store)
    content = (store.folder / INDEX_NAME).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__") == 200_000
