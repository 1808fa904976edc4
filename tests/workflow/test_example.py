"""The example with labelled proteins: embeddings tell more than the composition does."""

from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from clone import PROJECT, make_clone, make_recipe

EXAMPLE = PROJECT / "examples" / "enzymes"


@pytest.fixture(scope="module")
def example(tmp_path_factory, real_model_folder) -> Path:
    """The results of what `make example` runs, without a report and a certificate, which have tests of their own."""
    clone = make_clone(tmp_path_factory.mktemp("example") / "clone", copied=("examples",))
    config = clone / "examples" / "enzymes" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["esmflow"] |= {"report": False, "verify": {"sample": 0}}
    config.write_text(yaml.safe_dump(content))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        make_recipe(clone, "example"), shell=True, cwd=clone, env=one_thread, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return clone / "results" / "example"


@pytest.fixture(scope="module")
def scores(example) -> dict[str, np.ndarray]:
    """Balanced accuracy of each split, by features."""
    found = defaultdict(list)
    with open(example / "scores.tsv", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            found[row["features"]].append(float(row["balanced_accuracy"]))
    return {features: np.array(values) for features, values in found.items()}


@pytest.mark.parametrize("baseline", ["length", "composition", "composition and length"])
def test_embeddings_tell_enzymes_better_than_the_composition_does(scores, baseline):
    probe = runpy.run_path(str(EXAMPLE / "probe.py"))
    gain = scores["mean_layer6"] - scores[baseline]
    assert len(gain) == 20
    assert gain.mean() > 2 * probe["corrected_error"](gain)
    assert gain.mean() > 0.05


def test_token_embeddings_know_no_more_than_the_composition(scores):
    assert scores["mean_layer0"].mean() < scores["composition"].mean() + 0.02


def test_the_figures_of_the_readme_are_those_of_the_run(example, scores):
    """Within what another processor's rounding may change."""
    text = (EXAMPLE / "README.md").read_text()
    quoted = dict(re.findall(r"^\| (?:amino-acid )?`?([\w ]+?)`?(?:, the last)? \| (0\.\d+) ±", text, re.MULTILINE))
    assert quoted.keys() == scores.keys()
    for features, figure in quoted.items():
        assert scores[features].mean() == pytest.approx(float(figure), abs=0.02), features
    assert "368 proteins, no two related: 143 enzyme, 225 other" in (example / "probe.txt").read_text()


def test_every_protein_has_one_label_and_no_sequence_comes_twice():
    entries = (EXAMPLE / "proteins.fasta").read_text().lstrip(">").split("\n>")
    sequences = {entry.split()[0]: entry.split("\n", 1)[1].replace("\n", "") for entry in entries}
    with open(EXAMPLE / "labels.tsv", newline="") as table:
        labels = {row["id"]: row["label"] for row in csv.DictReader(table, delimiter="\t")}
    assert list(labels) == list(sequences)
    assert len(set(sequences.values())) == len(sequences) == 368


def test_labels_are_those_that_the_names_give():
    label = runpy.run_path(str(EXAMPLE / "select_proteins.py"))["label"]
    descriptions = {
        line[1:].split(" ", 1)[0]: line.split(" ", 1)[1]
        for line in (EXAMPLE / "proteins.fasta").read_text().splitlines()
        if line.startswith(">")
    }
    with open(EXAMPLE / "labels.tsv", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            assert label(descriptions[row["id"]]) == row["label"]
