"""A whole embed job beside the engine alone: process start, import, checkpoint, shards, segments on disk.

`job.py WORK CHECKPOINT DEVICE` runs the job of one shard group as the workflow does, and is timed from outside by
`measure_job`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "workflow" / "scripts")]

SHARD_RESIDUES = 1_000_000


def write_shards(folder: Path, sequences: list[str], shard_residues: int = SHARD_RESIDUES) -> int:
    """Deals sequences to shards as planning does. Returns the number of shards."""
    from esmflow.inputs.residues import sequence_digest
    from esmflow.plan.shards import write_shard

    unique = sorted(set(sequences), key=len, reverse=True)
    shards = max(1, round(sum(map(len, unique)) / shard_residues))
    for number in range(shards):
        part = unique[number::shards]
        write_shard(folder / f"shard-{number:05d}.fasta", [(sequence_digest(s), s) for s in part])
    return shards


def measure_job(
    checkpoint: Path, sequences: list[str], folder: Path, device: str, shard_residues: int = SHARD_RESIDUES
) -> dict[str, float]:
    """Residues per second of one embed job, from the start of its process to its last segment on disk."""
    write_shards(folder / "shards", sequences, shard_residues)
    command = [sys.executable, __file__, str(folder), str(checkpoint), device]
    started = time.time()
    subprocess.run(command, check=True)
    from esmflow.files import read_json

    run = read_json(folder / "run.json")
    ended = max(shard["ended"] for shard in run["shards"])
    busy = sum(shard["ended"] - shard["started"] for shard in run["shards"])
    return {
        "whole job": run["residues"] / (ended - started),
        "whole job, shards only": run["residues"] / busy,
        "whole job, seconds": ended - started,
        "whole job, seconds before the first shard": min(s["started"] for s in run["shards"]) - started,
    }


def run_job(folder: Path, checkpoint: str, device: str) -> None:
    """What the workflow's embed step does for one group, and like it without torch in this process."""
    from esmflow.checkpoint.file import read_checkpoint_info
    from esmflow.embedding.job import embed_group
    from esmflow.embedding.settings import EmbedSettings
    from esmflow.files import file_stamp
    from esmflow.method import ARITHMETIC, Fingerprint
    from esmflow.slots.leases import SlotSettings

    info = read_checkpoint_info(checkpoint)
    settings = EmbedSettings(
        group="0",
        shards=str(folder / "shards"),
        run=str(folder / "run.json"),
        failures=str(folder / "failures.tsv"),
        checkpoint=checkpoint,
        checkpoint_stamp=file_stamp(checkpoint),
        fingerprint=Fingerprint(
            checkpoint=info.digest,
            layers=(info.dimensions.layers,),
            include=("mean",),
            per_residue_precision=None,
            engine="packed",
            arithmetic=ARITHMETIC["packed", "auto"],
            precision="auto",
            long_sequences="truncate",
            max_residues=1022,
            window_overlap=None,
            invalid_residues="reject",
        ),
        store=str(folder / "store"),
        slots=SlotSettings(device, 1, str(folder / "slots"), 60.0),
        workers=1,
        token_budget=None,
        grace_seconds=0,
        hang_seconds=3600,
        threads=2,
        attempt=1,
        last_attempt=1,
        retry_failed=False,
        log_file=str(folder / "job.log"),
    )
    embed_group(settings)


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), *sys.argv[2:])
