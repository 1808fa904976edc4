"""A whole run over what people have: other formats, alignments, joined files, capital suffixes, notes in the sheet."""

from __future__ import annotations

import csv
import gzip
import shutil

import h5py
from workflow_run import PROJECT

FORMATS = PROJECT / "tests" / "data" / "formats"


def test_every_record_of_every_kind_of_file_has_its_row(quick_run):
    run = quick_run(1, groups=1, formats=["h5", "h5ad", "skbio"], gaps="remove", id="accession", include="mean")
    names = [path.name for path in sorted(FORMATS.iterdir())]
    for name in names:
        shutil.copy(FORMATS / name, run.folder)
    text = b">sp|P1|A one\nMKVLAGIVGLLLAQ\n>tr|Q2|B two\nMKV--LAGIV>r3|x joined\nMKTAYIAKQR\n"
    (run.folder / "joined.faa.GZ").write_bytes(gzip.compress(text))
    (run.folder / "reads.fasta").write_text("@read\nACGT\n+\nIIII\n")
    lines = [f"{name}\t{name}\tlab\n" for name in (*names, "reads.fasta")]
    (run.folder / "samples.tsv").write_text("".join(["sample\tfasta\ttissue\n{two}\tjoined.faa.GZ\tgut\n", *lines]))
    run.succeed()
    with open(run.results / "manifest.tsv", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [(r["id"], r["description"], r["length"], r["tissue"]) for r in rows if r["sample"] == "{two}"] == [
        ("P1", "sp|P1|A one", "14", "gut"),
        ("Q2", "tr|Q2|B two", "8", "gut"),
        ("r3|x", "r3|x joined", "10", "gut"),
    ]
    embedded = {name: sum(r["file"] == name and r["status"] == "embedded" for r in rows) for name in names}
    assert embedded == {
        "crambin.cif": 1, "crambin.pdb": 1, "crambin.pir": 2, "insulin.a3m": 3, "insulin.embl": 1, "insulin.gb": 1,
        "insulin.sto": 4, "insulin.txt": 1, "insulin.xml": 1,
    }  # fmt: skip
    assert run.summary()["reasons"] == {"empty_sequence": 1, "nucleotide_sequence": 1, "other_format": 1}
    # scikit-bio's format comes with the sequences of every input, which is read again for it.
    with h5py.File(run.results / "embeddings" / "mean_layer2" / "embeddings.skbio.h5") as file:
        ends = file["idptr"][:]
        text = file["id"][:].tobytes().decode()
        assert file["embedding"].shape == (18, 32)
    sequences = [text[start:end] for start, end in zip([0, *ends], ends)]
    assert sequences[:3] == ["MKVLAGIVGLLLAQ", "MKVLAGIV", "MKTAYIAKQR"]
    assert [len(sequence) for sequence in sequences] == [int(r["length"]) for r in rows if r["status"] == "embedded"]


def test_what_was_read_under_other_keys_is_read_again(quick_run):
    run = quick_run(1, groups=1)
    (run.folder / "samples.tsv").write_text("sample\tfasta\nx\ta.fasta\n")
    (run.folder / "a.fasta").write_text(">sp|P1|A\nMKV--LAG\n>b\nMKVLAGEDR\n")
    run.succeed()
    assert run.summary()["reasons"] == {"gap_characters": 1}
    run.configure(gaps="remove", id="accession")
    run.succeed()
    assert (run.summary()["embedded"], run.summary()["rejected"]) == (2, 0)
    assert "\tP1\tsp|P1|A\t6\t" in (run.results / "manifest.tsv").read_text()
