"""ESM C in its three layouts, ESM-1b and ESM-1v: one model is one converted file, and what is none is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from made_up_families import (
    ESM_C_SHAPES,
    random_esm1,
    random_esm_c,
    write_esm1,
    write_esm_c,
    write_esm_c_of_the_package,
    write_first_esm_c,
)
from safetensors.torch import load_file, save_file

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import OFFICIAL_MODELS, ModelDimensions, guess_model, official_name, swiglu_width

LAYERS, HIDDEN, HEADS, WIDTH = ESM_C_SHAPES["head 64"]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_esm_c(LAYERS, HIDDEN, HEADS, WIDTH)


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, tmp_path / "refused.safetensors", "x")
    assert not (tmp_path / "refused.safetensors").exists()
    return str(error.value)


def test_all_three_layouts_of_esm_c_are_one_model(tmp_path, tensors):
    sources = [
        write_esm_c(tmp_path / "transformers", tensors, HEADS),
        write_first_esm_c(tmp_path / "first", tensors, HEADS),
        write_esm_c_of_the_package(tmp_path / "package.pth", tensors),
    ]
    infos = [convert_checkpoint(source, tmp_path / "a.safetensors", "x") for source in sources]
    assert len({info.digest for info in infos}) == 1
    assert infos[0].dimensions == ModelDimensions(
        LAYERS, HIDDEN, HEADS, True, False, "ESM C", feed_forward_width=WIDTH, positions=None
    )


def test_an_adapter_of_esm_c_is_merged_and_its_decoder_stays_its_own(tmp_path, tensors):
    base = write_esm_c(tmp_path / "base", tensors, HEADS)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": 3}))
    draw = torch.Generator().manual_seed(0)
    updates, inside = {}, "base_model.model.esmc.layers.1"
    for module, rows, columns in (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.up_proj", WIDTH, HIDDEN)):
        updates[f"{inside}.{module}.lora_A.weight"] = torch.randn(3, columns, generator=draw)
        updates[f"{inside}.{module}.lora_B.weight"] = torch.randn(rows, 3, generator=draw)
    updates["base_model.model.esmc.embed_tokens.modules_to_save.weight"] = torch.randn(64, HIDDEN, generator=draw)
    save_file(updates, adapter / "adapter_model.safetensors")
    info = convert_checkpoint(adapter, tmp_path / "merged.safetensors", "x", base)
    found = load_file(tmp_path / "merged.safetensors")
    assert info.base == "base"
    for ours, theirs in (("self_attn.q_proj", "self_attn.q_proj"), ("fc1", "mlp.up_proj")):
        a, b = (updates[f"{inside}.{theirs}.lora_{letter}.weight"] for letter in "AB")
        expected = tensors[f"esmc.layers.1.{theirs}.weight"] + 2 * b @ a
        assert torch.allclose(found[f"layers.1.{ours}.weight"], expected, atol=1e-5)
    assert torch.equal(found["layers.0.fc1.weight"], tensors["esmc.layers.0.mlp.up_proj.weight"])
    assert torch.equal(found["embed_tokens.weight"], updates[list(updates)[-1]])
    assert torch.equal(found["lm_head.weight"], tensors["lm_head.decoder.weight"])


def test_rotary_frequencies_of_esm_c_are_not_rounded(tmp_path, tensors):
    convert_checkpoint(write_esm_c(tmp_path / "a", tensors, HEADS), tmp_path / "a.safetensors", "x")
    found = load_file(tmp_path / "a.safetensors")["layers.0.self_attn.rot_emb.inv_freq"]
    assert torch.equal(found, 1.0 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64))


def test_a_base_model_and_a_classifier_of_esm_c_convert_without_their_heads(tmp_path, tensors, caplog):
    encoder = {name.removeprefix("esmc."): t for name, t in tensors.items() if name.startswith("esmc.")}
    base = write_esm_c(tmp_path / "a", tensors, HEADS)
    save_file(encoder, base / "model.safetensors", {"format": "pt"})
    found = convert_checkpoint(base, tmp_path / "a.safetensors", "x")
    assert not found.dimensions.has_lm_head
    classifier = {f"esmc.{name}": t for name, t in encoder.items()} | {"classifier.dense.weight": torch.ones(2, 2)}
    save_file(classifier, base / "model.safetensors", {"format": "pt"})
    assert convert_checkpoint(base, tmp_path / "b.safetensors", "x").digest == found.digest
    assert "classifier.dense.weight left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"), [("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("vocab_size", 33),
                       ("rope_theta", 5e5), ("rope_type", "linear")],
)  # fmt: skip
def test_an_esm_c_with_other_arithmetic_is_refused_by_name(tmp_path, tensors, key, value):
    folder = write_esm_c(tmp_path / "a", tensors, HEADS)
    config = json.loads((folder / "config.json").read_text())
    where = config["rope_parameters"] if key.startswith("rope") else config
    where[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert f"has {key}: {value!r}, where every ESM C has" in refusal(folder, tmp_path)


@pytest.mark.parametrize("heads", [None, 0, 3, "two", 128])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, tensors, heads):
    folder = write_esm_c(tmp_path / "a", tensors, heads)
    assert f"has {heads!r} attention heads, and its width is 128" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("text", "is a str and no tensor"),
        (torch.ones(3, 3).to_sparse(), "is a sparse tensor"),
        (torch.tensor(1.0), "q_proj.weight should have shape"),
        (torch.ones(7, 3), "q_proj.weight should have shape"),
    ],
    ids=["text", "sparse", "a number", "of another shape"],
)
def test_what_is_no_matrix_in_a_pth_is_refused_by_name(tmp_path, tensors, value, sentence):
    path = write_esm_c_of_the_package(tmp_path / "a.pth", tensors)
    loaded = torch.load(path, weights_only=True)
    torch.save(loaded | {"transformer.blocks.0.attn.layernorm_qkv.1.weight": value}, path)
    assert sentence in refusal(path, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("esmc.layers.1.mlp.up_proj.weight"), "layers.1.fc1.weight should have shape"),
        (lambda t: t.pop("esmc.layers.0.self_attn.k_norm.weight"), "layers.0.self_attn.k_norm.weight should have"),
        (lambda t: t.update({"esmc.layers.0.self_attn.q_proj.bias": torch.ones(3)}), "which no ESM C has"),
        (lambda t: t.update({"esmc.embed_tokens.weight": torch.ones(33, HIDDEN)}), "no 64-token embedding"),
        (lambda t: t.pop("lm_head.decoder.weight"), "lm_head.weight should have shape (64, 128) and has None"),
        (lambda t: t.update({"esmc.norm.weight": torch.ones(3)}), "emb_layer_norm_after.weight should have shape"),
    ],
    ids=["no up", "no norm", "a bias", "33 tokens", "no decoder", "a short norm"],
)
def test_an_esm_c_that_is_incomplete_or_changed_is_refused_by_the_tensor(tmp_path, tensors, change, sentence):
    change(tensors)
    folder = write_esm_c(tmp_path / "a", tensors | {"esmc.layers.0.mlp.gate_proj.weight": torch.ones(WIDTH, HIDDEN)}, 2)
    assert sentence in refusal(folder, tmp_path)


@pytest.mark.parametrize("norm_before", [True, False], ids=["ESM-1b", "ESM-1v"])
def test_a_file_of_fair_esm_says_which_family_it_is(tmp_path, norm_before):
    source = write_esm1(tmp_path / "a.pt", random_esm1(norm_before), contact_regression=norm_before)
    found = convert_checkpoint(source, tmp_path / "a.safetensors", "x").dimensions
    assert found.family_name == ("ESM-1b" if norm_before else "ESM-1v")
    assert (found.heads, found.positions, found.longest, found.has_contact_head) == (2, 1024, 1022, norm_before)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"arch": "protein_bert_base"}, "has arch 'protein_bert_base'"),
        ({"token_dropout": False}, "token_dropout False"),
        ({"encoder_attention_heads": None}, "does not say how many attention heads"),
    ],
    ids=["ESM-1", "without token dropout", "without heads"],
)
def test_another_model_of_fair_esm_s_is_refused(tmp_path, said, sentence):
    source = write_esm1(tmp_path / "a.pt", random_esm1(True))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(source, weights_only=True)
    torch.save({**loaded, "args": argparse.Namespace(**{**vars(loaded["args"]), **said})}, source)
    assert sentence in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("text", "is a str and no tensor"),
        (torch.tensor(1.0), "not an ESM-1b model"),
        (torch.ones(20, 32), "not an ESM-1b model"),
        (torch.ones(33), "are empty or misshapen"),
    ],
    ids=["text", "a number", "20 tokens", "a vector"],
)
def test_an_esm1_whose_embedding_is_none_is_refused(tmp_path, value, sentence):
    source = write_esm1(tmp_path / "a.pt", random_esm1(True))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(source, weights_only=True)
    loaded["model"]["encoder.sentence_encoder.embed_tokens.weight"] = value
    torch.save(loaded, source)
    assert sentence in refusal(source, tmp_path)


def test_a_pth_with_names_that_are_no_text_is_refused(tmp_path):
    torch.save({1: torch.ones(2), "model": 3}, tmp_path / "a.pth")
    assert "not a checkpoint of fair-esm" in refusal(tmp_path / "a.pth", tmp_path)


def test_an_esm1_without_its_positions_is_refused(tmp_path):
    source = write_esm1(tmp_path / "a.pt", random_esm1(True))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(source, weights_only=True)
    loaded["model"].pop("encoder.sentence_encoder.embed_positions.weight")
    torch.save(loaded, source)
    assert "not an ESM-1b model (no 33-token embedding with learned positions)" in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((name, name) for name in OFFICIAL_MODELS),
        *((name.lower(), name) for name in OFFICIAL_MODELS),
        ("biohub/ESMC-600M", "ESMC-600M"),
        ("biohub/ESMC-6B-hf", "ESMC-6B"),
        ("Biohub/esmc-300m-2024-12", "ESMC-300M"),
        ("esmc_600m", "ESMC-600M"),
        ("facebook/esm1b_t33_650M_UR50S", "esm1b_t33_650M_UR50S"),
        ("facebook/esm1v_t33_650M_UR90S_4", "esm1v_t33_650M_UR90S_4"),
        ("650m", "esm2_t33_650M_UR50D"),
        ("somebody/ESMC-600M", "somebody/ESMC-600M"),
        ("facebook/opt", "facebook/opt"),
    ],
)
def test_models_are_known_by_the_names_that_they_have_elsewhere(model, name):
    assert official_name(model) == name


def test_a_folder_is_told_by_its_configuration(tmp_path, tensors):
    for write in (write_esm_c, write_first_esm_c):
        folder = write(tmp_path / write.__name__, tensors, HEADS)
        width = WIDTH if write is write_esm_c else swiglu_width(HIDDEN)
        assert guess_model(str(folder)) == ModelDimensions(LAYERS, HIDDEN, HEADS, True, False, "ESM C", width)
    esm1 = tmp_path / "esm1"
    esm1.mkdir()
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "position_embedding_type": "absolute",
    }
    (esm1 / "config.json").write_text(json.dumps(config | {"emb_layer_norm_before": True}))
    assert guess_model(str(esm1)).family_name == "ESM-1b"
    (esm1 / "config.json").write_text(json.dumps(config))
    assert guess_model(str(esm1)).family_name == "ESM-1v"


@pytest.mark.parametrize("name", ["ESMC-300M", "ESMC-600M", "ESMC-6B"])
def test_the_feed_forward_width_follows_from_the_width(name):
    model = OFFICIAL_MODELS[name]
    assert swiglu_width(model.hidden) == model.feed_forward
