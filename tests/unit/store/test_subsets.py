"""What a store has with more layers or kinds than are asked for is served from it; what differs otherwise is said."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import write_fasta
from stage_settings import plan_settings

from esmflow.checkpoint.models import ModelDimensions
from esmflow.failures import Failure, Reason
from esmflow.inputs.residues import sequence_digest
from esmflow.inputs.sheet import InputFile
from esmflow.method import ARITHMETIC, Fingerprint
from esmflow.plan import planning
from esmflow.plan.cost import CostModel
from esmflow.store.lookup import StoredSequences, stored_otherwise
from esmflow.store.segments import Segment, Store

KINDS = ("entropy", "mean", "per_residue", "pseudo_perplexity", "std")
WIDE = Fingerprint("c" * 32, (3, 6), KINDS, "fp16", "packed", "words", "fp32", "truncate", 1022, None, "reject")
LAST_MEAN = replace(WIDE, layers=(6,), include=("mean",), per_residue_precision=None)
SEQUENCES = ["MKV", "MKVLA", "GGW"]
DIGESTS = np.array([list(sequence_digest(s)) for s in SEQUENCES], np.uint8)


@pytest.fixture
def wide(tmp_path):
    """A store of two layers, with two sequences in one segment and a third that failed there."""
    store = Store(tmp_path / "store", WIDE)
    store.create()
    random = np.random.default_rng(0)
    shapes = {"mean": (2, 4), "std": (2, 4), "per_residue": (8, 4), "entropy": (8,), "pseudo_perplexity": (2,)}
    arrays = {
        a.name: random.random(shapes[a.kind]).astype("f2" if a.kind == "per_residue" else "f4")
        for a in WIDE.outputs.arrays()
    }
    failed = Failure(DIGESTS[2].tobytes().hex(), Reason.OUT_OF_MEMORY, "")
    store.write("a" * 32, Segment(DIGESTS[:2], np.array([3, 5]), arrays, "fp32", (failed,)))
    return store


def found(wide, asked):
    """How many of the sequences are found under another fingerprint, and its store."""
    store = Store(wide.folder.parent, asked)
    return (StoredSequences(store).find(DIGESTS) >= 0).tolist(), store


@pytest.mark.parametrize(
    "less",
    [
        {"layers": (6,), "include": ("mean",), "per_residue_precision": None},
        {"layers": (3, 6), "include": ("mean",), "per_residue_precision": None},
        {"layers": (3,)},
        {"include": ("per_residue",)},
        {"include": ("entropy",)},
        {"layers": (3,), "include": ("pseudo_perplexity", "std"), "per_residue_precision": None},
    ],
)
def test_a_subset_is_read_from_what_is_there_and_stands_on_its_own_afterwards(wide, less):
    there, store = found(wide, replace(WIDE, **less))
    assert there == [True, True, False]
    (name,) = store.names()
    whole, part = wide.read(name), store.read(name, check=True)
    assert part.arrays.keys() == set(store.description.outputs.names())
    assert all(np.array_equal(part.arrays[array], whole.arrays[array]) for array in part.arrays)
    assert (part.precision, part.failures) == (whole.precision, whole.failures)
    wide.path(name).unlink()
    assert found(wide, store.description)[0] == there


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"layers": (2, 6)}, "layers (2, 6 here, 3, 6 there)"),
        ({"include": ("bos", *KINDS)}, f"include (bos, {', '.join(KINDS)} here, {', '.join(KINDS)} there)"),
        ({"per_residue_precision": "fp32"}, "per_residue_precision (fp32 here, fp16 there)"),
        ({"precision": "auto"}, "precision (auto here, fp32 there)"),
        ({"engine": "reference", "arithmetic": "other"}, "engine (reference here, packed there)"),
        ({"long_sequences": "whole", "max_residues": None}, "long_sequences (whole here, truncate there)"),
        ({"max_residues": 512}, "max_residues (512 here, 1022 there)"),
        ({"checkpoint": "d" * 32}, "model (dddddddd here, cccccccc there)"),
        ({"method_version": 2}, "esmflow's method (2 here, 1 there)"),
    ],
)
def test_whatever_else_differs_is_not_served_but_said(wide, other, differs):
    there, store = found(wide, replace(WIDE, **other))
    assert not any(there)
    assert stored_otherwise(store, DIGESTS) == (2, [differs])


def test_planning_says_what_differs_of_the_nearest_settings_and_nothing_where_nothing_does(wide, tmp_path, capsys):
    (tmp_path / "checkpoint").touch()
    inputs = [InputFile("a", str(write_fasta(tmp_path / "a.fasta", [("p", s) for s in SEQUENCES[:2]])))]

    def told(asked):
        (tmp_path / "results" / "plan").mkdir(parents=True, exist_ok=True)
        settings = plan_settings(
            tmp_path / "results" / "plan", inputs, [tmp_path / "group-0"],
            CostModel(ModelDimensions(6, 4, 1, True, True)),
            fingerprint=asked, store=str(wide.folder.parent), checkpoint=str(tmp_path / "checkpoint"),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "check_unchanged", lambda *_, **__: None)
            return planning.plan(settings), capsys.readouterr().err

    dealt, words = told(LAST_MEAN)
    assert (dealt.stored, dealt.to_embed.sequences) == (2, 0)
    assert "differs" not in words
    # The store has two fingerprints now; the one that is asked for differs from one of them in one key only.
    dealt, words = told(replace(LAST_MEAN, precision="bf16"))
    assert (dealt.stored, dealt.to_embed.sequences) == (0, 2)
    assert (
        "the store has 2 of the first 2 sequences to embed under other settings; what differs: "
        "precision (bf16 here, fp32 there)" in words
    )


def test_a_damaged_wider_segment_is_not_counted_on_and_one_that_says_nothing_is_passed_over(wide, tmp_path):
    path = wide.path("a" * 32)
    content = bytearray(path.read_bytes())
    content[content.index(wide.read("a" * 32).arrays["mean_layer3"].tobytes())] ^= 1
    path.write_bytes(content)
    assert [any(found(wide, replace(WIDE, layers=(layer,)))[0]) for layer in (3, 6)] == [False, True]
    (wide.folder / "fingerprint.json").write_text("{}")
    assert not any(found(wide, replace(WIDE, layers=(3,), include=("per_residue",)))[0])


@pytest.mark.parametrize(("precision", "taken"), [("fp32", True), ("fp16", False)])
def test_what_the_engine_changed_in_16_bits_is_taken_over_in_fp32_only(tmp_path, precision, taken):
    first = replace(LAST_MEAN, precision="auto", arithmetic=ARITHMETIC["packed", "fp32"])
    store = Store(tmp_path / "store", first)
    store.create()
    arrays = {"mean_layer6": np.ones((2, 4), np.float32)}
    store.write("a" * 32, Segment(DIGESTS[:2], np.array([3, 5]), arrays, precision, ()))
    there, _ = found(store, replace(first, arithmetic=ARITHMETIC["packed", "auto"]))
    assert there == [taken, taken, False]
