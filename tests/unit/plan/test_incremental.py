"""After a finished run and an edit of its input, only sequences never seen are computed: what every `run.json` says."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from made_up import proteins, random_model, stored_tensors, write_fair_esm, write_fasta
from stage_settings import embed_settings, plan_settings

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.models import ModelDimensions
from esmflow.embedding.job import embed_group
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import deal_inputs
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Store

GROUPS = 2
SEQUENCES = proteins(40, 10, 30, seed=3)
FILES = {"a.fasta": SEQUENCES[:20], "b.fasta": SEQUENCES[20:30], "c.fasta": SEQUENCES[30:]}
NEW = proteins(8, 10, 30, seed=4)


class Project:
    """A folder with its FASTA files, planned and embedded with the library's own steps."""

    def __init__(self, folder, checkpoint, fingerprint):
        self.folder, self.checkpoint, self.fingerprint = folder, checkpoint, fingerprint
        self.store = Store(folder / "store", fingerprint)

    def write(self, files):
        shutil.rmtree(self.folder / "input", ignore_errors=True)
        self.inputs = []
        for name, sequences in files.items():
            path = write_fasta(self.folder / "input" / name, [(f"p{n}", s) for n, s in enumerate(sequences)])
            self.inputs.append(InputFile(name, str(path)))

    def run(self, files):
        """Plans and embeds. Returns the plan and each group's `run.json`."""
        self.write(files)
        shards = [self.folder / f"shards-{group}" for group in range(GROUPS)]
        settings = plan_settings(
            self.folder, self.inputs, shards, CostModel(ModelDimensions(2, 32, 2, True, True)), shard_residues=300
        )
        planned = deal_inputs(settings, StoredSequences(self.store))
        runs = []
        for group, folder in enumerate(shards):
            path, failures = self.folder / f"run-{group}.json", self.folder / f"failures-{group}.tsv"
            embed_group(
                embed_settings(
                    self.folder,
                    self.checkpoint,
                    self.fingerprint,
                    group=str(group),
                    shards=str(folder),
                    run=str(path),
                    failures=str(failures),
                )
            )
            runs.append(json.loads(path.read_text()))
        return planned, runs

    def digests(self):
        """Every row of every segment."""
        return [row.tobytes() for name in self.store.names() for row in np.array(self.store.read(name).digests)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose run is finished, as a folder to start from."""
    folder = tmp_path_factory.mktemp("finished")
    checkpoint = folder / "model.safetensors"
    source = write_fair_esm(folder / "model.pt", stored_tensors(random_model()))
    info = convert_checkpoint(source, checkpoint, "made up")
    method = Fingerprint(info.digest, (2,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")
    project = Project(folder, checkpoint, method)
    planned, runs = project.run(FILES)
    assert (planned.records, planned.stored) == (40, 0)
    assert sum(run["sequences"] for run in runs) == 40
    return project


EDITS = {
    "a file added": ({**FILES, "d.fasta": NEW}, len(NEW), 2),
    "one record edited": ({**FILES, "b.fasta": [*FILES["b.fasta"][:-1], NEW[0]]}, 1, 1),
    "a file renamed": ({"a.fasta": FILES["a.fasta"], "z.fasta": FILES["b.fasta"], "c.fasta": FILES["c.fasta"]}, 0, 0),
    "files in another order": (dict(reversed(FILES.items())), 0, 0),
    "records in another order": ({name: sequences[::-1] for name, sequences in FILES.items()}, 0, 0),
    "a file removed": ({name: FILES[name] for name in ("a.fasta", "c.fasta")}, 0, 0),
    "records moved to other files": ({"x.fasta": SEQUENCES[::2], "y.fasta": SEQUENCES[1::2]}, 0, 0),
    "nothing but new times": (FILES, 0, 0),
}


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit_only_sequences_never_seen_are_computed(finished, tmp_path, edit):
    files, new, busy_groups = EDITS[edit]
    shutil.copytree(finished.folder, tmp_path / "copy")
    project = Project(tmp_path / "copy", finished.checkpoint, finished.fingerprint)
    before = {path: path.stat().st_mtime_ns for path in project.store.folder.glob("*.safetensors")}
    planned, runs = project.run(files)
    assert planned.records == sum(map(len, files.values()))
    assert planned.stored == planned.records - new
    assert sum(run["sequences"] for run in runs) == new
    # A group with nothing new takes no slot and loads no model; what is new is spread over all groups.
    assert [bool(run["workers"]) for run in runs].count(True) == busy_groups
    if busy_groups == GROUPS:
        assert max(run["sequences"] for run in runs) - min(run["sequences"] for run in runs) <= 2
    assert all((run["model_load_seconds"] is None) == (run["sequences"] == 0) for run in runs)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(Counter(project.digests()).values()) == {1}
    assert len(project.digests()) == 40 + new
