"""What goes on without an end is a row with a reason, takes bounded memory, and costs nothing around it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esmflow.failures import REMEDY, Reason
from esmflow.inputs.fasta import BLOCK_BYTES, count_sequences, read_records
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.records import STRICT
from esmflow.inputs.streams import LONGEST_TEXT

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"
CHUNK = 1 << 18


def found(path):
    return [(r.position, r.id, r.sequence[:8], r.reason) for r in read_records(path)]


@pytest.mark.parametrize("line", [60, LONGEST_TEXT * 2], ids=["many lines", "one line"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_record_without_an_end_is_one_row_and_the_records_around_it_are_read(tmp_path, line, compress):
    path = tmp_path / "a.fasta"
    endless = b"".join(b"MKVLAG" * (line // 6) + b"\n" for _ in range(-(-2 * LONGEST_TEXT // line)))
    path.write_bytes(compress(b">first\nMKV\n>large of something\n" + endless + b">last\nMKVL\n>more\nMK\n"))
    assert found(path) == [
        (1, "first", "MKV", None),
        (2, "large", "", Reason.RECORD_TOO_LARGE),
        (3, "last", "MKVL", None),
        (4, "more", "MK", None),
    ]
    row = list(read_records(path))[1]
    assert (row.description, row.detail) == ("of something", "more than 10,000,000 letters")
    assert "genome" in REMEDY[row.reason]
    assert count_sequences(path) == 4


@pytest.mark.parametrize("beyond", [*range(-3, 4)])
def test_the_header_after_it_is_found_wherever_a_piece_of_the_file_ends(tmp_path, beyond):
    path = tmp_path / "a.fasta"
    size = 42 * CHUNK + beyond
    path.write_bytes(b">large\n" + b"M" * (size - 8) + b"\n" + b">last\nMKVL\n")
    assert [(p, i, s) for p, i, s, _ in found(path)] == [(1, "large", ""), (2, "last", "MKVL")]


def test_what_is_within_the_limit_is_kept_whole(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b">large\n" + b"MKVLAGDERT" * (LONGEST_TEXT // 10 - 1) + b"\n>last\nMKVL\n")
    large, last = read_records(path)
    assert (large.reason, len(large.sequence), last.sequence) == (None, LONGEST_TEXT - 10, "MKVL")


def test_a_header_without_an_end_is_shown_by_its_beginning(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b">" + b"x" * (2 * LONGEST_TEXT) + b"\nMKV\n>last\nMKVL\n")
    large, last = read_records(path)
    assert (large.reason, len(large.id), last.sequence) == (Reason.RECORD_TOO_LARGE, 1000, "MKVL")


def test_a_file_that_is_cut_off_in_such_a_record_has_a_row_for_that_too(tmp_path):
    path = tmp_path / "a.fasta.gz"
    whole = gzip.compress(b">first\nMKV\n>large\n" + os.urandom(2 * LONGEST_TEXT).hex().encode(), 1)
    path.write_bytes(whole[:-9])
    assert [row[3] for row in found(path)] == [None, Reason.RECORD_TOO_LARGE, Reason.UNREADABLE_FILE]


def test_joined_headers_in_such_a_record_do_not_make_a_protein_of_what_is_passed_over(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b">large\n" + (b"M" * 999 + b"V>joined_1\n") * (2 * LONGEST_TEXT // 1010) + b">last\nMKVL\n")
    assert [row[3] for row in found(path)] == [Reason.RECORD_TOO_LARGE, None]


def test_of_lines_above_the_first_header_little_is_kept_however_long_they_are(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"M" * 70 + b">joined " + b"V" * BLOCK_BYTES + b"\n>last\nMKVL\n")
    above, last = read_records(path)
    assert (above.reason, last.sequence) == (Reason.TEXT_BEFORE_HEADER, "MKVL")
    assert f"beginning {'M' * 60!r}" in above.detail
    assert "'>joined VVVVV" in above.detail
    assert len(above.detail) < 500


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_line_of_a_table_without_an_end_costs_no_row_before_it(tmp_path, quote):
    path = tmp_path / "a.csv"
    path.write_text(f"id,sequence\nfirst,MKV\nlarge,{quote}{'MKVLAG' * LONGEST_TEXT}")
    records = [record for task in input_tasks(path, STRICT) for record in task().records()]
    assert [(record.id, record.reason) for record in records] == [("first", None), ("", Reason.UNREADABLE_FILE)]
    assert "past record 1: a line has more than 10,000,000 letters" in records[-1].detail


READ_AND_MEASURE = """
import json, re, sys
from pathlib import Path
from esmflow.inputs.fasta import read_records

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

before = peak()
rows = [[record.id, record.reason] for record in read_records(sys.argv[1])]
print(json.dumps({"rows": rows, "growth": peak() - before}))
"""


def test_a_compressed_file_that_unpacks_to_one_record_of_any_size_takes_bounded_memory(tmp_path):
    path = tmp_path / "bomb.fasta.gz"
    with gzip.open(path, "wb", 1) as handle:
        handle.write(b">bomb\n")
        for _ in range(300):
            handle.write(b"MKVLAGDERT" * 100_000)
        handle.write(b"\n>last\nMKVL\n")
    assert path.stat().st_size < 3_000_000
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", READ_AND_MEASURE, str(path)]
    measured = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert measured["rows"] == [["bomb", "record_too_large"], ["last", None]]
    # Of 300 MB.
    assert measured["growth"] < 60_000_000
