"""Used as a module of another workflow, with results and logs placed elsewhere."""

from __future__ import annotations

import subprocess
import sys

import h5py
import yaml
from workflow_run import SNAKEFILE

OUTER = """
configfile: "outer.yaml"

module esmflow:
    snakefile: "{snakefile}"
    config: config["esmflow"]
    pathvars:
        results="embedded/results",
        logs="embedded/logs",

use rule * from esmflow as esmflow_*

rule all:
    default_target: True
    input: rules.esmflow_all.input
"""


def test_another_workflow_can_use_this_one_and_place_its_results(tmp_path, real_model_folder):
    (tmp_path / "Snakefile").write_text(OUTER.format(snakefile=SNAKEFILE))
    inner = {"samples": "*.faa", "model": str(real_model_folder), "groups": 1, "threads": 1, "device": "cpu"}
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"esmflow": inner}))
    (tmp_path / "two.faa").write_text(">first\nMKVLAAG\n>second\nMKVLAAGG\n")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--resources", "gpu=1"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with h5py.File(tmp_path / "embedded/results/embeddings/mean_layer6/embeddings.h5") as file:
        assert list(file["ids"].asstr()[:]) == ["first", "second"]
    assert (tmp_path / "embedded/logs/plan.log").exists()
    assert not (tmp_path / "results").exists()
