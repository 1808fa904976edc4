"""The sequences that a certificate may draw from: few, of all lengths, and the same in whatever order they come."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from made_up import proteins, with_digests

from esmflow.plan.shards import read_shard
from esmflow.plan.spot_check import Candidates, candidates_of_bin, length_bin, write_candidates
from esmflow.verify.verifying import draw_sample


@pytest.fixture(scope="module")
def sequences():
    """Many more short ones than long ones."""
    short, long = proteins(3000, 20, 90), proteins(40, 100, 900, seed=1)
    return sorted(dict(with_digests(short + long + proteins(20, 5000, 8000, seed=2))).items())


def chosen(sequences, path):
    candidates = Candidates()
    for digest, sequence in sequences:
        candidates.offer(digest, sequence)
    write_candidates(path, candidates)
    return list(read_shard(path))


def test_candidates_do_not_depend_on_the_order_of_the_input_and_are_few(sequences, tmp_path):
    there, back = chosen(sequences, tmp_path / "a"), chosen(reversed(sequences), tmp_path / "b")
    assert there == back
    counts = Counter(length_bin(len(sequence)) for _, sequence in there)
    offered = Counter(length_bin(len(sequence)) for _, sequence in sequences)
    assert counts == {number: min(count, candidates_of_bin(number)) for number, count in offered.items()}
    assert set(there) <= set(sequences)


def test_sequences_offered_as_a_block_or_twice_give_the_same_candidates(sequences, tmp_path):
    one_by_one = chosen(sequences, tmp_path / "a")
    candidates = Candidates()
    for part in (sequences[:700], sequences[500:], sequences[:100]):
        digests = np.frombuffer(b"".join(digest for digest, _ in part), np.uint8).reshape(-1, 16)
        lengths = np.array([len(sequence) for _, sequence in part])
        candidates.offer_block(digests, "".join(sequence for _, sequence in part).encode(), lengths)
    write_candidates(tmp_path / "b", candidates)
    assert list(read_shard(tmp_path / "b")) == one_by_one


def test_some_rows_of_a_block_can_be_offered_and_candidates_be_written_together(sequences, tmp_path):
    digests = np.frombuffer(b"".join(digest for digest, _ in sequences), np.uint8).reshape(-1, 16)
    residues = "".join(sequence for _, sequence in sequences).encode()
    lengths = np.array([len(sequence) for _, sequence in sequences])
    few, all_of_them = Candidates(), Candidates()
    rows = np.array([len(sequences) - 1, 5, 40])
    few.offer_block(digests, bytearray(residues), lengths, rows)
    all_of_them.offer_block(digests, residues, lengths)
    assert sorted(few.sequences().items()) == sorted(sequences[row] for row in rows)
    write_candidates(tmp_path / "a", all_of_them, few)
    assert list(read_shard(tmp_path / "a")) == sorted(all_of_them.sequences().items() | few.sequences().items())


def test_a_draw_takes_as_many_of_every_length_bin_as_it_can(sequences):
    residues = {digest: len(sequence) for digest, sequence in sequences}
    drawn = draw_sample(residues, 32, seed=0)
    counts = Counter(length_bin(residues[digest]) for digest in drawn)
    assert len(set(drawn)) == counts.total() == 32
    assert set(counts) == {length_bin(count) for count in residues.values()}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_draw_depends_on_the_seed_and_on_nothing_else(sequences):
    residues = {digest: len(sequence) for digest, sequence in sequences}
    backwards = dict(reversed(residues.items()))
    assert draw_sample(residues, 8, seed=1) == draw_sample(backwards, 8, seed=1)
    assert draw_sample(residues, 8, seed=1) != draw_sample(residues, 8, seed=2)


def test_most_of_a_draw_stays_where_sequences_are_added(sequences):
    residues = {digest: len(sequence) for digest, sequence in sequences}
    drawn = set(draw_sample(residues, 32, seed=0))
    more = residues | {digest: len(sequence) for digest, sequence in with_digests(proteins(60, 20, 900, seed=9))}
    assert 24 <= len(drawn & set(draw_sample(more, 32, seed=0))) < 32


def test_a_draw_of_more_than_there_is_is_all_there_is():
    assert draw_sample({b"a": 3, b"b": 300}, 32, seed=0) in ([b"a", b"b"], [b"b", b"a"])
    assert draw_sample({}, 32, seed=0) == []
