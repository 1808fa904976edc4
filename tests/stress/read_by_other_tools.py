"""Lets the tools that formats are made for read them: scikit-bio, ProtSpace and Scanpy, each as its users do.

They are no dependencies of the project: an environment of their own is made once (two minutes, from PyPI) and kept.
Vectors and ids, those with slashes, quotes and repetitions too, are compared with what was written.

    python tests/stress/read_by_other_tools.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

PROJECT = Path(__file__).resolve().parents[2]
sys.path += [str(PROJECT / "workflow" / "scripts"), str(PROJECT / "tests" / "support")]

from collected_run import CollectedRun, MadeUpRecord, random_segment  # noqa: E402
from made_up import proteins  # noqa: E402

from esmflow.arrays import Outputs  # noqa: E402

ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esmflow" / "other-tools"
PACKAGES = ("scikit-bio>=0.7", "protspace>=4", "scanpy>=1.11")
IDS = ["a", "b", "a", "../../etc/passwd", "sp|P1|X", 'tab"quote', "naïve", "i" * 300, "", *(f"p{n}" for n in range(31))]

WITH_SCIKIT_BIO = """
import json, sys, skbio
from skbio.embedding import ProteinEmbedding, ProteinVector
found = []
for folder, constructor in (("mean_layer6", ProteinVector), ("per_residue_layer6", ProteinEmbedding)):
    path = f"{sys.argv[1]}/{folder}/embeddings.skbio.h5"
    proteins = skbio.read(path, format="embed", constructor=constructor)
    found.append([(str(protein), protein.embedding.tolist()) for protein in proteins])
print(json.dumps(found))
"""
WITH_SCANPY = """
import json, sys, scanpy
data = scanpy.read_h5ad(f"{sys.argv[1]}/mean_layer6/embeddings.h5ad")
scanpy.pp.neighbors(data, n_neighbors=5, use_rep="X")
print(json.dumps([list(zip(data.obs["id"], data.X.tolist())), data.obsp["distances"].nnz]))
"""


def make_environment(folder: Path) -> Path:
    """Its Python. Made where it is missing."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def check(python: Path, folder: Path) -> None:
    """Raises AssertionError, or CalledProcessError with what the tool said."""
    outputs, sequences = (
        Outputs((6,), ("mean", "per_residue")),
        proteins(len(IDS), 5, 40, letters="LAGVSERTIDPKQNFYMHWCXBUZO"),
    )
    records = [MadeUpRecord("in/a.fasta", i, s) for i, s in zip(IDS, sequences)]
    segment = random_segment(sequences, outputs, width=64)
    embeddings = CollectedRun(folder, records, [segment], outputs).collect(["h5ad", "h5_per_protein", "skbio"])
    vectors, rows = segment.arrays["mean_layer6"], segment.arrays["per_residue_layer6"]

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{command[:3]}\\n{result.stdout}{result.stderr}"
        return result.stdout

    pooled, per_residue = json.loads(run(python, "-c", WITH_SCIKIT_BIO, embeddings))
    ends = np.cumsum([len(sequence) for sequence in sequences])[:-1]
    assert [sequence for sequence, _ in pooled] == [sequence for sequence, _ in per_residue] == sequences
    assert np.array_equal(np.array([vector for _, vector in pooled], np.float32).reshape(vectors.shape), vectors)
    for (_, found), wanted in zip(per_residue, np.split(rows, ends), strict=True):
        assert np.array_equal(np.array(found, np.float32), wanted)
    print(f"scikit-bio: {len(pooled)} vectors and their residues, with their sequences")

    found, edges = json.loads(run(python, "-c", WITH_SCANPY, embeddings))
    assert [identifier for identifier, _ in found] == IDS
    assert np.array_equal(np.array([vector for _, vector in found], np.float32), vectors)
    print(f"Scanpy: {len(found)} observations, {edges} neighbours")

    file = embeddings / "mean_layer6" / "per_protein.h5"
    run(python.with_name("protspace"), "project", "-i", file, "-m", "pca2", "-o", folder / "protspace")
    places = pq.read_table(folder / "protspace" / "projections_data.parquet")
    assert len(places) == len(IDS)
    print(f"ProtSpace: {len(places)} proteins on a map of two dimensions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--environment", type=Path, default=ENVIRONMENT, help="where the tools are, or will be installed"
    )
    python = make_environment(parser.parse_args().environment)
    with tempfile.TemporaryDirectory() as folder:
        check(python, Path(folder))


if __name__ == "__main__":
    main()
