"""What the sheet and tables say about records in further columns stands in the manifest and in the obs of h5ad."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from collected_run import CollectedRun, random_segment, read_h5ad
from made_up import write_fasta
from stage_settings import plan_settings

from esmflow.arrays import Outputs
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.inputs.sheet import read_samples
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import deal_inputs
from esmflow.plan.record_table import _TAKEN
from esmflow.plan.run_plan import Plan

OUTPUTS = Outputs((6,), ("mean",), None)
SEQUENCES = ["MKVLAG", "LAGVSE", "EDRTKQ", "MKVEDR"]


def collected(folder: Path, sheet: str) -> Path:
    """Plans what a sheet lists, and collects it with vectors made up."""
    (folder / "samples.tsv").write_text(sheet)
    run = CollectedRun(folder, [], [random_segment(SEQUENCES, OUTPUTS)], OUTPUTS)
    inputs, cost_model = read_samples(str(folder / "samples.tsv")), CostModel(ModelDimensions(6, 320, 20, True, True))
    summary = deal_inputs(plan_settings(folder, inputs, [folder / "shards"], cost_model), None)
    Plan(fingerprint=run.store.fingerprint, records=summary.records, groups=()).write(folder / "plan.json")
    return run.collect(["h5ad", "h5", "parquet"])


def write_inputs(folder: Path) -> None:
    write_fasta(folder / "a.fasta", [("a", SEQUENCES[0]), ("bad", "M1")])
    (folder / "t.tsv").write_text(
        f"length\tid\tsequence\tEC/no\n7\tb\t{SEQUENCES[1]}\t1.1.1.1\n8\tc\t{SEQUENCES[2]}\t\n"
    )
    columns = {"id": ["d"], "sequence": [SEQUENCES[3]], "tissue": ["own"], "score": [0.5], "sites": [[1, 2]]}
    pq.write_table(pa.table(columns), folder / "p.parquet")


def test_further_columns_reach_the_manifest_and_anndata(tmp_path):
    write_inputs(tmp_path)
    sheet = "sample\tfasta\ttissue\tstatus\nx\ta.fasta\tgut\tgood\ny\tt.tsv\tsoil\t\nz\tp.parquet\tleaf\tbad\n"
    embeddings = collected(tmp_path, sheet)
    table = pq.read_table(embeddings.parent / "manifest.parquet")
    further = ["tissue", "input_status", "input_length", "EC/no", "score", "sites"]
    assert table.column_names == [*MANIFEST_SCHEMA.names, *further]
    rows = table.to_pylist()
    assert [(r["id"], r["tissue"], r["input_status"], r["input_length"], r["EC/no"], r["score"]) for r in rows] == [
        ("a", "gut", "good", "", "", ""),
        ("bad", "gut", "good", "", "", ""),
        ("b", "soil", "", "7", "1.1.1.1", ""),
        ("c", "soil", "", "8", "", ""),
        ("d", "own", "bad", "", "", "0.5"),
    ]
    assert [r["length"] for r in rows] == [6, 2, 6, 6, 6]
    assert [r["status"] for r in rows] == ["embedded", "rejected", "embedded", "embedded", "embedded"]
    tsv = (embeddings.parent / "manifest.tsv").read_text().splitlines()
    assert tsv[0].split("\t") == table.column_names
    assert [line.split("\t")[15] for line in tsv[1:]] == ["gut", "gut", "soil", "soil", "own"]
    data = read_h5ad(embeddings / "mean_layer6" / "embeddings.h5ad")
    assert list(data.obs["tissue"]) == ["gut", "soil", "soil", "own"]
    assert list(data.obs["EC_no"]) == ["", "1.1.1.1", "", ""]
    assert list(data.obs["length"]) == [6, 6, 6, 6]
    assert list(data.obs["sites"]) == ["", "", "", "[1, 2]"]
    assert {"input_status", "input_length", "score"} <= set(data.obs.columns)


def test_without_further_columns_the_tables_are_what_they_were(tmp_path):
    write_inputs(tmp_path)
    embeddings = collected(tmp_path, "sample\tfasta\nx\ta.fasta\n")
    assert pq.read_schema(embeddings.parent / "manifest.parquet").equals(MANIFEST_SCHEMA)


def test_no_annotation_takes_the_name_of_a_column():
    assert set(MANIFEST_SCHEMA.names) <= _TAKEN
