"""The output formats: what each is called in the configuration, what it can hold, and which writer makes it.

Imports no writer by itself: the rules read this table, and must start without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esmflow.arrays import ATTENTION, INCLUDE, OF_HEAD, PER_LAYER, POOLED, Array

if TYPE_CHECKING:
    from esmflow.collect.writers.base import EmbeddingWriter


@dataclass(frozen=True)
class Format:
    """One output format.

    kinds: what of `include` it can hold. writer: its class, as module and name. record_bytes: what comes with each
    record's values, about, besides its id. joins_outputs: one writer takes all
    outputs of a run; otherwise each output has a folder and a writer of its own. named_after_inputs: files are named
    after the input files, see `inputs.sheet.output_names`. with_sequences: it holds residues too.
    """

    name: str
    kinds: tuple[str, ...]
    writer: str
    record_bytes: int
    joins_outputs: bool = False
    named_after_inputs: bool = False
    with_sequences: bool = False

    def holds(self, array: Array) -> bool:
        """Whether it can hold this output."""
        return array.kind in self.kinds

    def load_writer(self) -> type[EmbeddingWriter]:
        module, name = self.writer.split(":")
        return getattr(importlib.import_module(f"esmflow.collect.writers.{module}"), name)


FORMATS = {
    each.name: each
    for each in (
        Format("h5", INCLUDE, "h5:H5Writer", 52),
        Format("h5_per_protein", INCLUDE, "h5_per_protein:H5PerProteinWriter", 500),
        Format("npy", INCLUDE, "npy:NpyWriter", 128),
        Format("parquet", (*PER_LAYER, *OF_HEAD), "parquet:ParquetWriter", 24),
        Format("h5ad", (*POOLED, "pseudo_perplexity"), "h5ad:H5adWriter", 72),
        Format("skbio", PER_LAYER, "skbio:SkbioWriter", 72, with_sequences=True),
        Format("pt", INCLUDE, "pt:PtWriter", 80, named_after_inputs=True),
        Format(
            "esm",
            (*PER_LAYER, "contacts", "entropy", "pseudo_perplexity"),
            "record_files:EsmWriter",
            4096,
            joins_outputs=True,
            named_after_inputs=True,
        ),
        Format(
            "npz",
            (*INCLUDE, ATTENTION),
            "record_files:NpzWriter",
            1024,
            joins_outputs=True,
            named_after_inputs=True,
        ),
    )
}


def named_after_inputs(formats: Sequence[str]) -> list[str]:
    """Those of the formats that name their files after the input files."""
    return [name for name in formats if FORMATS[name].named_after_inputs]


def check_formats(formats: Sequence[str], include: Collection[str]) -> None:
    """Raises ValueError for a format that can hold nothing of what is included, and for maps that none can hold."""
    if ATTENTION in include and not any(ATTENTION in FORMATS[name].kinds for name in formats):
        raise ValueError(f"include: {ATTENTION} is written as npz only; put npz into formats")
    for name in formats:
        kinds = FORMATS[name].kinds
        if not set(kinds) & set(include):
            others = ", ".join(each.name for each in FORMATS.values() if set(each.kinds) & set(include))
            raise ValueError(
                f"formats: {name} holds {', '.join(kinds)} and nothing of include: {', '.join(sorted(include))}; "
                f"leave {name} out of formats, or choose one of {others}"
            )
