"""What is wrong with the configuration or an input file is said in a sentence, and nothing good is lost."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess

import pytest

GOOD = "MKVLAAGIVGLLLAQWERTYDE"


@pytest.fixture
def run(quick_run):
    return quick_run(3, groups=1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group": 4}, "group: there is no such key.*did you mean groups"),
        ({"samples": "*.none"}, r"samples: \*.none matches no file"),
    ],
)
def test_a_wrong_configuration_stops_before_any_job_with_a_sentence_that_names_the_key(run, change, sentence):
    """One of each kind: tests of the configuration and of the sheet have all."""
    run.configure(**change)
    shutil.rmtree(run.results)
    ended = run.run()
    assert ended.returncode != 0
    assert_sentence(ended.stdout, sentence)
    assert "rule " not in ended.stdout
    assert "Traceback" not in ended.stdout
    assert not run.results.exists()


def assert_sentence(printed, sentence):
    assert re.search(sentence, " ".join(printed.split())), printed


def test_a_layer_that_a_checkpoint_file_does_not_have_stops_before_a_gpu_is_used(small_run, real_model_folder):
    run = small_run(3, groups=1, model=real_model_folder)
    # Without its config.json a folder does not say how many layers there are until its weights are opened.
    folder = run.folder / "unlabelled"
    folder.mkdir()
    shutil.copy(real_model_folder / "pytorch_model.bin", folder)
    run.configure(model="unlabelled", layers=[9])
    ended = run.run()
    assert ended.returncode == 1
    assert_sentence(ended.stdout, "layers: 9 does not exist in this model: it has 6 layers")
    assert not (run.results / "embed").exists()


def test_damaged_input_files_are_accounted_for_and_everything_good_is_embedded(run):
    whole = gzip.compress("".join(f">r{n}\n{GOOD[n:]}\n" for n in range(8)).encode())
    (run.folder / "cut.faa.gz").write_bytes(whole[:-12])
    (run.folder / "not_gz.faa.gz").write_text(f">a\n{GOOD}\n")
    (run.folder / "empty.faa").write_text("")
    (run.folder / "text.faa").write_text(f"Dear colleague,\nhere they are:\n>b\n{GOOD}AA\n")
    names = ("part0.faa", "cut.faa.gz", "not_gz.faa.gz", "empty.faa", "text.faa")
    run.write_samples({name: name for name in names})
    printed = run.succeed()
    reasons = run.summary()["reasons"]
    assert reasons == {"empty_file": 1, "text_before_header": 1, "unreadable_file": 2}
    assert run.summary()["embedded"] >= 3 + 1
    table = (run.results / "failures.tsv").read_text()
    for name in ("cut.faa.gz", "not_gz.faa.gz", "empty.faa", "text.faa"):
        assert name in table
    assert "fetch or compress the file again" in printed


def test_an_offline_machine_is_told_where_the_checkpoint_was_looked_for(small_run, tmp_path):
    run = small_run(1, model="esm2_t33_650M_UR50D", download=False, model_folder="models")
    ended = run.run(environment={"TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf")})
    assert ended.returncode == 1
    for place in ("models/esm2_t33_650M_UR50D.pt", "torch/hub/checkpoints", "hf/hub/models--facebook--esm2_t33_650M"):
        assert place in ended.stdout
    assert "model_folder" in ended.stdout


def test_a_results_folder_that_cannot_be_written_is_named_before_any_job(run):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run.results], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        ended = run.run()
    finally:
        subprocess.run(["umount", "-l", run.results], check=True)
    assert ended.returncode != 0
    assert re.search(r"Read-only file system: '?\S*results", ended.stdout)
    run.succeed("--until", "plan")
