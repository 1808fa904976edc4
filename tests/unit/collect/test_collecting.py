"""Collecting accounts for every record: its vector, or why there is none, in the order of the input."""

import csv
import itertools
import json
import logging
import os
import re
import subprocess
from collections import Counter
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_up import proteins, random_model, relative_error, write_converted
from stage_settings import collect_settings, plan_settings

from esmflow.arrays import Outputs
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.collecting import collect
from esmflow.collect.joining import CollectError, Tally
from esmflow.collect.summary import Summary
from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.embedding.run_record import RunRecord, ShardResult, Speed
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.failures import Failure, Reason, write_failures
from esmflow.inputs.fasta import read_records
from esmflow.inputs.records import Record
from esmflow.inputs.residues import sequence_digest
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint
from esmflow.plan import planning
from esmflow.plan import record_table as records
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import deal_inputs
from esmflow.plan.record_table import RecordTable
from esmflow.plan.run_plan import Plan
from esmflow.plan.shards import list_shards, read_shard, shard_name
from esmflow.report.summary import Places, summary_lines
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Store

DIMENSIONS = ModelDimensions(layers=2, hidden=16, heads=2, has_lm_head=True, has_contact_head=True)
OUTPUTS = Outputs((0, 2), ("mean", "per_residue"))
PLACES = Places("embeddings/", "manifest.parquet", "report.html", "failures.tsv", "snakemake")
DIFFICULT = b"""note
>good first
MKVLAGEDRTKQ
>stop
MKV*LAG
>empty
>good again
mkvl agEDRTKQ*
>rare
MUZBOXK
>../../etc/passwd|x and more
NFYMHWC
>caf\xe9 \xfc
MKJV
>gene
ACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTACGT
>long
MKVLAGEDRTKQNFYMHWCMKVLAGEDRTKQNFYMHWC
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = random_model(DIMENSIONS.layers, DIMENSIONS.hidden, DIMENSIONS.heads)
    path = write_converted(tmp_path_factory.mktemp("checkpoint") / "a.safetensors", model)
    return ReferenceEngine.load(str(path), OUTPUTS, "fp32", "cpu")


class Run:
    """What a run leaves on disk, made step by step with the library itself: plan, embed, collect."""

    def __init__(self, folder, engine, files, store=None, groups=2, max_residues=None):
        self.engine = engine
        self.inputs = []
        for number, (name, content) in enumerate(files.items()):
            path = folder / "input" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.inputs.append(InputFile(f"sample {number}", str(path)))
        fingerprint = Fingerprint(
            "c",
            OUTPUTS.layers,
            OUTPUTS.include,
            None,
            "reference",
            "",
            "auto",
            "truncate",
            max_residues,
            None,
            "reject",
        )
        self.long = fingerprint.long
        self.store = Store(store or folder / "store", fingerprint)
        self.store.create()
        self.shards = [folder / f"group-{g}" for g in range(groups)]
        self.plan_path, self.records_path = folder / "plan.json", folder / "records.parquet"
        self.run_paths = [folder / f"run-{g}.json" for g in range(groups)]
        self.failure_paths = [folder / f"failures-{g}.tsv" for g in range(groups)]
        self.outputs = collect_settings(
            folder,
            folder / "out",
            fingerprint,
            runs=self.run_paths,
            failure_lists=self.failure_paths,
            store=str(self.store.folder.parent),
        )

    def plan(self) -> None:
        settings = plan_settings(
            self.plan_path.parent,
            self.inputs,
            self.shards,
            CostModel(DIMENSIONS, self.long),
            shard_residues=200,
        )
        deal_inputs(settings, StoredSequences(self.store)).write(self.plan_path)

    def embed(self, fail: dict[str, Failure] | None = None) -> None:
        """`fail`: failures by sequence, instead of vectors."""
        for group, folder in enumerate(self.shards):
            names, shards, failures = [], [], list((fail or {}).values()) if group == 0 else []
            for shard in list_shards(folder):
                sequences = [(digest, s) for digest, s in read_shard(shard) if s not in (fail or {})]
                segment = extract_esm_features(sequences, self.engine, 500, long=self.long).segment
                names.append(shard_name(digest for digest, _ in sequences))
                self.store.write(names[-1], segment)
                failures += segment.failures
                residues = int(segment.lengths.sum())
                begun = 100.0 + len(names)
                shards.append(ShardResult("", names[-1], len(segment), residues, 0, 500, "fp32", begun, begun + 2))
            write_failures(self.failure_paths[group], failures)
            RunRecord(
                group=str(group),
                segments_written=tuple(names),
                sequences=sum(len(self.store.read(name)) for name in names),
                failed_sequences=len(failures),
                shards=tuple(shards),
            ).write(self.run_paths[group])

    def collect(self, formats=("pt", "h5")) -> Summary:
        return collect(replace(self.outputs, formats=formats))

    def everything(self, **fail) -> Summary:
        self.plan()
        self.embed(**fail)
        return self.collect()

    @property
    def manifest(self) -> list[dict]:
        return pq.read_table(self.outputs.manifest).to_pylist()

    @property
    def failures(self) -> list[dict[str, str]]:
        with open(self.outputs.failures, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle, delimiter="\t"))

    def pt(self, stem: str, array: str = "mean_layer2") -> dict:
        path = f"{self.outputs.embeddings}/{array}/pt/{stem}_ESM.pt"
        return torch.load(path, weights_only=True)

    def h5(self, array: str = "mean_layer2") -> h5py.File:
        return h5py.File(f"{self.outputs.embeddings}/{array}/embeddings.h5")

    def vector(self, sequence: str, array: str = "mean_layer2") -> np.ndarray:
        """Of one sequence, computed alone."""
        prepared = self.engine.prepare([sequence[: self.long.embedded(len(sequence))]])
        values = self.engine.fetch(self.engine.launch(prepared))[array]
        return values if array.startswith("per_residue") else values[0]


def fasta(sequences, name="p") -> bytes:
    return "".join(f">{name}{i} protein {i}\n{s}\n" for i, s in enumerate(sequences)).encode()


@pytest.fixture
def difficult(tmp_path, engine):
    """Difficult records, good ones in another order, an empty file, and one that is not what it says."""
    files = {
        "difficult.fasta": DIFFICULT,
        "good.faa": fasta([*proteins(29, 5, 40), *proteins(1, 30, 30), "MKVLAGEDRTKQ"]),
        "empty.fasta": b"",
        "not.fasta.gz": b">a\nMKV\n",
    }
    return Run(tmp_path, engine, files, max_residues=30)


# Accounting


def test_every_record_is_embedded_failed_or_rejected(difficult):
    failed = {"NFYMHWC": Failure(sequence_digest("NFYMHWC").hex(), Reason.OUT_OF_MEMORY, "no room")}
    summary = difficult.everything(fail=failed)
    found = [(row["id"], row["status"], row["reason"]) for row in difficult.manifest]
    assert found[:10] == [
        ("", "rejected", "text_before_header"),
        ("good", "embedded", None),
        ("stop", "rejected", "invalid_residue"),
        ("empty", "rejected", "empty_sequence"),
        ("good", "embedded", None),
        ("rare", "embedded", None),
        ("../../etc/passwd|x", "failed", "out_of_memory"),
        (r"caf\xe9", "rejected", "invalid_residue"),
        ("gene", "rejected", "nucleotide_sequence"),
        ("long", "embedded", None),
    ]
    assert found[10:41] == [(f"p{i}", "embedded", None) for i in range(31)]
    assert found[41:] == [("", "rejected", "empty_file"), ("", "rejected", "unreadable_file")]
    assert (summary.records, summary.embedded, summary.failed, summary.rejected) == (43, 35, 1, 7)
    assert summary.records == summary.embedded + summary.failed + summary.rejected
    assert summary.reasons == {
        "empty_file": 1,
        "empty_sequence": 1,
        "invalid_residue": 2,
        "nucleotide_sequence": 1,
        "out_of_memory": 1,
        "text_before_header": 1,
        "unreadable_file": 1,
    }
    assert summary.duplicates == 2
    assert summary.groups_with_failures == ("0",)


def test_the_manifest_says_what_the_record_was_and_where_its_vector_is(difficult):
    difficult.everything()
    rows = difficult.manifest
    read = [record for file in difficult.inputs for record in read_records(file.path)]
    assert len(rows) == len(read)
    samples = {file.path: file.sample for file in difficult.inputs}
    for row, record in zip(rows, read):
        assert row["sample"] == samples[record.file]
        for column, value in (
            ("file", record.file),
            ("record", record.position),
            ("id", record.id),
            ("description", record.description),
            ("length", record.length),
            ("detail", record.detail),
        ):
            assert row[column] == value
        if record.reason:
            assert row["digest"] is row["segment"] is row["row"] is row["precision"] is None
            continue
        assert row["digest"] == sequence_digest(record.sequence).hex()
        assert row["precision"] == "fp32"
        segment = difficult.store.read(row["segment"])
        assert segment.digests[row["row"]].tobytes().hex() == row["digest"]
        vector = segment.arrays["mean_layer2"][row["row"]]
        assert relative_error(vector, difficult.vector(record.sequence)) < 1e-5


def test_a_truncated_record_is_marked(difficult):
    summary = difficult.everything()
    cut = [row["id"] for row in difficult.manifest if row["truncated"]]
    long = [r.id for file in difficult.inputs for r in read_records(file.path) if not r.reason and r.length > 30]
    assert "long" in cut
    assert cut == long
    assert summary.truncated == len(long)
    ids = difficult.pt("difficult", "per_residue_layer2")
    assert ids["data"][ids["proteins"].index("long")].shape == (30, 16)


def test_a_file_of_many_record_blocks_gives_one_complete_pt(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(records, "ROWS_PER_GROUP", 7)
    first, second = proteins(25, 5, 30), proteins(20, 5, 30, seed=1)
    run = Run(tmp_path, engine, {"a.fasta": fasta(first), "b.fasta": fasta(second)})
    run.everything()
    assert pq.ParquetFile(run.records_path).num_row_groups == 7
    for stem, sequences in (("a", first), ("b", second)):
        found = run.pt(stem)
        assert found["proteins"] == [f"p{i}" for i in range(len(sequences))]
        for vector, sequence in zip(found["data"], sequences):
            assert relative_error(vector.numpy(), run.vector(sequence)) < 1e-5
    assert len(run.manifest) == 45
    with run.h5() as file:
        assert file["embeddings"].shape == (45, 16)
    assert sorted(os.listdir(f"{run.outputs.embeddings}/mean_layer2/pt")) == ["a_ESM.pt", "b_ESM.pt"]


# Embeddings


def test_both_formats_have_the_vectors_of_the_embedded_records_in_input_order(difficult):
    difficult.everything()
    read = {
        file.path.rpartition("/")[2].split(".")[0]: [r for r in read_records(file.path) if not r.reason]
        for file in difficult.inputs
    }
    for array in OUTPUTS.names():
        vectors = []
        for stem, embedded in read.items():
            found = difficult.pt(stem, array)
            assert found["proteins"] == [record.id for record in embedded]
            for vector, record in zip(found["data"], embedded):
                assert relative_error(vector.numpy(), difficult.vector(record.sequence, array)) < 1e-5
            vectors += [vector.numpy() for vector in found["data"]]
        with difficult.h5(array) as file:
            assert file["ids"].asstr()[:].tolist() == [r.id for r in itertools.chain(*read.values())]
            joined = np.concatenate(vectors) if array.startswith("per_residue") else np.stack(vectors)
            assert np.array_equal(file["embeddings"][:], joined)
    assert difficult.pt("empty") == difficult.pt("not") == {"proteins": [], "data": []}


def test_one_sequence_in_two_files_is_computed_once_and_written_twice(tmp_path, engine):
    run = Run(tmp_path, engine, {"a.fasta": fasta(["MKVLAG", "EDRTKQ"]), "b.fasta": fasta(["mkvlag*", "MKVLAG"])})
    summary = run.everything()
    assert (summary.records, summary.duplicates, summary.computed_sequences) == (4, 2, 2)
    assert torch.equal(run.pt("a")["data"][0], run.pt("b")["data"][0])
    assert torch.equal(run.pt("b")["data"][0], run.pt("b")["data"][1])


def test_an_h5_names_the_fingerprint_the_precision_and_the_versions(difficult):
    difficult.everything()
    with difficult.h5("per_residue_layer0") as file:
        attributes = dict(file.attrs)
    assert attributes["fingerprint"] == difficult.store.fingerprint
    assert (attributes["layer"], attributes["pooling"], attributes["precision"]) == (0, "per_residue", "fp32")
    assert attributes["model"] == "made up"
    assert attributes["version_torch"] == torch.__version__
    assert {"version_python", "version_fair-esm", "version_numpy", "version_h5py"} <= attributes.keys()


def test_only_the_formats_that_are_asked_for_are_written(difficult):
    difficult.plan()
    difficult.embed()
    difficult.collect(formats=["h5"])
    for array in OUTPUTS.names():
        assert os.listdir(f"{difficult.outputs.embeddings}/{array}") == ["embeddings.h5"]


def test_what_an_earlier_run_computed_is_collected_too(tmp_path, engine):
    store = tmp_path / "store"
    first, second = proteins(20, 5, 30), proteins(20, 5, 30, seed=1)
    Run(tmp_path / "first", engine, {"a.fasta": fasta(first)}, store).everything()
    run = Run(tmp_path / "second", engine, {"a.fasta": fasta(first[:5] + second)}, store)
    summary = run.everything()
    assert Plan.read(run.plan_path).stored == 5
    assert (summary.records, summary.embedded, summary.computed_sequences) == (25, 25, 20)
    for vector, sequence in zip(run.pt("a")["data"], first[:5] + second):
        assert relative_error(vector.numpy(), run.vector(sequence)) < 1e-5
    again = Run(tmp_path / "third", engine, {"a.fasta": fasta(first + second)}, store).everything()
    assert again.computed_sequences == 0
    assert again.residues_per_second is None


def test_different_precisions_are_all_named_and_warned_of(tmp_path, engine, caplog):
    run = Run(tmp_path, engine, {"a.fasta": fasta(proteins(30, 10, 20))})
    run.plan()
    run.embed()
    half = ReferenceEngine(engine.model, engine.outputs, "bf16", engine.device)
    (shard, *_) = list_shards(run.shards[0])
    sequences = list(read_shard(shard))
    name = shard_name(digest for digest, _ in sequences)
    run.store.path(name).unlink()
    run.store.write(name, extract_esm_features(sequences, half, 500).segment)
    with caplog.at_level(logging.WARNING):
        run.collect()
    assert "different precisions (bf16, fp32)" in caplog.text
    with run.h5() as file:
        assert file.attrs["precision"] == "bf16+fp32"
    precisions = {row["segment"]: row["precision"] for row in run.manifest}
    assert precisions.pop(name) == "bf16"
    assert set(precisions.values()) == {"fp32"}


def test_a_run_without_any_good_record_is_collected(tmp_path, engine):
    summary = Run(tmp_path, engine, {"a.fasta": b">a\n>b\nMJ\n"}).everything()
    assert (summary.records, summary.embedded, summary.rejected) == (2, 0, 2)


# Tables


def read_tsv(path) -> list[dict[str, str]]:
    """As awk and cut do: lines end where they end, and every tab begins a cell."""
    header, *lines = (line.split("\t") for line in path_text(path).split("\n")[:-1])
    return [dict(zip(header, cells, strict=True)) for cells in lines]


def path_text(path) -> str:
    with open(path, newline="", encoding="utf-8") as handle:
        return handle.read()


def as_text(value) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_manifest_as_tsv_says_the_same_as_the_parquet(difficult):
    difficult.everything()
    expected = [{column: as_text(value) for column, value in row.items()} for row in difficult.manifest]
    assert read_tsv(difficult.outputs.manifest_tsv) == expected


def test_failures_tsv_has_a_row_for_every_record_without_a_vector(difficult):
    difficult.everything()
    lines = open(difficult.outputs.failures, encoding="utf-8").read().splitlines()
    assert lines[0] == "file\trecord\tid\treason\tdetail"
    without = [row for row in difficult.manifest if row["status"] != "embedded"]
    assert difficult.failures == [
        {column: str(row[column]) for column in ("file", "record", "id", "reason", "detail")} for row in without
    ]
    assert len(without) == 7
    assert all(row["detail"] for row in difficult.failures)


def test_without_failures_the_table_has_its_header_only(tmp_path, engine):
    run = Run(tmp_path, engine, {"a.fasta": fasta(["MKV"])})
    run.everything()
    assert run.failures == []
    assert open(run.outputs.failures).read() == "file\trecord\tid\treason\tdetail\n"


# How texts stand in the Parquet, and how in a TSV file.
NASTY = {
    "tab\there": "tab here",
    'quote"d "twice"': "quote'd 'twice'",
    '"Candidatus': "'Candidatus",
    "new\nline": "new line",
    "old\r\nline": "old  line",
    "'single'": "'single'",
    "naïve": "naïve",
    "=1+1": "'=1+1",
    "+cmd|' /C calc'!A0": "'+cmd|' /C calc'!A0",
    "@SUM(A1)": "'@SUM(A1)",
    "-2+3": "'-2+3",
    "a=b+c-d@e": "a=b+c-d@e",
    "red\x1b[31m": "red\N{REPLACEMENT CHARACTER}[31m",
    "bell\x07\x01\x7f": "bell" + 3 * "\N{REPLACEMENT CHARACTER}",
    "c1\x9b31m": "c1\N{REPLACEMENT CHARACTER}31m",
    "next\x85line\u2028another": "next line another",
    "comma,d": "comma,d",
    " spaced ": " spaced ",
    '"': "'",
}


@pytest.fixture
def nasty(tmp_path, engine) -> Run:
    """Collected, with texts that no table likes; every second record is rejected."""
    run = Run(tmp_path, engine, {"a.fasta": fasta(["MKVLAG"])})
    run.plan()
    run.embed()
    # FASTA cannot hold all of these, so they go into the record table directly.
    digest = sequence_digest("MKVLAG")
    with RecordTable(run.records_path) as table:
        for position, text in enumerate(NASTY, 1):
            table.add(text, Record(text, position, text, text, "MKVLAG", 6, None, text), digest)
            table.add(text, Record(text, position, text, text, "", 6, Reason.INVALID_RESIDUE, text), None)
    replace(Plan.read(run.plan_path), records=2 * len(NASTY)).write(run.plan_path)
    run.collect(formats=["h5"])
    return run


def test_ids_that_no_table_likes_survive(nasty):
    for rows, texts in ((nasty.manifest, list(NASTY)), (read_tsv(nasty.outputs.manifest_tsv), list(NASTY.values()))):
        assert [row["id"] for row in rows] == [text for text in texts for _ in (0, 1)]
        for column in ("sample", "file", "description", "detail"):
            assert [row[column] for row in rows] == [row["id"] for row in rows]
    with nasty.h5() as file:
        assert file["ids"].asstr()[:].tolist() == list(NASTY)


def test_the_tsv_tables_are_read_by_awk_cut_pandas_and_polars_as_they_come(nasty):
    texts, half = list(NASTY.values()), len(NASTY)
    for path, rows in ((nasty.outputs.manifest_tsv, 2 * half), (nasty.outputs.failures, half)):
        every = 2 if rows == half else 1
        expected = [text for text in texts for _ in range(2 // every)]
        columns = path_text(path).partition("\n")[0].split("\t")
        place = str(columns.index("id") + 1)
        lines = subprocess.run(["cut", "-f", place, path], capture_output=True, text=True, check=True).stdout
        assert lines.split("\n") == ["id", *expected, ""]
        assert pd.read_csv(path, sep="\t")["id"].tolist() == expected
        assert pl.read_csv(path, separator="\t")["id"].to_list() == expected
        with open(path, newline="", encoding="utf-8") as handle:
            assert [row["id"] for row in csv.DictReader(handle, delimiter="\t")] == expected
    program = '$8=="embedded" {n++} END {print n}'
    for path, number in ((nasty.outputs.manifest_tsv, half), (nasty.outputs.failures, 0)):
        counted = subprocess.run(["awk", "-F\t", program, path], capture_output=True, text=True, check=True).stdout
        assert counted == (f"{number}\n" if number else "\n")


# What does not add up


def test_a_record_with_neither_vector_nor_reason_is_an_error_that_names_it(tmp_path, engine):
    run = Run(tmp_path, engine, {"a.fasta": fasta(proteins(30, 10, 20))})
    run.plan()
    run.embed()
    record = RunRecord.read(run.run_paths[0])
    forgotten = [digest.tobytes() for name in record.segments_written for digest in run.store.read(name).digests]
    replace(record, segments_written=()).write(run.run_paths[0])
    lost = [r for r in read_records(run.inputs[0].path) if sequence_digest(r.sequence) in forgotten]
    assert 3 < len(lost) < 30
    with pytest.raises(CollectError) as error:
        run.collect()
    message = str(error.value)
    assert message.startswith(f"{len(lost)} records have neither an embedding nor a reason, the first: ")
    assert f"{run.inputs[0].path}, record {lost[0].position} ({lost[0].id})" in message
    assert "--forcerun plan" in message


def test_ids_steer_no_terminal_and_begin_no_line_of_the_message_that_names_them():
    tally, lost = Tally(), "x\nERROR \x1b[2J\u202e"
    rows = {name: pa.nulls(1, MANIFEST_SCHEMA.field(name).type) for name in MANIFEST_SCHEMA.names}
    rows |= {"file": pa.array(["a\x07.fa"]), "record": pa.array([2]), "id": pa.array([lost])}
    tally.count(pa.table(rows))
    with pytest.raises(CollectError, match=re.escape(r"a\x07.fa, record 2 (x\nERROR \x1b[2J\u202e). Segments")):
        tally.check(planned=1)


@pytest.mark.parametrize("difference", [-1, 1])
def test_more_or_fewer_records_than_were_planned_are_an_error(difficult, difference):
    difficult.plan()
    difficult.embed()
    planned = Plan.read(difficult.plan_path)
    replace(planned, records=planned.records + difference).write(difficult.plan_path)
    with pytest.raises(CollectError, match=f"records do not add up: {43 + difference} planned, 43 read"):
        difficult.collect()


def test_a_segment_that_is_cut_or_gone_is_an_error_and_leaves_no_manifest(difficult):
    difficult.plan()
    difficult.embed()
    cut, gone = (difficult.store.path(RunRecord.read(path).segments_written[0]) for path in difficult.run_paths)
    os.truncate(cut, cut.stat().st_size - 1)
    gone.unlink()
    with pytest.raises(CollectError, match=r"and 1 more: missing, or damaged.* The same command again computes"):
        difficult.collect()
    assert not os.path.exists(difficult.outputs.manifest)
    assert not cut.exists()


@pytest.mark.parametrize("place", ["digests", *OUTPUTS.names()])
def test_a_bit_that_flipped_since_embedding_is_noticed_before_anything_is_written(difficult, place):
    difficult.plan()
    difficult.embed()
    path = difficult.store.path(RunRecord.read(difficult.run_paths[1]).segments_written[0])
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[place]["data_offsets"]
    content[8 + size + (begin + end) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CollectError, match=r"missing, or damaged.* The same command again computes"):
        difficult.collect(formats=["h5"])
    assert not path.exists()
    assert not os.path.exists(difficult.outputs.manifest)
    assert not os.path.exists(difficult.outputs.embeddings)


def test_a_failure_of_a_sequence_goes_to_every_record_that_has_it(tmp_path, engine):
    files = {"a.fasta": fasta(["MKVLAG", "EDRTKQ"]), "b.fasta": fasta(["mkvlag"])}
    run = Run(tmp_path, engine, files)
    failure = Failure(sequence_digest("MKVLAG").hex(), Reason.NON_FINITE, "NaN")
    summary = run.everything(fail={"MKVLAG": failure})
    assert summary.failed == 2
    assert [(row["id"], row["reason"], row["detail"]) for row in run.failures] == [("p0", "non_finite", "NaN")] * 2


def test_a_vector_goes_before_a_failure_of_an_earlier_run(tmp_path, engine):
    run = Run(tmp_path, engine, {"a.fasta": fasta(["MKVLAG"])})
    run.plan()
    run.embed()
    write_failures(run.failure_paths[1], [Failure(sequence_digest("MKVLAG").hex(), Reason.WORKER_CRASHED, "SIGKILL")])
    summary = run.collect()
    assert (summary.embedded, summary.failed, summary.reasons) == (1, 0, {})
    assert [row["reason"] for row in run.manifest] == [None]


# The summary


def test_the_summary_has_the_speed_of_all_groups_together(difficult):
    summary = difficult.everything()
    runs = [RunRecord.read(path) for path in difficult.run_paths]
    speed = Speed.of((run.shards, run.started, run.ended) for run in runs)
    assert summary.computed_residues == speed.residues == sum(s.residues for run in runs for s in run.shards)
    assert (summary.seconds, summary.residues_per_second) == (speed.embedding_seconds, speed.while_embedding)
    assert (summary.seconds_with_start_up, summary.residues_per_second_with_start_up) == (
        speed.seconds,
        speed.with_start_up,
    )


def test_the_last_lines_say_what_was_done_where_it_is_and_what_to_do(difficult):
    summary = difficult.everything()
    text = "\n".join(summary_lines(summary, None, "made up", PLACES))
    for part in (
        "43: 36 embedded, 7 rejected, 0 failed",
        "2 share the embedding of an equal sequence",
        f"{summary.truncated} truncated",
        "2 × invalid_residue: correct the sequence, or for J and stops inside set invalid_residues: replace_with_x",
        "residues/s while embedding",
        "embeddings/",
        "mean_layer0, per_residue_layer0",
        "manifest.parquet",
        "failures.tsv",
    ):
        assert part in text


def test_the_last_lines_of_a_run_in_which_all_went_well_name_no_failures(tmp_path, engine):
    store = tmp_path / "store"
    for name in ("first", "second"):
        summary = Run(tmp_path / name, engine, {"a.fasta": fasta(["MKV"])}, store).everything()
    text = "\n".join(summary_lines(summary, None, "made up", PLACES))
    assert "failures.tsv" not in text
    assert "truncated" not in text
    assert "nothing had to be computed" in text


def test_counts_of_a_plan_in_windows_add_up_too(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 50)
    sequences = proteins(60, 5, 30)
    run = Run(tmp_path, engine, {"a.fasta": fasta(sequences)}, groups=3)
    summary = run.everything()
    assert summary.embedded == 60
    assert Counter(row["digest"] for row in run.manifest) == Counter(sequence_digest(s).hex() for s in sequences)
