"""How many bytes a run will write, by what it is, and whether the disks can hold them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from esmflow.arrays import ATTENTION, Array
from esmflow.checkpoint.models import ModelDimensions
from esmflow.errors import EsmflowError
from esmflow.files import stats_below
from esmflow.method import Fingerprint
from esmflow.plan.run_plan import DiskForecast, Plan
from esmflow.text import bytes_in_words, plural

# What comes with each sequence's values in a segment: its digest and length.
_SEGMENT_BYTES = 24
# A row of the manifest, as Parquet and as TSV, without its texts: digest, segment, numbers, and the names in the TSV.
_TABLE_BYTES = 200
# Disks are not filled to the last byte.
_SPARE = 1.02
_REPLACED = ("embeddings", "manifest.parquet", "manifest.tsv")


class DiskError(EsmflowError):
    """A disk that cannot hold what the run will write. The message says how much is missing, and what to do."""


class WrittenFormat(Protocol):
    """What counts of an output format, which `collect.formats` has."""

    @property
    def name(self) -> str: ...

    @property
    def record_bytes(self) -> int: ...

    @property
    def with_sequences(self) -> bool: ...

    @property
    def joins_outputs(self) -> bool: ...

    def holds(self, array: Array, /) -> bool: ...


def sentence(expected: DiskForecast) -> str:
    """What a run will write, for a person."""
    formats = "".join(f", {name} {bytes_in_words(size)}" for name, size in expected.formats.items())
    return (
        f"the run will write about {bytes_in_words(expected.segments + expected.results)}: "
        f"segments {bytes_in_words(expected.segments)}{formats}, manifest {bytes_in_words(expected.tables)}"
    )


def forecast(
    plan: Plan,
    fingerprint: Fingerprint,
    dimensions: ModelDimensions,
    formats: Sequence[WrittenFormat],
    pooled_precision: str = "fp32",
) -> DiskForecast:
    """What the run will write at most; what the store holds already is not part of it."""
    to_embed, valid = plan.to_embed, plan.valid
    outputs, shape = fingerprint.outputs, (dimensions.hidden, dimensions.heads)
    row_bytes = {array: outputs.row_bytes(array, *shape) for array in outputs.arrays()}
    segments = sum(to_embed.rows(array) * size for array, size in row_bytes.items())
    for kind, work in plan.variants.work.items():
        outputs = fingerprint.of_variants(kind).outputs
        sizes = (work.rows(array) * outputs.row_bytes(array, dimensions.hidden) for array in outputs.arrays())
        segments += sum(sizes) + work.sequences * _SEGMENT_BYTES
    records = {
        array: valid.rows(array) * (size // 2 if array.is_vector and pooled_precision == "fp16" else size)
        for array, size in row_bytes.items()
    }

    def written(form: WrittenFormat) -> int:
        of_arrays = [size for array, size in records.items() if form.holds(array)]
        times = 1 if form.joins_outputs else len(of_arrays)
        beside = valid.sequences * form.record_bytes + plan.id_bytes + form.with_sequences * valid.residues
        return sum(of_arrays) + times * beside

    return DiskForecast(
        segments + to_embed.sequences * _SEGMENT_BYTES,
        {form.name: written(form) for form in formats},
        # Once as Parquet, which packs texts, and once as TSV.
        plan.records * _TABLE_BYTES + 2 * plan.text_bytes,
    )


def check_maps(plan: Plan, fingerprint: Fingerprint, dimensions: ModelDimensions, most: float) -> None:
    """Raises DiskError when attention maps, in segments and once in results, take more than `most` bytes."""
    maps = [array for array in fingerprint.outputs.arrays() if array.kind == ATTENTION]
    size = sum(4 * dimensions.heads * (plan.to_embed.rows(array) + plan.valid.rows(array)) for array in maps)
    if size > most:
        raise DiskError(
            f"include: the attention maps of {plan.valid.sequences:,} sequences in {plural(len(maps), 'layer')} take "
            f"{bytes_in_words(size)}, more than attention.max_gigabytes allows ({bytes_in_words(int(most))}); embed "
            "fewer sequences, shorter ones (max_residues, long_sequences: reject) or fewer layers, or raise that key"
        )


def check_disks(expected: DiskForecast, store: str | Path, results: str | Path) -> None:
    """Raises DiskError when the disk of the store or that of the results, or the one that both are on, is too small.

    What an earlier run left in the results, and this one deletes before it writes it anew, counts as free.
    """
    places = {str(store): expected.segments, f"{results}/": expected.results}
    replaced = [Path(results) / name for name in _REPLACED]
    disks: dict[int, list[str]] = {}
    for place in places:
        disks.setdefault(os.stat(_existing(place)).st_dev, []).append(place)
    for device, on_it in disks.items():
        needed = int(_SPARE * sum(places[place] for place in on_it))
        there = os.statvfs(_existing(on_it[0]))
        free = there.f_bavail * there.f_frsize + _used(replaced, device)
        if needed > free:
            where = " and ".join(on_it)
            raise DiskError(
                f"{sentence(expected)}; {bytes_in_words(needed)} of it to the disk of {where}, where "
                f"{bytes_in_words(free)} are free. Make room there, put the store or the results on another disk "
                "(store, pathvars), write fewer formats, or set disk_check: false if you know better"
            )


def _existing(path: str) -> Path:
    """The path, or the nearest folder above it that exists."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return place


def _used(paths: Sequence[Path], device: int) -> int:
    """Bytes that files and folders take on a disk."""
    return sum(512 * found.st_blocks for path in paths for found in stats_below(path) if found.st_dev == device)
