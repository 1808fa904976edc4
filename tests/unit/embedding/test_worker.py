"""The workflow's worker function: one model for all shards, a committed segment for each, and memory that runs out."""

from __future__ import annotations

import pytest
import worker_functions
from made_up import proteins, random_model, with_digests, write_converted
from stage_settings import embed_settings

from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.embedding.worker import process_esm_files_worker
from esmflow.failures import Reason
from esmflow.method import ARITHMETIC, Fingerprint
from esmflow.plan.shards import shard_name, write_shard
from esmflow.slots.gpus import candidate_slots
from esmflow.store.segments import Store
from esmflow.workers.manager import BatchQueueManager


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("model") / "model.safetensors", random_model())


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """What the worker function is given besides its files."""
    fingerprint = Fingerprint(
        checkpoint=read_checkpoint_info(checkpoint).digest,
        layers=(2,),
        include=("mean",),
        per_residue_precision=None,
        engine="packed",
        arithmetic=ARITHMETIC["packed", "fp32"],
        precision="fp32",
        long_sequences="truncate",
        max_residues=1022,
        window_overlap=None,
        invalid_residues="reject",
    )
    store = Store(tmp_path / "store", fingerprint)
    store.create()
    return {
        "toks_per_batch": 1000,
        "output_dir": str(tmp_path / "store"),
        "slots": candidate_slots("cpu", 2, {}),
        "settings": embed_settings(tmp_path, checkpoint, fingerprint),
    }


@pytest.fixture
def shards(tmp_path):
    """Four shards, and the names of their segments."""
    written = {}
    for number in range(4):
        sequences = with_digests(proteins(5, 20, 60, seed=number))
        path = tmp_path / f"shard-{number}.fasta"
        write_shard(path, sequences)
        written[str(path)] = shard_name(digest for digest, _ in sequences)
    return written


def committed(arguments):
    return set(Store(arguments["output_dir"], arguments["settings"].fingerprint).names())


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_loads_the_model_once_and_every_shard_is_a_segment(workers, arguments, shards):
    manager = BatchQueueManager(workers, process_esm_files_worker)
    processed, failed = manager.process_files([list(shards)[n::workers] for n in range(workers)], **arguments)
    assert (set(processed), failed) == (set(shards), [])
    assert committed(arguments) == set(shards.values())
    by_device = {}
    for result in manager.results.values():
        by_device.setdefault(result.device, set()).add((result.worker, result.model_load_seconds))
    assert all(len(loads) == 1 for loads in by_device.values())
    assert all(record["model_load_seconds"] > 0 for record in manager.worker_records() if record["processed"])


def test_a_worker_says_which_card_it_sees_whatever_its_job_was_given(arguments, shards, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    manager = BatchQueueManager(1, process_esm_files_worker)
    manager.process_files([list(shards)], **arguments)
    (record,) = manager.worker_records()
    assert (
        (record["visible_devices"], record["seen_uuid"]) == (arguments["slots"][0].visible_devices, None) == ("", None)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_does_not_fit_into_memory_has_failed_and_the_worker_goes_on(workers, arguments, shards, tmp_path):
    giant = tmp_path / "shard-giant.fasta"
    with open(giant, "wb") as handle:
        handle.write(b">00\n")
        # Takes no disk: what is not written reads as zeros.
        handle.truncate(4 << 30)
    files = [next(iter(shards)), str(giant), *list(shards)[1:]]
    manager = BatchQueueManager(workers, worker_functions.embeds_with_little_memory)
    assigned = [files] + [[] for _ in range(workers - 1)]
    processed, failed = manager.process_files(assigned, more=1 << 30, **arguments)
    assert set(processed) == set(shards)
    assert [(failure.file, failure.reason) for failure in failed] == [(str(giant), Reason.OUT_OF_MEMORY)]
    assert committed(arguments) == set(shards.values())
    assert manager.restarts == 0
    assert len({(result.device, result.worker) for result in manager.results.values()}) <= workers
    # What came after it in the same worker had half the budget, however much there was.
    budgets = [manager.results[file].token_budget for file in processed if file in manager.results]
    assert set(budgets) <= {1000, 500}
    assert workers > 1 or budgets == [1000, 500, 500, 500]
