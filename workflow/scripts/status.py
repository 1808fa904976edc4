"""Shows what every group of a run is doing: waiting, loading, residues done and left, rate, slot, failures, deaths."""

import argparse
import sys
import time

from esmflow.embedding.status import StatusError, is_over, read_status, status_lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", default="results", help="the results folder of a run (default: results)")
    parser.add_argument("--watch", action="store_true", help="show it anew every few seconds until the run is over")
    parser.add_argument("--seconds", type=float, default=5.0, help="how often, with --watch (default: 5)")
    arguments = parser.parse_args()
    while True:
        try:
            groups = read_status(arguments.results)
        except StatusError as error:
            print(error, file=sys.stderr)
            return 1
        if arguments.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print("\n".join(status_lines(groups)), flush=True)
        if not arguments.watch or is_over(groups):
            return 0
        time.sleep(arguments.seconds)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
