"""The packed engine against fair-esm's own module, in fp32 on the CPU."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import esm
import numpy as np
import pytest
import torch

from esmflow.arrays import INCLUDE as EVERYTHING
from esmflow.arrays import Outputs
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointError
from esmflow.engine import transformer
from esmflow.engine.attention import Rotation, sdpa_attention
from esmflow.engine.fair_esm import load_fair_esm
from esmflow.engine.packed import PackedEngine, auto_token_budget
from esmflow.engine.packing import pack_sequences

SHAPES = {"head 16": (3, 64, 4), "head 24": (4, 96, 4), "head 64": (2, 128, 2)}
GOLDEN = Path(__file__).parents[2] / "data" / "golden_esm2_8m.npz"


def random_sequences(seed: int, count: int, longest: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO"), n)) for n in rng.integers(2, longest, count)]


def write_random_checkpoint(folder: Path, layers: int, hidden: int, heads: int, contact_head: bool = True) -> Path:
    """A fair-esm `.pt` with random weights, biases and norms, converted."""
    torch.manual_seed(layers * hidden)
    model = esm.ESM2(layers, hidden, heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "regression" in name else 0.05))
    state = {f"encoder.sentence_encoder.{k}": v for k, v in model.state_dict().items() if "contact_head" not in k}
    source = folder / "random.pt"
    torch.save({"cfg": argparse.Namespace(), "model": state}, source)
    if contact_head:
        regression = {k: v for k, v in model.state_dict().items() if "contact_head" in k}
        torch.save({"model": regression}, folder / "random-contact-regression.pt")
    target = folder / "random.safetensors"
    convert_checkpoint(source, target, "random")
    return target


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def random_checkpoint(request, tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), *request.param)


def embed(engine: PackedEngine, sequences: list[str]) -> dict[str, np.ndarray]:
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def all_outputs(checkpoint: Path, include: tuple[str, ...] = EVERYTHING) -> Outputs:
    layers = load_fair_esm(str(checkpoint), torch.device("cpu")).num_layers
    return Outputs(tuple(range(layers + 1)), include)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@torch.no_grad()
def fair_esm_results(checkpoint: Path, sequences: list[str], include: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Each sequence alone through fair-esm's module, so that padding plays no part."""
    model = load_fair_esm(str(checkpoint), torch.device("cpu"))
    tokenise = model.alphabet.get_batch_converter()
    parts: dict[str, list[np.ndarray]] = {}
    for sequence in sequences:
        tokens = tokenise([("", sequence)])[2]
        result = model(tokens, repr_layers=range(model.num_layers + 1), return_contacts="contacts" in include)
        for layer, values in result["representations"].items():
            residues = values[0, 1:-1].numpy()
            parts.setdefault(f"mean_layer{layer}", []).append(residues.mean(0)[None])
            parts.setdefault(f"bos_layer{layer}", []).append(values[0, :1].numpy())
            parts.setdefault(f"per_residue_layer{layer}", []).append(residues)
            parts.setdefault(f"max_layer{layer}", []).append(residues.max(0)[None])
            parts.setdefault(f"std_layer{layer}", []).append(residues.astype(np.float64).std(0)[None])
        if "contacts" in include:
            parts.setdefault("contacts", []).append(result["contacts"][0].numpy().ravel())
        logits = result["logits"][0, 1:-1]
        parts.setdefault("logits", []).append(logits.numpy())
        log_p = torch.log_softmax(logits.double(), -1).numpy()
        parts.setdefault("entropy", []).append(-(np.exp(log_p) * log_p).sum(-1))
        own = log_p[np.arange(len(sequence)), tokens[0, 1:-1].numpy()]
        parts.setdefault("pseudo_perplexity", []).append(np.exp(-own.mean(keepdims=True)))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def assert_agrees_with_fair_esm(checkpoint: Path, sequences: list[str], include: tuple[str, ...]) -> None:
    outputs = all_outputs(checkpoint, include)
    found = embed(PackedEngine.load(checkpoint, outputs, "fp32", "cpu"), sequences)
    expected = fair_esm_results(checkpoint, sequences, include)
    assert list(found) == outputs.names()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.shape == expected[name].shape
        assert relative_error(array, expected[name]) < (1e-4 if name == "contacts" else 1e-5), name


def test_everything_agrees_with_fair_esm(random_checkpoint):
    assert_agrees_with_fair_esm(random_checkpoint, random_sequences(1, 12, 90), EVERYTHING)


def test_positions_beyond_2048_agree_with_fair_esm_after_short_ones_too(random_checkpoint):
    short = random_sequences(11, 3, 40)
    long = [short[0], "".join(random_sequences(12, 80, 90))[:2500]]
    assert len(long[1]) == 2500
    include = ("mean", "bos", "per_residue")
    engine = PackedEngine.load(random_checkpoint, Outputs((1, 2), include), "fp32", "cpu")
    # The table of angles is made for the short ones first.
    embed(engine, short)
    found, expected = embed(engine, long), fair_esm_results(random_checkpoint, long, include)
    for name, array in found.items():
        assert relative_error(array, expected[name]) < 1e-5, name
    assert relative_error(found["per_residue_layer1"][-200:], expected["per_residue_layer1"][-200:]) < 1e-5


def test_everything_that_the_real_model_has_agrees_with_fair_esm(real_checkpoint):
    include = ("mean", "bos", "max", "std", "per_residue", "contacts")
    assert_agrees_with_fair_esm(real_checkpoint, random_sequences(2, 6, 400), include)


def test_scores_of_the_real_encoder_under_a_made_up_head_agree_with_fair_esm(real_with_head):
    include = ("mean", "logits", "entropy", "pseudo_perplexity")
    assert_agrees_with_fair_esm(real_with_head, random_sequences(3, 6, 400), include)


def test_the_real_model_agrees_with_the_golden_file(real_checkpoint):
    golden = np.load(GOLDEN)
    engine = PackedEngine.load(real_checkpoint, Outputs((3, 6), ("mean", "bos", "per_residue")), "fp32", "cpu")
    found = embed(engine, golden["sequences"].tolist())
    for name in ("mean_layer6", "mean_layer3", "bos_layer6"):
        assert relative_error(found[name], golden[name]) < 1e-4
    first_three = np.concatenate([golden[f"per_residue_{i}"] for i in range(3)])
    assert relative_error(found["per_residue_layer6"][: len(first_three)], first_three) < 1e-4


def test_any_packing_gives_the_same_vectors(random_checkpoint):
    sequences = random_sequences(3, 40, 120)
    engine = PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), "fp32", "cpu")
    together = embed(engine, sequences)["mean_layer2"]
    for budget in (1, 130, 1000):
        for pack in engine.batches([len(s) for s in sequences], budget):
            apart = embed(engine, [sequences[i] for i in pack])["mean_layer2"]
            assert relative_error(apart, together[pack]) < 1e-5


def test_the_tail_changes_nothing(random_checkpoint):
    sequences = random_sequences(4, 7, 50)
    engine = PackedEngine.load(random_checkpoint, Outputs((0, 2), EVERYTHING), "fp32", "cpu")
    plain = embed(engine, sequences)
    padded = engine.fetch(engine.launch(pack_sequences(sequences, quantum=1 << 20)))
    for name, array in plain.items():
        assert relative_error(padded[name], array) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_precision_stays_near_fp32(random_checkpoint, precision):
    sequences = random_sequences(5, 10, 80)
    exact = embed(PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), "fp32", "cpu"), sequences)
    rounded = embed(PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), precision, "cpu"), sequences)
    assert rounded["mean_layer2"].dtype == np.float32
    assert relative_error(rounded["mean_layer2"], exact["mean_layer2"]) < 0.02


def test_per_residue_can_be_fp16(random_checkpoint):
    sequences = random_sequences(6, 5, 40)
    outputs = Outputs((2,), ("mean", "per_residue"))
    half = embed(PackedEngine.load(random_checkpoint, replace(outputs, per_residue="fp16"), "fp32", "cpu"), sequences)
    full = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), sequences)
    assert half["per_residue_layer2"].dtype == np.float16
    assert np.array_equal(half["per_residue_layer2"], full["per_residue_layer2"].astype(np.float16))
    assert half["mean_layer2"].dtype == np.float32


def test_a_lower_layer_alone_is_the_same_as_beside_the_others(random_checkpoint):
    sequences = random_sequences(7, 5, 40)
    alone = embed(PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), "fp32", "cpu"), sequences)
    beside = embed(PackedEngine.load(random_checkpoint, all_outputs(random_checkpoint), "fp32", "cpu"), sequences)
    assert relative_error(alone["mean_layer1"], beside["mean_layer1"]) < 1e-6


def test_auto_is_fp32_with_the_exact_gelu_on_a_cpu(random_checkpoint):
    engine = PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), "auto", "cpu")
    assert engine.precision == "fp32"
    assert engine.model.operations.activate is transformer.exact_gelu
    with engine.at_full_precision() as exact:
        assert exact is engine


def test_full_precision_of_a_16_bit_engine_is_an_fp32_engine(random_checkpoint):
    engine = PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), "bf16", "cpu")
    before = embed(engine, ["MKV"])
    with engine.at_full_precision() as exact:
        assert exact.precision == "fp32"
        assert np.array_equal(
            embed(exact, ["MKV"])["mean_layer1"],
            embed(PackedEngine.load(random_checkpoint, engine.outputs, "fp32", "cpu"), ["MKV"])["mean_layer1"],
        )
    assert np.array_equal(embed(engine, ["MKV"])["mean_layer1"], before["mean_layer1"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_representation_stays_as_it_was_handed_out(random_checkpoint, precision):
    engine = PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), precision, "cpu")
    pack, attend = engine.prepare(random_sequences(9, 5, 40)), engine.model.operations.attend
    with torch.inference_mode():
        kept = list(engine.model.representations(pack, attend, (0, 1, 2)))
        as_handed_out = [found.clone() for found in engine.model.representations(pack, attend, (0, 1, 2))]
    assert all(torch.equal(*pair) for pair in zip(kept, as_handed_out, strict=True))
    assert not torch.equal(kept[0], kept[1])


def test_matrix_products_may_not_add_up_in_16_bits(random_checkpoint):
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), "bf16", "cpu")
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction


def broken_compiler(*_):
    raise RuntimeError("no working compiler\nand a long explanation")


def wrong_kernel(x, *_):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("kernel", "reason"), [(broken_compiler, "no working compiler"), (wrong_kernel, "layer norm is wrong")]
)
def test_kernels_that_fail_are_one_warning_and_the_same_vectors(random_checkpoint, monkeypatch, caplog, kernel, reason):
    sequences = random_sequences(8, 6, 60)
    outputs = Outputs((2,), ("mean",))
    plain = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu", fast_kernels=False), sequences)
    monkeypatch.setattr(transformer, "flash_available", lambda *_: True)
    broken = transformer.Operations(kernel, sdpa_attention, transformer.exact_gelu)
    monkeypatch.setattr(transformer, "kernel_operations", lambda family: broken)
    with caplog.at_level(logging.WARNING):
        found = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), sequences)
    assert len(caplog.records) == 1
    assert reason in caplog.records[0].getMessage()
    assert np.array_equal(found["mean_layer2"], plain["mean_layer2"])


def test_a_missing_triton_is_one_warning_and_the_same_vectors(random_checkpoint, monkeypatch, caplog):
    outputs = Outputs((2,), ("mean",))
    plain = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), ["MKV"])
    monkeypatch.setattr(transformer, "flash_available", lambda *_: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "esmflow.engine.kernels", raising=False)
    found = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), ["MKV"])
    assert len(caplog.records) == 1
    assert np.array_equal(found["mean_layer2"], plain["mean_layer2"])


def test_contacts_and_logits_need_their_heads(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path, 1, 32, 2, contact_head=False)
    with pytest.raises(ValueError, match="contact head"):
        PackedEngine.load(checkpoint, Outputs((1,), ("contacts",)), "fp32", "cpu")


def test_logits_need_a_language_model_head(real_checkpoint):
    with pytest.raises(ValueError, match="language model head"):
        PackedEngine.load(real_checkpoint, Outputs((6,), ("logits",)), "fp32", "cpu")


def test_a_truncated_checkpoint_is_a_clear_error(random_checkpoint, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(random_checkpoint.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        PackedEngine.load(broken, Outputs((1,), ("mean",)), "fp32", "cpu")


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
def test_attention_keeps_sequences_apart_at_every_head_size(head_dim):
    """Against plain attention of each sequence alone, with fair-esm's own rotary embedding."""
    from esm.rotary_embedding import RotaryEmbedding

    torch.manual_seed(head_dim)
    pack = pack_sequences(["M" * n for n in (7, 30, 30, 3)])
    qkv, bias = torch.randn(len(pack.tokens), 3, 2, head_dim), torch.randn(2, 2, head_dim)
    rotary = RotaryEmbedding(head_dim)
    found = sdpa_attention(qkv, bias.flatten(), Rotation.of(rotary.inv_freq, pack.longest), pack)
    for start, stop in zip(pack.boundaries[:-1], pack.boundaries[1:], strict=True):
        q, k, v = (x.transpose(0, 1) for x in qkv[start:stop].unbind(1))
        q, k = rotary(q + bias[0][:, None], k + bias[1][:, None])
        expected = torch.softmax(q @ k.transpose(1, 2) / head_dim**0.5, -1) @ v
        assert torch.allclose(found[start:stop], expected.transpose(0, 1).flatten(1), atol=1e-5)


def test_the_automatic_budget_is_a_budget(random_checkpoint):
    from esmflow.checkpoint.file import read_checkpoint_info

    assert auto_token_budget(read_checkpoint_info(random_checkpoint).dimensions, "fp32", "cpu") >= 1024
