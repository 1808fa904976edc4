"""Settings of the stages as small runs on a CPU have them; a test changes what it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esmflow.collect.collecting import CollectSettings
from esmflow.embedding.settings import EmbedSettings
from esmflow.files import file_stamp
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint
from esmflow.plan.cost import CostModel
from esmflow.plan.settings import PlanSettings
from esmflow.slots.leases import SlotSettings


def cpu_slots(folder: Path, slots: int = 1) -> SlotSettings:
    """Slots of a CPU, leased in a folder."""
    return SlotSettings("cpu", slots, str(folder / "slots"), 60.0)


def embed_settings(folder: Path, checkpoint: Path, fingerprint: Fingerprint, **changes: Any) -> EmbedSettings:
    """An embed job for `shards` in a folder, with everything else in the folder too."""
    settings = EmbedSettings(
        group="0",
        shards=str(folder / "shards"),
        run=str(folder / "run.json"),
        failures=str(folder / "failures.tsv"),
        checkpoint=str(checkpoint),
        checkpoint_stamp=file_stamp(checkpoint),
        fingerprint=fingerprint,
        store=str(folder / "store"),
        slots=cpu_slots(folder),
        workers=1,
        threads=1,
        token_budget=None,
        grace_seconds=1,
        hang_seconds=600,
        attempt=1,
        last_attempt=1,
        retry_failed=False,
        log_file=str(folder / "job.log"),
    )
    return replace(settings, **changes)


def plan_settings(
    folder: Path, files: Sequence[InputFile], groups: Sequence[Path], cost_model: CostModel, **changes: Any
) -> PlanSettings:
    """A plan of some files, written to a folder, for mean vectors without a checkpoint."""
    settings = PlanSettings(
        inputs=files,
        records=str(folder / "records.parquet"),
        candidates=str(folder / "candidates.fasta"),
        plan=str(folder / "plan.json"),
        groups=[str(group) for group in groups],
        work=0.0,
        least_cost=0.0,
        checkpoint="",
        fingerprint=Fingerprint("c", (1,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject"),
        store=str(folder / "store"),
        cost_model=cost_model,
        policy=ResiduePolicy(),
        id_rule="first_word",
        assignment="balanced",
        shard_residues=1_000_000,
        workers=1,
        processes=1,
        formats=(),
        pooled_precision="fp32",
        most_bytes_of_maps=1e9,
        disk_check=False,
        number=0,
    )
    return replace(settings, **changes)


def collect_settings(folder: Path, out: Path, fingerprint: Fingerprint, **changes: Any) -> CollectSettings:
    """What is to be written to a folder of a run whose only group has ended."""
    settings = CollectSettings(
        records=str(folder / "records.parquet"),
        plan=str(folder / "plan.json"),
        runs=[str(folder / "run.json")],
        failure_lists=[str(folder / "failures.tsv")],
        embeddings=str(out / "embeddings"),
        manifest=str(out / "manifest.parquet"),
        manifest_tsv=str(out / "manifest.tsv"),
        failures=str(out / "failures.tsv"),
        summary=str(out / "summary.json"),
        note=str(out / "embeddings.json"),
        note_number=0,
        store=str(folder / "store"),
        fingerprint=fingerprint,
        model="made up",
        formats=["h5"],
        pooled_precision="fp32",
        gaps="reject",
        threads=1,
    )
    return replace(settings, **changes)
