"""ESM C, ESM-1b and ESM-1v in the packed engine, fp32 on the CPU, against transformers and fair-esm's own modules."""

from __future__ import annotations

from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from made_up import RARE_RESIDUES, RESIDUES, proteins, random_model, write_converted
from made_up_families import ESM_C_SHAPES, random_esm1, random_esm_c, write_esm1, write_esm_c

from esmflow.arrays import Array, Outputs
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointInfo, read_checkpoint_info
from esmflow.checkpoint.models import OFFICIAL_MODELS, check_method
from esmflow.engine import fair_esm, load_engine
from esmflow.engine.packed import PackedEngine
from esmflow.step import make_fingerprint
from esmflow.verify.esm_c import PlainEsmC

GOLDEN = Path(__file__).parents[2] / "data" / "golden_esm_c.npz"
# Layers, width, heads, as fair-esm's own modules take them.
SHAPES = {"head 16": (3, 64, 4), "head 24": (2, 96, 4), "head 64": (2, 128, 2)}
TOLERANCE = 1e-5


def written_esm_c(folder: Path, name: str) -> Path:
    layers, hidden, heads, width = ESM_C_SHAPES[name]
    source = write_esm_c(folder / "source", random_esm_c(layers, hidden, heads, width), heads)
    convert_checkpoint(source, folder / "esm_c.safetensors", name)
    return folder / "esm_c.safetensors"


def written_esm1(folder: Path, model: esm.ProteinBertModel) -> Path:
    convert_checkpoint(write_esm1(folder / "esm1.pt", model), folder / "esm1.safetensors", "esm1")
    return folder / "esm1.safetensors"


def engine_of(checkpoint: Path, include: tuple[str, ...], precision: str = "fp32") -> PackedEngine:
    layers = read_checkpoint_info(checkpoint).dimensions.layers
    return PackedEngine.load(checkpoint, Outputs(tuple(range(layers + 1)), include), precision, "cpu")


def embed(engine: PackedEngine, sequences: list[str]) -> dict[str, np.ndarray]:
    return engine.fetch(engine.launch(engine.prepare(sequences)))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest number."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ESM_C_SHAPES)
def test_every_layer_and_every_output_of_esm_c_is_what_transformers_gives(tmp_path, name):
    golden = np.load(GOLDEN)
    engine = engine_of(written_esm_c(tmp_path, name), ("mean", "bos", "per_residue", "logits"))
    found = embed(engine, golden["sequences"].tolist())
    expected = {key.split("/")[1]: golden[key] for key in golden.files if key.startswith(f"{name}/")}
    assert found.keys() == expected.keys()
    assert {array: error(found[array], expected[array]) < TOLERANCE for array in found} == dict.fromkeys(found, True)


@torch.no_grad()
def of_fair_esm(model: esm.ProteinBertModel, sequences: list[str]) -> dict[str, np.ndarray]:
    """Each sequence alone through fair-esm's module, so that padding plays no part."""
    tokenise = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    # As fair-esm does when it loads one.
    model.embed_tokens.weight[32] = 0
    parts: dict[str, list[np.ndarray]] = {}
    for sequence in sequences:
        tokens = tokenise([("", sequence)])[2]
        result = model(tokens, repr_layers=range(model.num_layers + 1), return_contacts=True)
        for layer, values in result["representations"].items():
            rows = values[0].numpy()
            parts.setdefault(f"mean_layer{layer}", []).append(rows[None, 1:-1].mean(1))
            parts.setdefault(f"bos_layer{layer}", []).append(rows[:1])
            parts.setdefault(f"per_residue_layer{layer}", []).append(rows[1:-1])
        parts.setdefault("logits", []).append(result["logits"][0, 1:-1].numpy())
        parts.setdefault("contacts", []).append(result["contacts"][0].numpy().ravel())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


@pytest.mark.parametrize("norm_before", [True, False], ids=["ESM-1b", "ESM-1v"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_and_every_output_is_what_fair_esm_gives(tmp_path, name, norm_before):
    model = random_esm1(norm_before, *SHAPES[name])
    sequences = ["M", *proteins(3, 2, 60, seed=1, letters=RESIDUES + RARE_RESIDUES)]
    # The longest that there are positions for, once.
    sequences += ["ACDEFGHIKLMNPQRSTVWY" * 51 + "MK"] if name == "head 16" else []
    engine = engine_of(written_esm1(tmp_path, model), ("mean", "bos", "per_residue", "contacts", "logits"))
    found, expected = embed(engine, sequences), of_fair_esm(model, sequences)
    assert found.keys() == expected.keys()
    assert {array: error(found[array], expected[array]) < TOLERANCE for array in found} == dict.fromkeys(found, True)


@pytest.fixture(scope="module", params=["ESM C", "ESM-1b", "ESM-1v"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    if request.param == "ESM C":
        return written_esm_c(folder, "head 16")
    return written_esm1(folder, random_esm1(request.param == "ESM-1b"))


def test_a_neighbour_in_the_pack_changes_nothing(checkpoint):
    engine = engine_of(checkpoint, ("mean", "per_residue"))
    together = embed(engine, ["MKTAYIAKQR", "W" * 70, "MKTAYIAKQR"])
    alone = embed(engine, ["MKTAYIAKQR"])
    for name, values in together.items():
        first, last = (values[:1], values[-1:]) if Array.named(name).is_pooled else (values[:10], values[-10:])
        assert np.abs(first - alone[name]).max() < 1e-4
        assert np.abs(last - first).max() < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_stay_near_fp32(checkpoint, precision):
    sequences = proteins(4, 20, 80, seed=3)
    exact = embed(engine_of(checkpoint, ("mean",)), sequences)
    found = embed(engine_of(checkpoint, ("mean",), precision), sequences)
    for name, values in exact.items():
        cosine = (values * found[name]).sum(1) / np.linalg.norm(values, axis=1) / np.linalg.norm(found[name], axis=1)
        assert cosine.min() > 0.999, name


@pytest.mark.parametrize("name", ESM_C_SHAPES)
def test_products_of_8_bits_stay_near_fp32_in_esm_c(tmp_path, name):
    checkpoint = written_esm_c(tmp_path, name)
    sequences, include = proteins(30, 20, 80, seed=3), ("mean", "bos", "per_residue", "logits", "attention")
    exact = embed(engine_of(checkpoint, include), sequences)
    found = embed(engine_of(checkpoint, include, "int8"), sequences)
    assert found.keys() == exact.keys()
    for array, values in found.items():
        distance = np.linalg.norm(values - exact[array]) / np.linalg.norm(exact[array])
        # Embeddings are turned and turned back, not rounded; the rest is.
        assert distance < 1e-6 if array.endswith("layer0") else 1e-3 < distance < 0.035, (array, distance)
        if array.startswith("mean"):
            norms = np.linalg.norm(values, axis=1) * np.linalg.norm(exact[array], axis=1)
            assert ((values * exact[array]).sum(1) / norms).min() > 0.9995, array


@pytest.mark.parametrize("norm_before", [True, False], ids=["ESM-1b", "ESM-1v"])
@pytest.mark.parametrize("small_bytes", [0, 1 << 30], ids=["built without memory", "built at once"])
def test_the_reference_engine_runs_fair_esm_s_module_on_padded_batches(tmp_path, monkeypatch, norm_before, small_bytes):
    monkeypatch.setattr(fair_esm, "_SMALL_BYTES", small_bytes)
    checkpoint = written_esm1(tmp_path, random_esm1(norm_before))
    outputs = Outputs((0, 1, 2), ("mean", "bos", "per_residue", "contacts", "logits"))
    sequences = proteins(5, 2, 60, seed=4)
    expected = embed(PackedEngine.load(checkpoint, outputs, "fp32", "cpu"), sequences)
    found = embed(load_engine("reference", str(checkpoint), outputs, "fp32", "cpu"), sequences)
    assert {array: error(found[array], expected[array]) < TOLERANCE for array in found} == dict.fromkeys(expected, True)


def test_the_plain_esm_c_is_built_without_memory_when_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(fair_esm, "_SMALL_BYTES", 0)
    model = fair_esm.load_fair_esm(str(written_esm_c(tmp_path, "head 16")), torch.device("cpu"), None, PlainEsmC)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    result = model(fair_esm.padded_tokens(model, ["MKV", "MKVLA"]), repr_layers=[3])
    assert result["representations"][3].isfinite().all()


def test_more_residues_than_there_are_positions_for_are_a_sentence(tmp_path):
    engine = engine_of(written_esm1(tmp_path, random_esm1(True)), ("mean",))
    assert len(engine.prepare(["M" * 1022]).tokens) == 1024
    with pytest.raises(ValueError, match="1023 residues: this model has positions for 1022"):
        engine.prepare(["M", "M" * 1023])


def test_the_dimensions_of_published_models_are_those_of_fair_esm_and_of_the_papers():
    parameters = {"ESMC-300M": 333e6, "ESMC-600M": 575e6, "ESMC-6B": 6.3e9, "esm1b_t33_650M_UR50S": 652e6}
    for name, expected in parameters.items():
        assert abs(OFFICIAL_MODELS[name].parameters / expected - 1) < 0.01
    with torch.device("meta"):
        module = fair_esm.fair_esm_module(OFFICIAL_MODELS["esm1v_t33_650M_UR90S_3"])
    assert len(module.layers) == 33
    assert module.emb_layer_norm_before is None
    assert module.embed_positions.weight.shape == (1026, 1280)


METHOD = {
    **{"layers": [-1], "include": ["mean"], "per_residue_precision": "fp32", "engine": "packed", "arithmetic": "words"},
    **{"precision": "auto", "long_sequences": "truncate", "max_residues": 1022, "window_overlap": None},
    **{"invalid_residues": "reject", "method_version": 1},
}


@pytest.mark.parametrize(
    ("model", "changed", "sentence"),
    [
        ("ESMC-600M", {"include": ["mean", "contacts"]}, "no contact head was published for ESM C; leave contacts out"),
        ("ESMC-600M", {"engine": "reference"}, "fair-esm's own model, which has no ESM C; take engine: packed"),
        ("esm1b_t33_650M_UR50S", {"precision": "int8"}, "made for ESM-2 and ESM C only, and this model is ESM-1b"),
        ("esm1v_t33_650M_UR90S_2", {"precision": "int8"}, "and this model is ESM-1v"),
        ("esm1b_t33_650M_UR50S", {"max_residues": 1024}, "max_residues: 1024 is more than this model, ESM-1b, has"),
        ("esm1v_t33_650M_UR90S_1", {"include": ["contacts"]}, "no contact head was published for ESM-1v"),
        ("esm1v_t33_650M_UR90S_1", {"long_sequences": "window", "max_residues": 2000}, "give 1022 or less"),
    ],
)
def test_what_a_family_does_not_have_is_refused_with_a_sentence(model, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_method({**METHOD, **changed}, OFFICIAL_MODELS[model])


@pytest.mark.parametrize("model", OFFICIAL_MODELS)
def test_every_published_model_can_do_what_is_the_default(model):
    check_method(METHOD, OFFICIAL_MODELS[model])
    # And whole sequences, of which the longer ones are rows with a reason where there are no positions for them.
    check_method({**METHOD, "long_sequences": "whole", "max_residues": None}, OFFICIAL_MODELS[model])


@pytest.mark.parametrize("model", [name for name in OFFICIAL_MODELS if name.startswith(("esm2", "ESMC"))])
def test_esm2_and_esm_c_can_be_had_in_8_bits(model):
    check_method({**METHOD, "precision": "int8"}, OFFICIAL_MODELS[model])


def test_the_fingerprint_names_the_family_and_stays_as_it_was_for_esm2(tmp_path):
    info = read_checkpoint_info(written_esm_c(tmp_path, "head 16"))
    assert make_fingerprint(info, METHOD).arithmetic == "ESM C: words"
    write_converted(tmp_path / "esm2.safetensors", random_model())
    info = read_checkpoint_info(tmp_path / "esm2.safetensors")
    assert isinstance(info, CheckpointInfo)
    assert make_fingerprint(info, METHOD).arithmetic == "words"
