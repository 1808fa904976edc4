"""A wrong configuration or sample sheet ends in a sentence that names the key or the line, before anything runs."""

import csv
from pathlib import Path

import jsonschema
import pytest
import yaml
from made_up import random_model, stored_tensors, write_fasta, write_hugging_face

from esmflow.checkpoint.sources import OFFICIAL_NAMES
from esmflow.collect.formats import named_after_inputs
from esmflow.config.configuration import ConfigurationError, number_of_layers, validated
from esmflow.inputs.sheet import InputError, InputFile, read_samples

PROJECT = Path(__file__).resolve().parents[3]
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
SAMPLES_SCHEMA = PROJECT / "workflow" / "schemas" / "samples.schema.yaml"


def refusal(config: dict) -> str:
    with pytest.raises(ConfigurationError) as error:
        validated(config, SCHEMA)
    return str(error.value)


def sheet_refusal(path: Path | str, formats: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        read_samples(str(path), formats)
    return str(error.value)


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """Writes a sample sheet in a working directory that has a.fasta, b.fasta and sub/a.faa.gz."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.fasta", "b.fasta", "sub/a.faa.gz"):
        write_fasta(Path(name), [("p", "MKV")])

    def sheet(text: str | bytes, name: str = "samples.tsv") -> str:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return sheet


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
        ({"layers": -1}, "layers"),
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


def test_everything_that_is_wrong_is_said_at_once():
    message = refusal({"groups": 0, "threads": -2})
    assert "groups: " in message
    assert "threads: " in message


def test_a_format_that_could_hold_nothing_of_what_is_included_is_refused():
    assert refusal({"formats": ["h5", "h5ad"], "include": ["contacts"]}) == (
        "formats: h5ad holds mean, bos and nothing of include: contacts; leave h5ad out of formats, "
        "or choose one of h5, h5_per_protein, npy, pt, esm"
    )


# The model


def test_an_unknown_model_is_named_with_the_one_that_was_meant():
    assert refusal({"model": "esm2_t36_3B_UR50"}) == (
        "model: esm2_t36_3B_UR50 is not an ESM-2 model and not a path; did you mean esm2_t36_3B_UR50D?"
    )


def test_an_unknown_model_that_is_like_no_other_gets_the_list():
    message = refusal({"model": "prott5"})
    assert message.startswith("model: prott5 ")
    assert all(name in message for name in OFFICIAL_NAMES)


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


@pytest.mark.parametrize(("name", "layers"), list(zip(OFFICIAL_NAMES, (6, 12, 30, 33, 36, 48))))
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


@pytest.mark.parametrize(
    "text",
    [
        "sample\tfasta\nx\ta.fasta\n",
        "fasta\tsample\tnote\na.fasta\tx\tmine\n",
        "sample\tfasta\nx\t*.fasta\n",
        "sample\nx\n",
        "fasta\na.fasta\n",
        "sample\tfasta\n\ta.fasta\n",
        "sample\tfasta\nx\t\n",
    ],
)
def test_the_schema_of_the_sheet_and_its_reader_agree(sheet, text):
    path = sheet(text)
    with open(path, newline="") as handle:
        (row,) = csv.DictReader(handle, delimiter="\t")
    try:
        jsonschema.validate(row, yaml.safe_load(SAMPLES_SCHEMA.read_text()))
    except jsonschema.ValidationError:
        assert path in sheet_refusal(path)
    else:
        assert {file.sample for file in read_samples(path)} == {row["sample"]}


# The sample sheet


def test_a_sheet_gives_its_files_in_order(sheet):
    path = sheet("sample\tfasta\nsecond\tb.fasta\nfirst\ta.fasta\n")
    assert read_samples(path, ["pt"]) == [InputFile("second", "b.fasta"), InputFile("first", "a.fasta")]


def test_more_columns_blank_lines_comments_and_windows_line_ends_are_fine(sheet):
    path = sheet("\ufeffnote\tsample\tfasta\r\nmine\tx\ta.fasta\r\n\r\n\t#y\tnone.fasta\r\n\t z \t b.fasta \r\n")
    assert read_samples(path) == [InputFile("x", "a.fasta"), InputFile("z", "b.fasta")]


def test_a_glob_in_a_sheet_gives_every_match_under_one_sample(sheet):
    path = sheet("sample\tfasta\nx\t*.fasta\ny\t**/*.gz\n")
    assert read_samples(path) == [
        InputFile("x", "a.fasta"),
        InputFile("x", "b.fasta"),
        InputFile("y", "sub/a.faa.gz"),
    ]


def test_a_glob_instead_of_a_sheet_names_samples_by_their_files(sheet):
    assert read_samples("*.fasta") == [InputFile("a", "a.fasta"), InputFile("b", "b.fasta")]
    assert read_samples("s*/*.gz") == [InputFile("a", "sub/a.faa.gz")]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(sheet):
    write_fasta(Path("x[1].fasta"), [("p", "MKV")])
    assert read_samples(sheet("sample\tfasta\nx\tx[1].fasta\n")) == [InputFile("x", "x[1].fasta")]


def test_a_glob_that_matches_nothing_is_refused(sheet):
    assert sheet_refusal("none/*.faa") == "samples: none/*.faa matches no file"
    path = sheet("sample\tfasta\nx\ta.fasta\ny\t*.faa\n")
    assert sheet_refusal(path) == "samples.tsv, line 3: fasta: *.faa matches no file"


def test_a_sheet_that_is_not_there_is_refused(sheet):
    message = sheet_refusal("none.tsv")
    assert message.startswith("samples: none.tsv cannot be read (No such file or directory)")
    assert message.endswith("give a TSV file with the columns sample and fasta, or a glob")


def test_a_folder_is_no_sheet(sheet):
    assert sheet_refusal("sub").startswith("samples: sub cannot be read")


def test_a_sheet_that_is_no_utf8_text_is_refused(sheet):
    excel = sheet("sample\tfasta\nx\ta.fasta\n".encode("utf-16"))
    assert sheet_refusal(excel).startswith("samples: samples.tsv is not a text file in UTF-8")


@pytest.mark.parametrize(
    ("text", "found"),
    [("sample,fasta\nx,a.fasta\n", "sample,fasta"), ("name\tfasta\nx\ta.fasta\n", "name, fasta"), ("", "none")],
)
def test_a_sheet_without_the_columns_is_refused_and_told_what_it_has(sheet, text, found):
    assert sheet_refusal(sheet(text)) == (
        f"samples.tsv: needs the tab-separated columns sample and fasta; its first line has: {found}"
    )


def test_a_sheet_without_samples_is_refused(sheet):
    assert sheet_refusal(sheet("sample\tfasta\n\n")) == "samples.tsv: lists no sample"


@pytest.mark.parametrize("line", ["x\t", "x", "\ta.fasta"])
def test_a_line_that_is_not_filled_in_is_refused_by_its_number(sheet, line):
    path = sheet(f"sample\tfasta\ny\tb.fasta\n{line}\n")
    assert sheet_refusal(path) == "samples.tsv, line 3: sample and fasta must both be filled in"


def test_a_fasta_file_that_does_not_exist_is_named(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\ny\tnone.fasta\nz\tnor.fasta\n")
    assert sheet_refusal(path) == "samples.tsv: fasta: none.fasta does not exist (and 1 more); correct the path"


def test_a_sample_listed_twice_is_refused(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\nx\tb.fasta\n")
    assert sheet_refusal(path) == "samples.tsv: sample x is listed twice; give each its own name"


@pytest.mark.parametrize("again", ["a.fasta", "./a.fasta", "sub/../a.fasta", "[a]*.fasta"])
def test_a_file_listed_twice_is_refused_however_it_is_written(sheet, again):
    path = sheet(f"sample\tfasta\nx\ta.fasta\ny\t{again}\n")
    assert sheet_refusal(path) == "samples.tsv: the file a.fasta is listed twice; remove one"


def test_a_sheet_with_braces_in_its_name_is_a_sheet_like_any_other(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\nx\tb.fasta\n", "{run}.tsv")
    assert sheet_refusal(path) == "{run}.tsv: sample x is listed twice; give each its own name"


def test_two_files_with_one_stem_are_refused_where_both_would_be_one_pt_file(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\ny\tsub/a.faa.gz\n")
    assert sheet_refusal(path, ("pt",)) == (
        "samples.tsv: two files would both be written under the name a; rename one, or leave pt out of formats"
    )
    assert [file.path for file in read_samples(path)] == ["a.fasta", "sub/a.faa.gz"]
