"""Which reader an input file gets: the first bytes decide, and between FASTA and tables the suffix."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from esmflow.failures import Reason
from esmflow.inputs.fasta import block_tasks
from esmflow.inputs.ids import FIRST_WORD, renamed
from esmflow.inputs.kinds import kind_of
from esmflow.inputs.records import BlockTask, RecordBlock, file_row
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.inputs.streams import DAMAGE, first_bytes, is_fasta, is_table
from esmflow.inputs.tables import annotation_columns, table_block_tasks, vector_columns

log = logging.getLogger(__name__)


def input_tasks(path: str | os.PathLike[str], policy: ResiduePolicy, id_rule: str = FIRST_WORD) -> Iterator[BlockTask]:
    """Yields the tasks that make the blocks of records of an input file, in order; id_rule: see `ids`."""
    tasks = _tasks(path, policy)
    return tasks if id_rule == FIRST_WORD else (partial(_renamed, task, id_rule) for task in tasks)


def _renamed(task: BlockTask, id_rule: str) -> RecordBlock:
    return renamed(task(), id_rule)


def _tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    head = first_bytes(path)
    kind = kind_of(path, head)
    if kind is None:
        return (table_block_tasks if is_table(path) and not is_fasta(head) else block_tasks)(path, policy)
    if kind.parser:
        # Imported here, as few runs need Biopython.
        from esmflow.inputs.other_formats import other_block_tasks

        return other_block_tasks(path, kind, policy)
    return iter([partial(file_row, os.fspath(path), 0, Reason.OTHER_FORMAT, f"{path} is {kind.name}: {kind.remedy}")])


def annotation_names(inputs: Iterable[InputFile]) -> list[str]:
    """The names of the further columns of the sheet and of tables, each once; of tables that can be read."""
    inputs = list(inputs)
    names = dict.fromkeys(name for file in inputs for name, _ in file.annotations)
    for file in inputs:
        if not is_table(file.path):
            continue
        head = first_bytes(file.path)
        if not is_fasta(head) and kind_of(file.path, head) is None:
            # ValueError: no Parquet, says Arrow.
            with suppress(*DAMAGE, ValueError):
                names |= dict.fromkeys(annotation_columns(file.path))
                if vectors := vector_columns(file.path):
                    log.warning("%s: no annotations, since they hold vectors: %s", file.path, ", ".join(vectors))
    return list(names)
