"""Proteins out of what is neither FASTA nor a table; the small files are in tests/data/formats."""

import gzip
import re

import pytest

from esmflow.failures import Reason
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy

INSULIN = (
    "MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERGFFYTPKTRREAEDLQVGQVELGGGPGAGSLQPLALEGSLQKRGIVEQCCTSICSLYQLENYCN"
)
CRAMBIN = "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN"
A_CHAIN = INSULIN[89:]
STRICT, REMOVE = ResiduePolicy(), ResiduePolicy(gaps="remove")


@pytest.fixture
def formats(request):
    return request.path.parents[2] / "data" / "formats"


def records(path, policy=STRICT):
    return [record for task in input_tasks(path, policy) for record in task().records()]


def fields(path, policy=STRICT):
    return [(r.position, r.id, r.description, r.sequence or r.reason) for r in records(path, policy)]


def test_genbank_gives_its_translations_and_tells_of_features_without_one(formats):
    assert fields(formats / "insulin.gb") == [
        (1, "NP_000198.1", "insulin preproprotein", INSULIN),
        (2, "INS_pseudo", "", Reason.EMPTY_SEQUENCE),
    ]
    assert records(formats / "insulin.gb")[1].detail == "a CDS without a translation"


def test_genpept_gives_the_protein_itself(formats, tmp_path):
    path = tmp_path / "insulin.gp"
    body = "\n".join(f"{i + 1:>9} {INSULIN[i : i + 60].lower()}" for i in range(0, 110, 60))
    path.write_text(
        "LOCUS       NP_000198                110 aa            linear   PRI 01-JAN-2024\n"
        "DEFINITION  insulin preproprotein [Homo sapiens].\nACCESSION   NP_000198\nVERSION     NP_000198.1\n"
        'FEATURES             Location/Qualifiers\n     CDS             1..110\n                     /gene="INS"\n'
        f"ORIGIN\n{body}\n//\n"
    )
    assert fields(path) == [(1, "NP_000198.1", "insulin preproprotein [Homo sapiens]", INSULIN)]


def test_embl_gives_its_translations(formats):
    assert fields(formats / "insulin.embl") == [(1, "AAA59172.1", "insulin", INSULIN)]


def test_swiss_prot_text_and_uniprot_xml_give_their_entries_by_accession(formats):
    ((position, identifier, description, sequence),) = fields(formats / "insulin.txt")
    assert (position, identifier, sequence) == (1, "P01308", INSULIN)
    assert description.startswith("RecName: Full=Insulin;")
    assert fields(formats / "insulin.xml") == [(1, "P01308", "Insulin", INSULIN)]


def test_pdb_and_mmcif_give_the_sequences_of_their_chains_and_tell_of_those_without_amino_acids(formats):
    chain = (1, "1CRN:A", "UNP:P01542 CRAM_CRAAB", CRAMBIN)
    assert fields(formats / "crambin.pdb") == [chain, (2, "B", "", Reason.NUCLEOTIDE_SEQUENCE)]
    assert fields(formats / "crambin.cif") == [chain]


def test_pir_gives_its_entries(formats):
    assert fields(formats / "crambin.pir") == [
        (1, "CRAM_CRAAB", "Crambin - Abyssinian kale", CRAMBIN),
        (2, "INS_HUMAN", "Insulin precursor - human", INSULIN),
    ]


@pytest.mark.parametrize(("name", "gapped"), [("insulin.sto", 3), ("insulin.a3m", 1)])
def test_alignments_are_told_of_and_read_where_gaps_are_removed(formats, name, gapped):
    strict = records(formats / name)
    assert [i for i, r in enumerate(strict) if r.reason == Reason.GAP_CHARACTERS] == [gapped]
    found = records(formats / name, REMOVE)
    assert [r.position for r in found] == list(range(1, len(found) + 1))
    assert found[0].sequence == A_CHAIN
    assert all(r.reason is None and r.sequence.isalpha() for r in found)
    assert found[-1].sequence == ("GIVDECCFRSCDLRRLEMYCAP" if name.endswith("a3m") else A_CHAIN[:-2])


def test_what_colabfold_writes_above_an_alignment_is_no_text_above_a_header(tmp_path):
    path = tmp_path / "query.a3m"
    path.write_text("#6,3\t1,1\n>101\nMKVLAG---\n>102\n------EDR\n")
    assert [r.sequence for r in records(path, REMOVE)] == ["MKVLAG", "EDR"]


NAMES = ("insulin.gb", "insulin.embl", "insulin.txt", "insulin.xml", "crambin.pdb", "crambin.cif", "crambin.pir")


@pytest.mark.parametrize("name", [*NAMES, "insulin.sto"])
def test_they_are_read_compressed_with_other_line_ends_and_under_any_name(formats, tmp_path, name):
    content = (formats / name).read_bytes()
    expected = fields(formats / name, REMOVE)
    for i, variant in enumerate((content.replace(b"\n", b"\r\n"), gzip.compress(content))):
        path = tmp_path / f"x{i}.faa"
        path.write_bytes(variant)
        assert fields(path, REMOVE) == expected


@pytest.mark.parametrize("name", ["insulin.gb", "insulin.embl", "insulin.txt", "insulin.xml", "crambin.pir"])
def test_a_file_that_is_cut_gives_whole_proteins_only_and_says_so(formats, tmp_path, name):
    content = (formats / name).read_bytes()
    whole = {r.sequence for r in records(formats / name)}
    for end in range(200, len(content) - 10, 31):
        path = tmp_path / name
        path.write_bytes(content[:end])
        found = records(path)
        assert found
        assert {r.sequence for r in found} <= whole | {""}


def test_entries_before_damage_are_kept(formats, tmp_path):
    content = (formats / "insulin.txt").read_bytes()
    path = tmp_path / "many.dat"
    path.write_bytes(content * 1200 + content[: len(content) // 2])
    *good, bad = records(path)
    assert [r.position for r in good] == list(range(1, 1201))
    assert {r.sequence for r in good} == {INSULIN}
    assert (bad.position, bad.reason) == (1201, Reason.UNREADABLE_FILE)
    assert f"{path} cannot be read as a Swiss-Prot file past record 1200: " in bad.detail
    path.write_bytes(gzip.compress(content * 1200)[:-20])
    assert records(path)[-1].reason == Reason.UNREADABLE_FILE


def test_a_genome_without_proteins_is_told_of(formats, tmp_path):
    path = tmp_path / "genome.gb"
    content = (formats / "insulin.gb").read_text()
    path.write_text(re.sub(r" {5}CDS .*(?=ORIGIN)", "", content, flags=re.DOTALL))
    (row,) = records(path)
    assert (row.reason, row.position) == (Reason.EMPTY_FILE, 0)
    assert row.detail == f"{path} is a GenBank file without CDS features"


def test_gaps_and_stray_letters_in_other_formats_are_rejected_like_those_of_fasta(tmp_path):
    path = tmp_path / "a.pir"
    path.write_text(">P1;A\none\nMKV-LAG*\n>P1;B\ntwo\nMK1V*\n>P1;C\nthree\nMKV*\n")
    assert [r.reason for r in records(path)] == [Reason.GAP_CHARACTERS, Reason.INVALID_RESIDUE, None]


@pytest.mark.parametrize("name", [
    "insulin.txt", "insulin.xml", "insulin.gb", "insulin.embl", "insulin.sto", "insulin.a3m", "crambin.pir",
    "crambin.pdb", "crambin.cif",
])  # fmt: skip
@pytest.mark.parametrize(
    "begin", [b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \t\r\n"], ids=["empty lines", "mark", "mark and lines"]
)
def test_a_file_may_begin_with_empty_lines_and_a_byte_order_mark(formats, tmp_path, name, begin):
    content = (formats / name).read_bytes()
    (tmp_path / name).write_bytes(begin + content)
    expected = fields(formats / name, REMOVE)
    assert expected
    assert fields(tmp_path / name, REMOVE) == expected


@pytest.mark.parametrize("name", ["insulin.txt", "insulin.gb", "insulin.embl", "insulin.sto"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "mac"])
def test_files_that_were_joined_with_empty_lines_between_them_lose_nothing(formats, tmp_path, name, line_end):
    content = (formats / name).read_bytes().replace(b"\n", line_end)
    (tmp_path / name).write_bytes(content + line_end * 2 + content)
    once = [row[1:] for row in fields(formats / name, REMOVE)]
    assert [row[1:] for row in fields(tmp_path / name, REMOVE)] == once * 2
