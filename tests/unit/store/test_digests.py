"""An index of digests finds what is in it, also where halves of digests are equal."""

import numpy as np
import pytest
from made_up import proteins

from esmflow.inputs.residues import sequence_digest, sequence_digests
from esmflow.store.digests import DigestIndex, first_of_each, halves


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


def index_of(rows: np.ndarray, **columns: np.ndarray) -> DigestIndex:
    high, low = halves(rows)
    return DigestIndex.of({"high": [high], "low": [low], **{name: [values] for name, values in columns.items()}})


@pytest.mark.parametrize("kinds", [2, 5, 256])
@pytest.mark.parametrize("in_order", [True, False])
def test_an_index_that_grows_finds_what_was_added_and_nothing_else(kinds, in_order):
    rows = digests(3000, kinds)
    unique = rows[first_of_each(rows)]
    shuffled = np.random.default_rng(1).permutation(len(unique))
    parts = np.array_split(shuffled[: len(unique) * 2 // 3], 4)
    index = DigestIndex(columns={"part": np.empty(0, np.int32)})
    for number, part in enumerate(parts):
        index = index.merged(index_of(unique[part], part=np.full(len(part), number, np.int32)))
    expected = np.full(len(unique), -1)
    for number, part in enumerate(parts):
        expected[part] = number
    asked = np.arange(len(unique)) if in_order else np.random.default_rng(2).permutation(len(unique))
    assert index.values("part", index.find(unique[asked])).tolist() == expected[asked].tolist()
    assert len(index) == sum(map(len, parts))
    assert np.all(index.high[1:] >= index.high[:-1])


def test_an_index_of_pieces_is_in_order_and_takes_the_pieces():
    rows = digests(100)
    unique = rows[first_of_each(rows)]
    high, low = halves(unique[::-1])
    numbers = np.arange(len(unique), dtype=np.int32)
    pieces = {"high": [high[:7], high[7:]], "low": [low[:3], low[3:]], "number": [numbers[:1], numbers[1:]]}
    index = DigestIndex.of(pieces)
    assert index.values("number", index.find(unique)).tolist() == numbers[::-1].tolist()
    assert pieces == {}
    assert index.nbytes == 20 * len(unique)


def test_of_a_digest_that_is_there_more_than_once_the_first_that_will_do_is_found():
    rows = np.repeat(digests(2, seed=3), [3, 1], axis=0)
    index = index_of(rows, number=np.arange(4, dtype=np.int32))
    numbers = index.columns["number"]
    for wanted in range(4):
        places = index.find(rows[[0, 3]], lambda asked, places, wanted=wanted: numbers[places] == wanted)
        assert index.values("number", places).tolist() == [wanted if wanted < 3 else -1, 3 if wanted == 3 else -1]
    # Who asks is told with the place: each of three copies finds another one.
    mine = np.array([2, 0, 1], np.int32)
    places = index.find(rows[:3], lambda asked, places: numbers[places] == mine[asked])
    assert index.values("number", places).tolist() == mine.tolist()


def test_an_empty_index_finds_nothing():
    index = DigestIndex.of({"high": [], "low": [], "number": []})
    places = index.find(digests(2))
    assert places.tolist() == [-1, -1]
    assert index.values("number", places, missing=7).tolist() == [7, 7]
    assert index_of(digests(2)).find(digests(2)[:0]).tolist() == []
