"""What goes through the model for the variants of a sequence: the sequence as it is, and a copy for each place of
interest with the residue there masked. Of a long sequence, the window around the place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from esmflow.arrays import MASKED_LOGITS
from esmflow.inputs.residues import MASKED

WILD_TYPE = "logits"
KINDS = (WILD_TYPE, MASKED_LOGITS)
"""What is computed for variants, each in a folder of the store of its own: see `Fingerprint.of_variants`."""


@dataclass(frozen=True)
class Place:
    """A residue of a sequence, and what of the sequence goes through the model. at: in `seen`, from 0."""

    place: int
    seen: str
    at: int

    def text(self, kind: str) -> str:
        """What goes through the model, for one of `KINDS`: the residues, or the copy in which this one is masked."""
        return self.seen if kind == WILD_TYPE else f"{self.seen[: self.at]}{MASKED}{self.seen[self.at + 1 :]}"


def places_of(sequence: str, places: Iterable[int], longest: int | None) -> Iterator[Place]:
    """Places, from 1, of a sequence. longest: residues that go through the model at once; None for all.

    The place is in the middle of its window, but for the windows at either end.
    """
    for place in places:
        begin = 0
        if longest is not None and len(sequence) > longest:
            begin = min(max(0, place - 1 - longest // 2), len(sequence) - longest)
        end = len(sequence) if longest is None else begin + longest
        yield Place(place, sequence[begin:end], place - 1 - begin)
