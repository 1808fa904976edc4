"""Tells enzymes from other proteins, by their composition and by their embeddings, on the same splits.

A logistic regression on standardised features, its regularisation chosen within the training part. No two proteins are
related (see README.md), so that no test protein of a split at random has a relative in its training part.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
from Bio.SeqIO.FastaIO import SimpleFastaParser
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
TEST_PART = 0.3
BASELINE = "composition and length"


def read_labels(path: str) -> dict[str, str]:
    """The label of each protein, by id."""
    with open(path, newline="") as table:
        return {row["id"]: row["label"] for row in csv.DictReader(table, delimiter="\t")}


def read_embeddings(path: Path, ids: Iterable[str]) -> np.ndarray:
    """The vectors of the proteins named, `[N, D]`."""
    with h5py.File(path) as file:
        row = {name: number for number, name in enumerate(file["ids"].asstr()[:])}
        return file["embeddings"][:][[row[name] for name in ids]]


def composition(sequence: str) -> list[float]:
    """The fraction of each of the 20 residues."""
    return [sequence.count(residue) / len(sequence) for residue in RESIDUES]


def read_features(embeddings: str, proteins: str, ids: list[str]) -> dict[str, np.ndarray]:
    """What a protein can be described by, each `[N, features]`: the baselines, then each embedding."""
    with open(proteins) as fasta:
        sequences = {title.split()[0]: sequence for title, sequence in SimpleFastaParser(fasta)}
    fractions = np.array([composition(sequences[name]) for name in ids])
    lengths = np.log([[len(sequences[name])] for name in ids])
    found = {"length": lengths, "composition": fractions, BASELINE: np.hstack([fractions, lengths])}
    for path in sorted(Path(embeddings).glob("mean_layer*/embeddings.h5")):
        found[path.parent.name] = read_embeddings(path, ids)
    return found


def score(features: np.ndarray, labels: np.ndarray, splits: int) -> Iterator[float]:
    """The balanced accuracy on the test part of each split. The splits are the same for features of any kind."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    grid = {"logisticregression__C": [0.001, 0.01, 0.1, 1.0]}
    for train, test in StratifiedShuffleSplit(splits, test_size=TEST_PART, random_state=0).split(features, labels):
        search = GridSearchCV(classifier, grid, scoring="balanced_accuracy", cv=3).fit(features[train], labels[train])
        yield balanced_accuracy_score(labels[test], search.predict(features[test]))


def corrected_error(differences: np.ndarray) -> float:
    """The standard error of a mean over splits that share proteins (Nadeau and Bengio, 2003)."""
    return float(np.sqrt(differences.var(ddof=1) * (1 / len(differences) + TEST_PART / (1 - TEST_PART))))


def summary_lines(scores: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """The figures for a person: each mean with its spread over the splits, and what embeddings add."""
    counts = ", ".join(f"{(labels == label).sum()} {label}" for label in np.unique(labels))
    splits = len(scores[BASELINE])
    lines = [
        f"{len(labels)} proteins, no two related: {counts}",
        f"balanced accuracy over {splits} splits, ± their spread",
    ]
    lines += [f"  {name:<24}{found.mean():.3f} ± {found.std(ddof=1):.3f}" for name, found in scores.items()]
    for name, found in scores.items():
        if name.startswith("mean_layer"):
            gain = found - scores[BASELINE]
            lines.append(
                f"{name} over {BASELINE}: {gain.mean():+.3f}, standard error {corrected_error(gain):.3f}, "
                f"better in {(gain > 0).sum()} of {splits} splits"
            )
    return lines


def main(snakemake) -> None:
    label_of = read_labels(snakemake.input.labels)
    ids, labels = list(label_of), np.array(list(label_of.values()))
    features = read_features(snakemake.input.embeddings, snakemake.input.proteins, ids)
    scores = {name: np.array(list(score(x, labels, snakemake.params.splits))) for name, x in features.items()}
    with open(snakemake.output.scores, "w", newline="") as table:
        writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        writer.writerow(("features", "split", "balanced_accuracy"))
        writer.writerows((name, split, value) for name, found in scores.items() for split, value in enumerate(found))
    Path(snakemake.output.summary).write_text("\n".join(summary_lines(scores, labels)) + "\n")


if __name__ == "__main__":
    main(snakemake)
