"""What the certificate holds embeddings against is right, and well-known mistakes do not get past it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from made_up import proteins, random_model, relative_error, with_digests, write_converted
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esmflow.arrays import ATTENTION, INCLUDE, Outputs
from esmflow.engine import load_engine
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import load_fair_esm
from esmflow.method import EMBED_WHOLE, LongSequences
from esmflow.verify.agreement import LIMITS, UNLIKE, Agreement, common_fault, compare
from esmflow.verify.recompute import Recomputation

POOLED = Outputs((6,), ("mean",))


def expected(checkpoint, sequences, outputs, long=EMBED_WHOLE, **options):
    """By sequence and array."""
    found = dict(Recomputation(str(checkpoint), "cpu", **options).expect(sequences, outputs, long))
    return [found[number] for number in range(len(sequences))]


def embedded(checkpoint, sequences, outputs, precision="fp32", long=EMBED_WHOLE):
    """What the packed engine gives, by sequence and array."""
    engine = load_engine("packed", str(checkpoint), outputs, precision, "cpu")
    segment = extract_esm_features(with_digests(sequences), engine, 4096, long=long).segment
    row = {digest.tobytes(): i for i, digest in enumerate(segment.digests)}
    places = [row[digest] for digest, _ in with_digests(sequences)]
    offsets = {name: segment.offsets(name) for name in outputs.names()}
    return [
        {name: segment.arrays[name][offsets[name][p] : offsets[name][p + 1]] for name in outputs.names()}
        for p in places
    ]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A checkpoint with every head and random weights."""
    return write_converted(tmp_path_factory.mktemp("made_up") / "a.safetensors", random_model(3, 32, 2))


@pytest.fixture(scope="module")
def sample(golden):
    """Real proteins of all lengths up to 300."""
    return sorted((str(s) for s in golden["sequences"] if len(s) <= 250), key=len)


@pytest.fixture(scope="module")
def right(real_checkpoint, sample):
    """fair-esm's arrays of the sample."""
    return [arrays["mean_layer6"] for arrays in expected(real_checkpoint, sample, POOLED)]


@pytest.fixture(scope="module")
def with_ends(real_checkpoint, sample):
    """fair-esm's last layer of the sample with cls and eos, `[n + 2, 320]` each."""
    model = Recomputation(str(real_checkpoint), "cpu")
    return [model._run([sequence], [6])["representations"][6][0].numpy() for sequence in sample]


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16", "int8"])
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def vectors(real_checkpoint, sample, precision):
    """The engine's vectors of the sample, layers 5 and 6, `[N, 320]` each."""
    found = embedded(real_checkpoint, sample, Outputs((5, 6), ("mean",)), precision)
    return {layer: np.concatenate([arrays[f"mean_layer{layer}"] for arrays in found]) for layer in (5, 6)}


def test_vectors_are_those_of_the_golden_file(golden, real_checkpoint):
    numbers = [i for i, s in enumerate(golden["sequences"]) if len(s) <= 150]
    sequences = [str(golden["sequences"][i]) for i in numbers]
    found = expected(real_checkpoint, sequences, Outputs((3, 6), ("mean", "bos")))
    for array in ("mean_layer6", "mean_layer3", "bos_layer6"):
        for number, arrays in zip(numbers, found, strict=True):
            assert relative_error(arrays[array].right, golden[array][number]) < 1e-4


POOLED_OF_3 = Outputs((3,), ("mean",))
EVERYTHING = Outputs((0, 2, 3), (*INCLUDE, ATTENTION))


def test_every_kind_of_output_agrees_with_the_engine(made_up):
    sequences = proteins(6, 1, 40)
    for right, found in zip(
        expected(made_up, sequences, EVERYTHING), embedded(made_up, sequences, EVERYTHING), strict=True
    ):
        assert set(right) == set(EVERYTHING.names())
        for name, values in right.items():
            agreement = compare(found[name], values.right, values.mistakes, values.negligible)
            assert agreement.relative_error < 1e-4
            assert agreement.nearer_to is None


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_residues_that_do_not_differ_have_no_deviation_to_compare(made_up, precision):
    outputs, sequences = Outputs((0,), ("std",)), ["A", "A" * 70]
    for arrays, found in zip(
        expected(made_up, sequences, outputs), embedded(made_up, sequences, outputs, precision), strict=True
    ):
        values = arrays["std_layer0"]
        assert compare(found["std_layer0"], values.right, {}, values.negligible) == Agreement(1.0, 0.0, 1.0)
        assert compare(values.right + 1, values.right, {}, values.negligible).relative_error == UNLIKE


def test_entropies_of_a_model_that_is_sure_are_not_compared_beyond_rounding():
    sure, negligible = np.full(50, 1e-7), 1e-3 * 50**0.5
    assert compare(np.full(50, 2e-6), sure, {}, negligible) == Agreement(1.0, 0.0, 1.0)
    assert compare(np.full(50, 0.01), sure, {}, negligible).relative_error == UNLIKE


@pytest.mark.parametrize(
    ("kind", "wrong", "name"),
    [
        ("entropy", lambda values: values / np.log(2), "the entropy in bits"),
        ("max_layer3", None, "the max of layer 2"),
        ("std_layer3", None, "the std of layer 2"),
        ("pseudo_perplexity", lambda values: 1.03 * values, None),
        ("attention_layer3", None, "the maps of layer 2"),
    ],
)
def test_mistakes_in_the_numbers_of_one_pass_are_caught(made_up, kind, wrong, name):
    sequences = proteins(8, 20, 60)
    outputs = Outputs((2, 3), ("max", "std", "entropy", "pseudo_perplexity", ATTENTION))
    right = [arrays[kind] for arrays in expected(made_up, sequences, outputs)]
    found = embedded(made_up, sequences, outputs)
    vectors = [wrong(f[kind]) if wrong else f[kind.replace("3", "2")] for f in found]
    assert verdict([f[kind] for f in found], right, "fp32") == (0, None)
    failing, common = verdict(vectors, right, "fp32")
    assert failing == len(sequences)
    assert name is None or name in common


@pytest.mark.parametrize("overlap", [None, 0, 5])
def test_long_sequences_are_cut_as_the_engine_cuts_them(made_up, overlap):
    outputs = Outputs((1, 3), tuple(kind for kind in INCLUDE if kind not in ("contacts", "logits")))
    sequences = proteins(8, 15, 70)
    right = expected(made_up, sequences, outputs, LongSequences(16, overlap))
    found = embedded(made_up, sequences, outputs, long=LongSequences(16, overlap))
    for arrays, values in zip(found, right, strict=True):
        assert all(relative_error(arrays[name].ravel(), values[name].right.ravel()) < 1e-4 for name in arrays)


def test_a_model_that_is_read_layer_by_layer_gives_the_same_and_holds_no_layer(made_up):
    sequences = proteins(3, 5, 30)
    at_once = expected(made_up, sequences, EVERYTHING)
    model = Recomputation(str(made_up), "cpu", resident_bytes=0)
    layer_by_layer = dict(model.expect(sequences, EVERYTHING, EMBED_WHOLE))
    for number, arrays in enumerate(at_once):
        for name, values in arrays.items():
            assert np.array_equal(layer_by_layer[number][name].right, values.right)
    assert all(tensor.device.type == "meta" for layer in model.model.layers for tensor in layer.parameters())


def cuda_runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory")


def host_runs_out():
    torch.empty(2**60, dtype=torch.uint8)


def test_sequences_of_like_length_are_computed_together_above_all_where_layers_are_read_for_each_batch(made_up):
    sequences = proteins(40, 20, 90)
    batches = {}
    for resident_bytes in (1 << 30, 0):
        model = Recomputation(str(made_up), "cpu", resident_bytes)
        run, ran = model._run, batches.setdefault(resident_bytes, [])
        model._run = lambda residues, layers, run=run, ran=ran: (
            ran.append(list(map(len, residues))) or run(residues, layers)
        )
        found = dict(model.expect(sequences, EVERYTHING, EMBED_WHOLE))
        assert sorted(found) == list(range(40))
    assert [sorted(itertools.chain(*ran)) for ran in batches.values()] == [sorted(map(len, sequences))] * 2
    assert 3 <= len(batches[1 << 30]) <= 20
    assert all((max(ran) + 2) * len(ran) <= 512 for ran in batches[1 << 30])
    assert len(batches[0]) == 1


@pytest.mark.parametrize("run_out", [cuda_runs_out, host_runs_out])
def test_a_sequence_that_does_not_fit_is_left_out_and_the_others_are_computed(made_up, monkeypatch, run_out):
    monkeypatch.setattr("esmflow.verify.recompute._BATCH_TOKENS", {"cpu": 1000})
    model = Recomputation(str(made_up), "cpu")
    run = model._run

    def small_memory(sequences, layers):
        if sum(len(sequence) for sequence in sequences) > 30:
            run_out()
        return run(sequences, layers)

    monkeypatch.setattr(model, "_run", small_memory)
    found = dict(model.expect(proteins(5, 10, 20) + proteins(1, 40, 40), EVERYTHING, EMBED_WHOLE))
    assert [number for number, arrays in sorted(found.items()) if arrays is None] == [5]


@pytest.mark.parametrize("run_out", [cuda_runs_out, host_runs_out])
def test_windows_that_do_not_fit_leave_their_sequence_out(made_up, monkeypatch, run_out):
    model = Recomputation(str(made_up), "cpu")
    run = model._run

    def small_memory(sequences, layers):
        if len(sequences[0]) == 30:
            run_out()
        return run(sequences, layers)

    monkeypatch.setattr(model, "_run", small_memory)
    found = dict(model.expect(proteins(3, 10, 20) + proteins(1, 80, 80), POOLED_OF_3, LongSequences(30, 5)))
    assert [number for number, arrays in sorted(found.items()) if arrays is None] == [3]


def test_contacts_that_do_not_fit_are_missing_and_the_rest_is_computed(made_up, monkeypatch):
    model = Recomputation(str(made_up), "cpu")
    monkeypatch.setattr(model.model, "predict_contacts", lambda tokens: host_runs_out())
    found = dict(model.expect(proteins(3, 10, 20), EVERYTHING, EMBED_WHOLE))
    assert all(set(arrays) == set(EVERYTHING.names()) - {"contacts"} for arrays in found.values())


def test_weights_that_do_not_fit_are_read_layer_by_layer(made_up, monkeypatch):
    sequences = proteins(3, 5, 30)
    at_once = expected(made_up, sequences, EVERYTHING)

    def load(checkpoint, device, resident_bytes, module):
        if resident_bytes:
            host_runs_out()
        return load_fair_esm(checkpoint, device, resident_bytes, module)

    monkeypatch.setattr("esmflow.verify.recompute.load_fair_esm", load)
    for arrays, expected_ones in zip(expected(made_up, sequences, EVERYTHING), at_once, strict=True):
        assert all(np.array_equal(arrays[name].right, values.right) for name, values in expected_ones.items())


# Planted faults


def verdict(vectors, right, precision):
    """How many sequences do not pass, and what is wrong with all of them together."""
    limits = LIMITS[precision]
    agreements = [
        compare(vector, values.right, values.mistakes, values.negligible)
        for vector, values in zip(vectors, right, strict=True)
    ]
    return sum(not limits.allow(agreement) for agreement in agreements), common_fault(agreements, limits)


def test_right_embeddings_pass_in_every_precision(vectors, right, precision):
    assert verdict(vectors[6], right, precision) == (0, None)


def test_an_engine_that_forgets_the_scale_of_token_embeddings_is_caught(real_checkpoint, sample, right, tmp_path):
    with safe_open(real_checkpoint, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(real_checkpoint)
    tensors["embed_tokens.weight"] /= 0.88
    save_file(tensors, tmp_path / "unscaled.safetensors", metadata)
    unscaled = [a["mean_layer6"] for a in embedded(tmp_path / "unscaled.safetensors", sample, POOLED)]
    for limits in LIMITS:
        failing, common = verdict(unscaled, right, limits)
        assert failing == len(right) or common


@pytest.mark.parametrize("factor", [1.14, 0.98, 1.02])
def test_vectors_of_another_length_are_caught_though_their_cosine_is_1(vectors, right, precision, factor):
    failing, common = verdict(factor * vectors[6], right, precision)
    assert float(common.split("vectors are ")[1].split()[0]) == pytest.approx(factor, abs=0.005)
    assert failing == len(right) or precision != "fp32"


@pytest.mark.parametrize(
    ("rows", "what"),
    [(slice(1, None), "eos in it"), (slice(None, -1), "cls in it"), (slice(None), "cls and eos in it")],
)
def test_a_mean_over_more_than_the_residues_is_caught_and_named(with_ends, vectors, right, precision, rows, what):
    # With the rounding of the precision in it, as an engine with this fault would give it.
    wrong = [tokens[rows].mean(0) + v - r.right for tokens, v, r in zip(with_ends, vectors[6], right, strict=True)]
    assert what in verdict(wrong, right, precision)[1]


def test_another_layer_is_caught_and_named(vectors, right, precision):
    failing, common = verdict(vectors[5], right, precision)
    assert failing == len(right)
    assert "the mean of layer 5" in common


def test_two_swapped_rows_are_caught_and_no_other(vectors, right, precision):
    order = np.arange(len(right))
    order[[1, 4]] = order[[4, 1]]
    assert verdict(vectors[6][order], right, precision) == (2, None)


def test_what_is_not_finite_or_of_another_shape_does_not_pass():
    right = np.ones(4)
    for found in (np.full(4, np.nan), np.array([1, 1, 1, np.inf]), np.ones(5), np.zeros(4)):
        agreement = compare(found, right, {})
        assert not LIMITS["bf16"].allow(agreement)
    assert compare(np.ones(5), right, {}) == Agreement(0.0, UNLIKE, 0.0)
