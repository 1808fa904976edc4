"""The certificate on a real GPU: embeddings in low precision pass, and the model is never whole in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from workflow_run import PROJECT, WorkflowRun

from esmflow.arrays import Outputs
from esmflow.inputs.fasta import read_records
from esmflow.method import EMBED_WHOLE
from esmflow.verify.recompute import Recomputation

pytestmark = pytest.mark.gpu

KINDS = ["mean", "bos", "max", "std", "per_residue", "contacts"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "int8"])
def test_a_run_on_a_gpu_passes_with_the_largest_sample(tmp_path, real_model_folder, precision):
    config = {"device": "cuda", "groups": 1, "include": KINDS, "layers": [-1, 3], "precision": precision}
    run = WorkflowRun(tmp_path / "run", real_model_folder, verify={"sample": 128}, **config)
    run.write_samples({"all": PROJECT / "tests" / "data" / "uniprot_sample_500.fasta.gz"})
    run.succeed(cores=4, gpus=1)
    found = json.loads((run.results / "certificate.json").read_text())
    print(precision, found["device"], f"{found['seconds']:.1f} s", json.dumps(found["outputs"], indent=1))
    assert found["passed"]
    assert len(found["sequences"]) == 128
    assert set(found["limits"]) == {precision}


def test_layers_are_read_one_at_a_time_with_the_same_result(real_checkpoint):
    records = read_records(PROJECT / "tests" / "data" / "uniprot_sample_500.fasta.gz")
    sequences = [record.sequence for record in records if record.length < 300][:20]
    outputs = Outputs((6,), ("mean",))
    found = []
    for resident_bytes in (0, 1 << 30):
        model = Recomputation(str(real_checkpoint), "cuda", resident_bytes)
        arrays = dict(model.expect(sequences, outputs, EMBED_WHOLE))
        found.append(np.stack([arrays[n]["mean_layer6"].right for n in range(len(sequences))]))
    assert np.array_equal(*found)
