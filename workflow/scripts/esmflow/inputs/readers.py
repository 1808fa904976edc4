"""Which reader an input file gets."""

from __future__ import annotations

import os
from collections.abc import Iterator

from esmflow.inputs.fasta import block_tasks
from esmflow.inputs.records import BlockTask
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.streams import is_table
from esmflow.inputs.tables import table_block_tasks


def input_tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields the tasks that make the blocks of records of a FASTA file or a table, in order."""
    return table_block_tasks(path, policy) if is_table(path) else block_tasks(path, policy)
