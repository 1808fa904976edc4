"""Each key of the configuration either changes numbers, and then no old vector is used, or it does not, and all are."""

import dataclasses

import numpy as np
import pytest
import yaml
from made_up import write_fasta
from stage_settings import plan_settings
from workflow_run import PROJECT

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions
from esmflow.config.configuration import with_defaults
from esmflow.inputs.residues import sequence_digest
from esmflow.inputs.sheet import InputFile
from esmflow.method import EMBED_WHOLE, LongSequences, computing_method
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import deal_inputs
from esmflow.step import make_fingerprint
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Segment, Store

SCHEMA = yaml.safe_load((PROJECT / "workflow" / "schemas" / "config.schema.yaml").read_text())
MODEL = CheckpointInfo("made up", "c" * 32, "a.pt", "s" * 64, ModelDimensions(6, 320, 20, True, True))
SEQUENCES = ["MKVLAAGIVG", "LAGVSERTIDPKQ"]

# Another value for each key, from the default or from what `GIVEN` says.
CHANGES_NUMBERS = {
    "layers": [3],
    "include": ["mean", "bos"],
    "engine": "reference",
    "precision": "bf16",
    "per_residue_precision": "fp16",
    "long_sequences": "whole",
    "max_residues": 1024,
    "window_overlap": 64,
    "invalid_residues": "replace_with_x",
}
GIVEN = {
    "per_residue_precision": {"include": ["mean", "per_residue"]},
    "window_overlap": {"long_sequences": "window"},
}
CHANGES_NO_NUMBER = {
    "samples": "other.tsv",
    "model": "copy_of_the_same.pt",
    "base_model": "650M",
    "model_folder": "models",
    "download": False,
    "nucleotide_sequences": "keep",
    "gaps": "remove",
    "id": "accession",
    "batch_tokens": 512,
    "groups": 7,
    "assignment": "round_robin",
    "shard_residues": 5,
    "threads": 1,
    "device": "cpu",
    "cpu_slots": 9,
    "slot_wait_minutes": 1,
    "slot_lock_folder": "locks",
    "store": "elsewhere",
    "disk_check": False,
    "report": False,
    "gpus_per_job": 2,
    "grace_seconds": 1,
    "hang_minutes": 1,
    "device_tflops": 9,
    "pooled_precision": "fp16",
    "attention": {"max_residues": 90},
    "variants": "variants.tsv",
    "verify": {"sample": 0},
    "formats": ["h5"],
    "failures": {"policy": "error", "retries": 0},
    "pathvars": {"results": "elsewhere"},
}
WITHOUT_MEANING = {
    "window_overlap": 64,
    "per_residue_precision": "fp16",
}


def fingerprint(config, model=MODEL):
    return make_fingerprint(model, computing_method(with_defaults(config, SCHEMA)))


def sequences_to_compute(folder, old, new) -> int:
    """How many of two sequences are planned under a fingerprint, after they were computed under another."""
    store = Store(folder / "store", old)
    store.create()
    digests = np.array([list(sequence_digest(s)) for s in SEQUENCES], np.uint8)
    store.write("a", Segment(digests, np.array([10, 13]), {"mean_layer6": np.zeros((2, 4), np.float32)}, "fp32"))
    file = write_fasta(folder / "a.fasta", [("p", s) for s in SEQUENCES])
    inputs, cost_model = [InputFile("a", str(file))], CostModel(MODEL.dimensions)
    settings = plan_settings(folder, inputs, [folder / "shards"], cost_model)
    planned = deal_inputs(settings, StoredSequences(Store(folder / "store", new)))
    assert planned.stored + planned.groups[0].sequences == 2
    return planned.groups[0].sequences


def test_every_key_of_the_configuration_is_tried():
    assert CHANGES_NUMBERS.keys() | CHANGES_NO_NUMBER.keys() == SCHEMA["properties"].keys()


@pytest.mark.parametrize("key", CHANGES_NUMBERS)
def test_a_key_that_changes_numbers_never_reuses_an_old_vector(tmp_path, key):
    given = GIVEN.get(key, {})
    old, new = fingerprint(given), fingerprint({**given, key: CHANGES_NUMBERS[key]})
    assert sequences_to_compute(tmp_path, old, new) == 2


@pytest.mark.parametrize(("key", "value"), [*CHANGES_NO_NUMBER.items(), *WITHOUT_MEANING.items()])
def test_a_key_that_changes_no_number_reuses_every_vector(tmp_path, key, value):
    assert sequences_to_compute(tmp_path, fingerprint({}), fingerprint({key: value})) == 0


@pytest.mark.parametrize("how", ["checkpoint", "method_version", "arithmetic"])
def test_another_checkpoint_or_method_never_reuses_an_old_vector(tmp_path, how):
    old = fingerprint({})
    if how == "checkpoint":
        new = fingerprint({}, dataclasses.replace(MODEL, digest="d" * 32))
    else:
        changed = {**computing_method(with_defaults({}, SCHEMA)), how: {"method_version": 99, "arithmetic": "new"}[how]}
        new = make_fingerprint(MODEL, changed)
    assert sequences_to_compute(tmp_path, old, new) == 2


def test_the_same_checkpoint_under_another_name_reuses_every_vector(tmp_path):
    renamed = dataclasses.replace(MODEL, name="renamed", source="b.pt", source_sha256="t" * 64)
    assert sequences_to_compute(tmp_path, fingerprint({}), fingerprint({}, renamed)) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [({"layers": [-1]}, {"layers": [6]}), ({"include": ["mean", "bos"]}, {"include": ["bos", "mean"]})],
)
def test_two_ways_to_say_the_same_reuse_every_vector(tmp_path, one, other):
    assert sequences_to_compute(tmp_path, fingerprint(one), fingerprint(other)) == 0


# Long sequences


@pytest.mark.parametrize("residues", [1, 3, 9, 10, 11, 17, 18, 25, 100])
@pytest.mark.parametrize("overlap", [0, 3, 9])
def test_windows_cover_every_residue_overlap_as_asked_and_end_with_the_sequence(residues, overlap):
    long = LongSequences(10, overlap)
    pieces = long.pieces(residues)
    assert len(pieces) == long.number_of_pieces(residues)
    assert {end - begin for begin, end in pieces} == {long.piece_length(residues)}
    starts = [begin for begin, _ in pieces]
    assert starts[0] == 0
    assert pieces[-1][1] == residues == long.embedded(residues)
    if residues <= 10:
        assert starts == [0]
        return
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps[:-1] == 10 - overlap).all()
    assert steps[-1] <= 10 - overlap


@pytest.mark.parametrize("overlap", [-1, 10, 11])
def test_an_overlap_that_is_no_overlap_is_refused(overlap):
    with pytest.raises(ValueError, match="window_overlap"):
        LongSequences(10, overlap)


@pytest.mark.parametrize(
    ("long", "embedded", "pieces"),
    [
        (EMBED_WHOLE, 25, [(0, 25)]),
        (LongSequences(10), 10, [(0, 10)]),
        (LongSequences(10, 0), 25, [(0, 10), (10, 20), (15, 25)]),
    ],
)
def test_numbers_and_arrays_are_answered_alike(long, embedded, pieces):
    assert (long.embedded(25), long.pieces(25)) == (embedded, pieces)
    lengths = np.array([5, 10, 25])
    for method in (long.embedded, long.is_cut, long.piece_length, long.number_of_pieces):
        assert np.broadcast_to(method(lengths), 3).tolist() == [method(n) for n in lengths.tolist()]
    assert long.is_cut(lengths).tolist() == [False, False, long is not EMBED_WHOLE]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("truncate", LongSequences(1022)),
        ("window", LongSequences(1022, 256)),
        ("whole", EMBED_WHOLE),
        ("reject", EMBED_WHOLE),
    ],
)
def test_the_policy_is_read_once_from_the_configuration_and_travels_in_the_fingerprint(policy, expected):
    config = with_defaults({"long_sequences": policy, "max_residues": 1022, "window_overlap": 256}, SCHEMA)
    assert LongSequences.configured(config) == expected
    assert make_fingerprint(MODEL, computing_method(config)).long == expected
