"""Prints the nearest proteins of a run by the cosine of their embeddings: of those named, else of the first three."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workflow/scripts"))

import esmflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", help="the folder of a finished run")
    parser.add_argument("id", nargs="*", help="ids of proteins in it")
    parser.add_argument("-k", type=int, default=5, help="how many neighbours (default: 5)")
    arguments = parser.parse_args()
    e = esmflow.open(arguments.results)
    print("id", "neighbour", "cosine", sep="\t")
    for identifier in arguments.id or e.ids[:3]:
        for neighbour, cosine, _ in e.nearest(identifier, arguments.k).iter_rows():
            print(identifier, neighbour, f"{cosine:.4f}", sep="\t")


if __name__ == "__main__":
    main()
