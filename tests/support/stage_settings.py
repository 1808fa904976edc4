"""Settings of the stages as small runs on a CPU have them; a test changes what it is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from esmflow.checkpoint.file import file_stamp
from esmflow.embed.settings import EmbedSettings
from esmflow.method import Fingerprint
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
