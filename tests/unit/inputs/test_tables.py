"""Tables are read as FASTA files are."""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmflow.failures import Reason
from esmflow.inputs.columns import TableError, check_columns
from esmflow.inputs.readers import annotation_names, input_tasks
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputError, InputFile, read_samples
from esmflow.inputs.tables import annotation_columns, table_block_tasks

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
STRICT = ResiduePolicy()


def records(path, policy=STRICT):
    return [record for task in input_tasks(path, policy) for record in task().records()]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def text(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Tables


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("kind", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_a_text_table_reads_like_fasta(tmp_path, kind, delimiter, suffix):
    lines = [
        "x;id;sequence;description",
        "1;a;mkv lag*;first one",
        "2;b;MJV;",
        "3;c;;none",
        f'4;d;"EDR";"{delimiter}q"',
    ]
    content = "\r\n".join(lines).replace(";", delimiter).encode()
    found = records(text(tmp_path / f"t.{kind}{suffix}", COMPRESS[suffix](content)))
    assert [(r.position, r.id, r.description, r.sequence, r.reason) for r in found] == [
        (1, "a", "first one", "MKVLAG", None),
        (2, "b", "", "", Reason.INVALID_RESIDUE),
        (3, "c", "none", "", Reason.EMPTY_SEQUENCE),
        (4, "d", f"{delimiter}q", "EDR", None),
    ]
    assert found[1].detail == "'J' at residue 2"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_a_parquet_table_reads_like_fasta_whatever_type_its_text_has(tmp_path, kind):
    sequences = pa.array(["mkv lag*", None, "MK*V", "MKVL\nAG"], pa.string()).cast(kind)
    path = parquet(tmp_path / "t.parquet", sequence=sequences, id=[7, 8, None, 10], other=[1.0, 2, 3, 4])
    found = records(path)
    assert [(r.id, r.sequence, r.reason) for r in found] == [
        ("7", "MKVLAG", None),
        ("8", "", Reason.EMPTY_SEQUENCE),
        ("", "", Reason.INVALID_RESIDUE),
        ("10", "MKVLAG", None),
    ]


def test_a_table_longer_than_a_batch_is_read_whole_and_in_order(tmp_path):
    ids = [f"p{i}" for i in range(5000)]
    sequences = ["MKV" + "LAGDE"[i % 5] * (i % 700) for i in range(5000)]
    from_parquet = records(parquet(tmp_path / "t.parquet", id=ids, sequence=sequences))
    lines = "".join(f"{i}\t{s}\n" for i, s in zip(ids, sequences))
    from_text = records(text(tmp_path / "t.tsv", "id\tsequence\n" + lines))
    for found in (from_parquet, from_text):
        assert [r.position for r in found] == list(range(1, 5001))
        assert [(r.id, r.sequence) for r in found] == list(zip(ids, sequences))


def test_the_policy_holds_for_tables_too(tmp_path):
    path = text(tmp_path / "t.tsv", f"id\tsequence\na\tMJV\nb\t{'ACGT' * 20}\nc\tMKVLAG\n")
    found = records(path, ResiduePolicy("replace_with_x", "keep", 5))
    assert [(r.sequence, r.reason) for r in found] == [
        ("MXV", None),
        ("", Reason.TOO_LONG),
        ("", Reason.TOO_LONG),
    ]
    assert records(path)[1].reason == Reason.NUCLEOTIDE_SEQUENCE


def test_a_row_of_the_wrong_width_is_rejected_by_its_line_and_the_others_are_kept(tmp_path):
    path = text(tmp_path / "t.tsv", "id\tsequence\na\tMKV\nb\tLAG\textra\nc\tEDR\n")
    found = records(path)
    assert sorted(r.sequence for r in found if r.reason is None) == ["EDR", "MKV"]
    (bad,) = [r for r in found if r.reason]
    assert (bad.reason, bad.detail) == (Reason.UNREADABLE_FILE, f"{path}, line 3: 3 cells where the head has 2")


def test_ids_that_are_not_utf8_or_hold_nul_are_kept_as_escapes(tmp_path):
    found = records(text(tmp_path / "t.tsv", b"id\tsequence\ncaf\xe9\tMKV\nb\0c\tLAG\n"))
    assert [r.id for r in found] == [r"caf\xe9", r"b\x00c"]
    found = records(text(tmp_path / "u.tsv", b"id\tsequence\nb\0c\tLAG\n\x1b[1m\xc2\x9bd\tEDR\n"))
    assert [r.id for r in found] == [r"b\x00c", r"\x1b[1m\x9bd"]


@pytest.mark.parametrize("content", [b"", b"id\tsequence\n"])
def test_a_table_without_rows_is_an_empty_file(tmp_path, content):
    (row,) = records(text(tmp_path / "t.tsv", content))
    assert row.reason == Reason.EMPTY_FILE


def test_a_parquet_table_without_rows_is_an_empty_file(tmp_path):
    empty = pa.array([], pa.string())
    (row,) = records(parquet(tmp_path / "t.parquet", id=empty, sequence=empty))
    assert row.reason == Reason.EMPTY_FILE


def test_a_file_that_is_no_parquet_is_unreadable(tmp_path):
    (row,) = records(text(tmp_path / "t.parquet", "id and sequence\n"))
    assert row.reason == Reason.UNREADABLE_FILE


@pytest.mark.parametrize("name", ["t.parquet", "t.tsv", "t.csv", "t.csv.gz"])
def test_fasta_is_fasta_whatever_its_suffix_says(tmp_path, name):
    path = text(tmp_path / name, gzip.compress(b">a\nMKV\n") if name.endswith(".gz") else b">a\nMKV\n")
    check_columns(path)
    assert [(r.id, r.sequence) for r in records(path)] == [("a", "MKV")]


def test_a_truncated_table_keeps_what_was_read_and_says_so(tmp_path):
    content = "id\tsequence\n" + "".join(f"p{i}\tMKV{'LAGDE'[i % 5] * (i % 97)}\n" for i in range(60_000))
    data = gzip.compress(content.encode())
    *good, bad = records(text(tmp_path / "t.tsv.gz", data[: len(data) // 2]))
    assert bad.reason == Reason.UNREADABLE_FILE
    assert 0 < len(good) < 60_000
    assert all(record.reason is None for record in good)


def test_a_table_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        records(tmp_path / "none.parquet")


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.tsv.gz", "t.parquet"])
def test_a_missing_column_is_a_sentence_with_the_columns_and_the_remedy(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        parquet(path, Entry=["a"], sequence=["MKV"])
    else:
        content = "Entry\tsequence\na\tMKV\n".replace("\t", "," if ".csv" in name else "\t").encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    sentence = (
        f"{path}: has no column id; its columns are Entry, sequence. "
        "Rename the columns that hold the ids and the residues to id and sequence"
    )
    with pytest.raises(TableError) as error:
        check_columns(path)
    assert str(error.value) == sentence
    with pytest.raises(TableError):
        records(path)
    # A dry run says so already.
    sheet = text(tmp_path / "samples.tsv", f"sample\tfasta\nx\t{path}\n")
    with pytest.raises(InputError) as refusal:
        read_samples(str(sheet))
    assert str(refusal.value) == f"{sheet}: fasta: {sentence}"


def test_a_column_that_holds_no_text_is_a_sentence(tmp_path):
    path = parquet(tmp_path / "t.parquet", id=["a"], sequence=[[1, 2]])
    with pytest.raises(TableError, match="its column sequence is of type list"):
        records(path)


# Quotation marks


def outcomes(path):
    """Of each record its id, and its sequence or what is wrong."""
    return [(r.id, r.sequence or r.detail.removeprefix(f"{path}, ")) for r in records(path)]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_quote_that_is_never_closed_costs_no_row_of_a_tsv(tmp_path, column):
    first = ["a", "MKVLAG", "Candidatus"]
    first[column] = '"' + first[column]
    lines = ["id\tsequence\tdescription", "\t".join(first), "b\tLAG\t5' end", 'c\tEDR\t"whole"', 'd\tMKV\t"a" and "b"']
    found = records(text(tmp_path / "t.tsv", "\n".join(lines)))
    assert [(r.position, r.id) for r in found] == [(1, first[0]), (2, "b"), (3, "c"), (4, "d")]
    assert [r.description for r in found] == [first[2], "5' end", "whole", '"a" and "b"']
    assert [r.sequence for r in found[1:]] == ["LAG", "EDR", "MKV"]
    assert (found[0].reason is Reason.INVALID_RESIDUE) == (column == 1)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("rows_before", [0, 1, 3000])
def test_a_quote_that_is_never_closed_costs_one_row_of_a_csv_which_is_named_by_its_line(tmp_path, column, rows_before):
    rows = [[f"p{i}", "MKV" + "LAGDE"[i % 5], "a protein"] for i in range(rows_before + 5000)]
    rows[rows_before][column] = '"' + rows[rows_before][column]
    content = "id,sequence,description\n" + "".join(",".join(row) + "\n" for row in rows)
    path = text(tmp_path / "t.csv", content)
    found = records(path)
    assert [r.position for r in found] == list(range(1, len(rows) + 1))
    (bad,) = [r for r in found if r.reason]
    line = rows_before + 2
    assert (bad.position, bad.reason) == (rows_before + 1, Reason.UNREADABLE_FILE)
    assert bad.detail == f"{path}, line {line}: a quotation mark that is not closed before line {line + 1}"


def test_a_quote_opened_in_the_last_row_of_a_csv_is_named_too(tmp_path):
    path = text(tmp_path / "t.csv", 'id,sequence\na,MKV\nb,"LAG\n')
    assert outcomes(path) == [("a", "MKV"), ("b", "line 3: a quotation mark that is never closed")]


def test_a_quote_that_another_rows_quote_closes_swallows_nothing(tmp_path):
    lines = ["id,sequence,description", 'a,MKV,"Candidatus', "b,LAG,none", 'c,EDR,"whole, of it"', "d,TKQ,x"]
    path = text(tmp_path / "t.csv", "\n".join(lines))
    wrong = "line 2: a quotation mark that is not closed before line 3"
    assert outcomes(path) == [("a", wrong), ("b", "LAG"), ("c", "EDR"), ("d", "TKQ")]


def test_text_after_a_closing_quote_is_named_by_its_line(tmp_path):
    path = text(tmp_path / "t.csv", 'id,sequence,description\na,MKV,"one" of two\nb,LAG,x\n')
    assert outcomes(path) == [("a", "line 2: text after a closing quotation mark"), ("b", "LAG")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_line_ends_commas_and_quotes_of_a_csv_are_text(tmp_path, end):
    lines = [
        "id,description,sequence",
        '"a","first, of ""two""',
        'lines",MKVLAG',
        'b,"in three',
        "",
        'lines, with a comma","LAG',
        'EDR"',
        '"c',
        'd",,TKQ',
    ]
    found = records(text(tmp_path / "t.csv", end.join(lines)))
    assert [(r.position, r.id, r.description, r.sequence, r.reason) for r in found] == [
        (1, "a", 'first, of "two"\nlines', "MKVLAG", None),
        (2, "b", "in three\n\nlines, with a comma", "LAGEDR", None),
        (3, "c\nd", "", "TKQ", None),
    ]


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_a_row_of_many_megabytes_is_read(tmp_path, kind):
    delimiter = "," if kind == "csv" else "\t"
    giant = "MKVLAGEDRT" * 300_000
    rows = [("id", "sequence"), ("a", "MKV"), ("giant", giant), ("b", "LAG")]
    found = records(text(tmp_path / f"t.{kind}", "\n".join(delimiter.join(row) for row in rows)))
    assert [(r.id, r.length) for r in found] == [("a", 3), ("giant", len(giant)), ("b", 3)]


def test_rows_of_the_wrong_width_have_their_place_among_the_others(tmp_path):
    path = text(tmp_path / "t.tsv", "id\tsequence\na\tMKV\nb\tLAG\textra\nc\n\nd\tEDR\n")
    found = records(path)
    assert [(r.position, r.id, r.sequence) for r in found] == [
        (1, "a", "MKV"),
        (2, "b", ""),
        (3, "c", ""),
        (4, "d", "EDR"),
    ]
    assert found[2].detail == f"{path}, line 4: 1 cell where the head has 2"


def test_random_csv_of_pythons_own_writer_is_read_as_python_reads_it(tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        rows = [
            [f"p{i}", "".join(rng.choices('ab ,"\n', k=rng.randrange(6))).strip(), "MKV"]
            for i in range(rng.randrange(1, 9))
        ]
        written = io.StringIO()
        csv.writer(written).writerows([("id", "description", "sequence"), *rows])
        found = records(text(tmp_path / "t.csv", written.getvalue()))
        assert [(r.id, r.description, r.sequence) for r in found] == [(i, d, s) for i, d, s in rows]


@pytest.mark.parametrize("column", ["id", "description", "sequence"])
@pytest.mark.parametrize("value", [["a"], {"x": 1}])
def test_a_parquet_column_of_lists_or_structs_is_a_sentence(tmp_path, column, value):
    path = parquet(tmp_path / "t.parquet", **{"id": ["a"], "sequence": ["MKV"], "description": ["d"], column: [value]})
    with pytest.raises(TableError, match=f"its column {column} is of type"):
        records(path)


def test_a_parquet_id_that_is_not_utf8_is_kept_as_an_escape(tmp_path):
    wrong = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "t.parquet", id=wrong, sequence=["MKV"])
    assert [r.id for r in records(path)] == [r"caf\xe9"]


# How text tables are divided


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", "id;sequence;mass\na;MKV;1,5\nb;EDR;2,5\n"),
        ("excel.csv", "sep=;\r\nid;sequence;mass\r\na;MKV;1,5\r\nb;EDR;2,5\r\n"),
        ("excel_commas.csv", 'sep=,\nid,sequence,mass\na,MKV,"1,5"\nb,EDR,"2,5"\n'),
        ("tabs.csv", "id\tsequence\tmass\na\tMKV\t1,5\nb\tEDR\t2,5\n"),
        ("commas.tsv", 'id,sequence,mass\na,MKV,"1,5"\nb,EDR,"2,5"\n'),
        ("blanks.tsv", " id \tsequence\tmass \n a \tMKV \t1,5\nb \tEDR\t2,5\n"),
        ("quoted.csv", '\ufeff"id";"sequence";"mass"\n"a";"MKV";"1,5"\n"b";"EDR";"2,5"\n'),
    ],
)
def test_a_table_is_divided_as_its_head_is(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert annotation_columns(str(path)) == ["mass"]
    (block,) = [task() for task in table_block_tasks(path, ResiduePolicy())]
    assert [(r.id, r.sequence) for r in block.records()] == [("a", "MKV"), ("b", "EDR")]
    assert block.annotations["mass"].to_pylist() == ["1,5", "2,5"]


@pytest.mark.parametrize("column", ["sequence", "id", "note"])
@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet"])
def test_a_column_that_is_there_twice_is_refused_and_neither_is_lost(tmp_path, column, suffix):
    path = tmp_path / f"t.{suffix}"
    names = ["id", "sequence", "note", column]
    if suffix == "parquet":
        pq.write_table(pa.table([["x"]] * 4, names=names), path)
    else:
        tab = "\t" if suffix == "tsv" else ","
        path.write_text(f"{tab.join(names)}\n{tab.join('xMKV')}\n")
    with pytest.raises(TableError, match=f"its column {column} is there twice"):
        list(table_block_tasks(path, ResiduePolicy()))


# Annotations of all types


def test_annotations_of_every_type_of_parquet_are_spelled_in_one_way(tmp_path, caplog):
    day = datetime.date(2024, 2, 29)
    kinds = {
        "tags": (pa.list_(pa.string()), [["a", 'b"é'], [], None], ['["a", "b\\"é"]', "[]", ""]),
        "span": (
            pa.struct([("from", pa.int32()), ("day", pa.date32())]),
            [{"from": 1, "day": day}, {"from": None, "day": None}, None],
            ['{"from": 1, "day": "2024-02-29"}', '{"from": null, "day": null}', ""],
        ),
        "pairs": (pa.map_(pa.string(), pa.int8()), [[("x", 1)], [], None], ['[["x", 1]]', "[]", ""]),
        "spans": (pa.list_(pa.struct([("at", pa.int8())])), [[{"at": 1}], [], None], ['[{"at": 1}]', "[]", ""]),
        "raw": (pa.binary(), [b"\xff\0", "é".encode(), None], ["\\xff\\x00", "é", ""]),
        "fixed": (pa.binary(2), [b"ab", b"\x80a", None], ["ab", "\\x80a", ""]),
        "blobs": (pa.list_(pa.binary()), [[b"a\xff"], [], None], ['["a\\\\xff"]', "[]", ""]),
        "day": (pa.date32(), [day, None, day], ["2024-02-29", "", "2024-02-29"]),
        "when": (
            pa.timestamp("s"),
            [datetime.datetime(2024, 1, 2, 3), None, None],
            ["2024-01-02 03:00:00.000", "", ""],
        ),
        "took": (pa.duration("s"), [datetime.timedelta(hours=30), None, None], ["1 day, 6:00:00", "", ""]),
        "mass": (pa.decimal128(8, 3), [decimal.Decimal("1.500"), None, None], ["1.500", "", ""]),
        "kind": (pa.dictionary(pa.int8(), pa.string()), ["x", None, "x"], ["x", "", "x"]),
        "year": (pa.dictionary(pa.int8(), pa.int32()), [2024, None, 2025], ["2024", "", "2025"]),
        "good": (pa.bool_(), [True, False, None], ["true", "false", ""]),
        "none": (pa.null(), [None] * 3, [""] * 3),
        "a.b": (pa.large_string(), ["x", None, "y"], ["x", "", "y"]),
    }
    vectors = {
        "embedding": pa.array([[0.5, 1.0]] * 3, pa.list_(pa.float32(), 2)),
        "matrix": pa.array([[[0.5]]] * 3, pa.list_(pa.list_(pa.float64()))),
    }
    columns = {name: pa.array(values, kind) for name, (kind, values, _) in kinds.items()}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["1", "2", "3"], "sequence": ["MKV"] * 3} | columns | vectors), path)
    assert annotation_names([InputFile("s", str(path))]) == list(kinds)
    assert caplog.messages == [f"{path}: no annotations, since they hold vectors: embedding, matrix"]
    (block,) = [task() for task in table_block_tasks(path, ResiduePolicy())]
    found = {name: column.to_pylist() for name, column in block.annotations.items()}
    assert found == {name: expected for name, (_, _, expected) in kinds.items()}
