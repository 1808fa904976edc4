"""What the certificate of an ESM C run is computed with: right by transformers, padded, in memory or by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import proteins
from made_up_families import ESM_C_SHAPES, random_esm_c, write_esm_c

from esmflow.arrays import Outputs
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.engine.fair_esm import load_fair_esm, padded_tokens
from esmflow.engine.packed import PackedEngine
from esmflow.method import EMBED_WHOLE
from esmflow.verify.agreement import LIMITS, common_fault, compare
from esmflow.verify.esm_c import PlainEsmC
from esmflow.verify.recompute import Recomputation

GOLDEN = Path(__file__).parents[2] / "data" / "golden_esm_c.npz"
TOLERANCE = 1e-5


@pytest.fixture(params=ESM_C_SHAPES)
def golden_and_checkpoint(request, tmp_path) -> tuple[dict[str, np.ndarray], str]:
    golden = np.load(GOLDEN)
    shape = ESM_C_SHAPES[request.param]
    source = write_esm_c(tmp_path / "source", random_esm_c(*shape), shape[2])
    convert_checkpoint(source, tmp_path / "a.safetensors", "x")
    arrays = {name.removeprefix(f"{request.param}/"): golden[name] for name in golden.files}
    return arrays, str(tmp_path / "a.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("resident_bytes", [None, 0], ids=["in memory", "layer by layer"])
def test_the_plain_implementation_is_what_transformers_gives_in_one_padded_batch(golden_and_checkpoint, resident_bytes):
    golden, checkpoint = golden_and_checkpoint
    model = load_fair_esm(checkpoint, torch.device("cpu"), resident_bytes, PlainEsmC)
    sequences = golden["sequences"].tolist()
    result = model(padded_tokens(model, sequences), repr_layers=range(len(model.layers) + 1))

    def error(found: torch.Tensor, expected: np.ndarray) -> float:
        rows = np.concatenate([found[i, 1 : len(sequence) + 1].numpy() for i, sequence in enumerate(sequences)])
        return float(np.abs(rows - expected).max() / np.abs(expected).max())

    assert error(result["logits"], golden["logits"]) < TOLERANCE
    for layer, values in result["representations"].items():
        assert error(values, golden[f"per_residue_layer{layer}"]) < TOLERANCE


def test_only_the_layers_asked_for_are_given(golden_and_checkpoint):
    _, checkpoint = golden_and_checkpoint
    model = load_fair_esm(checkpoint, torch.device("cpu"), module=PlainEsmC)
    with torch.no_grad():
        result = model(padded_tokens(model, ["MKV"]), repr_layers=[1])
    assert result["representations"].keys() == {1}


def test_the_certificate_s_expectation_of_esm_c_is_what_transformers_gives(golden_and_checkpoint):
    golden, checkpoint = golden_and_checkpoint
    recomputation = Recomputation(checkpoint, "cpu")
    last = recomputation.dimensions.layers
    outputs = Outputs((0, last), ("mean", "bos", "logits"))
    sequences = golden["sequences"].tolist()
    found = dict(recomputation.expect(sequences, outputs, EMBED_WHOLE))
    for kind in ("mean", "bos"):
        rows = np.stack([found[i][f"{kind}_layer{last}"].right for i in range(len(sequences))])
        assert np.abs(rows - golden[f"{kind}_layer{last}"]).max() < TOLERANCE * np.abs(rows).max()
    assert "the mean with eos in it" in found[0][f"mean_layer{last}"].mistakes


def test_esm_c_in_8_bits_passes_and_mistakes_in_it_do_not(golden_and_checkpoint):
    _, checkpoint = golden_and_checkpoint
    recomputation = Recomputation(checkpoint, "cpu")
    sequences, last = proteins(16, 20, 90, seed=5), recomputation.dimensions.layers
    outputs, limits = Outputs((last - 1, last), ("mean", "bos", "entropy", "pseudo_perplexity")), LIMITS["int8"]
    expected = dict(recomputation.expect(sequences, outputs, EMBED_WHOLE))
    engine = PackedEngine.load(checkpoint, outputs, "int8", "cpu")
    found = engine.fetch(engine.launch(engine.prepare(sequences)))
    found["entropy"] = np.split(found["entropy"], np.cumsum([len(sequence) for sequence in sequences])[:-1])

    def verdict(name: str, vectors: np.ndarray) -> tuple[int, str | None]:
        right = [expected[number][name] for number in range(len(sequences))]
        agreements = [compare(v, r.right, r.mistakes, r.negligible) for v, r in zip(vectors, right, strict=True)]
        failing = sum(not limits.allow(agreement) for agreement in agreements)
        return failing, common_fault(agreements, limits)

    assert {name: verdict(name, vectors) for name, vectors in found.items()} == dict.fromkeys(found, (0, None))
    last_mean, mean_before = found[f"mean_layer{last}"], found[f"mean_layer{last - 1}"]
    assert verdict(f"mean_layer{last}", mean_before)[0] == len(sequences)
    assert "times as long as they should be" in verdict(f"mean_layer{last}", 1.02 * last_mean)[1]


def test_its_attention_maps_are_those_of_the_engine(golden_and_checkpoint):
    """Which `make test-tools` holds against those of transformers."""
    golden, checkpoint = golden_and_checkpoint
    sequence = golden["sequences"].tolist()[0]
    layers = load_fair_esm(checkpoint, torch.device("cpu"), module=PlainEsmC).layers
    outputs = Outputs(tuple(range(1, len(layers) + 1)), ("attention",))
    engine = PackedEngine.load(checkpoint, outputs, "fp32", "cpu")
    found = engine.fetch(engine.launch(engine.prepare([sequence])))
    ((_, expected),) = Recomputation(checkpoint, "cpu").expect([sequence], outputs, EMBED_WHOLE)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(found[name].ravel() - values.right.ravel()).max() < TOLERANCE, name
