"""A table of variants through whole runs: scores, what is computed once, what a later run adds."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from made_up import write_fair_esm
from safetensors.torch import load_file
from variant_scores import as_fair_esm_scores, some_variants
from workflow_run import PROJECT, WorkflowRun

from esmflow.engine.fair_esm import load_fair_esm
from esmflow.inputs.fasta import read_records

PROTEIN = next(iter(read_records(PROJECT / "resources" / "demo" / "reviewed.fasta")))


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_with_head):
    """The demo's model, under a made-up head since its own was not published, with one of its proteins."""
    folder = tmp_path_factory.mktemp("variants")
    tensors = load_file(real_with_head)
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model = write_fair_esm(folder / "esm2_8M_with_head.pt", tensors)
    run = WorkflowRun(folder / "run", model, variants="variants.tsv", groups=2, precision="fp32")
    (run.folder / "in.fasta").write_text(f">{PROTEIN.id} {PROTEIN.description}\n{PROTEIN.sequence}\n")
    run.write_samples({"demo": "in.fasta"})
    return run


def write(run, variants):
    lines = ["id\tvariant\tmeasured", *(f"{PROTEIN.id}\t{variant}\t{n}" for n, variant in enumerate(variants))]
    (run.folder / "variants.tsv").write_text("\n".join([*lines, "nobody\tA1C\t"]) + "\n")


def test_a_bundled_protein_is_scored_and_another_run_computes_only_new_places(run, real_with_head):
    sequence, variants = PROTEIN.sequence, some_variants(PROTEIN.sequence, 5, 4)
    write(run, variants)
    said = run.succeed()
    rows = pq.read_table(run.results / "variants.parquet").to_pylist()
    assert [row["variant"] for row in rows] == [*variants, "A1C"]
    assert [row["measured"] for row in rows] == [*map(str, range(len(variants))), ""]
    assert [row["reason"] for row in rows] == [None] * len(variants) + ["unknown_id"]
    model = load_fair_esm(str(real_with_head), torch.device("cpu"))
    for row in rows[:-1]:
        expected = as_fair_esm_scores(model, sequence, row["variant"], None)
        assert [row["wild_type_marginal"], row["masked_marginal"]] == pytest.approx(expected, abs=1e-5)
    assert f"variants   {len(rows)}: {len(variants)} scored, 1 without a score (1 × unknown_id)" in said
    places = {part[1:-1] for variant in variants for part in variant.split(":")}
    # The protein for its embedding, and again for its logits.
    assert sum(group["sequences"] for group in run.groups()) == len(places) + 2
    assert sum(group["residues"] for group in run.groups()) == len(sequence) * (len(places) + 2)
    assert sum(len(group["segments_written"]) for group in run.groups()) == 1
    assert "masked copies" in (run.folder / "logs" / "plan.log").read_text()

    new = next(n for n in range(1, len(sequence)) if str(n) not in places)
    write(run, [*variants, f"{sequence[new - 1]}{new}W"])
    run.succeed()
    again = pq.read_table(run.results / "variants.parquet").to_pylist()
    assert [row["masked_marginal"] for row in again[: len(variants)]] == [row["masked_marginal"] for row in rows[:-1]]
    assert sum(group["sequences"] for group in run.groups()) == 1
    assert json.loads((run.results / "variants.json").read_text())["scored"] == len(variants) + 1
