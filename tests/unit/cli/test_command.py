"""The command `esmflow` short of a run: what it refuses, what it writes, and that it starts at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_up import write_fasta

from esmflow.checkpoint.models import OFFICIAL_MODELS, SIZES, official_name
from esmflow.cli import main
from esmflow.cli.project import CommandError, configuration, find_inputs, make_project, sheet_text, write_run
from esmflow.cli.run import Compute, embed_inputs
from esmflow.config.configuration import validated
from esmflow.files import PROJECT
from esmflow.inputs.sheet import read_samples

SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with proteins, whose name has a space."""
    folder = tmp_path / "my data"
    write_fasta(folder / "a.fasta", [("one", "MKVLAA"), ("two", "MK*VL"), ("three", "mkvlaa"), ("four", "")])
    write_fasta(folder / "more" / "b.faa", [("five", "GIVEQ")])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def run(*arguments: str, monkeypatch) -> int:
    """What the command ends with."""
    monkeypatch.setattr(sys, "argv", ["esmflow", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code or 0


def test_help_is_there_at_once():
    code = "import sys; from esmflow.cli.main import main; sys.argv = ['esmflow', '--help']; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    paths = {"PYTHONPATH": str(Path(main.__file__).parents[2]), "PATH": os.environ["PATH"]}
    shown = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(command in shown.stdout for command in ("embed", "status", "report", "init", "check")), shown.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_where_runs_cannot_be_the_command_says_what_they_need(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run("embed", "a.fasta", "-o", "out", monkeypatch=monkeypatch) == 1
    assert "esmflow: runs need Linux, and this is darwin: on Windows use WSL 2" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "missing.fasta", "-o", "out"], "missing.fasta: there is no such file or folder"),
        (["embed", "x*.fasta", "-o", "out"], "x*.fasta matches no file"),
        (["embed", "nothing", "-o", "out"], "the folder nothing holds no FASTA file"),
        (["embed", "a.fasta", "-o", "a.fasta"], "a.fasta is a file; give -o a folder"),
        (["embed", "a.fasta", "-o", "."], "has other things in it; choose a folder of its own"),
        (["embed", "a.fasta", "-o", "out", "-m", "651M"], "did you mean 650M?"),
        (["embed", "a.fasta", "-o", "out", "--set", "modle=3B"], "did you mean model?"),
        (["embed", "a.fasta", "-o", "out", "--set", "verify.smaple=3"], "verify.smaple: there is no such key"),
        (["embed", "a.fasta", "-o", "out", "--set", "precision"], "write --set KEY=VALUE"),
        (["embed", "a.fasta", "-o", "out", "--set", "samples=b.tsv"], "the inputs are arguments"),
        (["embed", "a.fasta", "-o", "out", "--include", "mean,avg"], "did you mean mean?"),
        (["embed", "a.fasta", "-o", "out", "--format", "numpy"], "did you mean npy?"),
        (["embed", "a.fasta", "-o", "out", "--gpus", "9999"], "--gpus 9999: this machine has"),
        (["check", "missing.fasta"], "missing.fasta: there is no such file or folder"),
        (["check", "-"], "-: there is no such file or folder: write what comes from standard input to a file first"),
        (
            ["check", "https://x.org/p.fa"],
            "https://x.org/p.fa: there is no such file or folder: it is an address; download",
        ),
        (["check", "https://x.org/p?format=fasta"], "matches no file: it is an address; download it to a file first"),
        (["check", "pipe"], "pipe is no file but a pipe, socket or device: write it to a file first"),
        (["status", "missing"], "missing: no such folder"),
        (["report", "missing"], "missing: holds no finished run"),
        (["init", "more"], "more is there already and not empty"),
        (["init", "new", "--profile", "lsf"], "there is none of this name, only aws-batch"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(here, monkeypatch, capsys, arguments, message):
    (here / "nothing").mkdir()
    os.mkfifo(here / "pipe")
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith("esmflow: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (here / "out").exists()


def test_check_says_what_would_be_rejected(here, monkeypatch, capsys):
    assert run("check", "a.fasta", "more", monkeypatch=monkeypatch) == 1
    shown = capsys.readouterr().out
    assert "a.fasta\trecord 2 (two)\tinvalid_residue\t'*' at residue 3\n" in shown
    assert "5 records in 2 files: 3 can be embedded, 2 not" in shown
    assert "1 repeat the sequence of another record" in shown
    assert run("check", "more/b.faa", monkeypatch=monkeypatch) == 0
    assert run("check", "a.fasta", "--set", "invalid_residues=replace_with_x", monkeypatch=monkeypatch) == 1
    assert "3 can be embedded, 1 not" in capsys.readouterr().out


def test_inputs_are_files_folders_globs_and_sheets_each_once(here):
    (here / "sheet.tsv").write_text("sample\tfasta\tsite\ngut\tmore/b.faa\tcolon\n")
    files = find_inputs(["sheet.tsv", "~/more", "*.fasta", str(here / "a.fasta")])
    assert [(file.sample, file.path) for file in files] == [("gut", f"{here}/more/b.faa"), ("a", f"{here}/a.fasta")]
    assert files[0].annotations == (("site", "colon"),)
    write_fasta(here / "other" / "a.fasta", [("six", "MKV")])
    sheet = here / "samples.tsv"
    sheet.write_text(sheet_text(find_inputs(["sheet.tsv", "a.fasta", "other"])))
    assert [file.sample for file in read_samples(str(sheet))] == ["gut", "a", "a_2"]


def test_the_configuration_is_what_was_typed_and_no_more(here):
    typed, checked = configuration({}, [])
    assert typed == {"samples": "config/samples.tsv", "model": "esm2_t33_650M_UR50D"}
    assert checked["formats"] == ["h5", "pt"]
    options = {"model": "8M", "include": ["mean,bos", "logits"], "formats": ["h5"]}
    typed, _ = configuration(options, ["verify.sample=0", "layers=[3, -1]", "store=~/store", "failures.policy=error"])
    assert typed == {
        "samples": "config/samples.tsv",
        "model": "esm2_t6_8M_UR50D",
        "include": ["mean", "bos", "logits"],
        "formats": ["h5"],
        "verify": {"sample": 0},
        "layers": [3, -1],
        "store": str(here / "store"),
        "failures": {"policy": "error"},
    }


def test_a_model_by_its_path_is_found_from_the_folder_of_the_run(here):
    (here / "model.pt").touch()
    assert configuration({"model": "model.pt"}, [])[0]["model"] == str(here / "model.pt")
    assert configuration({}, ["model=~/model.pt"])[0]["model"] == str(here / "model.pt")


def test_a_table_of_variants_is_found_from_the_folder_of_the_run(here):
    (here / "variants.tsv").write_text("id\tvariant\n")
    typed, _ = configuration({}, ["variants=variants.tsv"])
    assert typed["variants"] == str(here / "variants.tsv")


@pytest.mark.parametrize(("size", "name"), SIZES.items())
def test_a_size_is_a_name_of_the_model_everywhere(size, name):
    assert name in OFFICIAL_MODELS
    assert official_name(size) == official_name(size.lower()) == name
    assert validated({"model": size}, SCHEMA)["model"] == name


def test_a_folder_that_others_made_is_left_alone(here):
    folder = here / "out"
    config = {"samples": "config/samples.tsv", "model": "8M"}
    write_run(folder, find_inputs(["a.fasta"]), config)
    written = folder / "config" / "config.yaml"
    before = written.stat().st_mtime_ns
    write_run(folder, find_inputs(["a.fasta"]), config)
    assert written.stat().st_mtime_ns == before
    written.write_text("model: 3B\n")
    with pytest.raises(CommandError, match="was not written by esmflow embed, or was edited"):
        write_run(folder, find_inputs(["a.fasta"]), config)


def test_init_makes_a_folder_to_edit(here):
    lines = make_project(here / "new", "slurm")
    assert (here / "new/profiles/slurm/config.yaml").exists()
    assert (here / "new/profiles/default/config.yaml").exists()
    assert validated(yaml.safe_load((here / "new/config/config.yaml").read_text()), SCHEMA)
    assert lines[-1].endswith("--profile profiles/slurm")
    sheet = here / "new/config/samples.tsv"
    sheet.write_text(sheet.read_text() + f"mine\t{here}/a.fasta\n")
    assert [file.sample for file in read_samples(str(sheet))] == ["mine"]


def test_a_profile_says_cores_and_gpus(here, monkeypatch):
    ran = []
    monkeypatch.setattr(
        "subprocess.run", lambda command: ran.append(command) or subprocess.CompletedProcess(command, 0)
    )
    options = {"model": "8M", "include": [], "formats": []}
    embed_inputs(["a.fasta"], "out", options, [], Compute(None, None, "slurm"), dry_run=True)
    assert not {"--cores", "--resources"} & set(ran[-1])
    embed_inputs(["a.fasta"], "out", options, [], Compute(4, 8, "slurm"), dry_run=True)
    assert " ".join(ran[-1]).endswith("--profile slurm --cores 8 --resources gpu=4 --dry-run")
    embed_inputs(["a.fasta"], "out", options, ["cpu_slots=3"], Compute(0, None, None), dry_run=True)
    assert "gpu=3" in ran[-1]
    embed_inputs(["a.fasta"], "out", options, [], Compute(0, 5, None), dry_run=True)
    assert " ".join(ran[-1]).endswith("--cores 5 --resources gpu=5 --dry-run")
    assert yaml.safe_load((here / "out/config/config.yaml").read_text())["device"] == "cpu"
