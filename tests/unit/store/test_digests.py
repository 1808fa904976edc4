"""A table of digests finds what is in it, also where halves of digests are equal."""

import numpy as np
import pytest
from made_up import proteins

from esmflow.inputs.residues import sequence_digest, sequence_digests
from esmflow.store.digests import DigestTable, first_of_each


def digests(count: int, kinds: int = 256, seed: int = 0) -> np.ndarray:
    """Random digests out of few bytes, so that many share a half and some are equal."""
    random = np.random.default_rng(seed)
    few = np.zeros((count, 16), np.uint8)
    few[:, [3, 12]] = random.integers(0, kinds, (count, 2))
    return few


def test_many_digests_are_those_of_the_sequences_one_by_one():
    sequences = proteins(50, 0, 300)
    lengths = np.array([len(s) for s in sequences])
    found = sequence_digests("".join(sequences).encode(), lengths)
    assert [row.tobytes() for row in found] == [sequence_digest(s) for s in sequences]


@pytest.mark.parametrize("kinds", [2, 5, 256])
def test_the_first_of_each_digest_is_found_in_the_order_of_the_bytes(kinds):
    rows = digests(500, kinds)
    first: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.tobytes(), i)
    assert first_of_each(rows).tolist() == [first[key] for key in sorted(first)]
    assert first_of_each(rows[:0]).tolist() == []


@pytest.mark.parametrize("kinds", [2, 5, 256])
def test_a_table_that_grows_finds_what_was_added_and_nothing_else(kinds):
    rows = digests(3000, kinds)
    unique = rows[first_of_each(rows)]
    shuffled = np.random.default_rng(1).permutation(len(unique))
    parts = np.array_split(shuffled[: len(unique) * 2 // 3], 4)
    table = DigestTable()
    for number, part in enumerate(parts):
        table.add(unique[np.sort(part)], number)
    expected = np.full(len(unique), -1)
    for number, part in enumerate(parts):
        expected[part] = number
    assert table.find(unique).tolist() == expected.tolist()
    assert len(table) == sum(map(len, parts))


def test_a_table_of_lists_numbers_them_as_they_come():
    rows = digests(100)
    unique = rows[first_of_each(rows)]
    table = DigestTable.of([unique[:10], unique[:0], unique[5:20]])
    assert table.find(unique[:25]).tolist() == [0] * 10 + [2] * 10 + [-1] * 5
    assert DigestTable.of([]).find(unique[:2]).tolist() == [-1, -1]
