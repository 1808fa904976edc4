"""A file is what its first bytes say: read, or refused by its name with what to do."""

import bz2
import gzip
import io
import lzma
import random
import sqlite3
import tarfile
import zipfile

import h5py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmflow.failures import Reason
from esmflow.inputs.fasta import count_sequences
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import fasta_stem

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
STRICT = ResiduePolicy()
FASTA = b">a first\nMKVLAG\n>b\nEDR\n"


def records(path, policy=STRICT):
    return [record for task in input_tasks(path, policy) for record in task().records()]


def made(write) -> bytes:
    """What a library writes into a file."""
    target = io.BytesIO()
    write(target)
    return target.getvalue()


def zipped(name: str) -> bytes:
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        archive.writestr(name, FASTA)
    return target.getvalue()


def tarred(mode: str = "w") -> bytes:
    entry = tarfile.TarInfo("a.fasta")
    entry.size = len(FASTA)
    with tarfile.open(fileobj=(target := io.BytesIO()), mode=mode) as archive:
        archive.addfile(entry, io.BytesIO(FASTA))
    return target.getvalue()


# Compression


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.fasta", "a", "a.faa{suffix}", "a.faa{upper}", "a.fa{title}", "a.gz"])
def test_compressed_files_are_read_whatever_their_name_is(tmp_path, suffix, name):
    path = tmp_path / name.format(suffix=suffix, upper=suffix.upper(), title=suffix.title())
    path.write_bytes(COMPRESS[suffix](FASTA))
    assert [(r.id, r.sequence) for r in records(path)] == [("a", "MKVLAG"), ("b", "EDR")]
    assert count_sequences(path) == 2
    assert fasta_stem(path) == "a"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_compressed_tables_are_read_whatever_their_suffix_says(tmp_path, suffix, kind):
    content = b"id\tsequence\na\tMKV\n".replace(b"\t", b"," if kind == "csv" else b"\t")
    for name in (f"t.{kind}", f"t.{kind}{suffix.upper()}"):
        (tmp_path / name).write_bytes(COMPRESS[suffix](content))
        assert [(r.id, r.sequence) for r in records(tmp_path / name)] == [("a", "MKV")]


@pytest.mark.parametrize("suffix", [".GZ", ".Bz2", ".XZ", ".zst"])
def test_a_damaged_start_of_a_compressed_file_is_damage_and_no_text(tmp_path, suffix):
    data = COMPRESS[suffix.lower()](FASTA)
    path = tmp_path / f"a.fasta{suffix}"
    path.write_bytes(b"\0" + data[1:])
    (row,) = records(path)
    assert (row.reason, row.sequence) == (Reason.UNREADABLE_FILE, "")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("rest", [b">c\nLLL\n", b"garbage", b"\n", b"\0\0B"])
def test_what_follows_compressed_data_is_told_of_and_costs_nothing_before_it(tmp_path, suffix, rest):
    for content, name in ((FASTA, "a.fasta"), (b"id\tsequence\na\tMKVLAG\nb\tEDR\n", "a.tsv")):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESS[suffix](content) + rest)
        *kept, last = records(path)
        assert [(r.id, r.sequence) for r in kept] == [("a", "MKVLAG"), ("b", "EDR")]
        assert last.reason == Reason.UNREADABLE_FILE
        assert "past record 2: what follows is not compressed" in last.detail


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_parts_that_were_compressed_one_by_one_are_one_file_whatever_zeros_lie_between(tmp_path, suffix):
    path = tmp_path / f"a.fasta{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](part) + bytes(4 * i) for i, part in enumerate((FASTA, b"", FASTA))))
    assert [r.id for r in records(path)] == ["a", "b"] * 2
    path.write_bytes(path.read_bytes()[:-12])
    assert records(path)[-1].reason == Reason.UNREADABLE_FILE


# What is refused

FASTQ = b"@read1 some\nACGT\nACGG\n+\nIIIIIIII\n@read2\nAC\n+\nII\n"
REFUSED = {
    "a zip archive": [zipped("proteins.fasta"), b"PK\x05\x06" + bytes(18)],
    "an Excel or other Office document": [
        zipped("[Content_Types].xml"),
        zipped("xl/workbook.xml"),
        b"\xd0\xcf\x11\xe0\xa1",
    ],
    "a tar archive": [tarred(), tarred("w:gz"), tarred("w:xz")],
    "a 7z or RAR archive": [b"7z\xbc\xaf\x27\x1c\0\4", b"Rar!\x1a\7\0"],
    "compressed twice": [gzip.compress(gzip.compress(FASTA)), bz2.compress(gzip.compress(FASTA))],
    "compressed by compress, pack, lzip or LZ4": [b"\x1f\x9d\x90" + bytes(9), b"LZIP\1", b"\x04\x22\x4d\x18\x64"],
    "a Parquet table": [made(lambda target: pq.write_table(pa.table({"id": ["a"]}), target))],
    "an HDF5 or SQLite file": [made(lambda target: h5py.File(target, "w").close()), b"SQLite format 3\0"],
    "a PDF, an image or a program": [b"%PDF-1.7\n>a\nMKV\n", b"\x89PNG\r\n", b"\x7fELF\2"],
    "2bit, SFF, ABI or nib data": [b".sff\0\0\0\1", b"ABIF\0", b"\x43\x27\x41\x1a"],
    "UTF-16 text": [FASTA.decode().encode(c) for c in ("utf-16", "utf-16-le", "utf-16-be")],
    "UTF-32 text": [FASTA.decode().encode(c) for c in ("utf-32", "utf-32-le", "utf-32-be")],
    "HTML, a web page": [b"<!DOCTYPE html>\n<p>&gt;a", b"\n  <html lang=en>", b"<HTML><PRE>\n>a\nMKV\n</PRE>"],
    "XML": [b'<?xml version="1.0"?>\n<note>MKV</note>', b"<!DOCTYPE GBSet>"],
    "JSON": [b'{"id": "a", "sequence": "MKV"}', b'[{"id": 1}]', b"[\n  []\n]"],
    "RTF, a word processor's document": [b"{\\rtf1\\ansi >a\\par MKV"],
    "a pointer of Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    "FASTQ, sequencing reads": [
        FASTQ,
        b"@a\nMKV\n+a\nIII\n",
        b"@long\n" + b"ACGT" * 5000 + b"\n+\n",
        FASTQ.replace(b"\n", b"\r\n"),
    ],
    "SAM, aligned reads": [b"@HD\tVN:1.6\n@SQ\tSN:1\tLN:9\n"],
    "a Clustal alignment": [b"CLUSTAL O(1.2.4) multiple sequence alignment\n\na  MKV\n", b"MUSCLE (3.8) multiple\n"],
    "an MSF alignment": [b"!!AA_MULTIPLE_ALIGNMENT 1.0\n", b" a.msf  MSF: 131  Type: P\n", b"PileUp\n"],
    "a NEXUS file": [b"#NEXUS\nBEGIN DATA;\n", b"#nexus\n"],
    "a PHYLIP alignment": [b" 5 42\nTurkey    AAGCTNGGGC\n", b"2 3\r\na MKV\r\n"],
    "a Newick tree": [b"((a:0.1,b:0.2):0.3,c);\n", b"(MKV,LAG);", b"(a)b;"],
    "GFF, GTF, BED or VCF": [b"##gff-version 3\n", b"##fileformat=VCFv4.2\n", b"#!genome-build GRCh38\n"],
    "a profile": [b"HMMER3/f [3.1b2]\nNAME x\n"],
    "BLAST's report": [b"BLASTP 2.12.0+\n", b"# BLASTP 2.12.0+\n# Query: a\n"],
    "ASN.1": [b"Seq-entry ::= set {\n"],
    "no text": [random.Random(0).randbytes(3000), b"\7\1\0\2some\0\0\0>a\nMKV\n"],
    "a table": [b"id\tsequence\na\tMKV\n", b'"id","length","sequence"\na,3,MKV\n', b"sequence,id\nMKV,a\n"],
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["a.fasta", "a.faa", "proteins"])
@pytest.mark.parametrize(
    ("kind", "content"),
    # Named by number: what libraries write holds the time of day, and every worker of pytest must see the same names.
    [pytest.param(kind, c, id=f"{kind}-{i}") for kind, contents in REFUSED.items() for i, c in enumerate(contents)],
)
def test_what_is_no_fasta_is_refused_by_its_name_in_one_sentence(tmp_path, kind, content, name, compress):
    path = tmp_path / name
    path.write_bytes(compress(content))
    (row,) = records(path)
    if compress is gzip.compress and content[:2] in (b"\x1f\x8b", b"\xfd7"):
        kind = "compressed twice"
    assert (row.reason, row.position, row.sequence) == (Reason.OTHER_FORMAT, 0, "")
    assert row.detail.startswith(f"{path} is {kind}: ")
    assert "first '>'" not in row.detail


@pytest.mark.parametrize("kind", ["UTF-16 text", "an Excel or other Office document", "HTML, a web page"])
@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.tsv.gz"])
def test_tables_are_looked_at_too(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes((gzip.compress if name.endswith("gz") else bytes)(REFUSED[kind][0]))
    (row,) = records(path)
    assert row.detail.startswith(f"{path} is {kind}: ")


def test_a_real_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "a.fasta") as database:
        database.execute("create table proteins (id, sequence)")
    database.close()
    assert records(tmp_path / "a.fasta")[0].reason == Reason.OTHER_FORMAT


@pytest.mark.parametrize(
    "content",
    [
        b">P12345;x\nMKV\n",
        b">LOCUS       x 12 aa\nMKV\n",
        b"\n\n>a\nMKV\n",
        b"\xef\xbb\xbf>a\nMKV\n",
        b">(a,b);\nMKV\n",
        b">@HD\tx\nMKV\n",
        b">a\nATOM\nMKV\n",
        b">id,sequence\nMKV\n",
        b"> <html>\nMKV\n",
    ],
)
def test_fasta_is_never_taken_for_anything_else(tmp_path, content):
    path = tmp_path / "a.fasta"
    path.write_bytes(content)
    (record,) = records(path)
    assert record.reason is None


@pytest.mark.parametrize(
    "above",
    [
        "(c) 2020, us",
        "TITLE a",
        "3 5",
        '{"made": "by us"}',
        "id,sequence",
        "BLASTP 2.12",
        "CLUSTAL",
        "#NEXUS",
        "##gff",
        "[\n  []",
    ],
)
def test_text_above_a_header_never_costs_the_records_below_it(tmp_path, above):
    path = tmp_path / "a.fasta"
    path.write_text(f"{above}\n>a\nMKV\n")
    assert [r.reason for r in records(path)] == [Reason.TEXT_BEFORE_HEADER, None]


def test_text_that_is_like_nothing_is_text_above_a_header(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"Dear colleague,\n>a\nMKV\n")
    assert [r.reason for r in records(path)] == [Reason.TEXT_BEFORE_HEADER, None]
