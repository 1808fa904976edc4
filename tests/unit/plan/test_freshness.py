"""A plan is made again when what it counts on changed without Snakemake seeing it, and only then."""

import json
import os

import pytest

from esmflow.embedding.run_record import RunRecord, read_run_records
from esmflow.plan.freshness import PlanNote, input_stamps, note_path, plan_number

HOUR = 3600 * 10**9


class Planned:
    """What a finished run leaves: a store of three segments, a plan that counts on one, a group that made two."""

    def __init__(self, folder):
        self.plan, self.store = folder / "plan.json", folder / "store"
        self.path = note_path(self.plan)
        self.inputs = [str(folder / name) for name in ("a.fasta", "b.fasta")]
        for path in self.inputs:
            with open(path, "w") as handle:
                handle.write(">p\nMKV\n")
            os.utime(path, ns=(os.stat(path).st_mtime_ns - HOUR,) * 2)
        (self.store / "f").mkdir(parents=True)
        for name in ("stored", "written", "reused"):
            self.segment(name).touch()
        self.runs = [folder / "run-0.json", folder / "run-1.json"]
        self.write_run("f")
        self.note(0)

    def write_run(self, fingerprint):
        run = RunRecord(group="0", fingerprint=fingerprint, segments_written=("written",), segments_reused=("reused",))
        run.write(self.runs[0])

    def note(self, number):
        PlanNote(number, "f", ("stored",), input_stamps(self.inputs)).write(self.path)

    def segment(self, name):
        return self.store / "f" / f"{name}.safetensors"

    def number(self):
        return plan_number(self.plan, self.inputs, read_run_records(self.runs), str(self.store))


@pytest.fixture
def planned(tmp_path):
    return Planned(tmp_path)


def test_before_the_first_plan_and_while_all_is_as_it_was_the_number_stays(planned):
    assert planned.number() == 0
    planned.note(3)
    assert planned.number() == 3
    planned.path.unlink()
    assert planned.number() == 0


@pytest.mark.parametrize("name", ["stored", "written", "reused"])
def test_a_segment_that_is_gone_makes_a_new_plan_and_the_new_plan_is_good(planned, name):
    planned.segment(name).unlink()
    assert planned.number() == 1
    planned.segment(name).touch()
    planned.note(1)
    assert planned.number() == 1


def test_a_store_that_is_gone_makes_a_new_plan(planned):
    for path in (planned.store / "f").iterdir():
        path.unlink()
    (planned.store / "f").rmdir()
    planned.store.rmdir()
    assert planned.number() == 1


def test_a_group_that_ran_under_another_fingerprint_does_not_count(planned):
    planned.write_run("g")
    planned.segment("written").unlink()
    assert planned.number() == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"number": "many"}'])
def test_a_note_that_cannot_be_read_is_as_none(planned, text):
    planned.path.write_text(text)
    assert planned.number() == 0


def test_the_note_is_read_as_it_always_was(planned):
    assert list(json.loads(planned.path.read_text())) == ["number", "fingerprint", "held_segments", "inputs"]


def test_an_input_replaced_by_an_older_one_makes_a_new_plan(planned):
    before = os.stat(planned.inputs[1]).st_mtime_ns
    os.utime(planned.inputs[1], ns=(before - 24 * HOUR,) * 2)
    assert planned.number() == 1


def test_an_input_of_another_size_makes_a_new_plan_whatever_its_time(planned):
    before = os.stat(planned.inputs[0]).st_mtime_ns
    with open(planned.inputs[0], "a") as handle:
        handle.write(">q\nLAG\n")
    os.utime(planned.inputs[0], ns=(before,) * 2)
    assert planned.number() == 1


def test_a_touch_is_left_to_snakemake(planned):
    os.utime(planned.inputs[0], ns=(os.stat(planned.path).st_mtime_ns + HOUR,) * 2)
    assert planned.number() == 0
