"""The reasons why a record can have no embedding, and the ledger they are written to."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from esmflow.files import atomic_path


class Reason(StrEnum):
    """Why a record has no embedding: the values of the manifest's `reason` column."""

    # Found while planning; the record is "rejected".
    EMPTY_SEQUENCE = "empty_sequence"
    INVALID_RESIDUE = "invalid_residue"
    GAP_CHARACTERS = "gap_characters"
    NUCLEOTIDE_SEQUENCE = "nucleotide_sequence"
    TOO_LONG = "too_long"
    RECORD_TOO_LARGE = "record_too_large"
    TEXT_BEFORE_HEADER = "text_before_header"
    EMPTY_FILE = "empty_file"
    OTHER_FORMAT = "other_format"
    UNREADABLE_FILE = "unreadable_file"
    # Found while embedding; the record has "failed".
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE = "non_finite"
    WORKER_CRASHED = "worker_crashed"
    WORKER_ERROR = "worker_error"
    SYSTEMIC_ABORT = "systemic_abort"


REMEDY = {
    Reason.EMPTY_SEQUENCE: "remove the record or fill in its sequence",
    Reason.INVALID_RESIDUE: "correct the sequence, or for J and stops inside set invalid_residues: replace_with_x",
    Reason.GAP_CHARACTERS: "give the sequences without gaps, or set gaps: remove",
    Reason.NUCLEOTIDE_SEQUENCE: "translate it to protein, or set nucleotide_sequences: keep if it is one",
    Reason.TOO_LONG: "set long_sequences to truncate or window, or raise max_residues if the model has more positions",
    Reason.RECORD_TOO_LARGE: "no protein is so large: check whether the file is a genome, or damaged",
    Reason.TEXT_BEFORE_HEADER: "remove the text above the file's first '>'",
    Reason.OTHER_FORMAT: "convert the file to FASTA, as its detail says",
    Reason.EMPTY_FILE: "remove the file from the sample sheet, or check why it is empty",
    Reason.UNREADABLE_FILE: "fetch or compress the file again",
    Reason.OUT_OF_MEMORY: "use a GPU with more memory, or set long_sequences: truncate",
    Reason.NON_FINITE: "check the checkpoint: this sequence gives NaN or infinity even in fp32",
    Reason.WORKER_CRASHED: "see the group's log for the signal that ended the worker, then run again",
    Reason.WORKER_ERROR: "see the group's log for the error, then run again",
    Reason.SYSTEMIC_ABORT: "see the group's log: shard after shard failed in the same way; mend that, then run again",
}


@dataclass(frozen=True)
class Failure:
    """One sequence that could not be embedded.

    digest: hexadecimal digest of the sequence; detail: one line for a person.
    """

    digest: str
    reason: Reason
    detail: str


def write_failures(path: str | os.PathLike[str], failures: Iterable[Failure]) -> None:
    """Writes a ledger: a TSV file with the columns digest, reason, detail; atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(("digest", "reason", "detail"))
        for failure in failures:
            writer.writerow((failure.digest, failure.reason.value, one_line(failure.detail)))


def read_failures(path: str | os.PathLike[str]) -> list[Failure]:
    """Reads a ledger written by `write_failures`."""
    with open(Path(path), newline="", encoding="utf-8") as handle:
        rows = csv.DictReader(handle, delimiter="\t")
        return [Failure(row["digest"], Reason(row["reason"]), row["detail"]) for row in rows]


def one_line(text: str) -> str:
    """Folds white space, so that a message is one cell of a table."""
    return " ".join(text.split())
