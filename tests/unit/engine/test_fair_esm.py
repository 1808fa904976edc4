"""The reference engine is fair-esm's own model, and right to the last digit that fp32 leaves."""

import logging

import esm
import numpy as np
import pytest
import torch
from esm.data import FastaBatchedDataset
from made_up import (
    RARE_RESIDUES,
    RESIDUES,
    proteins,
    random_model,
    relative_error,
    stored_tensors,
    with_digests,
    write_converted,
    write_hugging_face,
)
from safetensors.torch import load_file

from esmflow.arrays import Outputs, resolve_layers
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.engine.engine import resolve_precision
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine, load_fair_esm

CPU = torch.device("cpu")
EVERYTHING = ("mean", "bos", "per_residue")


def load(checkpoint, layers, include=EVERYTHING, precision="fp32") -> ReferenceEngine:
    return ReferenceEngine.load(str(checkpoint), Outputs(tuple(layers), include), precision, "cpu")


def embed(engine, sequences: list[str]) -> dict[str, np.ndarray]:
    """One batch."""
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def in_input_order(extraction, sequences: list[str]) -> dict[str, list[np.ndarray]]:
    """What was extracted, by array: one array for each sequence, in the order of the sequences."""
    segment = extraction.segment
    row = {digest.tobytes(): i for i, digest in enumerate(segment.digests)}
    rows = [row[digest] for digest, _ in with_digests(sequences)]
    offsets = segment.offsets("per_residue_layer6")
    found = {}
    for name, values in segment.arrays.items():
        if name.startswith("per_residue"):
            found[name] = [values[offsets[r] : offsets[r + 1]] for r in rows]
        else:
            found[name] = [values[r] for r in rows]
    return found


# The golden file

# Its first ten are of 67 to 1,009 residues. fair-esm takes its time; the packed engine is held to all forty.
GOLDEN = 10


@pytest.fixture(scope="module")
def embedded_golden(golden, real_checkpoint):
    sequences = [str(sequence) for sequence in golden["sequences"][:GOLDEN]]
    return in_input_order(
        extract_esm_features(with_digests(sequences), load(real_checkpoint, (3, 6)), 2048),
        sequences,
    )


@pytest.mark.parametrize("array", ["mean_layer6", "mean_layer3", "bos_layer6"])
def test_pooled_vectors_are_those_of_the_golden_file(golden, embedded_golden, array):
    expected = golden[array][:GOLDEN]
    assert expected.shape == (GOLDEN, 320)
    assert relative_error(np.stack(embedded_golden[array]), expected) < 1e-4
    for found, vector in zip(embedded_golden[array], expected):
        assert relative_error(found, vector) < 1e-4


@pytest.mark.parametrize("number", [0, 1, 2])
def test_per_residue_vectors_are_those_of_the_golden_file(golden, embedded_golden, number):
    expected = golden[f"per_residue_{number}"]
    found = embedded_golden["per_residue_layer6"][number]
    assert found.shape == expected.shape == (len(str(golden["sequences"][number])), 320)
    assert relative_error(found, expected) < 1e-4
    assert max(relative_error(f, e) for f, e in zip(found, expected)) < 1e-3


# fair-esm's own way of extracting

SHAPES = {"one layer": (1, 16, 1), "head 16": (3, 64, 4), "head 24": (2, 72, 3), "head 64": (2, 128, 2)}


def extract_as_fair_esm_does(model: esm.ESM2, sequences: list[str], layers, budget: int):
    """What its `extract.py` does: its data set, its batches, its converter, its slices."""
    found = {}
    dataset = FastaBatchedDataset([str(i) for i in range(len(sequences))], sequences)
    for batch in dataset.get_batch_indices(budget, extra_toks_per_seq=1):
        labels, strings, tokens = model.alphabet.get_batch_converter()([dataset[i] for i in batch])
        with torch.no_grad():
            out = model(tokens, repr_layers=layers)
        for i, label in enumerate(labels):
            for layer in layers:
                values = out["representations"][layer][i]
                residues = values[1 : len(strings[i]) + 1]
                found[int(label), f"mean_layer{layer}"] = residues.mean(0).numpy()
                found[int(label), f"bos_layer{layer}"] = values[0].numpy()
                found[int(label), f"per_residue_layer{layer}"] = residues.numpy()
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_are_those_of_fair_esms_own_extraction(tmp_path, shape):
    model = random_model(*shape)
    layers = list(range(shape[0] + 1))
    sequences = proteins(40, 1, 120, letters=RESIDUES + RARE_RESIDUES + ".-")
    sequences = list(dict.fromkeys(sequences))
    expected = extract_as_fair_esm_does(model, sequences, layers, 500)
    engine = load(write_converted(tmp_path / "a.safetensors", model), layers)
    found = in_input_order(extract_esm_features(with_digests(sequences), engine, 300), sequences)
    assert len(found) == 3 * len(layers)
    for (number, array), vector in expected.items():
        assert found[array][number].shape == vector.shape
        assert relative_error(found[array][number], vector) < 1e-5


def test_weights_stored_in_fp16_are_computed_with_in_fp32(tmp_path):
    model = random_model()
    stored = stored_tensors(model, torch.float16)
    convert_checkpoint(write_hugging_face(tmp_path / "hf", stored), tmp_path / "a.safetensors", "fp16")
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    sequences = proteins(5, 10, 50)
    expected = extract_as_fair_esm_does(model, sequences, [2], 10_000)
    found = embed(load(tmp_path / "a.safetensors", [2], ("mean",)), sequences)["mean_layer2"]
    assert found.dtype == np.float32
    for number in range(5):
        assert relative_error(found[number], expected[number, "mean_layer2"]) < 1e-5


# Arithmetic that is easy to get wrong


@pytest.fixture
def by_hand(tmp_path):
    """One protein through fair-esm's module, its layers listened to; and through the engine."""
    model = random_model(layers=3, hidden=48, heads=3)
    sequence = "MKVLAGUZBOX"
    tokens = torch.tensor([[0, *(model.alphabet.get_idx(residue) for residue in sequence), 2]])
    raw = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, outputs: raw.append(outputs[0][:, 0]))
    with torch.no_grad():
        model(tokens)
    engine = load(write_converted(tmp_path / "a.safetensors", model), range(4))
    return model, tokens, raw, embed(engine, [sequence])


def test_layer_zero_is_the_token_embedding_times_0_88(by_hand):
    model, tokens, _, found = by_hand
    expected = (0.88 * model.embed_tokens.weight[tokens[0]]).detach().numpy()
    assert relative_error(found["per_residue_layer0"], expected[1:-1]) < 1e-6
    assert relative_error(found["bos_layer0"][0], expected[0]) < 1e-6
    assert relative_error(found["mean_layer0"][0], expected[1:-1].mean(0)) < 1e-6


def test_layers_before_the_last_are_the_raw_residual_stream(by_hand):
    model, _, raw, found = by_hand
    for layer in (1, 2):
        assert relative_error(found[f"per_residue_layer{layer}"], raw[layer - 1][1:-1].numpy()) < 1e-5
        normed = model.emb_layer_norm_after(raw[layer - 1]).detach().numpy()
        assert relative_error(found[f"per_residue_layer{layer}"], normed[1:-1]) > 0.1


def test_the_last_layer_has_the_final_norm_applied(by_hand):
    model, _, raw, found = by_hand
    normed = model.emb_layer_norm_after(raw[2]).detach().numpy()
    assert relative_error(found["per_residue_layer3"], normed[1:-1]) < 1e-5
    assert relative_error(found["per_residue_layer3"], raw[2][1:-1].numpy()) > 0.1


def test_the_mean_is_over_residues_only(by_hand):
    model, _, raw, found = by_hand
    normed = model.emb_layer_norm_after(raw[2]).detach().numpy()
    assert relative_error(found["mean_layer3"][0], normed[1:-1].mean(0)) < 1e-5
    for leaking in (normed[:-1], normed[1:], normed):
        assert relative_error(found["mean_layer3"][0], leaking.mean(0)) > 1e-3


def test_bos_is_the_vector_of_cls(by_hand):
    model, _, raw, found = by_hand
    normed = model.emb_layer_norm_after(raw[2]).detach().numpy()
    assert relative_error(found["bos_layer3"][0], normed[0]) < 1e-5


def test_rotary_frequencies_are_those_of_the_checkpoint(tmp_path):
    model = random_model()
    sequence = proteins(1, 900, 900)
    with_stored = embed(load(write_converted(tmp_path / "a.safetensors", model), [2]), sequence)
    stored = model.layers[0].self_attn.rot_emb.inv_freq.clone()
    engine = load(tmp_path / "a.safetensors", [2])
    assert torch.equal(engine.model.layers[0].self_attn.rot_emb.inv_freq, stored)
    # Rounding to fp16 shows: computed anew, they give other numbers.
    for layer in engine.model.layers:
        exact = 1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
        assert not torch.equal(exact, stored)
        layer.self_attn.rot_emb.inv_freq.copy_(exact)
    assert relative_error(embed(engine, sequence)["per_residue_layer2"], with_stored["per_residue_layer2"]) > 1e-4


def test_rare_residues_are_not_x(tmp_path):
    engine = load(write_converted(tmp_path / "a.safetensors", random_model()), [2], ("mean",))
    rare = embed(engine, [f"MK{residue}VL" for residue in RARE_RESIDUES])["mean_layer2"]
    for other in rare[1:]:
        assert relative_error(other, rare[0]) > 1e-3


# Padding and batches


def test_padding_does_not_change_results(tmp_path):
    engine = load(write_converted(tmp_path / "a.safetensors", random_model(3, 64, 4)), range(4))
    sequences = ["M", "MKV", *proteins(4, 20, 90), *proteins(1, 400, 400)]
    together = embed(engine, sequences)
    offsets = np.concatenate(([0], np.cumsum([len(s) for s in sequences])))
    for number, sequence in enumerate(sequences):
        for name, values in embed(engine, [sequence]).items():
            whole = together[name]
            rows = whole[offsets[number] : offsets[number + 1]] if "residue" in name else whole[number : number + 1]
            assert relative_error(rows, values) < 1e-5


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory):
    return load(write_converted(tmp_path_factory.mktemp("tiny") / "a.safetensors", random_model(1, 16, 1)), [1])


@pytest.mark.parametrize("budget", [1, 64, 500, 2048, 10**9])
def test_batches_keep_to_the_budget_and_lose_no_sequence(tiny_engine, budget):
    lengths = np.random.default_rng(budget).integers(1, 1500, 400).tolist()
    batches = tiny_engine.batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(400))
    for batch in batches:
        padded_tokens = len(batch) * (2 + max(lengths[i] for i in batch))
        assert padded_tokens <= budget or len(batch) == 1
    assert len(tiny_engine.batches(lengths, 10**9)) == 1


def test_the_padded_tokens_are_what_the_batches_say(tiny_engine):
    sequences = proteins(60, 5, 300)
    for batch in tiny_engine.batches([len(s) for s in sequences], 1000):
        tokens, _ = tiny_engine.prepare([sequences[i] for i in batch])
        assert tokens.numel() == len(batch) * (2 + max(len(sequences[i]) for i in batch))
        assert tokens.numel() <= 1000


def test_no_sequence_is_no_batch(tiny_engine):
    assert tiny_engine.batches([], 2048) == []


# Precision, layers and heads


def test_the_default_budget_is_fair_esms_and_larger_in_lower_precision(tmp_path):
    checkpoint = write_converted(tmp_path / "a.safetensors", random_model(1, 16, 1))
    budgets = {p: load(checkpoint, [1], precision=p).default_token_budget() for p in ("fp32", "auto", "bf16", "fp16")}
    assert budgets == {"fp32": 2048, "auto": 2048, "bf16": 3072, "fp16": 3072}


def test_auto_on_a_cpu_is_fp32_and_says_why(caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_precision("auto", CPU) == "fp32"
    assert "fp32, because this runs on a CPU" in caplog.text
    assert [resolve_precision(p, CPU) for p in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("fp16", 0.01)])
def test_lower_precision_gives_fp32_vectors_near_those_of_fp32(tmp_path, precision, error):
    checkpoint = write_converted(tmp_path / "a.safetensors", random_model(2, 64, 4))
    engine = load(checkpoint, [1, 2], precision=precision)
    sequences = proteins(6, 20, 80)
    exact, found = embed(load(checkpoint, [1, 2]), sequences), embed(engine, sequences)
    for name, values in found.items():
        assert values.dtype == np.float32
        assert 1e-6 < relative_error(values, exact[name]) < error
    with engine.at_full_precision() as full:
        assert full.precision == "fp32"
        again = embed(full, sequences)
    assert engine.precision == precision
    assert all(np.array_equal(again[name], exact[name]) for name in exact)


def test_arrays_are_those_that_the_outputs_name(tiny_engine, tmp_path):
    outputs = Outputs((0, 1), ("bos", "mean"))
    engine = ReferenceEngine(tiny_engine.model, outputs, "fp32", CPU)
    assert list(embed(engine, ["MKV"])) == outputs.names() == ["bos_layer0", "mean_layer0", "bos_layer1", "mean_layer1"]


def test_layers_resolve_as_a_user_writes_them():
    assert resolve_layers([-1, 0, 3, -1, 6], 6) == (0, 3, 6)
    assert resolve_layers([-7], 6) == (0,)
    for layer in (7, -8):
        with pytest.raises(ValueError, match=f"layers: {layer} does not exist in this model"):
            resolve_layers([layer], 6)


def test_a_head_that_the_checkpoint_does_not_hold_is_not_made_up(real_checkpoint):
    assert "lm_head.dense.weight" not in load_file(real_checkpoint)
    model = load_fair_esm(str(real_checkpoint), CPU)
    assert isinstance(model.lm_head, torch.nn.Identity)
    assert not isinstance(model.contact_head, torch.nn.Identity)


def test_a_loaded_module_is_the_one_that_was_converted(tmp_path):
    model = random_model(2, 48, 2)
    loaded = load_fair_esm(str(write_converted(tmp_path / "a.safetensors", model)), CPU)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
