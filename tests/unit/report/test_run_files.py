"""What a run takes on disk is its own."""

from pathlib import Path

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.summary import Summary
from esmflow.embedding.run_record import RunRecord
from esmflow.method import Fingerprint
from esmflow.report.run_files import RunFiles
from esmflow.store.segments import Store

METHOD = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")


def test_segments_of_other_projects_in_a_shared_store_do_not_count(tmp_path):
    store = Store(tmp_path / "store", METHOD)
    store.create()
    for size, name in enumerate(("written", "reused", "stored", "of others", "of others too"), 1):
        store.path(name).write_bytes(bytes(1000**size % 999_983))
    (tmp_path / "embeddings" / "mean_layer6").mkdir(parents=True)
    Path(tmp_path / "embeddings" / "mean_layer6" / "a.npy").write_bytes(bytes(77))
    files = RunFiles(
        results=str(tmp_path), manifest=str(tmp_path / "m"), embeddings=str(tmp_path / "embeddings"),
        checkpoint=str(tmp_path / "c"), fingerprint=METHOD,
        summary=Summary(records=1, embedded=1, failed=0, rejected=0), store=store, certificate=None, variants=None,
        command="", configuration={},
        model=CheckpointInfo("m", "", "", "", ModelDimensions(6, 320, 20, False, False)), finished=0.0,
        runs=[RunRecord(group="0", segments_written=("written",), segments_reused=("reused",))],
        stored_segments=("stored",),
    )  # fmt: skip
    own = sum(store.path(name).stat().st_size for name in ("written", "reused", "stored"))
    assert files.disk() == {"output mean_layer6": 77, "store": own}
