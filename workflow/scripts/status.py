"""Shows what every group of a run is doing: waiting, loading, residues done and left, rate, slot, failures, deaths."""

import argparse
import sys

from esmflow.embedding.status import StatusError, show_status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", default="results", help="the results folder of a run (default: results)")
    parser.add_argument("--watch", action="store_true", help="show it anew every few seconds until the run is over")
    parser.add_argument("--seconds", type=float, default=5.0, help="how often, with --watch (default: 5)")
    arguments = parser.parse_args()
    try:
        show_status(arguments.results, arguments.seconds if arguments.watch else None)
    except StatusError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
