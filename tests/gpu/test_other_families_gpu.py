"""ESM C and ESM-1b on a GPU: with this project's kernels, against transformers, fair-esm and themselves in fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import proteins
from made_up_families import ESM_C_SHAPES, random_esm1, random_esm_c, write_esm1, write_esm_c

from esmflow.arrays import Array, Outputs
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.checkpoint.models import OFFICIAL_MODELS
from esmflow.engine import transformer
from esmflow.engine.attention import Rotation, normed_and_rotated, sdpa_attention, triton_attention, varlen_attention
from esmflow.engine.packed import PackedEngine, auto_token_budget
from esmflow.engine.packing import pack_sequences
from esmflow.engine.weights import Linear

kernels = pytest.importorskip("esmflow.engine.kernels.sixteen_bits") if torch.cuda.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GOLDEN = Path(__file__).parents[1] / "data" / "golden_esm_c.npz"
PUBLISHED = ["ESMC-300M", "ESMC-600M", "ESMC-6B"]


@pytest.fixture(scope="module", params=[*ESM_C_SHAPES, "ESM-1b", "ESM-1v"])
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """A name, and a converted checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("family")
    if request.param in ESM_C_SHAPES:
        shape = ESM_C_SHAPES[request.param]
        source = write_esm_c(folder / "source", random_esm_c(*shape), shape[2])
    else:
        source = write_esm1(folder / "source.pt", random_esm1(request.param == "ESM-1b", 2, 64, 4))
    convert_checkpoint(source, folder / "converted.safetensors", "x")
    return request.param, folder / "converted.safetensors"


def embed(checkpoint: Path, precision: str, device: str, sequences: list[str]) -> dict[str, np.ndarray]:
    dimensions = read_checkpoint_info(checkpoint).dimensions
    include = ("mean", "bos", "per_residue", "logits", *(["contacts"] if dimensions.has_contact_head else []))
    outputs = Outputs(tuple(range(dimensions.layers + 1)), include)
    engine = PackedEngine.load(checkpoint, outputs, precision, device)
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_fp32_on_the_gpu_is_what_transformers_gives(family):
    name, checkpoint = family
    if name not in ESM_C_SHAPES:
        pytest.skip("held against fair-esm on a CPU, and against that on a GPU below")
    golden = np.load(GOLDEN)
    for array, values in embed(checkpoint, "fp32", "cuda", golden["sequences"].tolist()).items():
        assert relative_error(values, golden[f"{name}/{array}"]) < 1e-5, array


def test_fp32_on_the_gpu_is_fp32_on_the_cpu(family):
    sequences = proteins(20, 1, 300, seed=1)
    expected = embed(family[1], "fp32", "cpu", sequences)
    for name, values in embed(family[1], "fp32", "cuda", sequences).items():
        assert relative_error(values, expected[name]) < (1e-4 if name == "contacts" else 1e-5), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_precision_is_near_fp32_and_the_kernels_serve(family, precision, caplog):
    sequences = proteins(20, 1, 300, seed=2)
    expected = embed(family[1], "fp32", "cpu", sequences)
    found = embed(family[1], precision, "cuda", sequences)
    assert "fast kernels do not work" not in caplog.text
    for name, values in found.items():
        assert relative_error(values, expected[name]) < 0.02, name
        if Array.named(name).is_pooled:
            norms = np.linalg.norm(values, axis=1) * np.linalg.norm(expected[name], axis=1)
            assert ((values * expected[name]).sum(1) / norms).min() > 0.999, name


@pytest.mark.parametrize("model", PUBLISHED)
def test_products_of_8_bits_are_near_fp32_and_the_kernels_serve(model, tmp_path, caplog):
    """Two layers of the widths of the published models."""
    heads, of_model = OFFICIAL_MODELS[model].heads, OFFICIAL_MODELS[model]
    tensors = random_esm_c(2, of_model.hidden, heads, of_model.feed_forward)
    convert_checkpoint(write_esm_c(tmp_path / "source", tensors, heads), tmp_path / "converted.safetensors", "x")
    sequences = proteins(40, 20, 300, seed=3)
    outputs = Outputs((0, 1, 2), ("mean", "bos", "per_residue"))
    exact, fast = (PackedEngine.load(tmp_path / "converted.safetensors", outputs, p, "cuda") for p in ("fp32", "int8"))
    assert "fast kernels do not work" not in caplog.text
    assert fast.model.operations.rounding.multiply.__module__ == "esmflow.engine.kernels.eight_bits"
    found, expected = (engine.fetch(engine.launch(engine.prepare(sequences))) for engine in (fast, exact))
    for name, values in found.items():
        assert relative_error(values, expected[name]) < (1e-3 if name.endswith("layer0") else 0.04), name
        if name.startswith("mean"):
            norms = np.linalg.norm(values, axis=1) * np.linalg.norm(expected[name], axis=1)
            assert ((values * expected[name]).sum(1) / norms).min() > 0.999, name


@pytest.mark.parametrize("back_end", [triton_attention, varlen_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", PUBLISHED)
def test_every_fast_attention_with_normed_queries_and_keys_is_the_plain_one(model, dtype, back_end):
    """At the widths of the published models."""
    torch.manual_seed(0)
    heads, size = OFFICIAL_MODELS[model].heads, OFFICIAL_MODELS[model].head_dim
    pack = pack_sequences(["M" * n for n in (1000, 126, 62, 33, 1)], quantum=16896)
    qkv, weight = torch.randn(len(pack.tokens), 3, heads, size).to(dtype), torch.randn(2 * heads * size)
    rotation = Rotation.of(10000.0 ** -(torch.arange(0, size, 2) / size), pack.longest)
    expected = sdpa_attention(qkv.float(), weight, rotation, pack, normed_and_rotated)
    on_gpu = Rotation(rotation.cos.cuda(), rotation.sin.cuda())
    attend = back_end(normed_and_rotated)
    found = attend(qkv.cuda(), weight.cuda(), on_gpu, pack.to(torch.device("cuda"))).cpu().float()
    assert relative_error(found.numpy(), expected.numpy()) < (6e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_gate_is_the_plain_one(model, dtype):
    """At the widths of the published models."""
    torch.manual_seed(0)
    hidden, width = OFFICIAL_MODELS[model].hidden, OFFICIAL_MODELS[model].feed_forward
    x = torch.randn(1000, hidden, device="cuda").to(dtype)
    fc1 = Linear(torch.randn(2 * width, hidden, device="cuda").to(dtype) * hidden**-0.5, None)
    exact = transformer.gated(x.float(), Linear(fc1.weight.float(), None))
    found, plain = (f(x, fc1).float() for f in (kernels.gated, transformer.gated))
    # It rounds once where PyTorch's rounds twice.
    assert (found - exact).norm() <= 1.01 * (plain - exact).norm()
    assert (found - exact).norm() / exact.norm() < (5e-3 if dtype == torch.bfloat16 else 6e-4)


@pytest.mark.parametrize("model", [*PUBLISHED, "esm1b_t33_650M_UR50S"])
def test_a_pack_of_the_budget_of_a_published_model_fits(model):
    assert auto_token_budget(OFFICIAL_MODELS[model], "bf16", "cuda") >= 1024
