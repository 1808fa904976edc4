"""Stores that people have already are found and read for ever: fingerprints and segments are promises."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from workflow_run import PROJECT

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions
from esmflow.config.configuration import with_defaults
from esmflow.inputs.fasta import read_records
from esmflow.inputs.residues import sequence_digest
from esmflow.method import ARITHMETIC, computing_method
from esmflow.step import make_fingerprint
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Store, read_fingerprint

SCHEMA = yaml.safe_load((PROJECT / "workflow" / "schemas" / "config.schema.yaml").read_text())
MODEL = CheckpointInfo("made up", "c" * 32, "a.pt", "s" * 64, ModelDimensions(6, 320, 20, True, True))
OLD_STORE = PROJECT / "tests" / "data" / "old_store"

# Written down when there was nothing but version 0.1.0: (configuration, digest of the fingerprint).
DIGESTS = [
    ({}, "94b6d6928450cd50c5e25878396a0b0c"),
    ({"layers": [3, -1]}, "a78279b00e7741b5c38ff3e823eb557b"),
    ({"include": ["per_residue", "mean"], "per_residue_precision": "fp16"}, "0091be9fc909e0d855cfdaae95a9bb7e"),
    ({"include": ["contacts", "logits", "bos"], "long_sequences": "whole"}, "59829461ad1d590bbfa16d002f2d40d8"),
    ({"engine": "reference", "precision": "bf16"}, "a8ac48a0a83a55b4010ff67de7764093"),
    ({"long_sequences": "window", "max_residues": 512, "window_overlap": 64}, "73b3d0f14983090df6d0e6397b0f5237"),
    ({"long_sequences": "reject", "invalid_residues": "replace_with_x"}, "81c6295919aa43094c91aab15d498c99"),
    ({"precision": "fp32"}, "20b7b4e5ed74f8c7bb3c21066529c509"),
]


@pytest.mark.parametrize(("config", "digest"), DIGESTS)
def test_a_configuration_finds_what_it_always_found(config, digest):
    now = make_fingerprint(MODEL, computing_method(with_defaults(config, SCHEMA)))
    if now.engine == "reference" or now.precision == "fp32":
        assert now.digest() == digest
    else:
        # What the packed engine does in bf16 has changed, and auto is bf16 now: what was computed in fp32 is as it was.
        first = replace(now, arithmetic=ARITHMETIC["packed", "fp32"])
        assert first.digest() == digest
        assert first.holds(now)
        assert not now.holds(first)
        assert first.only_fp32_is_alike(now)


def test_a_segment_of_the_first_version_is_found_and_read(tmp_path):
    """Computed from the demo's proteins by version 0.1.0 on a CPU, before any module was where it is now."""
    shutil.copytree(OLD_STORE, tmp_path / "store")
    (folder,) = (tmp_path / "store").iterdir()
    store = Store(tmp_path / "store", read_fingerprint(folder))
    assert store.fingerprint == folder.name
    described = json.loads((folder / "fingerprint.json").read_text())
    assert described["checkpoint"] == "e3d7a757c339f0eacceb0a03310900bd"

    proteins = {
        record.sequence[: described["max_residues"]]
        for file in ("reviewed.fasta", "unreviewed.fasta.gz", "environmental.faa", "difficult.fasta")
        for record in read_records(PROJECT / "resources" / "demo" / file)
        if record.reason is None
    }
    digests = np.array([list(sequence_digest(protein)) for protein in sorted(proteins)], np.uint8)
    found = StoredSequences(store).find(digests)
    today = make_fingerprint(
        replace(MODEL, digest=store.description.checkpoint), computing_method(with_defaults({}, SCHEMA))
    )
    under_auto = Store(tmp_path / "store", replace(today, layers=store.description.layers))
    assert under_auto.fingerprint != store.fingerprint
    assert (StoredSequences(under_auto).find(digests) >= 0).sum() == 28
    segment = store.read("117289cbedf765d058501e5a8f745d73", check=True)
    assert (found >= 0).sum() == len(segment) == 28
    assert segment.precision == "fp32"
    assert segment.arrays["mean_layer6"].shape == (28, 320)
    assert np.linalg.norm(segment.arrays["mean_layer6"], axis=1).sum() == pytest.approx(148.68087768554688, rel=1e-6)
