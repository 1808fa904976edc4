"""Sequences are found by their whole digest, in whichever segment, and their vectors come in the order asked for."""

import os
from pathlib import Path

import numpy as np
import pytest

from esmflow.arrays import Array
from esmflow.method import Fingerprint
from esmflow.store import gather
from esmflow.store.gather import SegmentIndex, read_rows
from esmflow.store.segments import Segment, SegmentError, Store

WIDTH = 4


@pytest.fixture
def store(tmp_path):
    method = Fingerprint("c", (6,), ("mean",), None, "reference", "", "fp32", "whole", None, None, "reject")
    store = Store(tmp_path, method)
    store.create()
    return store


def write(store: Store, name: str, digests: np.ndarray, seed: int, precision: str = "fp32") -> Segment:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6, len(digests))
    arrays = {
        "mean_layer6": random.standard_normal((len(digests), WIDTH)).astype(np.float32),
        "per_residue_layer6": random.standard_normal((lengths.sum(), WIDTH)).astype(np.float32),
    }
    segment = Segment(np.asarray(digests, np.uint8).reshape(-1, 16), lengths, arrays, precision)
    store.write(name, segment)
    return segment


def random_digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


@pytest.fixture
def three(store):
    """Three segments and where each of their sequences is."""
    digests = random_digests(600)
    parts = {"a": digests[:100], "b": digests[100:101], "c": digests[101:]}
    segments = [write(store, name, part, seed, f"precision {name}") for seed, (name, part) in enumerate(parts.items())]
    where = [(number, row) for number, part in enumerate(parts.values()) for row in range(len(part))]
    return SegmentIndex(store, list(parts), check=True), digests, where, segments


def test_every_sequence_is_found_in_its_segment_and_row(three):
    index, digests, where, _ = three
    order = np.random.default_rng(1).permutation(600)
    location = index.locate(digests[order])
    assert list(zip(location.segments.tolist(), location.rows.tolist())) == [where[i] for i in order]


def test_what_is_in_no_segment_is_not_found(three):
    index, digests, where, _ = three
    strangers = random_digests(50, seed=9)
    extremes = np.array([[0] * 16, [255] * 16], np.uint8)
    location = index.locate(np.concatenate([strangers, extremes, digests[:1]]))
    assert location.segments.tolist() == [-1] * 52 + [0]
    assert location.rows.tolist() == [-1] * 52 + [where[0][1]]


def test_digests_that_share_their_first_half_are_told_apart(store):
    digests = random_digests(40)
    # Two families of twenty, each with one first half; the last of each is in no segment.
    digests[:20, :8] = digests[0, :8]
    digests[20:, :8] = 255
    inside = np.concatenate([digests[:19], digests[20:39]])
    write(store, "a", inside[::2], 0)
    write(store, "b", inside[1::2], 1)
    index = SegmentIndex(store, ["a", "b"], check=True)
    location = index.locate(inside)
    assert location.segments.tolist() == [0, 1] * 19
    assert location.rows.tolist() == [row for row in range(19) for _ in (0, 1)]
    assert index.locate(digests[[19, 39]]).rows.tolist() == [-1, -1]


def test_digests_that_differ_in_one_bit_are_told_apart(store):
    base = random_digests(1)[0]
    family = np.repeat(base[None], 129, axis=0)
    for bit in range(128):
        family[bit + 1, bit // 8] ^= 1 << bit % 8
    write(store, "a", family, 0)
    assert SegmentIndex(store, ["a"], check=True).locate(family).rows.tolist() == list(range(129))


def test_a_sequence_in_two_segments_is_found_in_one_of_them(store):
    digests = random_digests(3)
    write(store, "a", digests[:2], 0)
    write(store, "b", digests[1:], 1)
    location = SegmentIndex(store, ["a", "b"], check=True).locate(digests)
    assert list(zip(location.segments, location.rows))[0::2] == [(0, 0), (1, 1)]
    assert (location.segments[1], location.rows[1]) in {(0, 1), (1, 0)}


def test_an_index_of_nothing_finds_nothing(store):
    empty = np.empty((0, 16), np.uint8)
    store.write("failures", Segment(empty, np.empty(0, np.int64), {}, "fp32"))
    for names in ([], ["failures"]):
        index = SegmentIndex(store, names, check=True)
        assert index.locate(random_digests(3)).segments.tolist() == [-1, -1, -1]
        assert index.locate(empty).rows.tolist() == []


def test_the_precision_of_each_segment_is_known(three):
    assert three[0].precisions == ["precision a", "precision b", "precision c"]


def test_a_segment_that_is_not_there_is_an_error(store):
    with pytest.raises(SegmentError, match="none"):
        SegmentIndex(store, ["none"], check=True)


# Gathering


def test_pooled_vectors_come_in_the_order_that_is_asked_for(three):
    index, digests, where, segments = three
    order = np.random.default_rng(2).permutation(600)[:200]
    order = np.concatenate([order, order[:3]])  # The same sequence twice.
    location = index.locate(digests[order])
    vectors = index.gather(location, Array("mean", 6))
    expected = [segments[n].arrays["mean_layer6"][row] for n, row in (where[i] for i in order)]
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, np.stack(expected))
    assert location.lengths.tolist() == [segments[n].lengths[row] for n, row in (where[i] for i in order)]


def test_per_residue_vectors_come_end_to_end_in_that_order(three):
    index, digests, where, segments = three
    order = [450, 3, 100, 3, 599, 0]
    location = index.locate(digests[order])
    vectors = index.gather(location, Array("per_residue", 6))
    expected = []
    for number, row in (where[i] for i in order):
        offsets = segments[number].offsets("per_residue_layer6")
        expected.append(segments[number].arrays["per_residue_layer6"][offsets[row] : offsets[row + 1]])
    assert location.lengths.tolist() == [len(rows) for rows in expected]
    assert np.array_equal(vectors, np.concatenate(expected))


def test_more_segments_than_are_kept_open_are_read_all_the_same(store, monkeypatch):
    monkeypatch.setattr(gather, "_OPEN_SEGMENTS", 3)
    digests = random_digests(40)
    names = [f"{n:02d}" for n in range(20)]
    segments = [write(store, name, digests[2 * n : 2 * n + 2], n) for n, name in enumerate(names)]
    index = SegmentIndex(store, names, check=True)
    for _ in range(2):
        location = index.locate(digests)
        vectors = index.gather(location, Array("mean", 6))
        assert np.array_equal(vectors, np.concatenate([s.arrays["mean_layer6"] for s in segments]))


def _one_fewer(digests: np.ndarray) -> np.ndarray:
    return digests[:9]


def _another_failed(digests: np.ndarray) -> np.ndarray:
    """As many rows: the third failed before, and now the fourth did, so that all after it are other sequences'."""
    return np.concatenate([digests[:3], random_digests(1, seed=5), digests[4:]])


def _in_another_order(digests: np.ndarray) -> np.ndarray:
    return digests[::-1]


@pytest.mark.parametrize("replaced", [_one_fewer, _another_failed, _in_another_order])
def test_a_segment_that_another_run_replaced_meanwhile_is_an_error(store, replaced):
    digests = random_digests(10)
    write(store, "a", digests, 0)
    index = SegmentIndex(store, ["a"], check=True)
    location = index.locate(digests)
    store.path("a").unlink()
    write(store, "a", replaced(digests), 0)
    with pytest.raises(SegmentError, match="another run replaced it meanwhile"):
        index.gather(location, Array("mean", 6))


def test_no_more_segments_stay_open_than_are_allowed(store, monkeypatch):
    monkeypatch.setattr(gather, "_OPEN_SEGMENTS", 3)
    digests = random_digests(40)
    names = [f"{n:02d}" for n in range(20)]
    for n, name in enumerate(names):
        write(store, name, digests[2 * n : 2 * n + 2], n)
    index = SegmentIndex(store, names, check=True)
    before = open_files()
    index.gather(index.locate(digests), Array("mean", 6))
    assert open_files() - before == 3


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_gathering_gives_back_the_memory_of_segments(store):
    rows = 200_000
    digests = random_digests(rows)
    values = np.zeros((rows, 64), np.float32)
    store.write("a", Segment(digests, np.ones(rows, np.int64), {"mean_layer6": values}, "fp32"))
    index = SegmentIndex(store, ["a"], check=True)
    location = index.locate(digests)
    before = mapped_bytes()
    index.gather(location, Array("mean", 6))
    assert mapped_bytes() - before < values.nbytes / 4


def mapped_bytes() -> int:
    """Bytes of files that this process has in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_gathers_the_same(store, monkeypatch, threads):
    # Copied in steps of a few rows, and more threads than segments that stay open.
    monkeypatch.setattr(gather, "_COPIED_BYTES", 50)
    monkeypatch.setattr(gather, "_OPEN_SEGMENTS", 2)
    digests = random_digests(400)
    names = [f"{n:02d}" for n in range(20)]
    segments = [write(store, name, digests[20 * n : 20 * n + 20], n) for n, name in enumerate(names)]
    order = np.random.default_rng(3).permutation(400)
    index = SegmentIndex(store, names, threads, check=True)
    location = index.locate(digests[order])
    everything = np.concatenate([segment.arrays["mean_layer6"] for segment in segments])
    assert np.array_equal(index.gather(location, Array("mean", 6)), everything[order])
    half = index.gather(location, Array("mean", 6), lambda values: values.astype(np.float16))
    assert half.dtype == np.float16
    assert np.array_equal(half, everything[order].astype(np.float16))


def test_all_damaged_segments_are_set_aside_before_the_error(store):
    digests = random_digests(40)
    for n in range(4):
        write(store, f"{n}", digests[10 * n : 10 * n + 10], n)
    for name in ("1", "3"):
        flip_last_bit(store.path(name))
    with pytest.raises(SegmentError, match=r"1\.safetensors and 1 more: missing, or damaged"):
        SegmentIndex(store, ["0", "1", "2", "3"], threads=4, check=True)
    assert store.names() == ["0", "2"]


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_index_takes_28_bytes_for_each_sequence(store):
    write(store, "a", random_digests(1000), 0)
    index = SegmentIndex(store, ["a"], check=True)
    assert index.digests.nbytes == 28_000
    assert not [value for value in vars(index).values() if isinstance(value, np.ndarray)]


# Single sequences


def test_single_sequences_are_read_by_segment_and_row(three):
    index, _, where, segments = three
    chosen = [450, 3, 100, 3, 599, 0]
    places = [("abc"[where[i][0]], where[i][1]) for i in chosen]
    for array in (Array("mean", 6), Array("per_residue", 6)):
        found = dict(read_rows(index._store, places, array))
        assert sorted(found) == list(range(len(chosen)))
        for number, (name, row) in enumerate(places):
            segment = segments["abc".index(name)]
            offsets = array.offsets(segment.lengths)
            values = segment.arrays[array.name][offsets[row] : offsets[row + 1]]
            assert np.array_equal(found[number], values[0] if array.is_pooled else values)


def test_each_segment_is_opened_once_for_single_sequences(three, monkeypatch):
    index, _, _, _ = three
    opened = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, name, **o: opened.append(name) or read(self, name, **o))
    assert len(list(read_rows(index._store, [("c", 2), ("a", 1), ("c", 0), ("a", 1)], Array("mean", 6)))) == 4
    assert opened == ["a", "c"]


def test_what_is_not_asked_to_be_checked_is_not_read_through(store):
    values = write(store, "a", random_digests(10), 0).arrays["mean_layer6"]
    content = bytearray(store.path("a").read_bytes())
    content[content.index(values.tobytes())] ^= 1
    store.path("a").write_bytes(content)
    assert len(SegmentIndex(store, ["a"], check=False).digests) == 10
    with pytest.raises(SegmentError, match="damaged and set aside"):
        SegmentIndex(store, ["a"], check=True)
