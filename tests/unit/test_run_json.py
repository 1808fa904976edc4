"""The JSON of a run is a promise: what a run wrote is read, and written again as it was, key by key."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from esmflow.collect.summary import Summary
from esmflow.embedding.run_record import LeasedSlot, RunRecord, ShardResult, Speed, WorkerRecord
from esmflow.files import JsonFile
from esmflow.plan.run_plan import Plan
from esmflow.verify.certificate import Certificate, Remedy
from esmflow.workers.worker import WorkerExit

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo_run"
KINDS = {"plan.json": Plan, "run.json": RunRecord, "summary.json": Summary, "certificate.json": Certificate}


@pytest.fixture(params=KINDS)
def written(request):
    """A file that a run of the demo wrote, and what it is read as."""
    return DEMO / request.param, KINDS[request.param]


def without_new_keys(now, before):
    """What is written now, less the keys that were not written before."""
    if isinstance(before, dict):
        return {key: without_new_keys(value, before[key]) for key, value in now.items() if key in before}
    if isinstance(before, list):
        return [without_new_keys(*pair) for pair in zip(now, before, strict=True)]
    return now


def test_what_a_run_wrote_is_written_again_as_it_was_with_new_keys_at_most(written, tmp_path):
    path, kind = written
    kind.read(path).write(tmp_path / path.name)
    before, now = path.read_text(), json.loads((tmp_path / path.name).read_text())
    assert json.dumps(without_new_keys(now, json.loads(before)), indent=2) + "\n" == before


def test_the_fields_have_what_the_file_says():
    plan, run = Plan.read(DEMO / "plan.json"), RunRecord.read(DEMO / "run.json")
    certificate, summary = Certificate.read(DEMO / "certificate.json"), Summary.read(DEMO / "summary.json")
    assert (plan.groups[1].residues, plan.valid.pairs, plan.disk_forecast.formats["h5"]) == (
        16172, 24890506, 309176,
    )  # fmt: skip
    assert (run.workers[0].slot.token, run.shards[1].sequences, run.precisions) == ("CPU-1", 28, ("fp32",))
    assert certificate.outputs["mean_layer6"].sequences == 32
    assert certificate.limits["fp32"].min_cosine == 0.99999
    assert certificate.sequences[0].outputs["mean_layer6"].nearer_to is None
    assert summary.reasons == {"empty_sequence": 1, "invalid_residue": 2, "nucleotide_sequence": 1}


def test_keys_of_a_later_version_and_keys_that_an_earlier_one_lacked_do_not_keep_a_file_from_being_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"group": "3", "color": "red", "workers": [{"slot": {"token": "0"}, "leased": 1.0,
                                                                          "released": 2.0, "mood": 5}]}))  # fmt: skip
    run = RunRecord.read(path)
    assert (run.group, run.shards, run.workers) == ("3", (), (WorkerRecord(LeasedSlot("0"), 1.0, 2.0),))


@pytest.mark.parametrize("content", [{}, [], {"group": "0", "shards": 5}, {"group": "0", "workers": [{}]}, None])
def test_what_is_no_run_json_is_an_error_that_readers_expect(tmp_path, content):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no |NoneType|iterable"):
        RunRecord.read(tmp_path / "run.json")


def test_a_worker_that_died_before_it_loaded_the_model_is_written_without_the_seconds_it_took(tmp_path):
    death = WorkerExit(5.0, 17, -9, "SIGKILL", "the worker was ended by SIGKILL", ("shard-00001.fasta",), ("last",))
    worker = WorkerRecord(LeasedSlot("GPU-1", "GPU-1", "H100", "cuda", "GPU-1"), 1.0, 6.0, exits=(death,))
    run = RunRecord(group="0", workers=(worker, replace(worker, model_load_seconds=3.0)))
    run.write(tmp_path / "run.json")
    first, second = json.loads((tmp_path / "run.json").read_text())["workers"]
    assert "model_load_seconds" not in first
    assert second["model_load_seconds"] == 3.0
    assert first["exits"] == [
        {
            "time": 5.0, "process": 17, "exit_code": -9, "signal": "SIGKILL",
            "how": "the worker was ended by SIGKILL", "in_hand": ["shard-00001.fasta"], "log_lines": ["last"],
        }
    ]  # fmt: skip
    assert RunRecord.read(tmp_path / "run.json") == run


def test_words_are_read_as_what_they_mean(tmp_path):
    Certificate(passed=False, remedy=Remedy.COLLECT).write(tmp_path / "certificate.json")
    assert Certificate.read(tmp_path / "certificate.json").remedy is Remedy.COLLECT
    (tmp_path / "certificate.json").write_text('{"passed": false, "remedy": "prayer"}')
    with pytest.raises(ValueError, match="prayer"):
        Certificate.read(tmp_path / "certificate.json")


def test_a_field_without_a_default_must_be_there(tmp_path):
    @dataclass(frozen=True)
    class Two(JsonFile):
        first: int
        second: int = 2

    (tmp_path / "two.json").write_text('{"first": 1}')
    assert Two.read(tmp_path / "two.json") == Two(1, 2)
    (tmp_path / "two.json").write_text('{"second": 1}')
    with pytest.raises(ValueError, match=r"Two.*first"):
        Two.read(tmp_path / "two.json")


def test_speed_while_embedding_leaves_out_the_time_in_which_no_shard_was_worked_on():
    def shard(started, ended):
        return ShardResult("s.fasta", "s", 1, 100, 0, 1, "fp32", started, ended)

    # Two workers of one job, then a job on the same slot; a job that found everything done counts for nothing.
    jobs = [([shard(10, 14), shard(12, 15)], 0.0, 16.0), ([shard(25, 30)], 20.0, 31.0), ((), 99.0, 100.0)]
    speed = Speed.of(jobs)
    assert (speed.residues, speed.embedding_seconds, speed.seconds) == (300, 10, 31)
    assert (speed.while_embedding, speed.with_start_up) == (30, pytest.approx(300 / 31))
    assert Speed.of([((), 0.0, 1.0)]).while_embedding is None
