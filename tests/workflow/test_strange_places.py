"""A run whose every path has spaces and other alphabets in it, from a checkout and a store that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import h5py
import pyarrow.parquet as pq
import pytest
from workflow_run import PROJECT, Hold, WorkflowRun, shadow_modules, wait_until

FORMATS = ["h5", "skbio", "pt", "esm"]


@contextmanager
def read_only(folder: Path):
    """During the block nobody, root neither, can write to a folder."""
    mounted = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class Elsewhere(WorkflowRun):
    """A run that is started in one folder and works in another, with `--directory`."""

    def __init__(self, folder: Path, checkout: Path, started_in: Path, model: Path, **config) -> None:
        super().__init__(folder, model, **config)
        self.checkout, self.started_in = checkout, started_in

    def command(self, *arguments: str, **limits: int) -> list[str]:
        # Snakemake itself wants an interpreter without spaces in its path.
        python, *words = super().command(**limits)
        moved = [word.replace(str(PROJECT), str(self.checkout)) for word in words]
        return ["env", f"--chdir={self.started_in}", python, *moved, "--directory", str(self.folder), *arguments]


@pytest.fixture
def run(tmp_path, real_model_folder):
    checkout, started_in = tmp_path / "只读 (checkout)", tmp_path / "別の folder"
    started_in.mkdir()
    shadow_modules(started_in)
    model = tmp_path / "モデル 8M"
    model.symlink_to(real_model_folder)
    places = {"store": "共有 store", "slot_lock_folder": str(tmp_path / "スロット & slots")}
    for name in ("workflow", "profiles"):
        shutil.copytree(PROJECT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "environment.yml", checkout)
    with read_only(checkout):
        run = Elsewhere(tmp_path / "작업 folder's", checkout, started_in, model, groups=1, formats=FORMATS, **places)
        run.fasta = run.folder / "入力 files" / "蛋白 a.b.faa"
        run.fasta.parent.mkdir()
        shadow_modules(run.folder)
        run.fasta.write_text(">蛋白/1 first one\nMKVLAAGIVGLLLAQW\n>p2\nMKVLAAGIVGLLW\n")
        run.write_samples({"試料 1": "入力 files/蛋白 a.b.faa"})
        yield run


def test_every_path_may_have_spaces_and_any_alphabet_and_neither_checkout_nor_store_need_be_writable(run):
    # The input is edited after planning: as large as before, and with an older time.
    hold = Hold(run.folder, segments=0)
    process = run.start(environment=hold.environment)
    wait_until(lambda: process.poll() is not None or hold.held(), what="a worker with a shard in hand")
    stamp = run.fasta.stat().st_mtime_ns - 10**12
    run.fasta.write_text(run.fasta.read_text().replace("GLLLAQW", "GLLLAQY"))
    os.utime(run.fasta, ns=(stamp, stamp))
    hold.release()
    assert process.wait(240) == 1
    printed = " ".join((run.folder / "snakemake.out").read_text().split())
    assert "蛋白 a.b.faa, record 1 (蛋白/1): its sequence is not the one that was planned" in printed
    assert "the same command again plans it anew" in printed
    assert not (run.results / "embeddings").exists()

    run.configure(verify={"sample": 2}, report=True)
    run.succeed()
    assert run.summary()["embedded"] == 2
    assert run.summary()["computed_sequences"] == 1
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.skbio.h5") as file:
        assert file["id"][:].tobytes().decode() == "MKVLAAGIVGLLLAQYMKVLAAGIVGLLW"
    manifest = pq.read_table(run.results / "manifest.parquet").to_pylist()
    assert [(row["sample"], row["file"], row["id"]) for row in manifest] == [
        ("試料 1", "入力 files/蛋白 a.b.faa", "蛋白/1"),
        ("試料 1", "入力 files/蛋白 a.b.faa", "p2"),
    ]
    assert '"passed": true' in (run.results / "certificate.json").read_text()
    assert "試料 1" in (run.results / "report.html").read_text()
    assert (run.results / "embeddings" / "mean_layer6" / "pt" / "蛋白 a.b_ESM.pt").exists()
    assert all(path.suffix == ".py" for path in run.started_in.iterdir())

    store = run.folder / "共有 store"
    with read_only(store):
        run.configure(formats=["npy"], verify={"sample": 0}, report=False)
        run.succeed()
        assert (run.results / "embeddings" / "mean_layer6" / "embeddings.npy").exists()
        # The run that was asked for none has none, of an earlier run neither.
        assert not (run.results / "certificate.json").exists()
        assert not (run.results / "report.html").exists()
        printed = run.succeed()
        assert "Nothing to be done" in printed, printed
