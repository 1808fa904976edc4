"""Substitutions as people write them, and a sentence about everything else."""

from __future__ import annotations

import pytest
from workflow_run import PROJECT

from esmflow.variants.notation import Unscored, VariantError, check_residues, parse_variant


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A42G", ["A42G"]),
        (" a42g : k7r ", ["A42G", "K7R"]),
        ("p.Ala42Gly", ["A42G"]),
        ("p.(Ala42Gly)", ["A42G"]),
        ("Sec3Xaa:W1U", ["U3X", "W1U"]),
        ("M1M", ["M1M"]),
        ("A007G", ["A7G"]),
    ],
)
def test_a_variant_is_read_however_it_is_written(text, found):
    assert [str(each) for each in parse_variant(text)] == found


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "A42", "42G", "AG42", "A42GG", "A42*", "A42-", "J42A", "A42J", "A-4G", "A4.2G", "A42G:", "A42G;K7R"),
        *("p.Ala42Ter", "p.Ala42=", "p.Ala42fs", "p.Foo42Gly", "A42del", "WT", "A٤G", "A99999999999999G", "\x00"),
    ],
)
def test_what_is_no_substitution_is_shown_and_what_to_write_is_said(text):
    with pytest.raises(VariantError, match="is no substitution of one residue by another; write A42G") as caught:
        parse_variant(text)
    assert caught.value.reason == Unscored.NOT_A_SUBSTITUTION
    assert "\x00" not in caught.value.detail


@pytest.mark.parametrize("reason", Unscored)
def test_every_reason_is_explained(reason):
    assert f"`{reason.value}`" in (PROJECT / "docs/outputs.md").read_text()


def test_a_place_that_is_there_twice_and_place_0_are_refused():
    with pytest.raises(VariantError, match="has place 42 twice"):
        parse_variant("A42G:K7R:A42C")
    with pytest.raises(VariantError, match="A0G has place 0; places count from 1"):
        parse_variant("A0G")


@pytest.mark.parametrize(
    ("variant", "reason", "detail"),
    [
        ("K1A", Unscored.OTHER_RESIDUE, "K1A: residue 1 of p is M and not K, as residue 2 is: places count from 1"),
        ("M2A", Unscored.OTHER_RESIDUE, "M2A: residue 2 of p is K and not M, as residue 1 is: places count from 1"),
        ("M1A:W3A", Unscored.OTHER_RESIDUE, "W3A: residue 3 of p is V and not W"),
        ("M1A:V4A", Unscored.BEYOND_THE_END, "V4A: p ends at residue 3"),
    ],
)
def test_a_variant_that_does_not_fit_its_sequence_says_what_is_there(variant, reason, detail):
    with pytest.raises(VariantError) as caught:
        check_residues(parse_variant(variant), "p", "MKV")
    assert (caught.value.reason, caught.value.detail) == (reason, detail)
    check_residues(parse_variant("M1A:V3A"), "p", "MKV")
