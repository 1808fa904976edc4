"""Substitutions as people write them: `A42G`, several joined by `:`, and `p.Ala42Gly` of HGVS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from esmflow.inputs.residues import AMINO_ACIDS
from esmflow.text import shown

_THREE_LETTERS = {
    **{"Ala": "A", "Arg": "R", "Asn": "N", "Asp": "D", "Cys": "C", "Gln": "Q", "Glu": "E", "Gly": "G", "His": "H"},
    **{"Ile": "I", "Leu": "L", "Lys": "K", "Met": "M", "Phe": "F", "Pro": "P", "Ser": "S", "Thr": "T", "Trp": "W"},
    **{"Tyr": "Y", "Val": "V", "Sec": "U", "Pyl": "O", "Asx": "B", "Glx": "Z", "Xaa": "X"},
}
_ONE = re.compile(r"([A-Za-z])([0-9]+)([A-Za-z])")
_HGVS = re.compile(r"(?:p\.)?\(?([A-Za-z]{3})([0-9]+)([A-Za-z]{3})\)?")
_LONGEST_PLACE = 9


class Unscored(StrEnum):
    """Why a variant has no score, before anything is computed."""

    NOT_A_SUBSTITUTION = "not_a_substitution"
    UNKNOWN_ID = "unknown_id"
    AMBIGUOUS_ID = "ambiguous_id"
    REJECTED_RECORD = "rejected_record"
    OTHER_RESIDUE = "other_residue"
    BEYOND_THE_END = "beyond_the_end"
    UNREADABLE_ROW = "unreadable_row"


class VariantError(ValueError):
    """A variant that cannot be scored: the reason, and a sentence about it."""

    def __init__(self, reason: Unscored, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Substitution:
    """One residue in another's place. place: from 1."""

    before: str
    place: int
    after: str

    def __str__(self) -> str:
        return f"{self.before}{self.place}{self.after}"


def parse_variant(text: str) -> list[Substitution]:
    """The substitutions of a variant, in the order in which they are written. Raises VariantError for what is none."""
    found = [_parse(part.strip()) for part in text.strip().split(":")]
    places = [substitution.place for substitution in found]
    if repeated := next((place for place in places if places.count(place) > 1), None):
        raise _wrong(f"{shown(text)} has place {repeated} twice; a place can have one new residue")
    return found


def check_residues(substitutions: list[Substitution], identifier: str, sequence: str) -> None:
    """Raises VariantError where a sequence has another residue than a substitution says, or ends before it."""
    for each in substitutions:
        if each.place > len(sequence):
            detail = f"{each}: {shown(identifier)} ends at residue {len(sequence)}"
            raise VariantError(Unscored.BEYOND_THE_END, detail)
        there = sequence[each.place - 1]
        if there != each.before:
            near = [n for n in (each.place - 1, each.place + 1) if sequence[n - 1 : n] == each.before and n > 0]
            hint = f", as residue {near[0]} is: places count from 1" if near else ""
            detail = f"{each}: residue {each.place} of {shown(identifier)} is {there} and not {each.before}{hint}"
            raise VariantError(Unscored.OTHER_RESIDUE, detail)


def _parse(text: str) -> Substitution:
    if match := _ONE.fullmatch(text):
        before, place, after = match[1].upper(), match[2], match[3].upper()
    elif match := _HGVS.fullmatch(text):
        before, place, after = (_THREE_LETTERS.get(match[1].title(), "?"), match[2],
                                _THREE_LETTERS.get(match[3].title(), "?"))  # fmt: skip
    else:
        match = None
    if match is None or not {before, after} <= set(AMINO_ACIDS) or len(place) > _LONGEST_PLACE:
        raise _wrong(
            f"{shown(text) or 'an empty text'} is no substitution of one residue by another; write A42G: the residue, "
            "its place from 1, the new residue, and ':' between several"
        )
    if int(place) == 0:
        raise _wrong(f"{shown(text)} has place 0; places count from 1")
    return Substitution(before, int(place), after)


def _wrong(detail: str) -> VariantError:
    return VariantError(Unscored.NOT_A_SUBSTITUTION, detail)
