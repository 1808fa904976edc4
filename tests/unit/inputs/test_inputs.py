"""Tables are read as FASTA files are; folders and globs stand for their files."""

import bz2
import gzip
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmflow.failures import Reason
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import FASTA_SUFFIXES, InputError, InputFile, expand, read_samples
from esmflow.inputs.tables import TableError, check_columns

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
    found = records(text(tmp_path / "u.tsv", b"id\tsequence\nb\0c\tLAG\n"))
    assert [r.id for r in found] == [r"b\x00c"]


@pytest.mark.parametrize("content", [b"", b"id\tsequence\n"])
def test_a_table_without_rows_is_an_empty_file(tmp_path, content):
    (row,) = records(text(tmp_path / "t.tsv", content))
    assert row.reason == Reason.EMPTY_FILE


def test_a_parquet_table_without_rows_is_an_empty_file(tmp_path):
    empty = pa.array([], pa.string())
    (row,) = records(parquet(tmp_path / "t.parquet", id=empty, sequence=empty))
    assert row.reason == Reason.EMPTY_FILE


def test_a_file_that_is_no_parquet_is_unreadable(tmp_path):
    (row,) = records(text(tmp_path / "t.parquet", ">a\nMKV\n"))
    assert row.reason == Reason.UNREADABLE_FILE


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


# Folders and globs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("b.faa", "a.fasta.gz", "C.FA", "d.pep.zst", ".hidden.fasta", "notes.txt", "t.tsv", "e.fasta.tmp")
    os.mkdir("proteins")
    for name in names:
        text(tmp_path / "proteins" / name, b"")
    os.mkdir("proteins/deeper.fasta")
    return "proteins"


def test_a_folder_stands_for_its_fasta_files_in_order(folder):
    assert expand(folder) == [f"proteins/{name}" for name in ("C.FA", "a.fasta.gz", "b.faa", "d.pep.zst")]


def test_a_folder_in_the_sheet_is_one_sample_of_many_files(folder, tmp_path):
    sheet = text(tmp_path / "samples.tsv", "sample\tfasta\nx\tproteins/\ny\tproteins/t.ts?\n")
    text(tmp_path / "proteins" / "t.tsv", "id\tsequence\n")
    names = ("C.FA", "a.fasta.gz", "b.faa", "d.pep.zst")
    assert read_samples(str(sheet)) == [
        *(InputFile("x", f"proteins/{name}") for name in names),
        InputFile("y", "proteins/t.tsv"),
    ]


def test_a_folder_without_fasta_files_is_a_sentence(folder, tmp_path):
    os.mkdir("empty")
    sheet = text(tmp_path / "samples.tsv", "sample\tfasta\nx\tempty\n")
    with pytest.raises(InputError) as refusal:
        read_samples(str(sheet))
    assert str(refusal.value).startswith(f"{sheet}, line 2: fasta: the folder empty holds no FASTA file")
    assert all(suffix in str(refusal.value) for suffix in FASTA_SUFFIXES)


def test_a_glob_that_matches_nothing_is_a_sentence(folder):
    with pytest.raises(InputError, match=r"proteins/\*\.xyz matches no file"):
        expand("proteins/*.xyz")
