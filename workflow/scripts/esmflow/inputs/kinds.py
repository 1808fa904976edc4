"""What a file is, told by its first bytes: besides FASTA and tables, what Biopython reads and what is refused."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from esmflow.inputs.streams import BYTE_ORDER_MARK, is_fasta, suffix


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not FASTA.

    name: what it is. begins: what its text begins with. parser: its name in Bio.SeqIO, if it is read; holds: what its
    records are. remedy: what to do with one that is not read. tables: the suffixes with which it is read as a table.
    has_no_headers: with a line that begins with `>` it is FASTA with text above it.
    """

    name: str
    begins: re.Pattern[bytes]
    parser: str = ""
    holds: str = "records"
    remedy: str = ""
    tables: tuple[str, ...] = ()
    has_no_headers: bool = False


def kind_of(path: str | os.PathLike[str], head: bytes) -> Kind | None:
    """What a file of this name is that begins with these bytes; None for FASTA, tables and what is not known."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    kind = next((kind for kind in _BINARY if kind.begins.match(head)), None)
    kind = kind or next((kind for kind in _TEXT if kind.begins.match(text)), None)
    if kind is None and not is_fasta(head) and len(head) - len(head.translate(None, _CONTROLS)) > len(head) / 20:
        return _NO_TEXT
    if kind and (suffix(path) in kind.tables or (kind.has_no_headers and b"\n>" in text)):
        return None
    return kind


def _refused(name: str, begins: bytes, remedy: str) -> Kind:
    return Kind(name, re.compile(begins, re.DOTALL), remedy=remedy)


def _without_headers(name: str, begins: bytes, remedy: str) -> Kind:
    return replace(_refused(name, begins, remedy), has_no_headers=True)


def _read(name: str, begins: bytes, parser: str, holds: str) -> Kind:
    return Kind(name, re.compile(begins, re.DOTALL), parser, holds)


_UNPACK = "unpack it and list the files in it"
_UTF_8 = "save it as UTF-8 text"
_FASTA = "convert it to FASTA"
_NO_SEQUENCES = "it holds no sequences; list the FASTA file that belongs to it"
_DOWNLOAD = "this is what a server answers when a download fails; fetch the file again"

_BINARY = (
    _refused(
        "an Excel or other Office document",
        rb"PK\x03\x04.{22}.{4}(?:\[Content_Types\]|_rels/|xl/|mimetype|docProps/)|\xd0\xcf\x11\xe0",
        "save its table as tab-separated UTF-8 text, with the suffix .tsv",
    ),
    _refused("a zip archive", rb"PK(?:\x03\x04|\x05\x06)", _UNPACK),
    _refused("a tar archive", rb".{257}ustar", _UNPACK),
    _refused("a 7z or RAR archive", rb"7z\xbc\xaf\x27\x1c|Rar!", _UNPACK),
    _refused("compressed twice", rb"\x1f\x8b|BZh\d1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd", "decompress it once"),
    _refused(
        "compressed by compress, pack, lzip or LZ4", rb"\x1f[\x9d\xa0\x1e]|LZIP|\x04\x22\x4d\x18", "use gzip or zstd"
    ),
    Kind("a Parquet table", re.compile(rb"PAR1"), remedy="give its name the suffix .parquet", tables=(".parquet",)),
    _refused("an HDF5 or SQLite file", rb"\x89HDF\r\n|SQLite format 3", "write its sequences as FASTA"),
    _refused("a PDF, an image or a program", rb"%PDF|\x89PNG|\xff\xd8\xff|GIF8|\x7fELF|MZ\x90\0", "it is no text"),
    _refused("2bit, SFF, ABI or nib data", rb"\x1a\x41\x27\x43|\x43\x27\x41\x1a|\.sff|ABIF|\x3a\x3d\xe9\x6b", _FASTA),
    _refused("UTF-32 text", rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0[^\0]\0\0\0|\0\0\0[^\0]\0\0\0[^\0]", _UTF_8),
    _refused("UTF-16 text", rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", _UTF_8),
)

_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r"))
_NO_TEXT = _refused("no text", b"", "it may be damaged, or need a program to unpack it")
_TABLE = Kind(
    "a table",
    re.compile(rb'(?=(?:[^\n]*[\t,])?"?id"?[\t,\n])(?=(?:[^\n]*[\t,])?"?sequence"?[\t,\n])'),
    remedy="give its name the suffix .tsv if it has tabs, or .csv if it has commas",
    tables=(".tsv", ".csv"),
    has_no_headers=True,
)
_TEXT = (
    _read("a UniProt XML file", rb"(?:<\?xml[^>]*>\s*)?<uniprot\b", "uniprot-xml", "entries"),
    _refused("HTML, a web page", rb"(?i:<!doctype html|<html|<head|<body|<pre\b|<script)", _DOWNLOAD),
    _refused("XML", rb"<\?xml|<!DOCTYPE|<!--", "of XML only UniProt's is read; " + _FASTA),
    _without_headers("JSON", rb"[\[{]\s*[\"\[{}\]]", _FASTA),
    _refused("RTF, a word processor's document", rb"\{\\rtf", _UTF_8),
    _refused("a pointer of Git LFS", rb"version https://git-lfs", "fetch what it stands for with git lfs pull"),
    _refused(
        "FASTQ, sequencing reads", rb"@[^\n]*\n[A-Za-z.*~\n-]+(?:\n\+|\Z)", "find the proteins in them, and give these"
    ),
    _without_headers("SAM, aligned reads", rb"@(?:HD|SQ|RG|PG|CO)\t", "find the proteins in them, and give these"),
    _read("a GenPept file", rb"LOCUS +\S+ +\d+ aa\b", "genbank", "proteins"),
    _read("a GenBank file", rb"LOCUS {2,}|[^\n]*Genetic Sequence Data Bank", "genbank-cds", "CDS features"),
    _read(
        "a Swiss-Prot file", rb"ID {3}\S+ +(?:Reviewed|Unreviewed|STANDARD|PRELIMINARY); +\d+ AA", "swiss", "entries"
    ),
    _read("an EMBL file", rb"ID {3}[^\n]*\bBP\b", "embl-cds", "CDS features"),
    _read("a PIR file", rb">(?:P1|F1|D[LC]|R[LC]|N[13]|XX);", "pir", "entries"),
    _read("a Stockholm alignment", rb"# ?STOCKHOLM", "stockholm", "sequences"),
    _without_headers(
        "a Clustal alignment", rb"CLUSTAL|MUSCLE \(|PROBCONS|MSAPROBS|Kalign", _FASTA + ", and set gaps: remove"
    ),
    _without_headers(
        "an MSF alignment", rb"!![AN]A_MULTIPLE|PileUp|[^\n]*\bMSF: *\d", _FASTA + ", and set gaps: remove"
    ),
    _without_headers("a NEXUS file", rb"(?i:#nexus)", _FASTA + ", and set gaps: remove"),
    _without_headers("a PHYLIP alignment", rb"\d+[ \t]+\d+[ \t]*[IS]?[ \t]*\n", _FASTA + ", and set gaps: remove"),
    Kind(
        "a PDB file",
        re.compile(
            rb"(?:HEADER|TITLE|COMPND|CRYST1|MODEL|ATOM  |HETATM|REMARK|SEQRES|OBSLTE|CAVEAT|EXPDTA|AUTHOR) {1,8}\S"
        ),
        "pdb-seqres",
        "SEQRES records",
        has_no_headers=True,
    ),
    _read("an mmCIF file", rb"(?:#[^\n]*\n)*\s*data_\S*\s", "cif-seqres", "polymers (_pdbx_poly_seq_scheme)"),
    _without_headers("a Newick tree", rb"\([^>\n]*[,)]", _NO_SEQUENCES),
    _without_headers("GFF, GTF, BED or VCF", rb"##gff|##fileformat|#!genome|track |browser ", _NO_SEQUENCES),
    _without_headers("a profile", rb"HMMER\d|HH-suite|PssmWithParameters", _NO_SEQUENCES),
    _without_headers("BLAST's report", rb"T?BLAST[NPX] \d|# T?BLAST[NPX]", _NO_SEQUENCES),
    _without_headers("ASN.1", rb"[A-Z][\w-]* ::= ", _FASTA),
    _TABLE,
)
