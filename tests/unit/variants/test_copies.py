"""What of a long sequence goes through the model around a place."""

from __future__ import annotations

import pytest

from esmflow.variants.copies import KINDS, places_of

SEQUENCE = "ACDEFGHIKL"


@pytest.mark.parametrize(
    ("place", "seen", "masked"),
    [
        (1, "ACDE", "_CDE"),
        (3, "ACDE", "AC_E"),
        (4, "CDEF", "CD_F"),
        (8, "GHIK", "GH_K"),
        (9, "HIKL", "HI_L"),
        (10, "HIKL", "HIK_"),
    ],
)
def test_a_window_is_around_its_place_and_within_the_sequence(place, seen, masked):
    (found,) = places_of(SEQUENCE, [place], 4)
    assert [found.text(kind) for kind in KINDS] == [seen, masked]
    assert found.seen[found.at] == SEQUENCE[place - 1]


@pytest.mark.parametrize("longest", [None, 10, 1022])
def test_what_fits_goes_through_as_it_is(longest):
    for found in places_of(SEQUENCE, range(1, 11), longest):
        assert found.seen == SEQUENCE
        assert found.text(KINDS[1]).count("_") == 1
        assert found.at == found.place - 1
