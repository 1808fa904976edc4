"""A segment is whole and of its fingerprint, or it is not used."""

import dataclasses
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from esmflow.failures import Failure, Reason
from esmflow.inputs.residues import sequence_digest
from esmflow.method import Fingerprint
from esmflow.plan.shards import shard_name
from esmflow.store import segments
from esmflow.store.segments import Segment, SegmentError, Store

FINGERPRINT = Fingerprint(
    checkpoint="c" * 32,
    layers=(0, 6),
    include=("mean", "per_residue"),
    per_residue_precision="fp32",
    engine="reference",
    arithmetic="in words",
    precision="auto",
    long_sequences="truncate",
    max_residues=1022,
    window_overlap=None,
    invalid_residues="reject",
    method_version=1,
)
OTHER_VALUES = {
    "checkpoint": "d" * 32,
    "layers": (6,),
    "include": ("mean",),
    "per_residue_precision": "fp16",
    "engine": "packed",
    "arithmetic": "in other words",
    "precision": "fp32",
    "long_sequences": "whole",
    "max_residues": None,
    "window_overlap": 64,
    "invalid_residues": "replace_with_x",
    "method_version": 2,
}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(segments.__file__).rsplit("/", 3)[0], os.path.dirname(__file__)]),
}


def make_segment(lengths=(3, 5, 1), seed=0, failures=()) -> Segment:
    random = np.random.default_rng(seed)
    return Segment(
        digests=random.integers(0, 256, (len(lengths), 16), np.uint8),
        lengths=np.array(lengths, np.int64),
        arrays={
            "mean_layer6": random.standard_normal((len(lengths), 4)).astype(np.float32),
            "per_residue_layer6": random.standard_normal((sum(lengths), 4)).astype(np.float32),
        },
        precision="fp32",
        failures=tuple(failures),
    )


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", FINGERPRINT)
    store.create()
    return store


# Written and read


def test_a_segment_reads_as_it_was_written(store):
    written = make_segment()
    path = store.write("a", written)
    assert path == store.path("a")
    found = store.read("a")
    assert np.array_equal(found.digests, written.digests)
    assert np.array_equal(found.lengths, written.lengths)
    assert found.arrays.keys() == written.arrays.keys()
    for name, values in written.arrays.items():
        assert found.arrays[name].dtype == np.float32
        assert np.array_equal(found.arrays[name], values)
    assert (found.precision, found.failures, len(found)) == ("fp32", (), 3)


def test_rows_of_a_sequence_are_where_the_offsets_say(store):
    store.write("a", make_segment((3, 5, 1)))
    assert store.read("a").offsets("per_residue_layer6").tolist() == [0, 3, 8, 9]


def test_failures_survive_in_the_metadata(store):
    failures = [
        Failure("ab" * 16, Reason.OUT_OF_MEMORY, '30000 residues\tdo not "fit"\ninto memory, naïve'),
        Failure("cd" * 16, Reason.NON_FINITE, ""),
    ]
    store.write("a", make_segment(failures=failures))
    assert store.read("a").failures == tuple(failures)


def test_a_segment_of_failures_only_has_no_rows(store):
    empty = Segment(
        np.empty((0, 16), np.uint8), np.empty(0, np.int64), {}, "bf16", (Failure("ab", Reason.NON_FINITE, "x"),)
    )
    store.write("a", empty)
    found = store.read("a")
    assert (len(found), found.digests.shape, dict(found.arrays), found.precision) == (0, (0, 16), {}, "bf16")
    assert found.failures == empty.failures
    assert found.offsets("per_residue_layer6").tolist() == [0]


def test_a_segment_is_a_safetensors_file_that_anyone_can_read(store):
    written = make_segment()
    found = load_file(store.write("a", written))
    assert found.keys() == {"digests", "lengths", "mean_layer6", "per_residue_layer6"}
    assert np.array_equal(found["mean_layer6"], written.arrays["mean_layer6"])


def test_arrays_are_mapped_and_cannot_be_changed(store):
    store.write("a", make_segment())
    values = store.read("a").arrays["per_residue_layer6"]
    assert isinstance(values.base, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1


def test_values_that_are_not_contiguous_are_written_right(store):
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T
    digests = np.arange(96, dtype=np.uint8).reshape(6, 16)
    store.write("a", Segment(digests, np.ones(6, np.int64), {"mean_layer6": values}, "fp32"))
    assert np.array_equal(store.read("a").arrays["mean_layer6"], values)


# Atomic


def test_a_segment_that_cannot_be_written_leaves_nothing_behind(store):
    broken = dataclasses.replace(make_segment(), arrays={"mean_layer6": np.array(["no number"])})
    with pytest.raises(SafetensorError):
        store.write("a", broken)
    assert store.names() == []
    assert os.listdir(store.folder) == ["fingerprint.json"]


def test_a_writer_that_is_killed_leaves_no_segment(store):
    code = """
import os, sys
import numpy as np
from esmflow.store import segments
from test_segments import FINGERPRINT
os.fsync = lambda handle: os.kill(os.getpid(), 9)  # Written, but not yet renamed.
store = segments.Store(sys.argv[1], FINGERPRINT)
store.write("a", segments.Segment(np.zeros((1, 16), np.uint8), np.ones(1, np.int64), {}, "fp32"))
"""
    ended = subprocess.run([sys.executable, "-c", code, store.folder.parent], env=ENVIRONMENT)
    assert ended.returncode == -signal.SIGKILL
    assert len(os.listdir(store.folder)) == 2
    assert store.names() == []
    assert store.find("a", check=True) is None


def test_a_segment_that_lacks_nothing_is_not_written_again(store):
    first = make_segment(seed=1)
    path = store.write("a", first)
    before = path.stat()
    store.write("a", dataclasses.replace(make_segment(seed=2), digests=first.digests))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert np.array_equal(store.read("a").arrays["mean_layer6"], first.arrays["mean_layer6"])


def test_a_segment_with_failures_gives_way_to_one_with_no_more_of_them(store):
    digests = make_segment().digests

    def with_failed(lengths, seed=0):
        """The same three sequences, of which the last ones have failed."""
        failures = [Failure(bytes(digest).hex(), Reason.OUT_OF_MEMORY, "") for digest in digests[len(lengths) :]]
        return dataclasses.replace(make_segment(lengths, seed, failures), digests=digests[: len(lengths)])

    store.write("a", with_failed((3, 5)))
    tried_again = with_failed((3, 5), seed=1)
    store.write("a", tried_again)
    assert np.array_equal(store.read("a").arrays["mean_layer6"], tried_again.arrays["mean_layer6"])
    store.write("a", with_failed((3,)))
    assert len(store.read("a")) == 2
    store.write("a", with_failed((3, 5, 1)))
    assert (len(store.read("a")), store.read("a").failures) == (3, ())


def test_what_killed_writers_left_is_removed_after_a_day_and_not_before(store):
    recent, old = store.folder / ".a.safetensors.x.part", store.folder / ".b.safetensors.y.part"
    for path in (recent, old):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    store.create()
    assert recent.exists()
    assert not old.exists()


# Damage


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_segment_is_noticed_and_counts_as_absent(store, caplog, kept):
    path = store.write("a", make_segment())
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(SegmentError, match=r"a\.safetensors: truncated"):
        store.read("a")
    with caplog.at_level(logging.WARNING):
        assert store.find("a", check=True) is None
    assert f"{path}: truncated; its sequences will be computed again" in caplog.text
    assert store.names() == []


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_no_flipped_bit_is_taken_for_data(store):
    written = make_segment(failures=[Failure("ab" * 16, Reason.NON_FINITE, "")])
    path = store.write("a", written)
    intact = path.read_bytes()
    for bit in range(0, 8 * len(intact), 11):
        flip(path, bit)
        try:
            found = store.read("a", check=True)
        except SegmentError:
            pass
        else:
            # The header's white space and its order mean nothing.
            assert np.array_equal(found.digests, written.digests)
            assert all(np.array_equal(found.arrays[name], written.arrays[name]) for name in written.arrays)
            assert (found.precision, found.failures) == (written.precision, written.failures)
            assert bit < 8 * (8 + int.from_bytes(intact[:8], "little"))
        path.write_bytes(intact)


def test_a_flipped_bit_in_a_vector_is_noticed_by_reading_through_and_in_a_digest_always(store):
    written = make_segment()
    path = store.write("a", written)
    vectors, digests = written.arrays["mean_layer6"], written.digests
    bit_of_a_vector, bit_of_a_digest = (8 * path.read_bytes().index(part.tobytes()) + 3 for part in (vectors, digests))
    flip(path, bit_of_a_vector)
    store.read("a")
    with pytest.raises(SegmentError, match="damaged: the checksum of its tensor mean_layer6 does not match"):
        store.read("a", check=True)
    flip(path, bit_of_a_vector)
    store.read("a", check=True)
    flip(path, bit_of_a_digest)
    with pytest.raises(SegmentError, match="its tensor digests"):
        store.read("a")


def test_a_damaged_segment_is_set_aside_under_another_name(store, caplog):
    path = store.write("a", make_segment())
    flip(path, 8 * path.stat().st_size - 1)
    damaged = path.read_bytes()
    assert store.find("a", check=True) is None
    (aside,) = store.folder.glob("*.damaged-*")
    assert aside.name.startswith("a.safetensors.damaged-20")
    assert aside.read_bytes() == damaged
    assert f"set aside as {aside}" in caplog.text
    store.write("a", make_segment())
    assert store.find("a", check=True) is not None
    assert aside.exists()


def test_what_is_written_takes_the_place_of_other_sequences_under_its_name(store):
    written, other = make_segment(), make_segment(seed=1)
    store.write("a", other)
    store.write("a", written)
    assert store.read("a").sequences() == written.sequences()
    assert len(list(store.folder.glob("a*.damaged-*"))) == 1
    assert store.find("a", check=True, of=other.sequences()) is None
    assert not store.path("a").exists()


def test_a_shard_is_known_by_its_failures_too(store):
    failure = Failure("ab" * 16, Reason.NON_FINITE, "")
    segment = make_segment(failures=[failure])
    store.write("a", segment)
    digests = {digest.tobytes() for digest in segment.digests}
    assert store.find("a", check=True, of=digests | {bytes.fromhex(failure.digest)}) is not None
    assert store.find("a", check=True, of=digests) is None


def test_a_segment_that_was_mended_meanwhile_is_not_set_aside(store, monkeypatch):
    path = store.write("a", make_segment())
    intact = path.read_bytes()
    flip(path, 8 * path.stat().st_size - 1)
    rename = os.rename

    def mended_by_another_run_first(source, target):
        monkeypatch.setattr(os, "rename", rename)
        path.write_bytes(intact)
        rename(source, target)

    monkeypatch.setattr(os, "rename", mended_by_another_run_first)
    assert store.find("a", check=True) is None
    assert store.find("a", check=True) is not None
    assert not list(store.folder.glob("*.damaged-*"))


def test_a_segment_that_cannot_be_set_aside_is_not_used_either(store, monkeypatch, caplog):
    path = store.write("a", make_segment())
    os.truncate(path, 200)

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert store.find("a", check=True) is None
    assert "could not be set aside" in caplog.text


def test_a_segment_with_more_bytes_than_it_should_have_is_noticed(store):
    path = store.write("a", make_segment())
    with open(path, "ab") as handle:
        handle.write(b"more")
    assert store.find("a", check=True) is None


@pytest.mark.parametrize(
    "content", [b"x" * 1000, (2).to_bytes(8, "little") + b"{}", b"\x10" + b"\0" * 7 + b"\xff" * 99]
)
def test_a_file_that_is_no_segment_is_refused(store, content):
    store.path("a").write_bytes(content)
    with pytest.raises(SegmentError, match=r"a\.safetensors: "):
        store.read("a")
    assert store.find("a", check=True) is None


def test_another_safetensors_file_is_refused(store):
    save_file({"digests": np.zeros((1, 16), np.uint8)}, store.path("a"))
    with pytest.raises(SegmentError, match=r"a\.safetensors: not a tensor file"):
        store.read("a")


def test_a_segment_that_is_not_there_is_refused_and_not_found(store):
    with pytest.raises(SegmentError, match=r"none\.safetensors: cannot be read"):
        store.read("none")
    assert store.find("none", check=True) is None


# Fingerprints


def test_a_segment_of_another_fingerprint_is_refused_even_in_the_wrong_folder(tmp_path, store):
    other = Store(tmp_path / "store", dataclasses.replace(FINGERPRINT, layers=(6,)))
    other.create()
    path = other.write("a", make_segment())
    assert store.find("a", check=True) is None
    assert path.exists()
    path.rename(store.path("a"))
    with pytest.raises(SegmentError, match=f"not a segment of fingerprint {FINGERPRINT.digest()}"):
        store.read("a")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Fingerprint)])
def test_everything_that_changes_a_number_changes_the_fingerprint(field):
    other = dataclasses.replace(FINGERPRINT, **{field: OTHER_VALUES[field]})
    assert other.digest() != FINGERPRINT.digest()


def test_equal_fingerprints_have_one_digest_for_ever():
    # Written out: a digest that changes unnoticed would orphan every store there is.
    assert dataclasses.replace(FINGERPRINT).digest() == "cfc7dc079a186b4a8509e3b38f8adab8"


def test_the_store_says_in_words_what_its_fingerprint_stands_for(store):
    described = json.loads((store.folder / "fingerprint.json").read_text())
    assert described["layers"] == [0, 6]
    assert described["precision"] == "auto"
    assert store.folder.name == FINGERPRINT.digest()
    store.create()


# Names


def test_equal_shards_have_one_name_whatever_their_order():
    digests = [sequence_digest(s) for s in ("MKV", "LAG", "EDR")]
    assert shard_name(digests) == shard_name(digests[::-1]) == shard_name(iter(digests))
    assert shard_name(digests) != shard_name(digests[:2])
    assert shard_name([]) != shard_name(digests)


def test_names_are_sorted_and_only_those_of_segments(store):
    for name in ("b", "a"):
        store.write(name, make_segment())
    (store.folder / ".c.safetensors.x.part").touch()
    assert store.names() == ["a", "b"]
