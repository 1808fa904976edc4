"""Folders as every version of transformers writes them are read; what is not ESM-2's arithmetic is refused by name."""

import json
import logging
import os
import time

import pytest
import torch
from made_up import random_model, stored_tensors, write_hugging_face
from safetensors.torch import load_file, save_file
from workflow_run import PROJECT

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import AS_STORED, CheckpointError, read_checkpoint_info
from esmflow.checkpoint.hugging_face import published_frequencies
from esmflow.config.configuration import ConfigurationError, validated

SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
LAYERS, HIDDEN, HEADS = 3, 32, 2
PER_LAYER = "esm.encoder.layer.{n}.attention.self.rotary_embeddings.inv_freq"
SHARED = ("esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq", "esm.rotary_embeddings.inv_freq")


@pytest.fixture(scope="module")
def model():
    model = random_model(LAYERS, HIDDEN, HEADS)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.rot_emb.inv_freq.copy_(published_frequencies(HIDDEN // HEADS))
    return model


@pytest.fixture
def folder(tmp_path, model):
    return write_hugging_face(tmp_path / "saved", stored_tensors(model))


def change(folder, change_tensors=lambda tensors: None, **config):
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def without_frequencies(tensors):
    for n in range(LAYERS):
        del tensors[PER_LAYER.format(n=n)]


def refusal(folder, tmp_path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(folder, tmp_path / "x.safetensors", "x")
    return str(error.value)


@pytest.mark.parametrize("name", SHARED)
def test_one_frequency_for_all_layers_is_read_like_one_for_each(folder, tmp_path, name):
    expected = convert_checkpoint(folder, tmp_path / "each.safetensors", "each")

    def share(tensors):
        tensors[name] = tensors[PER_LAYER.format(n=0)].clone()
        without_frequencies(tensors)

    change(folder, share)
    found = convert_checkpoint(folder, tmp_path / "shared.safetensors", "shared")
    assert found.digest == expected.digest
    assert (expected.frequencies, found.frequencies) == (AS_STORED, "as stored, one for all layers")


def test_norms_with_the_names_of_tensorflow_are_read_like_any_other(folder, tmp_path):
    """As transformers 5.24 stores a base model."""
    expected = convert_checkpoint(folder, tmp_path / "each.safetensors", "each")

    def rename(tensors):
        for key in [key for key in tensors if ".LayerNorm." in key]:
            stem, _, parameter = key.rpartition(".")
            tensors[f"{stem}.{'gamma' if parameter == 'weight' else 'beta'}"] = tensors.pop(key)

    change(folder, rename)
    assert any(key.endswith("LayerNorm.gamma") for key in load_file(folder / "model.safetensors"))
    assert convert_checkpoint(folder, tmp_path / "x.safetensors", "x").digest == expected.digest


def test_without_frequencies_they_are_those_of_the_published_models_and_it_is_said(folder, tmp_path, caplog):
    expected = convert_checkpoint(folder, tmp_path / "each.safetensors", "each")
    change(folder, without_frequencies, num_attention_heads=HEADS, hidden_size=HIDDEN)
    with caplog.at_level(logging.WARNING):
        found = convert_checkpoint(folder, tmp_path / "none.safetensors", "none")
    assert found.digest == expected.digest
    assert read_checkpoint_info(tmp_path / "none.safetensors").frequencies == "computed"
    assert "computed as the published models have them" in caplog.text


def test_without_frequencies_and_without_the_number_of_heads_there_is_no_guessing(folder, tmp_path):
    change(folder, without_frequencies)
    assert "put its config.json there" in refusal(folder, tmp_path)


def test_a_foreign_tensor_inside_the_encoder_is_refused(folder, tmp_path):
    change(folder, lambda tensors: tensors.update({"esm.encoder.layer.2.foo.weight": torch.ones(2)}))
    assert "esm.encoder.layer.2.foo.weight, which no ESM-2 has" in refusal(folder, tmp_path)


def test_the_head_of_a_classifier_is_left_out_with_a_warning(folder, tmp_path, caplog):
    expected = convert_checkpoint(folder, tmp_path / "each.safetensors", "each")
    change(folder, lambda tensors: tensors.update({"classifier.dense.weight": torch.ones(2, 2)}))
    assert convert_checkpoint(folder, tmp_path / "x.safetensors", "x").digest == expected.digest
    assert "classifier.dense.weight left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "bert"), ("token_dropout", False), ("layer_norm_eps", 1e-12), ("emb_layer_norm_before", True),
     ("position_embedding_type", "relative_key"), ("is_folding_model", True), ("vocab_size", 64)],
)  # fmt: skip
def test_a_model_with_other_arithmetic_is_refused_by_name(folder, tmp_path, key, value):
    change(folder, **{key: value})
    assert f"has {key}: {value!r}, where every ESM-2 has" in refusal(folder, tmp_path)


def test_learned_positions_that_are_said_and_not_there_are_refused(folder, tmp_path):
    change(folder, position_embedding_type="absolute", num_attention_heads=HEADS)
    assert "not an ESM-1v model (no 33-token embedding with learned positions)" in refusal(folder, tmp_path)


@pytest.mark.parametrize("content", ["[1]", "not json"])
def test_a_config_that_is_none_is_a_sentence(folder, tmp_path, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder, tmp_path)


def test_a_layer_number_of_three_million_is_refused_at_once(folder, tmp_path):
    stray = "esm.encoder.layer.3000000.intermediate.dense.weight"
    change(folder, lambda tensors: tensors.update({stray: torch.ones(4 * HIDDEN, HIDDEN)}))
    before = time.process_time()
    assert "has a layer 3000000" in refusal(folder, tmp_path)
    assert time.process_time() - before < 5


def test_an_empty_frequency_is_a_sentence(folder, tmp_path):
    change(folder, lambda tensors: tensors.update({PER_LAYER.format(n=0): torch.ones(0)}))
    assert "empty or misshapen" in refusal(folder, tmp_path)


@pytest.mark.parametrize("content", [5, torch.ones(2, 2).to_sparse(), "text"])
def test_what_is_no_dense_tensor_is_a_sentence(tmp_path, model, content):
    folder = write_hugging_face(tmp_path / "saved", stored_tensors(model), "bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "esm.encoder.layer.0.intermediate.dense.bias": content}, folder / "pytorch_model.bin")
    assert "fc1.bias is a" in refusal(folder, tmp_path)


def test_a_number_in_an_index_is_a_sentence(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}}))
    assert "not an index of weight files" in refusal(folder, tmp_path)


def test_an_adapter_is_told_apart_from_a_model(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter and no model" in refusal(folder, tmp_path)


def test_weights_that_are_a_pipe_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "esm2.pt")
    assert "neither a file nor a folder" in refusal(tmp_path / "esm2.pt", tmp_path)


def test_names_of_hugging_face_and_missing_files_of_official_names_are_understood():
    assert validated({"model": "facebook/esm2_t33_650M_UR50D"}, SCHEMA)["model"] == "esm2_t33_650M_UR50D"
    with pytest.raises(ConfigurationError, match="did you mean the name esm2_t33_650M_UR50D"):
        validated({"model": "/nowhere/esm2_t33_650M_UR50D.pt"}, SCHEMA)
