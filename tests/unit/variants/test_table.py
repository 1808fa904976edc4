"""The table of variants: which record each row is of, and a sentence where that cannot be said."""

from __future__ import annotations

import gzip
import os

import pytest
from made_up import write_fasta

from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy
from esmflow.variants.head import VariantTableError, head_of
from esmflow.variants.table import RecordSearch, places_by_sequence, read_variants


def planned(folder, text, files, name="variants.tsv", id_rule="first_word"):
    """The rows of a table, as dictionaries. files: records by the name of their sample."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    search = RecordSearch(read_variants(folder / name))
    for sample, records in files.items():
        path = write_fasta(folder / f"{sample}.fasta", records)
        for task in input_tasks(str(path), ResiduePolicy(), id_rule):
            search.take(sample, task())
    return search.planned()


ONE = {"s": [("a", "MKV"), ("sp|P1|X_Y", "ACD"), ("bad", "MK1V"), ("b", "WWW")]}


def test_rows_find_their_records_by_id_or_accession_and_keep_their_order_and_columns(tmp_path):
    text = "variant\tid\tdms score\tfile\nW3A\tb\t0.5\tx\nA1C\tP1\t\ty\nA1C\tsp|P1|X_Y\t-1\tz\n\nM1V:K2R\ta\t2\t\n"
    rows = planned(tmp_path, text, ONE).to_pylist()
    assert [(row["id"], row["variant"], row["sequence"], row["record"]) for row in rows] == [
        ("b", "W3A", "WWW", 4),
        ("P1", "A1C", "ACD", 2),
        ("sp|P1|X_Y", "A1C", "ACD", 2),
        ("a", "M1V:K2R", "MKV", 1),
    ]
    assert [row["dms score"] for row in rows] == ["0.5", "", "-1", "2"]
    assert [row["input_file"] for row in rows] == ["x", "y", "z", ""]
    assert {row["sample"] for row in rows} == {"s"}
    assert not any(row["reason"] or row["detail"] for row in rows)


def test_no_column_takes_the_place_of_another(tmp_path):
    text = "id\tvariant\tinput_file\tfile\tstatus\treason\t\na\tM1C\t1\t2\t3\t4\t5\n"
    (row,) = planned(tmp_path, text, ONE).to_pylist()
    further = list(row)[list(row).index("sequence") + 1 :]
    assert [row[name] for name in further] == ["1", "2", "3", "4"]
    assert further == ["input_file", "input_input_file", "input_status", "input_reason"]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ("nobody\tA1C", "unknown_id", "no record is called nobody"),
        ("\tA1C", "unknown_id", "no record is called (nothing)"),
        ("bad\tM1C", "rejected_record", "record 3 (bad) was rejected: invalid_residue ('1' at residue 3)"),
        ("a\tW1C", "other_residue", "W1C: residue 1 of a is M and not W"),
        ("a\tV4C", "beyond_the_end", "V4C: a ends at residue 3"),
        ("a\tfoo", "not_a_substitution", "foo is no substitution"),
        ("a", "unreadable_row", "line 2: 1 cell where the head has 2"),
        ("a\tM1C\tmore", "unreadable_row", "line 2: 3 cells where the head has 2"),
    ],
)
def test_a_row_that_cannot_be_scored_is_a_row_with_a_reason_and_costs_no_other(tmp_path, row, reason, detail):
    rows = planned(tmp_path, f"id\tvariant\n{row}\na\tM1C\n", ONE).to_pylist()
    assert rows[0]["reason"] == reason
    assert detail in rows[0]["detail"]
    assert rows[0]["sequence"] is None
    assert (rows[1]["reason"], rows[1]["sequence"]) == (None, "MKV")


def test_a_row_that_is_there_twice_is_scored_and_says_so(tmp_path):
    rows = planned(tmp_path, "id\tvariant\na\tM1C\nb\tW1C\na\tM1C\n", ONE).to_pylist()
    assert [row["detail"] for row in rows] == ["", "", "repeats line 2"]
    assert all(row["sequence"] for row in rows)


TWICE = {"one": [("a", "MKV"), ("same", "ACD")], "two": [("a", "MKL"), ("same", "ACD"), ("half", "MMM"), ("half", "1")]}


def test_records_that_share_an_id_are_told_apart_by_their_sample(tmp_path):
    text = "id\tvariant\tsample\na\tM1C\t\na\tK2R\ttwo\na\tM1C\tthree\nsame\tA1C\t\nhalf\tM1C\t\n"
    rows = planned(tmp_path, text, TWICE).to_pylist()
    assert rows[0]["reason"] == "ambiguous_id"
    assert "2 records are called a and differ: " in rows[0]["detail"]
    assert rows[0]["detail"].endswith("; add a column sample that says which one is meant")
    assert (rows[1]["sequence"], rows[1]["sample"]) == ("MKL", "two")
    assert (rows[2]["reason"], rows[2]["detail"]) == ("unknown_id", "no record of sample three is called a")
    assert (rows[3]["sequence"], rows[3]["sample"]) == ("ACD", "one")
    assert rows[4]["sequence"] == "MMM"


def test_the_id_is_what_the_records_of_the_run_are_called(tmp_path):
    rows = planned(tmp_path, "id\tvariant\nP1\tA1C\n", ONE, id_rule="accession").to_pylist()
    assert rows[0]["sequence"] == "ACD"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.csv", b"id,variant\na,M1C\n"),
        ("v.tsv", b"\xef\xbb\xbfid\tvariant\r\na\tM1C\r\n"),
        ("v.tsv.gz", gzip.compress(b"id\tvariant\na\tM1C\n")),
        ("v.tsv", b'"id"\t"variant"\n"a"\t"M1C"'),
    ],
    ids=["csv", "with a mark and returns", "compressed", "quoted"],
)
def test_tables_of_every_kind_are_read(tmp_path, name, text):
    assert [row["sequence"] for row in planned(tmp_path, text, ONE, name).to_pylist()] == ["MKV"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id\tmutant\n", "needs the tab-separated columns id and variant; its first line has: id, mutant"),
        ("", "its first line has: nothing"),
        ("i\0d\0\tv\0", r"its first line has: i\x00d\x00, v\x00"),
        ("id\tvariant\tvariant\n", "has the column variant twice"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_table_without_its_columns_is_refused_before_anything_runs(tmp_path, text, sentence):
    path = tmp_path / "v.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(VariantTableError) as caught:
        head_of(path)
    assert sentence in str(caught.value)


def test_a_pipe_is_no_table_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "v.tsv")
    with pytest.raises(VariantTableError, match="is no file but a pipe, socket or device: write it to a file first"):
        head_of(tmp_path / "v.tsv")


def test_places_are_counted_once_for_all_variants_of_a_sequence(tmp_path):
    text = "id\tvariant\na\tM1C\na\tM1A:V3C\na\tV3W\nb\tW2C\nnobody\tM1A\n"
    found = places_by_sequence(planned(tmp_path, text, ONE), None)
    places = {sequence: [each.place for each in of_sequence] for sequence, of_sequence in found.items()}
    assert places == {"MKV": [1, 3], "WWW": [2]}
