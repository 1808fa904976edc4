"""`snakemake --profile profiles/slurm-whole-node`: one job with all GPUs of a node, one worker on each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from made_up import proteins, write_fasta
from workflow_run import PROJECT, demo_folder, groups

pytestmark = pytest.mark.timeout(600)


def test_a_whole_node_job_works_on_every_gpu_that_slurm_gave_it(slurm, real_model_folder, tmp_path):
    folder = demo_folder(tmp_path)
    write_fasta(folder / "some.faa", ((f"p{n}", protein) for n, protein in enumerate(proteins(160, 40, 80))))
    configuration = {"samples": "*.faa", "model": str(real_model_folder), "groups": 1, "threads": 1, "device": "cpu"}
    configuration |= {"shard_residues": 1000, "slot_lock_folder": str(folder / "slots")}
    (folder / "config").unlink()
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(configuration))
    site = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm-whole-node", *site],
        cwd=folder, env={**os.environ, **slurm.environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (group,) = groups(folder / "results")
    profile = yaml.safe_load((PROJECT / "profiles" / "slurm-whole-node" / "config.yaml").read_text())
    assert profile["config"] == ["gpus_per_job=4"]
    # The certificate's job asks for no GPU on a CPU.
    given = [allocation for allocation in slurm.allocations() if allocation.gpus != ("",)][-1]
    assert given.gpus == ("0", "1", "2", "3")
    assert tuple(worker["slot"]["token"] for worker in group["workers"]) == given.gpus
    assert sum(worker["processed"] for worker in group["workers"]) == len(group["shards"]) > 4
