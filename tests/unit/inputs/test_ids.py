"""Records are called by the first word of their header, their accession, or what a regular expression finds."""

import pytest

from esmflow.config.configuration import ConfigurationError, validated
from esmflow.inputs.ids import ACCESSION, IdError, id_pattern
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy


def named(path, content: str, rule: str):
    path.write_text(content)
    records = [record for task in input_tasks(path, ResiduePolicy(), rule) for record in task().records()]
    return [(record.id, record.description) for record in records]


@pytest.mark.parametrize(
    ("header", "accession"),
    [
        ("sp|P84927|X_HUMAN Protein X OS=Homo sapiens", "P84927"),
        ("tr|A0A024R161|A0A024R161_HUMAN Guanine", "A0A024R161"),
        ("ref|NP_000198.1| insulin [Homo sapiens]", "NP_000198.1"),
        ("gi|4557671|ref|NP_000198.1| insulin", "NP_000198.1"),
        ("gi|386828|gb|AAA59172.1| insulin", "AAA59172.1"),
        ("emb|CAA23828.1|", "CAA23828.1"),
        ("dbj|BAA00001.1| x", "BAA00001.1"),
        ("pir||A42594 x", "A42594"),
        ("prf||1902227A", "1902227A"),
        ("gi|231300|pdb|1ABC|A Chain A", "1ABC_A"),
        ("pdb|1ABC| x", "1ABC"),
        ("gnl|WGS|ABC_1 x", "ABC_1"),
        ("lcl|seq1 x", "seq1"),
        ("gi|4557671 x", "4557671"),
        ("NP_000198.1 insulin", "NP_000198.1"),
        ("UniRef90_P84927 Cluster", "UniRef90_P84927"),
        ("a|b|c", "a|b|c"),
        ("sp|", "sp|"),
        ("sp||x", "sp||x"),
    ],
)
def test_an_accession_is_what_uniprot_and_ncbi_mean_by_it(tmp_path, header, accession):
    assert named(tmp_path / "a.fasta", f">{header}\nMKV\n", ACCESSION) == [(accession, header)]


def test_a_regular_expression_looks_at_the_whole_header(tmp_path):
    content = ">lcl|x [locus_tag=b0001] [gene=thrL]\nMKV\n>plain\nMKV\n>y [locus_tag=]\nJ\n>\nMKV\n"
    assert named(tmp_path / "a.fasta", content, r"locus_tag=(\w*)") == [
        ("b0001", "lcl|x [locus_tag=b0001] [gene=thrL]"),
        ("plain", "plain"),
        ("y", "y [locus_tag=]"),
        ("", ""),
    ]


def test_rows_about_files_are_no_records_to_name(tmp_path):
    assert named(tmp_path / "a.fasta", "", r"(.*)") == [("", "")]


def test_tables_are_named_by_the_same_rule(tmp_path):
    content = "id\tsequence\tdescription\nsp|P1|X\tMKV\tone\n"
    assert named(tmp_path / "t.tsv", content, ACCESSION) == [("P1", "sp|P1|X one")]


@pytest.mark.parametrize("rule", ["acession", "first word", r"\w+", r"(a)(b)"])
def test_a_rule_without_one_group_is_a_sentence(rule, request):
    with pytest.raises(IdError, match="or a regular expression with one group"):
        id_pattern(rule)
    with pytest.raises(ConfigurationError, match=r"^id: "):
        validated({"id": rule}, request.path.parents[3] / "workflow" / "schemas" / "config.schema.yaml")


def test_a_rule_that_is_nearly_a_name_is_told_which(request):
    schema = request.path.parents[3] / "workflow" / "schemas" / "config.schema.yaml"
    with pytest.raises(ConfigurationError, match=r"did you mean accession\?$"):
        validated({"id": "acession"}, schema)
    with pytest.raises(ConfigurationError, match="is no regular expression"):
        validated({"id": "("}, schema)
