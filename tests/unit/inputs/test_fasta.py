"""FASTA as people have it: every case ends as a good record, or as a row that says what is wrong."""

import bz2
import functools
import gzip
import io
import lzma
import os
import random
import time
import warnings

import pyarrow as pa
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from made_up import proteins, sample_proteins, write_fasta

from esmflow.failures import REMEDY, Reason
from esmflow.inputs.fasta import count_sequences, read_records
from esmflow.inputs.residues import RESIDUE_TOKEN, ResiduePolicy, sequence_digest
from esmflow.inputs.sheet import fasta_stem

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
STRICT = ResiduePolicy()
REPLACE = ResiduePolicy(invalid="replace_with_x")


@pytest.fixture
def read(tmp_path):
    """Reads a file with this content."""

    def read(content: str | bytes, policy: ResiduePolicy = STRICT, name: str = "proteins.fasta"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_records(path, policy))

    return read


def sequences(records):
    records = list(records)
    assert all(record.reason is None for record in records), records
    return [record.sequence for record in records]


@functools.cache
def long_text(records: int) -> bytes:
    """Enough different proteins to fill several blocks of every compressed format."""
    return "".join(f">protein_{i}\n{s}\n" for i, s in enumerate(proteins(records, 100, 140))).encode()


# Residues


def test_a_trailing_stop_is_removed(read):
    assert sequences(read(">a\nMKV*\n>b\nMKV**\n>c\nMK\nV*\n")) == ["MKV", "MKV", "MKV"]


def test_a_stop_inside_rejects_the_record_and_says_where(read):
    bad, good = read(">a\nMK*VL\n>b\nMKV\n")
    assert (bad.reason, bad.detail, bad.length, bad.sequence) == (Reason.INVALID_RESIDUE, "'*' at residue 3", 5, "")
    assert good.reason is None


def test_a_record_of_nothing_but_a_stop_is_an_empty_sequence(read):
    assert [record.reason for record in read(">a\n*\n")] == [Reason.EMPTY_SEQUENCE]


def test_lower_case_becomes_upper_case(read):
    assert sequences(read(">a\nmkvLag\n")) == ["MKVLAG"]


def test_white_space_inside_a_sequence_is_no_residue(read):
    (record,) = read(">a\nMKV LAG\tEDR \n  TKQ\n")
    assert (record.sequence, record.length) == ("MKVLAGEDRTKQ", 12)


@pytest.mark.parametrize("residue", "UZBO")
def test_rare_residues_keep_their_own_tokens(read, residue):
    (record,) = read(f">a\nMK{residue}V\n")
    assert record.sequence == f"MK{residue}V"
    assert RESIDUE_TOKEN[residue] != RESIDUE_TOKEN["X"]


@pytest.mark.parametrize("letter", ["J", "1", "9", "?", "@", "/"])
def test_a_letter_without_a_token_rejects_the_record(read, letter):
    bad, good = read(f">bad\nMK{letter}V{letter}\n>good\nMKV\n")
    assert bad.reason == Reason.INVALID_RESIDUE
    assert bad.detail == f"{letter!r} at residue 3, and 1 more"
    assert good.sequence == "MKV"


def test_a_lower_case_j_is_rejected_too(read):
    assert read(">a\nmkjv\n")[0].reason == Reason.INVALID_RESIDUE


def test_letters_without_a_token_become_x_where_that_is_asked_for(read):
    (record,) = read(">a\nMJKV*Lj\n", REPLACE)
    assert (record.sequence, record.reason) == ("MXKVXLX", None)
    assert record.detail == "3 residues replaced with X"


@pytest.mark.parametrize(
    "inside",
    ["9", "[Met]", "(Phospho)", "<b>LAG</b>", "{X}", "&amp;", "?", "~", ">", "J9", "é", "*1", "\u2013", "<", "|P1|"],
)
def test_what_stands_for_no_amino_acid_is_never_replaced(read, inside):
    for policy in (STRICT, REPLACE, ResiduePolicy("replace_with_x", gaps="remove"), ResiduePolicy(gaps="keep")):
        bad, good = read(f">a\nMKV{inside}LAG\n>b\nMKV\n", policy)
        assert (bad.reason, bad.sequence, good.sequence) == (Reason.INVALID_RESIDUE, "", "MKV")


# str.upper would make SS of ß, S of ſ and I of ı.
@pytest.mark.parametrize("letter", ["ß", "ſ", "ı", "é", "\u041c", "\uff21", "\u00a0", "\u200b"])
def test_letters_of_other_alphabets_are_never_turned_into_residues(read, letter):
    for policy in (STRICT, REPLACE):
        assert read(f">a\nMK{letter}V\n", policy)[0].reason == Reason.INVALID_RESIDUE


def test_a_byte_that_is_not_utf8_inside_a_sequence_is_one_wrong_letter(read):
    for policy in (STRICT, REPLACE):
        bad, good = read(b">a\nMK\xe9V\n>b\nMKV\n", policy)
        assert (bad.reason, bad.length) == (Reason.INVALID_RESIDUE, 4)
        assert good.sequence == "MKV"


def test_an_empty_sequence_is_rejected_and_the_next_record_kept(read):
    empty, blank, good, last = read(">a\n>b\n\n \n>c\nMKV\n>d")
    assert [empty.reason, blank.reason, last.reason] == [Reason.EMPTY_SEQUENCE] * 3
    assert (good.id, good.position, good.sequence) == ("c", 3, "MKV")


# Gaps


REMOVE, KEEP = ResiduePolicy(gaps="remove"), ResiduePolicy(gaps="keep")


@pytest.mark.parametrize(
    ("written", "first", "others", "kind"),
    [
        ("MKV--LAG..W-", "'-' at residue 4", ", and 4 more", "an alignment"),
        ("------", "'-' at residue 1", ", and 5 more", "an alignment"),
        ("-MKV", "'-' at residue 1", "", "an alignment"),
        ("mkv.lag", "'.' at residue 4", "", "an alignment, or '.' stands for a stop codon"),
        ("MKV\n-\nLAG*", "'-' at residue 4", "", "an alignment"),
        ("M K-V*", "'-' at residue 3", "", "an alignment"),
    ],
)
def test_gaps_reject_a_record_and_their_removal_gives_the_protein(read, written, first, others, kind):
    text = f">a\n{written}\n>b\nMKV\n"
    bad, good = read(text)
    assert (bad.reason, bad.sequence, good.sequence) == (Reason.GAP_CHARACTERS, "", "MKV")
    assert bad.detail == f"{first}{others}; this looks like {kind}"
    removed, good = read(text, REMOVE)
    protein = "".join(letter for letter in written.upper() if letter.isalpha())
    assert (removed.sequence, removed.length, good.sequence) == (protein, len(protein), "MKV")
    assert removed.reason == (None if protein else Reason.EMPTY_SEQUENCE)
    assert removed.detail.endswith(" removed") or not protein


def test_kept_gaps_are_tokens_of_their_own(read):
    assert sequences(read(">a\nMKV--LAG..W-\n>b\nMKVLAG.\n", KEEP)) == ["MKV--LAG..W-", "MKVLAG."]


def test_a_trailing_dot_is_a_stop_like_a_trailing_star(read):
    for policy in (STRICT, REMOVE, REPLACE):
        assert sequences(read(">a\nMKVLAG.\n>b\nMKVLAG*.\n>c\nMKV\nLAG.\n", policy)) == ["MKVLAG"] * 3


def test_a_stop_before_trailing_gaps_is_no_residue_once_they_are_removed(read):
    assert sequences(read(">a\n--MKV*---\n", REMOVE)) == ["MKV"]
    assert sequences(read(">a\nM-J*\n", ResiduePolicy("replace_with_x", gaps="remove"))) == ["MX"]


def test_the_digest_of_a_protein_is_the_same_with_its_gaps_removed(read):
    gapped, plain = read(">a\nM-KV..LAG\n>b\nMKVLAG\n", REMOVE)
    assert sequence_digest(gapped.sequence) == sequence_digest(plain.sequence)


def test_an_alignment_of_insertions_in_lower_case_gives_whole_proteins(read):
    assert sequences(read(">a\nMKv.lAG\n>b\nMK.-.AG\n", REMOVE)) == ["MKVLAG", "MKAG"]


# Headers in the wrong place


JOINED = "cut off the line before it, which lacked its end"


@pytest.mark.parametrize(
    "joined",
    [
        "MKVLAG>b second",
        "MKVLAG*>b second",
        "MKVLAG>b\tsecond",
        "  MKV LAG  >b second",
        "MKV\nLAG>b second",
        "MKVLAG\ufeff>b second",
        "MKVLAG\n\ufeff>b second",
        "MKVLAG\n  >b second",
        "mkvlag>b second",
    ],
)
@pytest.mark.parametrize("policy", [STRICT, REPLACE])
def test_a_header_that_is_joined_to_a_line_is_cut_off_and_both_records_are_embedded(tmp_path, read, joined, policy):
    records = read(f">a first\n{joined}\nEDR\n>c third\nTKQ\n", policy)
    assert [(r.position, r.id, r.description, r.sequence) for r in records] == [
        (1, "a", "first", "MKVLAG"),
        (2, "b", "second", "EDR"),
        (3, "c", "third", "TKQ"),
    ]
    assert [r.detail for r in records] == ["", JOINED, ""]
    assert count_sequences(tmp_path / "proteins.fasta") == 3


@pytest.mark.parametrize("header", ["sp|P1|X", "b", "WP_1.1", "seq1", "Protein", "X1 LAG", "a>b"])
def test_what_is_certainly_a_header_is_cut_off(read, header):
    assert [(r.id, r.sequence) for r in read(f">a\nMKV>{header}\nEDR")] == [("a", "MKV"), (header.split()[0], "EDR")]


@pytest.mark.parametrize(
    "line", ["MKV>LAG", "mkv>lag", "MKV1>b second", "M<b>KV</b>", "MKV>", "é>b second", "M|>b second"]
)
@pytest.mark.parametrize("policy", [STRICT, REPLACE, KEEP])
def test_what_may_be_no_header_rejects_its_record_which_names_it(tmp_path, read, line, policy):
    bad, good = read(f">a\n{line}\nEDR\n>b\nMKV\n", policy)
    assert (bad.id, bad.reason, good.sequence) == ("a", Reason.INVALID_RESIDUE, "MKV")
    assert bad.detail.endswith(f"not read: {line[line.index('>') :]!r}")
    assert count_sequences(tmp_path / "proteins.fasta") == 2


def test_headers_joined_to_text_above_the_first_are_named(read):
    row, good = read("MKVLAG>b second\nEDR\nMKV>c\n>a\nMKV\n")
    assert (row.reason, good.sequence) == (Reason.TEXT_BEFORE_HEADER, "MKV")
    assert row.detail.endswith("; joined to its lines and not read: '>b second', '>c'")


def test_a_line_of_a_million_headers_takes_no_time(read):
    started = time.perf_counter()
    (record,) = read(b">a\nM|" + b">b" * 1_000_000)
    assert record.reason == Reason.INVALID_RESIDUE
    assert len(read(b"x\n" + b"y>z\n" * 300_000)) == 1
    assert time.perf_counter() - started < 20


def test_files_joined_at_block_borders_keep_every_record(tmp_path):
    path = tmp_path / "joined.fasta"
    parts = [long_text(900)[:-1], *([b">x%d joined\nMKV" % i for i in range(3000)]), long_text(5000)]
    path.write_bytes(b"".join(parts))
    records = list(read_records(path))
    assert [r.position for r in records] == list(range(1, 8901))
    assert all(r.reason is None for r in records)
    assert sum(r.detail == JOINED for r in records) == 3001
    assert count_sequences(path) == 8900


# Lengths and nucleotides


def test_a_file_of_very_long_proteins_is_kept_whole(tmp_path):
    giants = proteins(5, 30_000, 30_000)
    path = write_fasta(tmp_path / "giants.fasta", [(f"giant{i}", s) for i, s in enumerate(giants)])
    assert sequences(read_records(path)) == giants


def test_too_long_is_a_reason_only_where_there_is_a_limit(read):
    text = f">a\n{'MKVLA' * 20}\n>b\n{'MKVLA' * 20}G\n"
    assert [r.reason for r in read(text)] == [None, None]
    kept, rejected = read(text, ResiduePolicy(max_residues=100))
    assert kept.length == 100
    assert (rejected.reason, rejected.detail) == (Reason.TOO_LONG, "101 residues; the limit is 100")


def test_the_limit_counts_residues_after_spaces_and_stop_are_gone(read):
    assert sequences(read(">a\nMK VL\nA*\n", ResiduePolicy(max_residues=5))) == ["MKVLA"]


@pytest.mark.parametrize("letters", ["ACGT", "ACGU", "acgtn"])
def test_every_record_of_a_nucleotide_file_is_rejected(read, letters):
    text = "".join(f">gene{i}\n{(letters * 40)[i:]}\n" for i in range(3))
    records = read(text)
    assert [r.reason for r in records] == [Reason.NUCLEOTIDE_SEQUENCE] * 3
    assert records[0].detail == f"{len(letters) * 40} letters, all of them A, C, G, T, U or N"


@pytest.mark.parametrize("codes", ["R", "RYSWKMBDHV", "NNNNRNNNNY"])
@pytest.mark.parametrize("bases", ["ACGT", "acgu", "AAATTTATGCATTATAATCAGAATTATTAC"])
def test_codes_for_several_nucleotides_do_not_make_a_protein_of_them(read, codes, bases):
    sequence = bases * 30 + codes + bases * 30
    (record,) = read(f">a\n{sequence}\n")
    assert record.reason == Reason.NUCLEOTIDE_SEQUENCE
    assert record.detail == f"{len(sequence)} letters, all of them A, C, G, T, U, N or codes for several of them"
    assert sequences(read(f">a\n{sequence}\n", ResiduePolicy(nucleotides="keep"))) == [sequence.upper()]


def test_no_protein_is_taken_for_nucleotides(read, request):
    """Real ones, parts of them of few letters, and made-up ones of only the letters that nucleotides have too."""
    proteins = [
        record.sequence for record in read_records(request.path.parents[2] / "data/uniprot_sample_500.fasta.gz")
    ]
    # Silk, a cysteine-rich and an arginine-serine domain, an antifreeze protein, a linker.
    proteins += [
        "GAGAGS" * 20,
        "GCGSGCGGCGSGCGGCGSS" * 5,
        "RSRSYSRSRS" * 8,
        "DTASDAAAAAATAANAKAAA" * 4,
        "GSGSTGSGSA" * 7,
    ]
    by_share = random.Random(3).choices(
        # Without E, F, I, L, P and Q; as frequent as in Swiss-Prot.
        "ACDGHKMNRSTVWY", [83, 14, 55, 71, 23, 58, 24, 41, 55, 66, 53, 69, 11, 29], k=200_000
    )  # fmt: skip
    proteins += ["".join(by_share[i : i + 70]) for i in range(0, len(by_share), 70)]
    found = read("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(proteins)))
    assert {record.reason for record in found} == {None}


def test_nucleotide_letters_are_kept_where_that_is_asked_for(read):
    assert sequences(read(f">a\n{'ACGT' * 40}\n", ResiduePolicy(nucleotides="keep"))) == ["ACGT" * 40]


def test_a_short_peptide_of_nucleotide_letters_is_a_peptide(read):
    assert sequences(read(f">a\n{'ACGT' * 14}ACG\n")) == ["ACGT" * 14 + "ACG"]
    assert read(f">a\n{'ACGT' * 15}\n")[0].reason == Reason.NUCLEOTIDE_SEQUENCE


def test_one_other_residue_makes_it_a_protein(read):
    assert len(sequences(read(f">a\n{'ACGT' * 40}L\n"))) == 1


# Lines and headers


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
def test_every_kind_of_line_end_is_understood(read, end):
    records = read(end.join([">a first", "MKV", "LAG", ">b second", "EDR", ""]))
    assert sequences(records) == ["MKVLAG", "EDR"]
    assert [(r.id, r.description) for r in records] == [("a", "first"), ("b", "second")]


def test_blank_lines_are_nothing(read):
    assert sequences(read("\n\n>a\n\nMKV\n\nLAG\n\n\n>b\nEDR\n\n")) == ["MKVLAG", "EDR"]


def test_a_byte_order_mark_is_not_text_above_the_first_header(read):
    (record,) = read(b"\xef\xbb\xbf>a\nMKV\n")
    assert (record.id, record.sequence, record.reason) == ("a", "MKV", None)


def test_text_above_the_first_header_is_reported_and_the_records_kept(read):
    note, first, second = read("; made by hand\nMKV\n>a\nMKV\n>b\nLAG\n")
    assert (note.reason, note.position, note.id) == (Reason.TEXT_BEFORE_HEADER, 0, "")
    assert "'; made by hand'" in note.detail
    assert note.file in note.detail
    assert sequences([first, second]) == ["MKV", "LAG"]
    assert [first.position, second.position] == [1, 2]


def test_text_without_any_header_is_reported_once(read):
    (row,) = read("this is not FASTA\nat all\n")
    assert (row.reason, row.position) == (Reason.OTHER_FORMAT, 0)
    assert row.detail.endswith("has no line with a '>', so it is no FASTA; it begins 'this is not FASTA'")


@pytest.mark.parametrize("space", [" ", "\t", "\f", "\n\f\n \v "])
@pytest.mark.parametrize("above", ["", "; made by hand\n", "x" * (1 << 18)])
def test_white_space_before_a_header_does_not_hide_it(read, space, above):
    found = read(f"{above}{space}>a first\nMKV\n{space}>b\nEDR\n")
    # Where it would cost the line above the file's first header its end, that header is told of.
    kept = [(r.id, r.sequence) for r in found if not r.reason]
    if above.startswith("x") and "\n" not in space:
        assert "'>a first'" in found[0].detail
        kept.insert(0, ("a", "MKV"))
    assert kept == [("a", "MKV"), ("b", "EDR")]


def test_the_last_line_needs_no_newline(read):
    assert sequences(read(">a\nMKV\n>b\nLAG")) == ["MKV", "LAG"]


def test_a_header_alone_is_an_empty_sequence(read):
    for text in (">a", ">a\n", ">a description\n\n"):
        (record,) = read(text)
        assert (record.id, record.reason) == ("a", Reason.EMPTY_SEQUENCE)


def test_a_header_without_an_id_keeps_its_sequence(read):
    records = read(">\nMKV\n> spaced description\nLAG\n")
    assert sequences(records) == ["MKV", "LAG"]
    assert [(r.id, r.description) for r in records] == [("", ""), ("spaced", "description")]


def test_the_same_id_twice_is_two_records(read):
    records = read(">a\nMKV\n>a\nLAG\n>a\nMKV\n")
    assert [(r.id, r.position, r.sequence) for r in records] == [("a", 1, "MKV"), ("a", 2, "LAG"), ("a", 3, "MKV")]


@pytest.mark.parametrize(
    "identifier", ["../../etc/passwd", "a/b\\c", "sp|P12345|NAME", "i" * 300, "<b>&amp;", "'\"`$(rm)", "naïve"]
)
def test_an_id_is_kept_as_it_is_written(read, identifier):
    (record,) = read(f">{identifier} and a description\nMKV\n")
    assert (record.id, record.description) == (identifier, "and a description")


def test_an_id_ends_at_the_first_space_or_tab(read):
    records = read(">a b  c\nMKV\n>a\tb\nMKV\n")
    assert [(r.id, r.description) for r in records] == [("a", "b  c"), ("a", "b")]


def test_header_bytes_that_are_not_utf8_are_kept_as_escapes(read):
    (record,) = read(b">caf\xe9 M\xfcller\nMKV\n")
    assert (record.id, record.description, record.sequence) == (r"caf\xe9", r"M\xfcller", "MKV")


def test_what_a_terminal_would_obey_is_kept_as_an_escape_and_what_a_spreadsheet_reads_as_it_is(read):
    records = read(">a\x1b[31mred\x07 b\x9bc\x7f\nMKV\n>=cmd|'/c calc'!A1 +1 @x\nMKV\n")
    assert (records[0].id, records[0].description) == (r"a\x1b[31mred\x07", r"b\x9bc\x7f")
    assert (records[1].id, records[1].description) == ("=cmd|'/c", "calc'!A1 +1 @x")


def test_a_nul_in_a_header_is_kept_as_an_escape(read):
    (record,) = read(b">a\0b\nMKV\n")
    assert record.id == r"a\x00b"


# Files


def test_an_empty_file_is_one_row_that_names_the_file(read):
    for content in (b"", b"\n\n  \n", b"\xef\xbb\xbf"):
        (row,) = read(content)
        assert (row.reason, row.position, row.detail) == (Reason.EMPTY_FILE, 0, f"{row.file} holds no record")


def test_an_empty_gz_is_an_empty_file(read):
    for content in (b"", gzip.compress(b"")):
        assert [row.reason for row in read(content, name="empty.gz")] == [Reason.EMPTY_FILE]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_reads_like_the_plain_one(read, suffix):
    text = long_text(50)
    assert sequences(read(COMPRESS[suffix](text), name=f"a.faa{suffix}")) == sequences(read(text))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_pieces_laid_end_to_end_are_one_file(read, suffix):
    compress = COMPRESS[suffix]
    assert sequences(read(compress(b">a\nMKV\n>b\nLA") + compress(b"G\n>c\nEDR\n"), name=f"a{suffix}")) == [
        "MKV",
        "LAG",
        "EDR",
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_not_what_its_suffix_says_is_unreadable(read, suffix):
    (row,) = read(b">a\nMKV\n", name=f"a.fasta{suffix}")
    assert (row.reason, row.sequence) == (Reason.UNREADABLE_FILE, "")
    assert row.detail.startswith(f"{row.file} cannot be read past record 0: ")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kept", ["half", "all but the last byte"])
def test_a_truncated_file_keeps_the_records_before_the_cut_and_never_the_one_that_was_cut(read, suffix, kept):
    # Large enough for several blocks of bz2, which can give nothing of a block that is not whole.
    text = long_text(15_000)
    data = COMPRESS[suffix](text)
    whole = sequences(read(text))
    *good, damage = read(data[: len(data) // 2] if kept == "half" else data[:-1], name=f"a{suffix}")
    assert damage.reason == Reason.UNREADABLE_FILE
    assert damage.position == len(good) + 1
    assert 0 < len(good) < len(whole)
    assert sequences(good) == whole[: len(good)]


def test_damage_in_the_middle_of_a_gz_is_reported(read):
    text = long_text(2000)
    data = bytearray(gzip.compress(text))
    data[len(data) // 2] ^= 0xFF
    records = read(bytes(data), name="a.gz")
    assert records[-1].reason == Reason.UNREADABLE_FILE
    assert len(records) < 2000


def test_a_binary_file_gives_rejected_rows_and_no_sequence(read):
    noise = random.Random(0).randbytes(200_000)
    for content in (noise, b"\x7fELF\0\0" + noise, gzip.compress(noise), b"%PDF-1.7\n" + noise):
        records = read(content)
        assert records
        assert all(record.reason is not None and not record.sequence for record in records)


def test_rejected_rows_of_any_file_can_be_written_as_utf8(read):
    for record in read(b"\xff\xfe\x80text\n>\xff\xfe\nMK\xffV\n>b\n" + random.Random(0).randbytes(5000)):
        for text in (record.id, record.description, record.detail):
            text.encode("utf-8")


def test_a_file_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.fasta"):
        list(read_records(tmp_path / "none.fasta"))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_file_is_closed_when_reading_ends(tmp_path):
    for suffix, compress in {"": bytes, **COMPRESS}.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(compress(b">a\nMKV\n"))
        before = len(os.listdir("/proc/self/fd"))
        with warnings.catch_warnings():
            # A file that is closed only because it is forgotten warns.
            warnings.simplefilter("error", ResourceWarning)
            list(read_records(path))
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_uniprot_sample_is_read_whole(request):
    data = request.path.parents[2] / "data"
    found = list(sample_proteins(data))
    assert len(found) == 500
    assert len(set(found)) == 498
    assert sum(len(sequence) > 1022 for sequence in found) == 43


# Around records


def test_every_record_is_counted_whatever_it_is_worth(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"note\r\n>a\r\nMKV\r\n>b\r\n>c\r\nMJ>V\r\n>d caf\xe9\r\nMKV")
    assert count_sequences(path) == 4


def test_compressed_records_are_counted(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(compress(long_text(123)))
        assert count_sequences(path) == 123


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/b.faa.gz", "b"),
        ("b.fasta", "b"),
        ("b.v2.fasta.zst", "b.v2"),
        ("viruses.1.fa.bz2", "viruses.1"),
        ("plain", "plain"),
        (".hidden.fasta", ".hidden"),
        ("x.pep.xz", "x"),
    ],
)
def test_a_stem_is_the_name_without_compression_and_fasta_suffix(path, stem):
    assert fasta_stem(path) == stem


def test_a_digest_is_of_the_residues_and_of_nothing_else(read):
    first, second = read(">a\nmkv lag*\n>b other\nMKVLAG\n")
    assert sequence_digest(first.sequence) == sequence_digest(second.sequence)
    assert sequence_digest("MKVLAG") != sequence_digest("MKVLAV")
    assert len(sequence_digest("M")) == 16


def test_every_reason_has_a_remedy():
    assert set(REMEDY) == set(Reason)


def test_records_are_those_of_biopythons_parser(read):
    """Random files of headers, residues in lines of any length, blank lines and both kinds of line ends."""
    rng = random.Random(1)
    for _ in range(200):
        lines = []
        for number in range(rng.randrange(1, 8)):
            lines.append(
                f">{rng.choice(['p', 'sp|P1|A', 'x.y', 'a/b'])}{number}{rng.choice(['', ' of something', '  two'])}"
            )
            lines += [
                "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randrange(1, 90))) for _ in range(rng.randrange(1, 4))
            ]
            lines += [""] * rng.choice([0, 0, 1])
        content = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])
        expected = [(title.split(None, 1)[0], sequence) for title, sequence in SimpleFastaParser(io.StringIO(content))]
        assert [(record.id, record.sequence) for record in read(content, ResiduePolicy(nucleotides="keep"))] == expected
