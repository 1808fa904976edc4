"""Groups the proteins of a run by their embeddings (k-means), and lays them out on a map, by UMAP if that is installed.

Prints a table with id, cluster, x and y. The embeddings are normalised and reduced to their first 50
principal components; without UMAP the map is the first two of them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workflow/scripts"))

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

import esmflow


def grouped(components: np.ndarray, number: int) -> np.ndarray:
    """The cluster of each row, `[N]`."""
    return KMeans(number, random_state=0, n_init=3).fit_predict(components)


def separation(components: np.ndarray, clusters: np.ndarray) -> float:
    """How well clusters are apart: the mean silhouette, of at most 5,000 rows."""
    return silhouette_score(components, clusters, sample_size=min(5000, len(components)), random_state=0)


def laid_out(components: np.ndarray) -> np.ndarray:
    """Places on a map, `[N, 2]`, of principal components `[N, C]`."""
    try:
        import umap
    except ImportError:
        print("no UMAP (pip install umap-learn): the map is the first two principal components", file=sys.stderr)
        return components[:, :2]
    return umap.UMAP(random_state=0).fit_transform(components)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the folder of a finished run")
    parser.add_argument(
        "--clusters", type=int, help="how many (default: of 2 to 15 the number that separates them best)"
    )
    arguments = parser.parse_args()
    e = esmflow.open(arguments.results)
    vectors = normalize(e.matrix())
    components = PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors)
    numbers = [arguments.clusters] if arguments.clusters else range(2, min(16, len(components)))
    clusters = max((grouped(components, number) for number in numbers), key=lambda each: separation(components, each))
    print("id", "cluster", "x", "y", sep="\t")
    for identifier, cluster, (x, y) in zip(e.ids, clusters, laid_out(components)):
        print(identifier, cluster, f"{x:.4f}", f"{y:.4f}", sep="\t")
    found = f"{len(set(clusters))} clusters of {len(e)} proteins"
    print(f"{found}, silhouette {separation(components, clusters):.3f} (1: far apart, 0: touching)", file=sys.stderr)


if __name__ == "__main__":
    main()
