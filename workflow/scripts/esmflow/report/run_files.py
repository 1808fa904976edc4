"""What a finished run left on disk, read for its report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.files import read_json
from esmflow.method import Fingerprint
from esmflow.store.segments import Store


@dataclass(frozen=True)
class RunFiles:
    """The files of a run; those in JSON are read. certificate: None if verification was off."""

    results: str
    manifest: str
    embeddings: str
    checkpoint: str
    model: CheckpointInfo
    fingerprint: Fingerprint
    store: Store
    summary: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    certificate: Mapping[str, Any] | None

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
    ) -> RunFiles:
        """Reads the small ones. Raises OSError if one is missing."""
        digest = read_json(plan)["fingerprint"]
        fingerprint = read_fingerprint(Path(store, digest))
        return cls(
            results=os.path.dirname(manifest),
            manifest=manifest,
            embeddings=embeddings,
            checkpoint=checkpoint,
            model=model,
            fingerprint=fingerprint,
            store=Store(store, fingerprint),
            summary=read_json(summary),
            runs=[read_json(path) for path in runs],
            certificate=read_json(certificate) if certificate else None,
        )

    @property
    def written_segments(self) -> set[str]:
        """Names of the segments that this run computed."""
        return {name for run in self.runs for name in run["segments_written"]}

    def why_nothing(self) -> str:
        """Why a run computed nothing."""
        return "everything was in the store" if self.summary["embedded"] else "no record could be computed"

    def slots(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Host and description of each slot that was leased, each once."""
        found = {(run["host"], w["slot"]["token"]): w["slot"] for run in self.runs for w in run["workers"]}
        return [(host, slot) for (host, _), slot in sorted(found.items(), key=lambda item: item[0])]

    def disk(self) -> dict[str, int]:
        """Bytes by what they are for; what is not there is left out."""
        places = {f"output {path.name}": path for path in sorted(Path(self.embeddings).glob("*")) if path.is_dir()}
        places |= {
            "store": self.store.folder,
            "plan": Path(self.results, "plan"),
            "converted checkpoint": Path(self.checkpoint),
            "manifest": Path(self.manifest),
        }
        sizes = {name: sum(_sizes(path)) for name, path in places.items()}
        return {name: size for name, size in sizes.items() if size}


def read_fingerprint(folder: Path) -> Fingerprint:
    """What the segments in a folder of a store were computed with, as the run wrote it down."""
    fields: dict[str, Any] = read_json(folder / "fingerprint.json")
    return Fingerprint(**fields | {name: tuple(fields[name]) for name in ("layers", "include")})


def _sizes(path: Path) -> Iterator[int]:
    if path.is_dir():
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(Path(entry.path))
                elif entry.is_file():
                    yield entry.stat().st_size
    elif path.exists():
        yield path.stat().st_size


def devices(files: RunFiles) -> str:
    """The devices that were leased, with their numbers."""
    names = Counter(str(slot["name"]) for _, slot in files.slots())
    return ", ".join(f"{number} × {name}" for name, number in names.items()) or "no device"
