"""What a finished run left on disk, read for its report."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.summary import Summary, VariantSummary
from esmflow.embedding.run_record import LeasedSlot, RunRecord
from esmflow.files import stats_below
from esmflow.method import Fingerprint
from esmflow.plan.run_plan import Plan
from esmflow.store.segments import Store, read_fingerprint
from esmflow.verify.certificate import Certificate

_RESULTS = {
    "failures.tsv": "records without an embedding",
    "variants.parquet": "scores of variants",
    "variants.tsv": "scores of variants",
    "certificate.json": "certificate",
    "summary.json": "summary",
    "run.log": "logs of all steps",
}


@dataclass(frozen=True)
class RunFiles:
    """The files of a run; those in JSON are read. certificate, variants: None if there were to be none.

    stored_segments: what the store had before the run. command: what was typed. configuration: with every default
    filled in. finished: when the last step before the report was done, in seconds since 1970.
    """

    results: str
    manifest: str
    embeddings: str
    checkpoint: str
    model: CheckpointInfo
    fingerprint: Fingerprint
    store: Store
    summary: Summary
    runs: Sequence[RunRecord]
    stored_segments: Sequence[str]
    certificate: Certificate | None
    variants: VariantSummary | None
    command: str
    configuration: Mapping[str, Any]
    finished: float

    @classmethod
    def read(
        cls,
        *,
        manifest: str,
        embeddings: str,
        checkpoint: str,
        model: CheckpointInfo,
        plan: str,
        store: str,
        summary: str,
        runs: Sequence[str],
        certificate: str | None,
        variants: str | None,
        command: str,
        configuration: Mapping[str, Any],
    ) -> RunFiles:
        """Reads the small ones. Raises OSError if one is missing."""
        planned = Plan.read(plan)
        fingerprint = read_fingerprint(Path(store, planned.fingerprint))
        return cls(
            results=os.path.dirname(manifest),
            manifest=manifest,
            embeddings=embeddings,
            checkpoint=checkpoint,
            model=model,
            fingerprint=fingerprint,
            store=Store(store, fingerprint),
            summary=Summary.read(summary),
            runs=[RunRecord.read(path) for path in runs],
            stored_segments=planned.stored_segments,
            certificate=Certificate.read(certificate) if certificate else None,
            variants=VariantSummary.read(variants) if variants else None,
            command=command,
            configuration=configuration,
            finished=os.stat(certificate or summary).st_mtime,
        )

    @property
    def written_segments(self) -> set[str]:
        """Names of the segments that this run computed."""
        return {name for run in self.runs for name in run.segments_written}

    def why_nothing(self) -> str:
        """Why a run computed nothing."""
        return "everything was in the store" if self.summary.embedded else "no record could be computed"

    def slots(self) -> list[tuple[str, LeasedSlot]]:
        """Host and description of each slot that was leased, each once."""
        found = {(run.host, w.slot.token): w.slot for run in self.runs for w in run.workers}
        return [(host, slot) for (host, _), slot in sorted(found.items(), key=lambda item: item[0])]

    def links(self) -> list[tuple[str, str]]:
        """The results by their paths from the page's folder, each with what it is."""
        embeddings = Path(self.embeddings)
        found = {Path(self.manifest): "manifest", Path(self.results, "manifest.tsv"): "manifest"}
        found |= {Path(self.results, name): what for name, what in _RESULTS.items()}
        for folder in sorted(path for path in embeddings.glob("*") if path.is_dir()):
            found |= {path: f"embeddings, {folder.name}" for path in sorted(folder.iterdir())}
        return [(os.path.relpath(path, self.results or "."), what) for path, what in found.items() if path.exists()]

    def disk(self) -> dict[str, int]:
        """Bytes by what they are for; what is not there is left out."""
        places = {f"output {path.name}": path for path in sorted(Path(self.embeddings).glob("*")) if path.is_dir()}
        places |= {
            "plan": Path(self.results, "plan"),
            "converted checkpoint": Path(self.checkpoint),
            "manifest": Path(self.manifest),
        }
        # A store may be shared: only the segments that this run's records are in.
        segments = self.written_segments.union(self.stored_segments, *(run.segments_reused for run in self.runs))
        sizes = {"store": sum(_size(self.store.path(name)) for name in segments)}
        sizes |= {name: _size(path) for name, path in places.items()}
        return {name: size for name, size in sizes.items() if size}


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(found.st_size for found in stats_below(path.resolve()) if stat.S_ISREG(found.st_mode))


def devices(files: RunFiles) -> str:
    """The devices that were leased, with their numbers."""
    names = Counter(slot.name for _, slot in files.slots())
    return ", ".join(f"{number} × {name}" for name, number in names.items()) or "no device"
