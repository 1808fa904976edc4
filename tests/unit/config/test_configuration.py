"""A wrong configuration ends in a sentence that names the key, before anything runs."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from made_up import random_model, stored_tensors, write_hugging_face

from esmflow.checkpoint.models import OFFICIAL_MODELS
from esmflow.collect.formats import named_after_inputs
from esmflow.config.configuration import ConfigurationError, number_of_layers, validated
from esmflow.inputs.sheet import read_samples

PROJECT = Path(__file__).resolve().parents[3]
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"


def refusal(config: dict) -> str:
    with pytest.raises(ConfigurationError) as error:
        validated(config, SCHEMA)
    return str(error.value)


# Keys


def test_an_empty_configuration_gets_every_default():
    complete = validated({}, SCHEMA)
    assert complete["model"] == "esm2_t36_3B_UR50D"
    assert complete["layers"] == [-1]
    assert complete["formats"] == ["h5", "pt"]
    assert complete["failures"] == {"policy": "report", "retries": 2}


def test_a_nested_key_that_is_missing_gets_its_default_and_the_others_stay():
    config = {"failures": {"policy": "error"}}
    assert validated(config, SCHEMA)["failures"] == {"policy": "error", "retries": 2}
    assert config == {"failures": {"policy": "error"}}


def test_what_is_given_is_kept():
    given = {"model": "esm2_t6_8M_UR50D", "layers": [0, 3, -1], "batch_tokens": 512, "groups": 16}
    complete = validated(given, SCHEMA)
    assert {key: complete[key] for key in given} == given


def test_an_unknown_key_is_named_with_the_one_that_was_meant():
    assert refusal({"asignment": "balanced"}).startswith("asignment: there is no such key")
    assert refusal({"asignment": "balanced"}).endswith("did you mean assignment?")


def test_an_unknown_key_that_is_like_no_other_gets_the_list():
    message = refusal({"xyzzy": 1})
    assert message.startswith("xyzzy: there is no such key")
    assert all(key in message for key in ("samples", "layers", "batch_tokens"))


def test_an_unknown_nested_key_is_named_with_its_place():
    assert refusal({"failures": {"polcy": "error"}}) == (
        "failures.polcy: there is no such key in the configuration; did you mean policy?"
    )


@pytest.mark.parametrize("budget", [-1, 0, "many", 1.5, None])
def test_a_budget_that_is_no_positive_number_is_refused(budget):
    message = refusal({"batch_tokens": budget})
    assert message.startswith(f"batch_tokens: {budget!r} is not possible")
    assert "Tokens in one batch" in message


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"groups": 0}, "groups"),
        ({"groups": "four"}, "groups"),
        ({"layers": []}, "layers"),
        ({"layers": ["last"]}, "layers.0"),
        ({"include": ["median"]}, "include.0"),
        ({"include": []}, "include"),
        ({"include": ["mean", "mean"]}, "include"),
        ({"formats": ["csv"]}, "formats.0"),
        ({"pooled_precision": "bf16"}, "pooled_precision"),
        ({"engine": "fast"}, "engine"),
        ({"precision": "fp8"}, "precision"),
        ({"assignment": "random"}, "assignment"),
        ({"long_sequences": "cut"}, "long_sequences"),
        ({"max_residues": 0}, "max_residues"),
        ({"invalid_residues": "ignore"}, "invalid_residues"),
        ({"failures": None}, "failures"),
        ({"failures": {"policy": "ignore"}}, "failures.policy"),
        ({"failures": {"retries": -1}}, "failures.retries"),
        ({"slot_wait_minutes": 0}, "slot_wait_minutes"),
        ({"device": "tpu"}, "device"),
        ({"samples": ""}, "samples"),
        ({"samples": None}, "samples"),
        ({"download": "no"}, "download"),
        ({"threads": 0}, "threads"),
        ({"shard_residues": 0}, "shard_residues"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(config, key):
    assert refusal(config).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"layers": 33}, {"layers": [33]}),
        ({"layers": "-1"}, {"layers": [-1]}),
        ({"layers": "0, 33,-1"}, {"layers": [0, 33, -1]}),
        ({"layers": "[0, 33]"}, {"layers": [0, 33]}),
        ({"layers": ["6"]}, {"layers": [6]}),
        ({"include": "mean"}, {"include": ["mean"]}),
        ({"include": "mean,bos"}, {"include": ["mean", "bos"]}),
        ({"formats": "h5"}, {"formats": ["h5"]}),
        ({"report": "true", "download": "False"}, {"report": True, "download": False}),
        ({"groups": "8", "threads": "1"}, {"groups": 8, "threads": 1}),
        ({"batch_tokens": "4096"}, {"batch_tokens": 4096}),
        ({"batch_tokens": "auto"}, {"batch_tokens": "auto"}),
        ({"slot_wait_minutes": "1.5"}, {"slot_wait_minutes": 1.5}),
        ({"store": "null", "model_folder": None}, {"store": None, "model_folder": None}),
        ({"failures": "{policy: error}"}, {"failures": {"policy": "error", "retries": 2}}),
        ({"failures": {"retries": "0"}}, {"failures": {"policy": "report", "retries": 0}}),
        ({"samples": "1"}, {"samples": "1"}),
        ({"model": "esm2_t33_650M_UR50D", "id": "true"}, {"model": "esm2_t33_650M_UR50D"}),
    ],
)
def test_what_can_mean_one_thing_only_is_taken_for_it(given, meant):
    if given.get("id") == "true":
        assert refusal(given).startswith("id: true has no groups")
        return
    complete = validated({"model": "esm2_t33_650M_UR50D", **given}, SCHEMA)
    assert {key: complete[key] for key in meant} == meant
    assert all(type(complete[key]) is type(value) for key, value in meant.items())


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"failures": "error"}, "failures: 'error' is no mapping; write failures: {policy: error}"),
        (
            {"failures": "stop"},
            "failures: 'stop' is no mapping; write failures: a mapping with the keys policy, retries",
        ),
        ({"verify": 8}, "verify: 8 is no mapping; write verify: a mapping with the keys sample, seed, "),
        ({"precision": "float16"}, "did you mean fp16?"),
        ({"precision": "bfloat16"}, "did you mean bf16?"),
        ({"precision": 32}, "did you mean fp32?"),
        ({"pooled_precision": "half"}, "did you mean fp16?"),
        ({"include": ["per_tok"]}, "did you mean per_residue?"),
        ({"include": "cls"}, "did you mean bos?"),
        ({"formats": ["hdf5"]}, "did you mean h5?"),
        ({"formats": "parket"}, "did you mean parquet?"),
        ({"device": "gpu"}, "did you mean cuda?"),
        ({"gaps": "strip"}, "did you mean remove?"),
        ({"long_sequences": "windows"}, "did you mean window?"),
        ({"precision": "fp8"}, "'fp8' is not one of auto, bf16, fp16, fp32"),
        ({"pooled_precision": "bfloat16"}, "'bfloat16' is not one of fp32, fp16"),
    ],
)
def test_a_value_that_is_nearly_right_is_told_which_is(given, hint):
    assert hint in refusal(given)


def test_everything_that_is_wrong_is_said_at_once():
    message = refusal({"groups": 0, "threads": -2})
    assert "groups: " in message
    assert "threads: " in message


def test_a_format_that_could_hold_nothing_of_what_is_included_is_refused():
    assert refusal({"formats": ["h5", "h5ad"], "include": ["contacts"]}) == (
        "formats: h5ad holds mean, bos, max, std, pseudo_perplexity and nothing of include: contacts; leave h5ad out "
        "of formats, or choose one of h5, h5_per_protein, npy, pt, esm, npz"
    )


def test_a_table_of_variants_is_looked_at_before_anything_runs(tmp_path):
    path = tmp_path / "v.tsv"
    assert refusal({"variants": str(path)}).startswith(
        f"variants: {path} cannot be read (No such file or directory); give"
    )
    path.write_text("gene\tvariant\n")
    assert "its first line has: gene, variant" in refusal({"variants": str(path)})
    path.write_text("id\tvariant\n")
    assert validated({"variants": str(path)}, SCHEMA)["variants"] == str(path)
    wild = tmp_path / "{x}.tsv"
    wild.write_text("id\tvariant\n")
    assert "which Snakemake takes for a wildcard; rename it" in refusal({"variants": str(wild)})


# The model


@pytest.mark.parametrize(
    ("model", "changed", "sentence"),
    [
        ("ESMC-600M", {"include": ["contacts"]}, "include: contacts are asked for, and no contact head was published"),
        ("esm1b_t33_650M_UR50S", {"max_residues": 1024}, "max_residues: 1024 is more than this model, ESM-1b, has"),
        ("facebook/esm1b_t33_650M_UR50S", {"precision": "int8"}, "precision: int8 is made for ESM-2 and ESM C only"),
        ("esmc_300m", {"engine": "reference"}, "engine: reference is fair-esm's own model, which has no ESM C"),
        ("ESMC-300M", {"layers": [31]}, "layers: 31 does not exist in this model: it has 30 layers"),
        ("esm1v_t33_650M_UR90S_5", {"layers": [34]}, "it has 33 layers"),
    ],
)
def test_what_a_family_does_not_have_is_refused_before_anything_runs(model, changed, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        validated({"model": model, **changed}, SCHEMA)


def test_an_unknown_model_is_named_with_the_one_that_was_meant():
    assert refusal({"model": "esm2_t36_3B_UR50"}) == (
        "model: esm2_t36_3B_UR50 is no known model and not a path; did you mean esm2_t36_3B_UR50D?"
    )


def test_an_unknown_model_that_is_like_no_other_gets_the_list():
    message = refusal({"model": "prott5"})
    assert message.startswith("model: prott5 ")
    assert all(name in message for name in OFFICIAL_MODELS)


@pytest.mark.parametrize("path", ["models/none.pt", "none.pt", "./nothing"])
def test_a_model_path_that_does_not_exist_is_refused(path):
    assert refusal({"model": path}).startswith(f"model: {path} does not exist")


@pytest.mark.parametrize("layer", [37, -38, 1000])
def test_a_layer_that_the_model_does_not_have_is_refused(layer):
    message = refusal({"layers": [0, layer]})
    assert message.startswith(f"layers: {layer} does not exist in this model: it has 36 layers")
    assert message.endswith("layers go from -37 to 36")


@pytest.mark.parametrize("layer", [36, -37, 0])
def test_the_outermost_layers_are_accepted(layer):
    assert validated({"layers": [layer]}, SCHEMA)["layers"] == [layer]


@pytest.mark.parametrize(("name", "layers"), list(zip(OFFICIAL_MODELS, (6, 12, 30, 33, 36, 48))))
def test_an_official_name_says_how_many_layers_it_has(name, layers):
    assert number_of_layers(name) == layers
    assert refusal({"model": name, "layers": [layers + 1]}).startswith(f"layers: {layers + 1} ")


def test_a_hugging_face_folder_says_how_many_layers_it_has(tmp_path):
    folder = write_hugging_face(tmp_path / "folder", stored_tensors(random_model(layers=2)))
    assert validated({"model": str(folder), "layers": [2]}, SCHEMA)["model"] == str(folder)
    assert refusal({"model": str(folder), "layers": [3]}).startswith("layers: 3 ")


def test_the_layers_of_a_pt_file_are_left_for_later(tmp_path):
    (tmp_path / "own.pt").write_bytes(b"not opened here")
    assert validated({"model": str(tmp_path / "own.pt"), "layers": [99]}, SCHEMA)["layers"] == [99]


# The schemas and the configurations that come with the project


def keys_of(schema: dict, prefix: str = "") -> dict[str, dict]:
    keys = {}
    for key, rule in schema["properties"].items():
        keys[prefix + key] = rule
        if "properties" in rule:
            keys |= keys_of(rule, f"{prefix}{key}.")
    return keys


def test_every_key_has_a_description_and_a_default_that_the_schema_allows():
    schema = yaml.safe_load(SCHEMA.read_text())
    keys = keys_of(schema)
    assert {"model", "failures.policy"} <= set(keys)
    for key, rule in keys.items():
        assert rule.get("description"), key
        # Snakemake reads pathvars before the workflow does and has defaults of its own.
        if key != "pathvars":
            jsonschema.validate(rule["default"], rule)


@pytest.mark.parametrize("path", ["config/config.yaml", "config/demo/config.yaml"])
def test_the_configurations_of_the_project_are_valid(path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    config = validated(yaml.safe_load(Path(path).read_text()), SCHEMA)
    assert read_samples(config["samples"], named_after_inputs(config["formats"]))


def test_the_demo_configuration_is_valid_with_the_model_it_is_given(real_model_folder):
    config = yaml.safe_load((PROJECT / "config/demo/config.yaml").read_text())
    assert validated({**config, "model": str(real_model_folder)}, SCHEMA)["layers"] == [-1]
