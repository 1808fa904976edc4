"""The residues of records, for formats that hold them: read from the input files once more, as planning read them."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from esmflow.collect.joining import CollectError
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.records import Record
from esmflow.inputs.residues import ResiduePolicy, sequence_digest
from esmflow.text import record_name


class InputSequences:
    """Reads on in the input files as it is asked, so that every file is read once."""

    def __init__(self, policy: ResiduePolicy) -> None:
        self._policy = policy
        self._file: str | None = None
        self._records: Iterator[Record] = iter(())

    def of(self, records: pa.Table) -> list[str]:
        """The normalised residues of embedded records; the next ones, in the order of the inputs.

        records: their columns file, record, id and digest. Raises CollectError where a file has others by now.
        """
        columns = (records[name].to_pylist() for name in ("file", "record", "id", "digest"))
        return [self._next(*row) for row in zip(*columns)]

    def _next(self, file: str, position: int, identifier: str, digest: str) -> str:
        try:
            if file != self._file:
                tasks = input_tasks(file, self._policy)
                self._file, self._records = file, (record for task in tasks for record in task().records())
            for record in self._records:
                if record.position == position and sequence_digest(record.sequence).hex() == digest:
                    return record.sequence
                if record.position >= position > 0:
                    break
        except OSError as error:
            raise CollectError(f"{file} cannot be read again for the sequences of its records: {error}") from error
        raise CollectError(
            f"{record_name(file, position, identifier)}: its sequence is not the one that was planned, so the file has "
            "been changed; the same command again plans it anew"
        )
