"""Whatever a checkpoint comes as, it is converted to the same tensors; what is no ESM-2 is refused in a sentence."""

import argparse
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from made_up import random_model, stored_tensors, write_converted, write_fair_esm, write_hugging_face
from made_up_families import random_esm1, write_esm1
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esmflow.checkpoint import file as checkpoints
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import (
    CheckpointError,
    check_unchanged,
    file_stamp,
    read_checkpoint_info,
    verify_checkpoint,
)
from esmflow.checkpoint.models import ModelDimensions
from esmflow.files import file_sha256


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2, hidden=48, heads=2)


@pytest.fixture
def tensors(model):
    """What a checkpoint of the model holds, in fp32."""
    return stored_tensors(model)


@pytest.fixture
def convert(tmp_path):
    def convert(source, name="made up"):
        target = tmp_path / "converted.safetensors"
        info = convert_checkpoint(source, target, name)
        return info, load_file(target)

    return convert


def refusal(source, target) -> str:
    """The sentence with which a source is refused, which leaves no converted file behind."""
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, target, "made up")
    assert not target.exists()
    return str(error.value)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def without_tied_decoder(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


SOURCES = {
    "fair-esm": lambda folder, t: write_fair_esm(folder / "esm2_made_up.pt", t),
    "safetensors": lambda folder, t: write_hugging_face(folder / "hf", t),
    "bin": lambda folder, t: write_hugging_face(folder / "hf", t, "bin"),
    "safetensors in shards": lambda folder, t: write_hugging_face(folder / "hf", t, shards=3),
    "bin in shards": lambda folder, t: write_hugging_face(folder / "hf", t, "bin", shards=3),
}


# What comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_format_converts_to_the_tensors_of_the_model_as_they_are_stored(tmp_path, convert, model, source, dtype):
    stored = stored_tensors(model, dtype)
    info, found = convert(source(tmp_path, stored))
    expected = without_tied_decoder(stored)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert info.dimensions == ModelDimensions(2, 48, 2, has_lm_head=True, has_contact_head=True)


def test_the_same_weights_have_one_digest_whatever_they_come_as(tmp_path, convert, tensors):
    digests = {name: convert(source(tmp_path / name, tensors))[0].digest for name, source in SOURCES.items()}
    assert len(set(digests.values())) == 1, digests


def test_other_weights_have_another_digest(tmp_path, convert, tensors):
    before = convert(write_fair_esm(tmp_path / "a.pt", tensors))[0].digest
    tensors["layers.1.fc2.bias"][3] = torch.nextafter(tensors["layers.1.fc2.bias"][3], torch.tensor(1e9))
    assert convert(write_fair_esm(tmp_path / "b.pt", tensors))[0].digest != before


def test_weights_in_another_precision_have_another_digest(tmp_path, convert, model):
    digests = set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        digests.add(convert(write_fair_esm(tmp_path / "a.pt", stored_tensors(model, dtype)))[0].digest)
    assert len(digests) == 3


def test_the_same_bytes_read_as_another_precision_have_another_digest(tmp_path, convert, model):
    half = stored_tensors(model, torch.float16)
    other = {name: tensor.view(torch.bfloat16) for name, tensor in half.items()}
    digests = [convert(write_fair_esm(tmp_path / "a.pt", tensors))[0].digest for tensors in (half, other)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_rotary_frequencies_are_kept_bit_by_bit_and_never_computed_anew(tmp_path, convert, tensors, source):
    rounded = tensors["layers.0.self_attn.rot_emb.inv_freq"]
    computed = 1.0 / 10000 ** (torch.arange(0, 24, 2).float() / 24)
    assert not torch.equal(rounded, computed)
    # Layers may even differ from one another.
    tensors["layers.1.self_attn.rot_emb.inv_freq"] = rounded * 1.25
    _, found = convert(source(tmp_path, tensors))
    for layer, expected in enumerate((rounded, rounded * 1.25)):
        assert same_bits(found[f"layers.{layer}.self_attn.rot_emb.inv_freq"], expected)


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(1, 16, 1), (3, 80, 5), (6, 24, 3)])
def test_dimensions_are_those_of_the_tensors_whatever_the_name_says(tmp_path, convert, layers, hidden, heads):
    stored = stored_tensors(random_model(layers, hidden, heads))
    for source in (
        write_fair_esm(tmp_path / "esm2_t48_15B_UR50D.pt", stored),
        write_hugging_face(tmp_path / "esm2_t48_15B_UR50D", stored),
    ):
        info, _ = convert(source, "esm2_t48_15B_UR50D")
        assert (info.dimensions.layers, info.dimensions.hidden, info.dimensions.heads) == (layers, hidden, heads)
        assert info.dimensions.head_dim == hidden // heads


def test_without_the_regression_file_there_is_no_contact_head_and_a_warning(tmp_path, convert, tensors, caplog):
    with caplog.at_level(logging.WARNING):
        info, found = convert(write_fair_esm(tmp_path / "alone.pt", tensors, contact_regression=False))
    assert not info.dimensions.has_contact_head
    assert not [name for name in found if name.startswith("contact_head")]
    assert "alone-contact-regression.pt is not beside the checkpoint" in caplog.text


def test_a_family_without_a_contact_head_is_not_told_that_it_lacks_one(tmp_path, convert, caplog):
    info, _ = convert(write_esm1(tmp_path / "a.pt", random_esm1(norm_before=False), contact_regression=False))
    assert info.dimensions.family.name == "ESM-1v"
    assert not caplog.records


def test_a_folder_without_heads_has_none(tmp_path, convert, tensors):
    encoder = {name: t for name, t in tensors.items() if not name.startswith(("lm_head", "contact_head"))}
    info, found = convert(write_hugging_face(tmp_path / "encoder", encoder))
    assert (info.dimensions.has_lm_head, info.dimensions.has_contact_head) == (False, False)
    assert found.keys() == encoder.keys()


def test_the_old_format_of_torch_is_read_too(tmp_path, convert, tensors):
    new = write_fair_esm(tmp_path / "new.pt", tensors, contact_regression=False)
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save(torch.load(new), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.pt")[0].digest == convert(new)[0].digest


def test_the_real_encoder_converts_and_names_its_source(real_model_folder, real_checkpoint):
    info = read_checkpoint_info(real_checkpoint)
    assert info.name == real_model_folder.name
    assert info.dimensions == ModelDimensions(6, 320, 20, has_lm_head=False, has_contact_head=True)
    assert info.source == real_model_folder.name
    assert info.source_sha256 == file_sha256(real_model_folder / "pytorch_model.bin")
    assert verify_checkpoint(real_checkpoint) == info


# The converted file


def test_a_converted_file_is_plain_safetensors(tmp_path, model):
    path = write_converted(tmp_path / "a.safetensors", model)
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["format"] == "esmflow-checkpoint-1"
        assert torch.equal(handle.get_tensor("embed_tokens.weight"), model.embed_tokens.weight)


def test_information_is_read_without_torch(tmp_path, model):
    path = write_converted(tmp_path / "a.safetensors", model)
    code = (
        "import sys; from esmflow.checkpoint.file import read_checkpoint_info\n"
        "print(read_checkpoint_info(sys.argv[1]).dimensions.hidden); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, path], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "48\n", done.stderr


def test_a_missing_converted_file_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file; run the workflow's model step again"):
        read_checkpoint_info(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_converted_file_is_refused(tmp_path, model, kept):
    path = write_converted(tmp_path / "a.safetensors", model)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: not a whole \.safetensors file .*delete it and run again"
    ):
        read_checkpoint_info(path)


def test_a_file_that_this_workflow_did_not_convert_is_refused(tmp_path):
    save_file({"embed_tokens.weight": torch.zeros(33, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not converted by this version of esmflow"):
        read_checkpoint_info(tmp_path / "a.safetensors")


def test_one_changed_bit_of_a_converted_file_is_found(tmp_path, model):
    path = write_converted(tmp_path / "a.safetensors", model)
    verify_checkpoint(path)
    for position in (-1, path.stat().st_size // 2):
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        (tmp_path / "changed.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"changed\.safetensors: the weights are not the ones"):
            verify_checkpoint(tmp_path / "changed.safetensors")


def test_weights_exchanged_under_a_foreign_digest_are_found(tmp_path, model):
    path = write_converted(tmp_path / "a.safetensors", model)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    changed = load_file(path)
    changed["emb_layer_norm_after.bias"] = changed["emb_layer_norm_after.bias"] + 1
    save_file(changed, path, metadata)
    with pytest.raises(CheckpointError, match="the weights are not the ones"):
        verify_checkpoint(path)


# What is refused


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("source", ["fair-esm", "safetensors", "bin"])
def test_a_truncated_checkpoint_is_refused(tmp_path, tensors, source, kept):
    path = SOURCES[source](tmp_path, tensors)
    file = path if path.is_file() else next(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))
    os.truncate(file, int(kept * file.stat().st_size))
    message = refusal(path, tmp_path / "target")
    assert message.startswith(f"{file}: ")
    assert message.endswith("fetch it again")


def test_a_truncated_contact_regression_is_refused_by_its_own_name(tmp_path, tensors):
    path = write_fair_esm(tmp_path / "a.pt", tensors)
    regression = tmp_path / "a-contact-regression.pt"
    os.truncate(regression, 200)
    assert refusal(path, tmp_path / "target").startswith(f"{regression}: ")


FOREIGN = {
    "a tensor": torch.zeros(3),
    "a list": [1, 2, 3],
    "a state dict of another model": {"conv1.weight": torch.zeros(3, 3)},
    "ESM-1b, which has args instead of cfg": {
        "args": argparse.Namespace(arch="roberta_large"),
        "model": {"encoder.sentence_encoder.embed_tokens.weight": torch.zeros(33, 8)},
    },
    "ESM-1b, renamed": {
        "cfg": {"model": argparse.Namespace(arch="roberta_large")},
        "model": {
            "encoder.sentence_encoder.embed_tokens.weight": torch.zeros(33, 8),
            "encoder.sentence_encoder.embed_positions.weight": torch.zeros(1026, 8),
        },
    },
    "a model that is a list": {"cfg": {}, "model": [torch.zeros(3)]},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_torch_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    assert refusal(path, tmp_path / "target").startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text file\n",
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs\n",
        b"]q\x01.",
    ],
    ids=["empty", "text", "html", "git-lfs pointer", "pickle"],
)
@pytest.mark.parametrize("name", ["a.pt", "folder/pytorch_model.bin", "folder/model.safetensors"])
def test_a_file_that_is_no_torch_file_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path if path.suffix == ".pt" else path.parent
    assert refusal(source, tmp_path / "target").startswith(f"{path}: ")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_noise_is_refused_whatever_it_makes_the_unpickler_do(tmp_path):
    path = tmp_path / "noise.pt"
    noise = random.Random(0)
    for length in range(1, 200):
        path.write_bytes(noise.randbytes(length))
        assert refusal(path, tmp_path / "target").startswith(f"{path}: ")


def test_another_hugging_face_model_is_refused(tmp_path, tensors):
    folder = tmp_path / "bert"
    folder.mkdir()
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(30522, 8)}, folder / "model.safetensors")
    assert refusal(folder, tmp_path / "target").startswith(f"{folder}: not an ESM-2 model")


@pytest.mark.parametrize("source", ["fair-esm", "safetensors"])
def test_every_single_tensor_is_needed(tmp_path, tensors, source):
    last_layer = [n for n in without_tied_decoder(tensors) if not n.startswith("layers.0.")]
    for name in last_layer:
        incomplete = {key: tensor for key, tensor in tensors.items() if key != name}
        message = refusal(SOURCES[source](tmp_path, incomplete), tmp_path / "target")
        assert name in message or name == "embed_tokens.weight"
        assert str(tmp_path) in message
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path, tensors):
    tensors["layers.1.fc1.weight"] = tensors["layers.1.fc1.weight"][:-1]
    assert "layers.1.fc1.weight should have shape (192, 48) and has (191, 48)" in refusal(
        write_fair_esm(tmp_path / "a.pt", tensors), tmp_path / "target"
    )


def test_a_tensor_that_no_esm2_has_is_refused(tmp_path, tensors):
    tensors["embed_positions.weight"] = torch.zeros(1026, 48)
    assert "holds embed_positions.weight, which no ESM-2 has" in refusal(
        write_fair_esm(tmp_path / "a.pt", tensors), tmp_path / "target"
    )


def test_an_untied_head_is_refused(tmp_path, tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    path = write_fair_esm(tmp_path / "a.pt", tensors)
    assert refusal(path, tmp_path / "target") == (
        f"{path}: its LM head is not tied to the token embedding, as every ESM-2's is"
    )


def test_a_path_with_nothing_there_is_refused(tmp_path):
    assert refusal(tmp_path / "none.pt", tmp_path / "target") == f"{tmp_path / 'none.pt'}: no such checkpoint"


def test_a_folder_without_weights_is_told_what_it_should_hold(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path, tmp_path / "target")
    assert message.startswith(f"{tmp_path}: ")
    assert "model.safetensors or pytorch_model.bin" in message


def test_a_shard_that_is_missing_is_named(tmp_path, tensors):
    folder = write_hugging_face(tmp_path / "hf", tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = refusal(folder, tmp_path / "target")
    assert message.startswith(f"{folder}: ")
    assert "model-00002-of-00003.safetensors, which is not there" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, tensors, content):
    folder = write_hugging_face(tmp_path / "hf", tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(folder, tmp_path / "target").startswith(f"{index}: ")


# Security and memory

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(checkpoints.__file__).rsplit("/", 3)[0]}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.pt", "folder/pytorch_model.bin", "a-contact-regression.pt"])
@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["torch", "pickle"]
)
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, tensors, name, save):
    trace = tmp_path / "it was run"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if "regression" in name:
        write_fair_esm(tmp_path / "a.pt", tensors)
    save({"cfg": {}, "model": {"embed_tokens.weight": Malicious(trace)}}, path)
    source = path.parent if "folder" in name else tmp_path / "a.pt"
    assert refusal(source, tmp_path / "target").startswith(f"{path}: ")
    assert not trace.exists()
    # The file is what it is meant to be: opened carelessly, it does run.
    open_carelessly = pickle.loads(pickle.dumps(Malicious(trace)))
    open_carelessly.close()
    assert trace.exists()


def test_the_tensors_are_mapped_and_nothing_of_the_source_is_needed_afterwards(tmp_path, model):
    path = write_converted(tmp_path / "a.safetensors", model)
    path.with_suffix(".pt").unlink()
    assert torch.equal(load_file(path)["embed_tokens.weight"], model.embed_tokens.weight)


CONVERT_AND_MEASURE = """
import json, re, sys
from pathlib import Path
import torch, safetensors.torch
from esmflow.checkpoint.convert import convert_checkpoint

def peak():  # KiB; unlike ru_maxrss it does not begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

before = peak()
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), "large")
print((peak() - before) * 1024)
"""


@pytest.mark.parametrize("source", ["fair-esm", "safetensors"])
def test_conversion_takes_less_memory_than_twice_the_checkpoint(tmp_path, source):
    layers, hidden = 6, 1432
    shapes = {name: tuple(t.shape) for name, t in random_model(layers, 8, 1).state_dict().items()}
    sizes = {8: hidden, 32: 4 * hidden, 4: hidden // 2}
    large = {
        name: torch.full([sizes.get(n, n) for n in shape], 0.01, dtype=torch.float16)
        for name, shape in shapes.items()
        if not name.startswith("contact_head")
    }
    large["lm_head.weight"] = large["embed_tokens.weight"]
    path = SOURCES[source](tmp_path, large)
    file = path if path.is_file() else path / "model.safetensors"
    size = file.stat().st_size
    assert size > 290_000_000
    for regression in tmp_path.glob("*regression*"):
        regression.unlink()
    command = [sys.executable, "-c", CONVERT_AND_MEASURE, path, tmp_path / "target"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * size
    assert (tmp_path / "target").stat().st_size >= size - 100_000


def test_a_conversion_that_fails_leaves_an_earlier_file_in_place(tmp_path, tensors, model):
    target = write_converted(tmp_path / "a.safetensors", model)
    before = target.read_bytes()
    del tensors["layers.1.fc2.bias"]
    with pytest.raises(CheckpointError):
        convert_checkpoint(write_fair_esm(tmp_path / "b.pt", tensors), target, "other")
    assert target.read_bytes() == before


def test_the_description_survives_as_json(tmp_path, tensors):
    path = write_fair_esm(tmp_path / 'na"ïve.pt', tensors)
    info = convert_checkpoint(path, tmp_path / "a.safetensors", 'a "name"')
    assert read_checkpoint_info(tmp_path / "a.safetensors") == info
    assert info.source == 'na"ïve.pt'
    assert info.source_sha256 == file_sha256(path)


def test_a_file_that_was_touched_is_read_in_full_and_one_that_was_not_is_not(tmp_path, model):
    path = tmp_path / "model.safetensors"
    info = convert_checkpoint(write_fair_esm(tmp_path / "esm2.pt", stored_tensors(model)), path, "made up")
    stamp = file_stamp(path)
    check_unchanged(path, info.digest, stamp)
    with pytest.raises(CheckpointError, match="not the checkpoint that this run was planned with"):
        check_unchanged(path, "0" * 32, stamp)

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the ones that were converted"):
        check_unchanged(path, info.digest, stamp)
    # With its old time it passes for untouched: this is what makes a job's start cheap.
    os.utime(path, ns=(stamp[1], stamp[1]))
    check_unchanged(path, info.digest, stamp)
