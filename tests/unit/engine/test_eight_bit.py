"""Products of 8 bits, in PyTorch: what is rounded, what stays exact, and how near the engine is to fp32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up import random_model, write_converted

from esmflow.arrays import Outputs
from esmflow.engine import eight_bit
from esmflow.engine.kernels import plain_eight_bits as plain
from esmflow.engine.packed import PackedEngine
from esmflow.engine.transformer import EPSILON
from esmflow.engine.weights import EightBitMatrix, Norm

EVERYTHING = ("mean", "bos", "per_residue", "contacts", "logits")


def embed(engine, sequences):
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def cosines(found, expected):
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return (found * expected).sum(1) / norms


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_hadamard_matrix_is_orthogonal(size):
    signs = plain.hadamard(size)
    assert torch.equal(signs @ signs.T, size * torch.eye(size))
    assert signs.abs().min() == 1


@pytest.mark.parametrize("width", [96, 320, 480])
def test_rows_are_rounded_to_half_a_step_and_the_largest_fills_the_range(width):
    torch.manual_seed(0)
    x = torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]
    signs = plain.hadamard(min(width & -width, 64))
    values, scales = plain.quantise_rows(x, signs)
    assert values.dtype == torch.int8
    assert (values.abs().amax(1) == 127).all()
    steps = scales * len(signs) ** 0.5
    rotated = (x.unflatten(1, (-1, len(signs))) @ signs).flatten(1)
    assert ((values * steps[:, None] - rotated).abs() <= 0.501 * steps[:, None]).all()


def test_a_row_of_zeros_gives_zeros():
    values, scales = plain.quantise_rows(torch.zeros(2, 64), plain.hadamard(64))
    assert not values.any()
    assert torch.isfinite(scales).all()


def test_what_stands_out_in_one_coordinate_costs_the_others_little():
    torch.manual_seed(1)
    x, weight = torch.randn(50, 128), torch.randn(32, 128)
    x[:, 5] *= 60
    errors = []
    for signs in (plain.hadamard(1), plain.hadamard(64)):
        (a, sa), (b, sb) = (plain.quantise_rows(m, signs) for m in (x, weight))
        product = (a.float() @ b.float().T) * sa[:, None] * sb
        errors.append(float((product - x @ weight.T).norm()))
    assert errors[1] < errors[0] / 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """head size 24, width 96: blocks of 32."""
    path = tmp_path_factory.mktemp("eight") / "random.safetensors"
    return write_converted(path, random_model(layers=3, hidden=96, heads=4))


def sequences(count=12, longest=90):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in rng.integers(2, longest, count)]


def test_every_output_is_there_and_near_fp32(checkpoint):
    outputs = Outputs((0, 1, 3), EVERYTHING)
    exact, found = (embed(PackedEngine.load(checkpoint, outputs, p, "cpu"), sequences()) for p in ("fp32", "int8"))
    assert found.keys() == exact.keys()
    for name, values in found.items():
        error = np.linalg.norm(values - exact[name]) / np.linalg.norm(exact[name])
        # Embeddings are turned and turned back, not rounded.
        assert error < (1e-6 if name.endswith("layer0") else 0.03), name
        assert error > 0


def test_layers_are_in_8_bits_and_nothing_else_is(checkpoint):
    engine = PackedEngine.load(checkpoint, Outputs((3,), ("mean",)), "int8", "cpu")
    assert engine.precision == "int8"
    for layer in engine.model.weights.layers:
        for matrix in (layer.qkv, layer.out, layer.fc1, layer.fc2):
            assert isinstance(matrix, EightBitMatrix)
            assert matrix.weight.dtype == torch.int8
    assert engine.model.weights.embedding.dtype == torch.float32


def test_weights_that_were_given_up_are_rounded_alike_again(checkpoint):
    engine = PackedEngine.load(checkpoint, Outputs((3,), ("mean",)), "int8", "cpu")
    before = embed(engine, sequences())["mean_layer3"]
    with engine.at_full_precision() as exact:
        assert exact.precision == "fp32"
    assert np.array_equal(embed(engine, sequences())["mean_layer3"], before)


def test_what_all_tokens_share_is_exact():
    """The mean that is taken away before rounding comes back through the matrix's bias, with the norm's own."""
    torch.manual_seed(2)
    weight, bias, mean = torch.randn(20, 64), torch.randn(20), 3 * torch.randn(64)
    norm = Norm(*torch.randn(3, 64).unbind())
    rounded = eight_bit._rounded(*eight_bit._after_norm(weight, bias, norm, mean))
    nothing_else = plain.quantise_rows(torch.zeros(1, 64), plain.hadamard(64))
    expected = weight @ (norm.weight * mean + norm.bias) + bias
    assert torch.allclose(plain.product(nothing_else, rounded)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [96, 320, 480])
def test_a_norm_of_a_turned_stream_is_the_norm_turned(width):
    torch.manual_seed(3)
    x, norm, mean = torch.randn(9, width) + 2, Norm(*torch.randn(3, width).unbind()), torch.randn(width)
    block = plain.block_of(width)
    turned_norm = eight_bit._before_product(norm, mean)
    values, scales = plain.quantise_norm(plain.turned(x), turned_norm, EPSILON, block)
    found = plain.turned(values * scales[:, None])
    expected = F.layer_norm(x + norm.offset, (width,), eps=EPSILON) - mean
    assert (found - expected).abs().max() < 0.06
    assert ((found - expected).norm() / expected.norm()) < 0.01


def test_packing_changes_nothing_but_rounding(checkpoint):
    engine = PackedEngine.load(checkpoint, Outputs((3,), ("mean",)), "int8", "cpu")
    together = embed(engine, sequences())["mean_layer3"]
    alone = np.concatenate([embed(engine, [s])["mean_layer3"] for s in sequences()])
    assert cosines(alone, together).min() >= 0.9999


def test_the_real_model_in_8_bits_is_near_fp32(real_checkpoint, golden):
    proteins = [s for s in golden["sequences"].tolist() if len(s) <= 250]
    proteins += [s[:residues] for s, residues in zip(proteins, range(8, 30, 3))]
    outputs = Outputs((6,), ("mean", "per_residue"))
    exact, found = (embed(PackedEngine.load(real_checkpoint, outputs, p, "cpu"), proteins) for p in ("fp32", "int8"))
    pooled, residues = (cosines(found[name], exact[name]) for name in ("mean_layer6", "per_residue_layer6"))
    lengths = np.array([len(s) for s in proteins])
    long = lengths >= 30
    assert pooled[long].min() >= 0.9993
    assert pooled.min() >= 0.997
    assert np.quantile(residues[np.repeat(long, lengths)], 0.01) >= 0.998
    assert residues.min() >= 0.985
