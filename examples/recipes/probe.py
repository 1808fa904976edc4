"""Says how well labels can be told from the embeddings of a run: a logistic regression, balanced accuracy, five splits.

The labels are a TSV file with the columns id and label. Hold out families rather than single proteins where you can: a
third argument names a column of the table with each protein's family, and no family is on both sides of a split.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workflow/scripts"))

import numpy as np
import polars as pl
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import esmflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the folder of a finished run")
    parser.add_argument("labels", help="a TSV file with the columns id and label")
    parser.add_argument(
        "family", nargs="?", default="id", help="the column with each protein's family, if there is one"
    )
    arguments = parser.parse_args()
    e = esmflow.open(arguments.results)
    table = pl.read_csv(arguments.labels, separator="\t", infer_schema=False)
    known = table.filter(pl.col("id").is_in(e.ids))
    vectors = np.stack([e[identifier] for identifier in known["id"]])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    groups = known[arguments.family].to_numpy()
    scores = cross_val_score(
        probe, vectors, known["label"].to_numpy(), cv=splits, groups=groups, scoring="balanced_accuracy"
    )
    print(f"balanced accuracy {scores.mean():.3f} ± {scores.std():.3f}, {len(known)} of {len(table)} proteins")


if __name__ == "__main__":
    main()
