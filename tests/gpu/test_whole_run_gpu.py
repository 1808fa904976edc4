"""The workflow on a real GPU: the slot, the precision, the numbers."""

from __future__ import annotations

from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from esm.rotary_embedding import RotaryEmbedding
from workflow_run import PROJECT, WorkflowRun

from esmflow.arrays import Outputs
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.inputs.fasta import read_records
from esmflow.inputs.residues import sequence_digest
from esmflow.slots.gpus import driver_gpus

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_model_folder) -> WorkflowRun:
    config = {"device": "auto", "groups": 4, "shard_residues": 10000, "report": True}
    run = WorkflowRun(tmp_path_factory.mktemp("run"), real_model_folder, **config)
    run.write_samples({"all": PROJECT / "tests" / "data" / "uniprot_sample_500.fasta.gz"})
    run.succeed(cores=4, gpus=2)
    return run


@pytest.fixture(scope="module")
def sequences():
    return [record.sequence[:1022] for record in read_records(PROJECT / "tests/data/uniprot_sample_500.fasta.gz")]


def vectors(engine, sequences):
    found = np.empty((len(sequences), 320), np.float32)
    for batch in engine.batches([len(s) for s in sequences], 8192):
        arrays = engine.fetch(engine.launch(engine.prepare([sequences[i] for i in batch])))
        found[batch] = arrays["mean_layer6"]
    return found


def test_every_job_ran_on_a_gpu_of_the_driver_and_none_shared_it(run):
    uuids = {gpu.uuid for gpu in driver_gpus()}
    held = []
    for group in run.groups():
        (worker,) = group["workers"]
        assert worker["slot"]["uuid"] in uuids
        assert worker["slot"]["visible_devices"] == worker["slot"]["uuid"]
        assert worker["visible_devices"] == worker["seen_uuid"] == worker["slot"]["uuid"]
        assert group["precisions"] == ["bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"]
        assert 0 < group["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
        held.append((worker["slot"]["uuid"], worker["leased"], worker["released"]))
    for uuid in uuids:
        mine = sorted((start, end) for slot, start, end in held if slot == uuid)
        assert all(end <= start for (_, end), (start, _) in pairwise(mine))


def test_vectors_from_the_gpu_agree_with_fp32(run, sequences, real_checkpoint):
    exact = vectors(ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), "fp32", "cuda"), sequences)
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5") as file:
        found = file["embeddings"][:]
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert len(found) == 500
    assert cosine.min() >= 0.9995
    assert np.median(cosine) > 0.99995


def test_the_reference_engine_under_autocast_agrees_with_fp32(sequences, real_checkpoint):
    exact, found = (
        vectors(ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), precision, "cuda"), sequences)
        for precision in ("fp32", "bf16")
    )
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    print(f"reference engine, bf16: cosine min {cosine.min():.5f}, median {np.median(cosine):.6f}")
    # 0.9991 at worst; without the correction of the rotary tables it is 0.68.
    assert cosine.min() > 0.998
    assert np.median(cosine) > 0.9999


def test_fp32_on_the_gpu_agrees_with_the_golden_file(golden, real_checkpoint):
    engine = ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), "fp32", "cuda")
    found = vectors(engine, list(golden["sequences"]))
    assert np.linalg.norm(found - golden["mean_layer6"]) / np.linalg.norm(golden["mean_layer6"]) < 1e-4


def distinct_positions(rotary):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cosines, _ = rotary._update_cos_sin_tables(torch.zeros(1, 1024, 16, device="cuda"))
    return len(torch.unique(cosines[0], dim=0))


def test_positions_stay_distinct_under_autocast_where_fair_esm_alone_merges_them(real_checkpoint):
    engine = ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), "bf16", "cuda")
    assert distinct_positions(RotaryEmbedding(16).cuda()) < 1024
    assert distinct_positions(engine.model.layers[0].self_attn.rot_emb) == 1024


def test_a_batch_that_does_not_fit_is_cut_until_it_does(sequences, real_checkpoint):
    engine = ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), "fp32", "cuda")
    unique = {sequence_digest(s): s for s in sequences}
    everything = sum(len(s) + 2 for s in unique.values())
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + (2 << 30)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        extraction = extract_esm_features(list(unique.items()), engine, everything)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert extraction.token_budget < everything
    assert len(extraction.segment) == len(unique)
    assert extraction.segment.failures == ()
