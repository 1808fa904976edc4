"""A LoRA adapter in the model step: merged as its paper says, its base found, and what is not plain LoRA refused."""

import json
import math
import shutil

import pytest
import torch
import yaml
from made_up import random_model, stored_tensors, write_fair_esm, write_hugging_face
from made_up_families import ESM_C_SHAPES, random_esm_c, write_first_esm_c
from safetensors.torch import load_file, save_file
from workflow_run import PROJECT

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.fetch import ModelSettings, fetch_model
from esmflow.checkpoint.file import CheckpointError, read_checkpoint_info
from esmflow.checkpoint.models import base_of
from esmflow.config.configuration import ConfigurationError, number_of_layers, validated

HIDDEN, RANK = 32, 4
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
LAYER = "base_model.model.esm.encoder.layer.1."
QUERY = f"{LAYER}attention.self.query"
UP, DOWN = f"{LAYER}intermediate.dense", f"{LAYER}output.dense"
WORDS = "base_model.model.esm.embeddings.word_embeddings"
PLAIN = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "init_lora_weights": True, "use_rslora": False}


def update(module, width_in=HIDDEN, width_out=HIDDEN, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width_in, generator=generator),
        f"{module}.lora_B.weight": torch.randn(width_out, rank, generator=generator),
    }


def write_adapter(folder, tensors, base="base", kind="safetensors", **config):
    folder.mkdir(parents=True, exist_ok=True)
    described = {**PLAIN, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    if kind == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


@pytest.fixture(scope="module")
def weights():
    return stored_tensors(random_model(2, HIDDEN, 2))


@pytest.fixture
def base(tmp_path, weights):
    return write_hugging_face(tmp_path / "base", weights)


def merged(tmp_path, adapter, base):
    """The converted tensors, and what they say of themselves."""
    target = tmp_path / "merged.safetensors"
    info = convert_checkpoint(adapter, target, adapter.name, base)
    assert read_checkpoint_info(target) == info
    return load_file(target), info


def refusal(tmp_path, adapter, base):
    with pytest.raises(CheckpointError) as refused:
        convert_checkpoint(adapter, tmp_path / "merged.safetensors", "adapter", base)
    assert not (tmp_path / "merged.safetensors").exists()
    return str(refused.value)


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("origin", ["Hugging Face", "fair-esm"])
def test_an_adapter_is_added_to_the_matrices_that_it_is_for_and_to_nothing_else(tmp_path, weights, base, origin, kind):
    if origin == "fair-esm":
        base = write_fair_esm(tmp_path / "esm2.pt", weights)
    tensors = update(QUERY) | update(UP, HIDDEN, 4 * HIDDEN, seed=1) | update(DOWN, 4 * HIDDEN, HIDDEN, rank=2, seed=2)
    found, info = merged(tmp_path, write_adapter(tmp_path / "lora", tensors, kind=kind, fan_in_fan_out=True), base)
    expected = {
        "layers.1.self_attn.q_proj.weight": 6 / 4 * product(tensors, QUERY),
        "layers.1.fc1.weight": 6 / 4 * product(tensors, UP),
        "layers.1.fc2.weight": 6 / 2 * product(tensors, DOWN),
    }
    plain = convert_checkpoint(base, tmp_path / "plain.safetensors", "plain")
    for name, tensor in load_file(tmp_path / "plain.safetensors").items():
        torch.testing.assert_close(found[name], tensor + expected.get(name, 0), rtol=1e-6, atol=1e-6)
    assert info.digest != plain.digest
    assert (info.name, info.source, info.base, plain.base) == ("lora", "lora", base.stem, "")


def test_rank_stabilised_adapters_and_alphas_of_single_modules_scale_otherwise(tmp_path, weights, base):
    tensors = update(QUERY) | update(UP, HIDDEN, 4 * HIDDEN, seed=1)
    settings = {"use_rslora": True, "alpha_pattern": {"intermediate.dense": 3, "dense": 100}}
    found, _ = merged(tmp_path, write_adapter(tmp_path / "lora", tensors, **settings), base)
    for name, module, scale in (
        ("layers.1.self_attn.q_proj.weight", QUERY, 6 / math.sqrt(4)),
        ("layers.1.fc1.weight", UP, 3 / math.sqrt(4)),
    ):
        torch.testing.assert_close(found[name], weights[name] + scale * product(tensors, module), rtol=1e-6, atol=1e-6)


def test_what_was_trained_whole_takes_its_place_and_a_classifier_is_left_out(tmp_path, weights, base, caplog):
    norm = {f"base_model.model.esm.encoder.emb_layer_norm_after.{p}": torch.randn(HIDDEN) for p in ("weight", "bias")}
    bias = {f"{QUERY}.base_layer.bias": torch.randn(HIDDEN), f"{QUERY}.lora_B.bias": torch.randn(HIDDEN)}
    head = {"base_model.model.classifier.modules_to_save.dense.weight": torch.randn(2, HIDDEN)}
    tensors = update(QUERY) | norm | bias | head | update("base_model.model.classifier.dense", seed=3)
    found, _ = merged(tmp_path, write_adapter(tmp_path / "lora", tensors, modules_to_save=["classifier"]), base)
    for parameter in ("weight", "bias"):
        trained = norm[f"base_model.model.esm.encoder.emb_layer_norm_after.{parameter}"]
        assert torch.equal(found[f"emb_layer_norm_after.{parameter}"], trained)
    expected = bias[f"{QUERY}.base_layer.bias"] + 6 / 4 * bias[f"{QUERY}.lora_B.bias"]
    torch.testing.assert_close(found["layers.1.self_attn.q_proj.bias"], expected, rtol=1e-6, atol=1e-6)
    assert "classifier.dense, classifier.dense.weight left out" in caplog.text


@pytest.mark.parametrize("origin", ["Hugging Face", "fair-esm"])
def test_an_adapted_token_embedding_is_still_tied_to_its_decoder(tmp_path, weights, base, origin):
    if origin == "fair-esm":
        base = write_fair_esm(tmp_path / "esm2.pt", weights)
    a, b = torch.randn(RANK, 33), torch.randn(HIDDEN, RANK)
    tensors = {f"{WORDS}.lora_embedding_A": a, f"{WORDS}.lora_embedding_B": b}
    found, info = merged(tmp_path, write_adapter(tmp_path / "lora", tensors), base)
    expected = weights["embed_tokens.weight"] + 6 / 4 * (b @ a).T
    torch.testing.assert_close(found["embed_tokens.weight"], expected, rtol=1e-6, atol=1e-6)
    assert info.dimensions.has_lm_head


def test_an_adapter_of_esm_c_is_merged_whatever_layout_its_base_is_in(tmp_path):
    layers, hidden, heads, width = ESM_C_SHAPES["head 64"]
    weights = random_esm_c(layers, hidden, heads, width)
    base = write_first_esm_c(tmp_path / "base", weights, heads)
    value, gate = (f"base_model.model.esmc.layers.0.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj"))
    tensors = update(value, hidden, hidden) | update(gate, hidden, width, seed=1)
    found, info = merged(tmp_path, write_adapter(tmp_path / "lora", tensors), base)
    convert_checkpoint(base, tmp_path / "plain.safetensors", "plain")
    plain = load_file(tmp_path / "plain.safetensors")
    changed = {"layers.0.self_attn.v_proj.weight": value, "layers.0.gate.weight": gate}
    for name, tensor in plain.items():
        expected = tensor + (6 / 4 * product(tensors, changed[name]) if name in changed else 0)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    assert info.dimensions.family_name == "ESM C"


def test_weights_stay_in_the_precision_that_the_base_model_has(tmp_path, weights):
    base = write_hugging_face(tmp_path / "half", {name: tensor.half() for name, tensor in weights.items()})
    tensors = update(QUERY.replace("esm.", ""))
    found, _ = merged(tmp_path, write_adapter(tmp_path / "lora", tensors), base)
    name = "layers.1.self_attn.q_proj.weight"
    exact = weights[name].half().float() + 6 / 4 * product(tensors, QUERY.replace("esm.", ""))
    assert torch.equal(found[name], exact.half())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind IA3, where LORA is known; merge it with peft"),
        ({"use_dora": True}, "an adapter with use_dora, which is more than plain LoRA; merge it with peft"),
        ({"layer_replication": [[0, 2]]}, "an adapter with layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4, which changes the base model"),
        ({"lora_alpha": None}, "adapter_config.json does not say lora_alpha"),
    ],
)
def test_other_kinds_of_adapters_are_refused_with_what_to_do(tmp_path, base, config, sentence):
    assert sentence in refusal(tmp_path, write_adapter(tmp_path / "lora", update(QUERY), **config), base)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            update(QUERY, HIDDEN, 2 * HIDDEN),
            r"q_proj.weight has the shape (64, 32), and that of the base model (32, 32)",
        ),
        (
            update(QUERY.replace("layer.1", "layer.7")),
            "layer.7.attention.self.query.weight, which the base model does not",
        ),
        (update("base_model.model.classifier.dense"), "changes nothing that embeddings depend on"),
        (
            {f"{QUERY}.lora_A.weight": torch.ones(RANK, HIDDEN)},
            "the update of esm.encoder.layer.1.attention.self.query is",
        ),
        (update(QUERY) | {f"{QUERY}.lora_B.weight": torch.ones(RANK)}, "the update of esm.encoder.layer.1"),
        (update(QUERY) | {f"{QUERY}.lora_B.weight": torch.full((HIDDEN, RANK), torch.nan)}, "that are no numbers"),
        (
            {f"{LAYER}attention.self.query.lora_magnitude_vector": torch.ones(HIDDEN)},
            "which the base model does not have",
        ),
    ],
    ids=["shape", "layer", "head only", "half", "flat", "not finite", "magnitude"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_name_of_what_does_not(tmp_path, base, tensors, sentence):
    assert sentence in refusal(tmp_path, write_adapter(tmp_path / "lora", tensors), base)


def test_damaged_and_missing_files_are_sentences(tmp_path, base):
    folder = write_adapter(tmp_path / "lora", update(QUERY))
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "truncated or damaged" in refusal(tmp_path, folder, base)
    (folder / "adapter_model.safetensors").unlink()
    assert "holds adapter_model.safetensors or adapter_model.bin; this one has neither" in refusal(
        tmp_path, folder, base
    )
    assert "holds an adapter and no model, and cannot be the base" in refusal(tmp_path, folder, folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="not the settings of an adapter"):
        validated({"model": str(folder), "base_model": "8M"}, SCHEMA)


def test_the_base_is_what_the_configuration_says_else_what_the_adapter_does(tmp_path, base, monkeypatch):
    adapter = write_adapter(tmp_path / "lora", update(QUERY), base="facebook/esm2_t33_650M_UR50D")
    assert base_of(str(adapter)) == "esm2_t33_650M_UR50D"
    assert base_of(str(adapter), "8M") == "esm2_t6_8M_UR50D"
    assert base_of(str(adapter), str(base)) == str(base)
    assert base_of(str(base)) is None
    beside = write_adapter(tmp_path / "lora", update(QUERY), base="../base")
    assert number_of_layers(base_of(str(beside))) == 2
    monkeypatch.chdir(tmp_path)
    assert base_of(str(write_adapter(tmp_path / "lora", update(QUERY), base="base"))) == "base"
    assert validated({"model": str(adapter), "layers": [2]}, SCHEMA)["base_model"] == "base"


@pytest.mark.parametrize(
    ("named", "given", "sentence"),
    [
        ("somebody/esm2-tuned", None, "base_model_name_or_path somebody/esm2-tuned is neither an official name nor on"),
        ("", None, "does not say which model was adapted; name it as base_model"),
        (
            "facebook/esm2_t33_650M_UR50D",
            "nowhere",
            "base_model: nowhere is neither an official name nor on this machine",
        ),
    ],
)
def test_a_base_that_is_not_there_stops_the_run_before_it_begins(tmp_path, named, given, sentence):
    adapter = write_adapter(tmp_path / "lora", update(QUERY), base=named)
    with pytest.raises(ConfigurationError) as refused:
        validated({"model": str(adapter), "base_model": given}, SCHEMA)
    assert sentence in str(refused.value)


def test_a_base_for_a_whole_model_and_a_layer_that_the_base_lacks_are_refused(tmp_path, base):
    with pytest.raises(ConfigurationError, match=r"is given, but .* is no adapter; leave base_model out"):
        validated({"model": str(base), "base_model": "8M"}, SCHEMA)
    adapter = write_adapter(tmp_path / "lora", update(QUERY), base=base)
    with pytest.raises(ConfigurationError, match="layers: 7 does not exist in this model: it has 2 layers"):
        validated({"model": str(adapter), "layers": [7]}, SCHEMA)
    shutil.copy(base / "model.safetensors", adapter)
    assert validated({"model": str(adapter)}, SCHEMA)["base_model"] is None


def test_the_model_step_says_what_it_merged_into_what(tmp_path, base):
    adapter = write_adapter(tmp_path / "lora", update(QUERY))
    out = {"checkpoint": str(tmp_path / "c.safetensors"), "info": str(tmp_path / "model.json")}
    fetch_model(ModelSettings(model=str(adapter), base=str(base), folder=None, download=False, **out))
    said = yaml.safe_load((tmp_path / "model.json").read_text())
    assert (said["name"], said["source"], said["base"]) == ("lora", "lora", "base")
