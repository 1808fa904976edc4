"""The packed engine on a GPU: against itself in fp32 on the CPU, and as a citizen of a card that others share."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from esmflow.arrays import ATTENTION, INCLUDE, MASKED_LOGITS, Outputs
from esmflow.checkpoint.file import write_checkpoint
from esmflow.checkpoint.models import ModelDimensions
from esmflow.engine import transformer
from esmflow.engine.attention import Rotation, sdpa_attention, triton_attention, varlen_attention
from esmflow.engine.packed import PackedEngine, auto_token_budget
from esmflow.engine.packing import pack_sequences
from esmflow.inputs.fasta import read_records

kernels = pytest.importorskip("esmflow.engine.kernels.sixteen_bits") if torch.cuda.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PROJECT = Path(__file__).parents[2]
GOLDEN = PROJECT / "tests" / "data" / "golden_esm2_8m.npz"
# layers, width, heads: head sizes 16, 24, 32, 64 and 128.
SHAPES = [(3, 64, 4), (3, 96, 4), (2, 128, 4), (2, 256, 4), (2, 256, 2)]


def write_random_checkpoint(path: Path, layers: int, hidden: int, heads: int) -> Path:
    """A converted checkpoint with random weights, and every head."""
    generator = torch.Generator().manual_seed(layers * hidden + heads)

    def random(*shape: int, around: float = 0.0, scale: float = 0.05) -> torch.Tensor:
        return around + scale * torch.randn(*shape, generator=generator)

    tensors = {"embed_tokens.weight": random(33, hidden, scale=1.0)}
    for n in range(layers):
        layer = f"layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{layer}.self_attn.{part}.weight"] = random(hidden, hidden, scale=hidden**-0.5)
            tensors[f"{layer}.self_attn.{part}.bias"] = random(hidden)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{layer}.{norm}.weight"] = random(hidden, around=1.0)
            tensors[f"{layer}.{norm}.bias"] = random(hidden)
        tensors[f"{layer}.self_attn.rot_emb.inv_freq"] = 10000.0 ** -(
            torch.arange(0, hidden // heads, 2) / (hidden // heads)
        )
        tensors[f"{layer}.fc1.weight"] = random(4 * hidden, hidden, scale=hidden**-0.5)
        tensors[f"{layer}.fc1.bias"] = random(4 * hidden)
        tensors[f"{layer}.fc2.weight"] = random(hidden, 4 * hidden, scale=hidden**-0.5)
        tensors[f"{layer}.fc2.bias"] = random(hidden)
    for norm in ("emb_layer_norm_after", "lm_head.layer_norm"):
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = random(hidden, around=1.0), random(hidden)
    tensors["lm_head.dense.weight"] = random(hidden, hidden, scale=hidden**-0.5)
    tensors["lm_head.dense.bias"], tensors["lm_head.bias"] = random(hidden), random(33)
    tensors["contact_head.regression.weight"] = random(1, layers * heads, scale=1.0)
    tensors["contact_head.regression.bias"] = random(1)
    write_checkpoint(path, tensors, name="random", dimensions=ModelDimensions(layers, hidden, heads, True, True))
    return path


@pytest.fixture(scope="module", params=SHAPES, ids=[f"head {d // h}" for _, d, h in SHAPES])
def random_checkpoint(request, tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random.safetensors", *request.param)


def random_sequences(seed: int, count: int, longest: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO"), n)) for n in rng.integers(1, longest, count)]


def embed(engine: PackedEngine, sequences: list[str]) -> dict[str, np.ndarray]:
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    # In 64 bits: squares of pseudo-perplexities are beyond 32.
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_fp32_on_the_gpu_is_fp32_on_the_cpu(random_checkpoint):
    sequences = random_sequences(1, 20, 300)
    outputs = Outputs((0, 1, 2), (*INCLUDE, ATTENTION))
    expected = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), sequences)
    found = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cuda"), sequences)
    for name, array in found.items():
        limit = {"contacts": 1e-4, "pseudo_perplexity": 1e-4}.get(name, 1e-5)
        assert relative_error(array, expected[name]) < limit, name


def masked_copies(seed: int) -> list[str]:
    places = np.random.default_rng(seed)
    cut = ((sequence, places.integers(len(sequence))) for sequence in random_sequences(seed, 30, 300))
    return [f"{sequence[:place]}_{sequence[place + 1 :]}" for sequence, place in cut]


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 0.02), ("bf16", 0.02)])
def test_masked_copies_on_the_gpu_are_those_on_the_cpu(random_checkpoint, precision, limit):
    outputs = Outputs((), (MASKED_LOGITS,))
    expected = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), masked_copies(5))[MASKED_LOGITS]
    engine = PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), precision, "cuda").with_outputs(outputs)
    found = embed(engine, masked_copies(5))[MASKED_LOGITS]
    assert found.shape == expected.shape == (30, 33)
    assert relative_error(found, expected) < limit


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_precision_is_near_fp32(random_checkpoint, precision):
    sequences = random_sequences(2, 20, 300)
    outputs = Outputs((0, 1, 2), (*INCLUDE, ATTENTION))
    expected = embed(PackedEngine.load(random_checkpoint, outputs, "fp32", "cpu"), sequences)
    found = embed(PackedEngine.load(random_checkpoint, outputs, precision, "cuda"), sequences)
    for name, array in found.items():
        assert array.dtype == np.float32
        if name == "pseudo_perplexity":
            # Random weights are surprised by every residue, and what they say is raised to that power.
            array, expected[name] = np.log(array), np.log(expected[name])
        # They are sure of what they say, too: entropy is what differences of large logits leave. 0.067 on an H100.
        limit = 0.1 if name == "entropy" else 0.05 if name.startswith(ATTENTION) else 0.02
        assert relative_error(array, expected[name]) < limit, name


@pytest.mark.parametrize("back_end", [triton_attention, varlen_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
def test_every_fast_attention_is_plain_attention(head_dim, dtype, back_end):
    torch.manual_seed(head_dim)
    pack = pack_sequences(["M" * n for n in (1000, 400, 126, 127, 128, 62, 33, 1)], quantum=16896)
    qkv, bias = torch.randn(len(pack.tokens), 3, 5, head_dim).to(dtype), torch.randn(10 * head_dim)
    rotation = Rotation.of(10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim), pack.longest)
    expected = sdpa_attention(qkv.float(), bias, rotation, pack)
    on_gpu = Rotation(rotation.cos.cuda(), rotation.sin.cuda())
    found = back_end()(qkv.cuda(), bias.cuda(), on_gpu, pack.to(torch.device("cuda"))).cpu().float()
    assert relative_error(found.numpy(), expected.numpy()) < (6e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize("width", [320, 480, 640, 1280, 2560, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fast_layer_norm_is_plain_layer_norm(width, dtype):
    x = torch.randn(300, width, device="cuda").bfloat16()
    vectors = torch.randn(3, width, device="cuda")
    expected = transformer.normalise(x, *vectors, 1e-5, torch.float32)
    found = kernels.normalise(x, *vectors, 1e-5, dtype)
    assert found.dtype == dtype
    assert relative_error(found.float().cpu().numpy(), expected.cpu().numpy()) < (
        3e-3 if dtype != torch.float32 else 1e-6
    )


def test_the_kernels_are_in_use(random_checkpoint, caplog):
    engine = PackedEngine.load(random_checkpoint, Outputs((1,), ("mean",)), "auto", "cuda")
    assert engine.precision == "bf16"
    assert engine.model.operations.activate is transformer.fused_tanh_gelu
    assert engine.model.operations.normalise is kernels.normalise
    assert not caplog.records


def test_pytorchs_own_operations_give_the_same_vectors(random_checkpoint):
    sequences = random_sequences(3, 20, 300)
    outputs = Outputs((1, 2), ("mean",))
    fast = embed(PackedEngine.load(random_checkpoint, outputs, "bf16", "cuda"), sequences)
    plain = embed(PackedEngine.load(random_checkpoint, outputs, "bf16", "cuda", fast_kernels=False), sequences)
    for name in fast:
        assert cosines(fast[name], plain[name]).min() > 0.9999


@pytest.mark.parametrize(
    ("precision", "pooled", "residue"), [("fp16", 0.9998, 0.998), ("auto", 0.9995, 0.996), ("int8", 0.985, 0.975)]
)
def test_16_bit_stays_near_fp32_on_the_real_model_also_late_in_a_sequence(real_checkpoint, precision, pooled, residue):
    """In int8 the lowest are peptides below 30 residues, of which any change of rounding makes others the worst."""
    sample = PROJECT / "tests/data/uniprot_sample_500.fasta.gz"
    sequences = [record.sequence[:1022] for record in read_records(sample)]
    assert len(sequences) == 500
    outputs = Outputs((6,), ("mean", "per_residue"))
    exact = embed(PackedEngine.load(real_checkpoint, outputs, "fp32", "cuda"), sequences)
    found = embed(PackedEngine.load(real_checkpoint, outputs, precision, "cuda"), sequences)
    pooled_cosines = cosines(found["mean_layer6"], exact["mean_layer6"])
    residue_cosines = cosines(found["per_residue_layer6"], exact["per_residue_layer6"])
    print(f"{precision}: pooled min {pooled_cosines.min():.6f}, mean {pooled_cosines.mean():.7f}")
    print(f"{precision}: per residue min {residue_cosines.min():.5f}, mean {residue_cosines.mean():.6f}")
    assert pooled_cosines.min() >= pooled
    assert residue_cosines.min() >= residue
    of_proteins = pooled_cosines[[len(s) >= 30 for s in sequences]]
    print(f"{precision}: pooled min from 30 residues on {of_proteins.min():.6f}")
    assert of_proteins.min() >= 0.999
    assert np.quantile(residue_cosines, 0.01) >= 0.998
    late = np.concatenate([np.arange(len(s)) > 900 for s in sequences])
    assert residue_cosines[late].min() >= residue_cosines[~late].min()


@pytest.mark.parametrize("precision", ["auto", "fp16", "int8"])
def test_any_packing_gives_the_same_vectors_in_16_bit(real_checkpoint, precision):
    sequences = np.load(GOLDEN)["sequences"].tolist()
    engine = PackedEngine.load(real_checkpoint, Outputs((6,), ("mean",)), precision, "cuda")
    together = embed(engine, sequences)["mean_layer6"]
    alone = np.concatenate([embed(engine, [s])["mean_layer6"] for s in sequences])
    assert cosines(alone, together).min() >= 0.9999


def test_packs_in_flight_do_not_disturb_each_other(random_checkpoint):
    engine = PackedEngine.load(random_checkpoint, Outputs((1, 2), INCLUDE), "bf16", "cuda")
    packs = [random_sequences(seed, 15, 200) for seed in range(6)]
    one_by_one = [embed(engine, pack) for pack in packs]
    launched = [engine.launch(engine.prepare(pack)) for pack in packs]
    for result, expected in zip(launched, one_by_one, strict=True):
        found = engine.fetch(result)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_out_of_memory_is_raised_and_leaves_the_engine_usable(random_checkpoint):
    engine = PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), "bf16", "cuda")
    before = embed(engine, ["MKV"])
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (1 << 26)) / total))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            embed(engine, ["M" * 1000] * 400)
        after = embed(engine, ["MKV"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.array_equal(before["mean_layer2"], after["mean_layer2"])


def test_full_precision_takes_the_place_of_16_bits_and_leaves_nothing_behind(random_checkpoint):
    engine = PackedEngine.load(random_checkpoint, Outputs((2,), ("mean",)), "bf16", "cuda")
    before = embed(engine, ["MKV"])
    in_16_bits = weakref.ref(engine.model.weights.layers[0].qkv)
    with engine.at_full_precision() as exact:
        embed(exact, ["MKV"])
        in_32_bits = weakref.ref(exact.model.weights.layers[0].qkv)
        assert in_16_bits() is None
    assert in_32_bits() is None
    assert np.array_equal(embed(engine, ["MKV"])["mean_layer2"], before["mean_layer2"])


def test_the_automatic_budget_fits(random_checkpoint):
    dimensions = ModelDimensions(33, 1280, 20, False, False)
    budget = auto_token_budget(dimensions, "bf16", "cuda")
    free, _ = torch.cuda.mem_get_info()
    assert 1024 <= budget <= free / (1280 * 24)


def test_the_kernels_of_8_bits_are_in_use_and_are_plain_arithmetic(real_checkpoint, caplog):
    sequences = [str(s) for s in np.load(GOLDEN)["sequences"]]
    outputs = Outputs((6,), ("mean",))
    fast = PackedEngine.load(real_checkpoint, outputs, "int8", "cuda")
    assert fast.model.operations.rounding.attend is not None
    assert not caplog.records
    plain = PackedEngine.load(real_checkpoint, outputs, "int8", "cpu")
    assert cosines(embed(fast, sequences)["mean_layer6"], embed(plain, sequences)["mean_layer6"]).min() >= 0.999
