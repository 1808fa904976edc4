"""Time, memory and disk speed of collecting, from ten thousand to ten million records, beside the disk's own speed.

A store of segments and the table of records are made with random numbers, through the library's own writers. Then each
format is collected in a process of its own, as fp16 vectors. Nothing is flattered by the page cache: the store is
dropped from it before each run, collect flushes what it writes to disk before it renames it, and `dd` beside it writes
as many bytes with `conv=fsync`, once before and once after. `tables` is collect without any format: manifest and
failures only. "In the writer" counts only the time in which the format's writer worked, flush included: what it adds to
finding and reading the vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.collect.formats import FORMATS
from esmflow.embedding.run_record import RunRecord
from esmflow.files import atomic_path, write_json
from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.method import Fingerprint
from esmflow.plan.record_table import RECORD_SCHEMA, ROWS_PER_GROUP
from esmflow.plan.run_plan import Plan
from esmflow.store.segments import Segment, Store

ARRAY = "mean_layer6"
# These make a file or a dataset for each record: minutes for each million.
LARGEST = {"h5_per_protein": 1_000_000, "esm": 100_000}
# Of records that are made up there are no input files to read sequences from.
MEASURED = [name for name, form in FORMATS.items() if not form.with_sequences]
# As planning deals them: residues that are dealt at once, and residues in a shard.
WINDOW_RESIDUES, SHARD_RESIDUES, MEAN_LENGTH = 200_000_000, 1_000_000, 342
RECORDS_PER_FILE = 1_000_000
# As the rule of the collect step allows on a machine whose cores are all for it.
THREADS = min(4, os.cpu_count() or 1)


class MadeUp:
    """A run that is ready to be collected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fingerprint = Fingerprint(
            "made up", (6,), ("mean",), None, "packed", "", "auto", "truncate", 1022, None, "reject"
        )
        self.store = Store(folder / "store", fingerprint)

    def make(self, records: int, width: int, seed: int = 0) -> None:
        """Segments and records. Within a window of planning, records are in no order in the segments."""
        rng = np.random.default_rng(seed)
        self.store.create()
        digests = rng.integers(0, 256, (records, DIGEST_BYTES), np.uint8)
        lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.245, 0.7, records), 20, 1022).astype(np.int64)
        names = []
        window = WINDOW_RESIDUES // MEAN_LENGTH
        for start in range(0, records, window):
            order = start + rng.permutation(min(window, records - start))
            segments = -(-len(order) * MEAN_LENGTH // SHARD_RESIDUES)
            for rows in np.array_split(order, segments):
                vectors = rng.standard_normal((len(rows), width), np.float32)
                names.append(f"{len(names):032x}")
                self.store.write(names[-1], Segment(digests[rows], lengths[rows], {ARRAY: vectors}, "fp16"))
        self._write_records(digests, lengths)
        Plan(fingerprint=self.store.fingerprint, records=records, groups=()).write(self.folder / "plan.json")
        RunRecord(group="0", segments_written=tuple(names), sequences=records).write(self.folder / "run.json")
        (self.folder / "failures.tsv").write_text("digest\treason\tdetail\n")

    def _write_records(self, digests: np.ndarray, lengths: np.ndarray) -> None:
        with (
            atomic_path(self.folder / "records.parquet") as path,
            pq.ParquetWriter(path, RECORD_SCHEMA, compression="zstd") as writer,
        ):
            for start in range(0, len(digests), ROWS_PER_GROUP):
                numbers = range(start, min(start + ROWS_PER_GROUP, len(digests)))
                files = [f"part{number // RECORDS_PER_FILE}" for number in numbers]
                table = {
                    "sample": files,
                    "file": [f"data/{file}.faa.gz" for file in files],
                    "position": [number % RECORDS_PER_FILE + 1 for number in numbers],
                    "id": [f"UniRef50_A0A{number:09d}" for number in numbers],
                    "description": ["Uncharacterized protein n=1 Tax=Bacteria RepID=A0A_9BACT"] * len(numbers),
                    "length": lengths[start : numbers.stop],
                    "digest": [digest.tobytes() for digest in digests[start : numbers.stop]],
                    "reason": pa.nulls(len(numbers)),
                    "detail": [""] * len(numbers),
                }
                writer.write_table(pa.table(table).cast(RECORD_SCHEMA))

    def collect(self, form: str) -> None:
        from esmflow.collect.collecting import CollectSettings, collect

        folder, out = self.folder, self.outputs
        collect(
            CollectSettings(
                records=str(folder / "records.parquet"),
                plan=str(folder / "plan.json"),
                runs=[str(folder / "run.json")],
                failure_lists=[str(folder / "failures.tsv")],
                embeddings=str(out / "embeddings"),
                manifest=str(out / "manifest.parquet"),
                manifest_tsv=str(out / "manifest.tsv"),
                failures=str(out / "failures"),
                summary=str(out / "summary.json"),
                note=str(out / "embeddings.json"),
                note_number=0,
                store=str(self.store.folder.parent),
                fingerprint=self.store.description,
                model="made up",
                formats=[] if form == "tables" else [form],
                pooled_precision="fp16",
                gaps="reject",
                threads=THREADS,
            )
        )

    @property
    def outputs(self) -> Path:
        return self.folder / "out"

    def drop_from_cache(self) -> None:
        for path in [*self.store.folder.iterdir(), self.folder / "records.parquet"]:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(made_up: MadeUp, form: str) -> dict[str, float]:
    """Seconds and peak memory of one collect in a process of its own; bytes of vectors and of all that was written."""
    made_up.drop_from_cache()
    command = [sys.executable, __file__, "--child", form, str(made_up.folder)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(run.stdout)
    embeddings = made_up.outputs / "embeddings"
    figures["vector_bytes"] = size_of(embeddings)
    figures["bytes"] = size_of(made_up.outputs)
    shutil.rmtree(made_up.outputs)
    return figures


def run_child(form: str, folder: Path) -> None:
    made_up = MadeUp(folder)
    in_writer = 0.0

    def timed(method):
        def call(*arguments):
            nonlocal in_writer
            started = time.perf_counter()
            result = method(*arguments)
            in_writer += time.perf_counter() - started
            return result

        return call

    if form != "tables":
        writer = FORMATS[form].load_writer()
        writer.add, writer.__exit__ = timed(writer.add), timed(writer.__exit__)
    started = time.perf_counter()
    made_up.collect(form)
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(
        json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(), "peak_bytes": peak, "in_writer": in_writer})
    )


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dd_speed(folder: Path, size: int) -> float:
    """Bytes per second of `dd` to a new file on the same file system, flushed."""
    target = folder / "dd"
    blocks = max(1, size >> 22)
    started = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=4M", f"count={blocks}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return (blocks << 22) / seconds


def benchmark(folder: Path, records: int, width: int, formats: list[str]) -> list[dict]:
    made_up = MadeUp(folder / str(records))
    made_up.folder.mkdir(parents=True)
    try:
        started = time.perf_counter()
        made_up.make(records, width)
        print(f"{records:,} records made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        lines = []
        size = 2 * width * records
        for form in ["tables", *formats]:
            if records > LARGEST.get(form, records):
                continue
            before = dd_speed(folder, size)
            line = {"records": records, "format": form, **measure(made_up, form)}
            line["dd"] = [before, dd_speed(folder, size)]
            lines.append(line)
            print(describe(line), file=sys.stderr)
        return lines
    finally:
        shutil.rmtree(made_up.folder)


COLUMNS = (
    *("records", "format", "seconds", "CPU seconds", "in the writer, seconds", "peak memory, MB", "vectors, MB"),
    *("whole, MB/s", "in the writer, MB/s", "dd, MB/s"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def describe(line: dict) -> str:
    megabytes = line["vector_bytes"] / 1e6
    cells = (
        f"{line['records']:,}",
        line["format"],
        *(f"{line[name]:.1f}" for name in ("seconds", "cpu_seconds", "in_writer")),
        f"{line['peak_bytes'] / 1e6:,.0f}",
        f"{megabytes:,.0f}",
        f"{megabytes / line['seconds']:,.0f}",
        f"{megabytes / line['in_writer']:,.0f}" if line["in_writer"] else "",
        " and ".join(f"{speed / 1e6:,.0f}" for speed in line["dd"]),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=MEASURED, metavar="FORMAT")
    parser.add_argument("--folder", type=Path, help="where to work: on the disk that is to be measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="two thousand records: whether it runs, not how fast")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child[0], Path(arguments.child[1]))
        return
    sizes = [2_000] if arguments.smoke else arguments.records
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = [
            line for size in sizes for line in benchmark(Path(folder), size, arguments.width, list(arguments.only))
        ]
    print(HEADER, *map(describe, lines), sep="\n")
    if arguments.json:
        write_json(arguments.json, lines)


if __name__ == "__main__":
    main()
