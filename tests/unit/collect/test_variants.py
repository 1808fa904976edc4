"""Scores of variants, from the table to `variants.parquet`, against fair-esm's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up import proteins, random_model, write_converted, write_fasta
from made_up_families import ESM_C_SHAPES, random_esm1, random_esm_c, write_esm1, write_esm_c
from stage_settings import plan_settings
from variant_scores import as_fair_esm_scores, some_variants

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointError, read_checkpoint_info
from esmflow.collect.joining import CollectError
from esmflow.collect.summary import VariantSummary
from esmflow.collect.variants import VariantSettings, score_variants
from esmflow.engine import load_engine
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import fair_esm_module, load_fair_esm
from esmflow.failures import Failure, Reason, write_failures
from esmflow.inputs.fasta import read_records
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint, LongSequences
from esmflow.plan import planning
from esmflow.plan.cost import CostModel
from esmflow.plan.shards import list_shards, read_shard, shard_fingerprint, shard_name
from esmflow.store.segments import Store
from esmflow.verify.esm_c import PlainEsmC

PROJECT = Path(__file__).resolve().parents[3]
METHOD = Fingerprint("c", (1,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")


class Scored:
    """A run's part about variants: planned, computed and scored in a folder. longest: of a window."""

    def __init__(self, folder, checkpoint, records, rows, longest=None, engine="packed", failing=()):
        self.folder, self.computed = folder, []
        folder.mkdir(exist_ok=True)
        method = METHOD if longest is None else replace(METHOD, long_sequences="truncate", max_residues=longest)
        fasta = write_fasta(folder / "in.fasta", records)
        table = folder / "variants.tsv"
        table.write_text("".join(f"{identifier}\t{variant}\n" for identifier, variant in [("id", "variant"), *rows]))
        settings = plan_settings(
            folder, [InputFile("s", str(fasta))], [folder / "group-0", folder / "group-1"],
            CostModel(read_checkpoint_info(checkpoint).dimensions, LongSequences(longest)),
            fingerprint=method, store=str(folder / "store"), variants=(str(table), str(folder / "planned.parquet")),
        )  # fmt: skip
        self.plan = planning.deal_inputs(settings)
        for shard in [shard for group in settings.groups for shard in list_shards(group)]:
            fingerprint = shard_fingerprint(shard, method)
            if fingerprint == method:
                continue
            loaded = load_engine(engine, str(checkpoint), fingerprint.outputs, "fp32", "cpu")
            sequences = [pair for pair in read_shard(shard) if pair[1] not in failing]
            self.computed += [sequence for _, sequence in sequences]
            store = Store(folder / "store", fingerprint)
            store.create()
            store.write(shard_name(d for d, _ in sequences), extract_esm_features(sequences, loaded, 4096).segment)
        self.settings = VariantSettings(
            planned=str(folder / "planned.parquet"),
            failure_lists=[str(folder / "failures.tsv")],
            store=str(folder / "store"),
            fingerprint=method,
            threads=1,
            **{name: str(folder / f"out.{name}") for name in ("table", "table_tsv", "summary")},
        )
        write_failures(self.settings.failure_lists[0], [])

    def rows(self) -> list[dict]:
        score_variants(self.settings)
        return pq.read_table(self.settings.table).to_pylist()


def largest_difference(rows, model, sequences, longest=None) -> float:
    differences = []
    for row in rows:
        found = [row["wild_type_marginal"], row["masked_marginal"]]
        expected = as_fair_esm_scores(model, sequences[row["id"]], row["variant"], longest)
        differences.append(np.abs(np.array(found) - expected).max())
    return max(differences)


@pytest.fixture(scope="module")
def model():
    return random_model(2, 32, 2)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("made_up") / "a.safetensors", model)


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize("longest", [None, 24])
def test_scores_are_those_of_fair_esms_own_script(tmp_path, checkpoint, model, engine, longest):
    sequences = {f"p{n}": sequence for n, sequence in enumerate(proteins(4, 15, 70))}
    rows = [(name, variant) for name, sequence in sequences.items() for variant in some_variants(sequence, 6, 1)]
    found = Scored(tmp_path, checkpoint, sequences.items(), rows, longest, engine).rows()
    assert [(row["id"], row["variant"]) for row in found] == rows
    assert {row["status"] for row in found} == {"scored"}
    difference = largest_difference(found, model, sequences, longest)
    print(f"largest difference to fair-esm's script: {difference:.1e}")
    # Random weights have logits of up to 30.
    assert difference < 1e-4


def written_esm1(folder: Path, norm_before: bool) -> Path:
    return write_esm1(folder / "source.pt", random_esm1(norm_before))


def written_esm_c(folder: Path) -> Path:
    layers, hidden, heads, width = ESM_C_SHAPES["head 16"]
    return write_esm_c(folder / "source", random_esm_c(layers, hidden, heads, width), heads)


FAMILIES = {
    "ESM-1v": (partial(written_esm1, norm_before=False), fair_esm_module),
    "ESM-1b": (partial(written_esm1, norm_before=True), fair_esm_module),
    "ESM C": (written_esm_c, PlainEsmC),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_scored_as_their_own_modules_do(tmp_path, family):
    write, module = FAMILIES[family]
    convert_checkpoint(write(tmp_path), tmp_path / "a.safetensors", family)
    model = load_fair_esm(str(tmp_path / "a.safetensors"), torch.device("cpu"), module=module)
    sequences = {f"p{n}": sequence for n, sequence in enumerate(proteins(3, 15, 60))}
    rows = [(name, variant) for name, sequence in sequences.items() for variant in some_variants(sequence, 5, 1)]
    found = Scored(tmp_path / "run", tmp_path / "a.safetensors", sequences.items(), rows, longest=32).rows()
    difference = largest_difference(found, model, sequences, 32)
    print(f"largest difference to the module's own: {difference:.1e}")
    assert difference < 1e-4


def test_a_bundled_protein_is_scored_with_the_real_encoder(tmp_path, real_with_head):
    """Under a made-up head: its own was not published with it."""
    record = next(iter(read_records(PROJECT / "resources" / "demo" / "reviewed.fasta")))
    rows = [(record.id, variant) for variant in some_variants(record.sequence, 12, 2)]
    model = load_fair_esm(str(real_with_head), torch.device("cpu"))
    found = Scored(tmp_path, real_with_head, [(record.id, record.sequence)], rows).rows()
    difference = largest_difference(found, model, {record.id: record.sequence})
    print(f"largest difference to fair-esm's script: {difference:.1e}")
    assert difference < 1e-5


def test_a_place_is_computed_once_and_another_run_computes_only_what_is_new(tmp_path, checkpoint):
    first = Scored(tmp_path, checkpoint, [("a", "MKVLA")], [("a", "K2A"), ("a", "K2C:V3W"), ("a", "K2D")])
    assert sorted(first.computed) == ["MKVLA", "MK_LA", "M_VLA"]
    assert (first.plan.variants.places, first.plan.variants.stored) == (2, 0)
    before = {row["variant"]: row["masked_marginal"] for row in first.rows()}
    again = Scored(tmp_path, checkpoint, [("a", "MKVLA")], [("a", "K2A"), ("a", "L4A"), ("a", "V3F")])
    assert again.computed == ["MKV_A"]
    assert (again.plan.variants.places, again.plan.variants.stored) == (3, 2)
    assert again.rows()[0]["masked_marginal"] == before["K2A"]


def test_rows_in_are_rows_out_and_those_without_a_score_say_why(tmp_path, checkpoint):
    rows = [("a", "K2A"), ("b", "K2A"), ("a", "A2K"), ("a", "K2K"), ("a", "K9A"), ("a", "K2A")]
    scored = Scored(tmp_path, checkpoint, [("a", "MKVLA")], rows)
    found = scored.rows()
    reasons = [None, "unknown_id", "other_residue", None, "beyond_the_end", None]
    assert [row["reason"] for row in found] == reasons
    assert found[3]["wild_type_marginal"] == found[3]["masked_marginal"] == 0
    assert found[5]["masked_marginal"] == found[0]["masked_marginal"]
    assert all((row["masked_marginal"] is None) == (row["reason"] is not None) for row in found)
    summary = VariantSummary.read(scored.settings.summary)
    assert (summary.rows, summary.scored, sum(summary.reasons.values())) == (6, 3, 3)
    assert summary.line().startswith("6: 3 scored, 3 without a score (1 × ")
    lines = Path(scored.settings.table_tsv).read_text().splitlines()
    assert len(lines) == 7
    assert lines[0].split("\t")[:9] == [
        *("id", "variant", "sample", "file", "record", "status", "wild_type_marginal", "masked_marginal", "reason"),
    ]
    assert float(lines[1].split("\t")[7]) == pytest.approx(found[0]["masked_marginal"])


def test_rows_of_many_blocks_are_the_rows_of_one(tmp_path, checkpoint, monkeypatch):
    sequences = {f"p{n}": sequence for n, sequence in enumerate(proteins(5, 15, 30))}
    rows = [(name, variant) for name, sequence in sequences.items() for variant in some_variants(sequence, 5, 3)]
    rows[7] = ("nobody", "A1C")
    at_once = Scored(tmp_path / "once", checkpoint, sequences.items(), rows).rows()
    monkeypatch.setattr(planning, "VARIANTS_PER_GROUP", 3)
    in_blocks = Scored(tmp_path / "blocks", checkpoint, sequences.items(), rows).rows()
    assert [{**row, "file": ""} for row in in_blocks] == [{**row, "file": ""} for row in at_once]


def test_a_copy_that_failed_gives_its_rows_a_reason_and_one_that_is_lost_is_an_error(tmp_path, checkpoint):
    rows = [("a", "K2A"), ("a", "K2A:V3A"), ("a", "V3C")]
    scored = Scored(tmp_path, checkpoint, [("a", "MKVLA")], rows, failing=("MK_LA",))
    with pytest.raises(CollectError, match="variants: a K2A:V3A was neither computed nor has it failed; run again"):
        scored.rows()
    digest = planning.sequence_digests(b"MK_LA", np.array([5]))[0].tobytes().hex()
    write_failures(scored.settings.failure_lists[0], [Failure(digest, Reason.OUT_OF_MEMORY, "no room")])
    found = scored.rows()
    assert [(row["reason"], row["detail"]) for row in found] == [(None, ""), *[("out_of_memory", "no room")] * 2]
    assert found[0]["masked_marginal"] is not None


def test_a_table_of_nothing_but_unknown_ids_needs_no_model(tmp_path, checkpoint):
    scored = Scored(tmp_path, checkpoint, [("a", "MKVLA")], [("b", "K2A")])
    assert scored.computed == []
    assert [row["reason"] for row in scored.rows()] == ["unknown_id"]
    assert Scored(tmp_path / "none", checkpoint, [("a", "MKVLA")], []).rows() == []


def test_what_there_is_to_compute_is_in_the_plan_and_in_the_forecast(tmp_path, checkpoint):
    from esmflow.plan.disk_forecast import forecast

    scored = Scored(tmp_path, checkpoint, [("a", "MKVLA" * 4)], [("a", "K2A"), ("a", "V3A")])
    dimensions = read_checkpoint_info(checkpoint).dimensions
    work = {kind: (each.sequences, each.residues) for kind, each in scored.plan.variants.work.items()}
    assert work == {"logits": (1, 20), "masked_logits": (2, 40)}
    assert sum(group.sequences for group in scored.plan.groups) == 4
    assert sum(group.residues for group in scored.plan.groups) == 80
    without = replace(scored.plan, variants=type(scored.plan.variants)())
    more = [forecast(each, METHOD, dimensions, []).segments for each in (scored.plan, without)]
    assert more[0] - more[1] == 20 * 33 * 4 + 24 + 2 * (33 * 4 + 24)


def test_a_checkpoint_without_its_head_is_refused_with_a_sentence(tmp_path, real_checkpoint):
    (tmp_path / "v.tsv").write_text("id\tvariant\na\tK2A\n")
    info = read_checkpoint_info(real_checkpoint)
    settings = plan_settings(
        tmp_path, [], [tmp_path / "group-0"], CostModel(info.dimensions), checkpoint=str(real_checkpoint),
        fingerprint=replace(METHOD, checkpoint=info.digest),
        variants=(str(tmp_path / "v.tsv"), str(tmp_path / "planned.parquet")),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="variants: the checkpoint has no language model head"):
        planning.plan(settings)
