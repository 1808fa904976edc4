"""What would be rejected of some inputs, and why: read as planning reads them, without a model."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence

from esmflow.cli.project import configuration, find_inputs
from esmflow.failures import REMEDY, Reason
from esmflow.inputs.readers import input_tasks
from esmflow.inputs.residues import ResiduePolicy
from esmflow.method import LongSequences
from esmflow.text import plural

_LISTED = 20


def check_inputs(places: Sequence[str], settings: Sequence[str], everything: bool) -> int:
    """Prints the rejected records and the counts. Returns 0 if every record can be embedded, else 1."""
    files = find_inputs(places)
    _, config = configuration({}, settings)
    policy = ResiduePolicy.configured(config)
    long = LongSequences.configured(config)
    reasons: Counter[Reason] = Counter()
    records = cut = residues = 0
    seen: set[bytes] = set()
    distinct = 0
    for file in files:
        for task in input_tasks(file.path, policy, config["id"]):
            block = task()
            records += len(block)
            lengths = block.lengths[block.valid()]
            residues += int(lengths.sum())
            cut += int(long.is_cut(lengths).sum())
            distinct += len(lengths)
            seen.update(digest.tobytes() for digest in block.digests)
            for record in block.rejected():
                assert record.reason is not None
                reasons[record.reason] += 1
                if everything or reasons.total() <= _LISTED:
                    name = f"record {record.position} ({record.id or 'no id'})" if record.position else "the file"
                    path = min(file.path, os.path.relpath(file.path), key=len)
                    print(f"{path}\t{name}\t{record.reason.value}\t{record.detail}")
    rejected = reasons.total()
    if rejected > _LISTED and not everything:
        print(f"… and {rejected - _LISTED:,} more; --all lists them")
    sys.stdout.flush()
    good = records - rejected
    print(f"{plural(records, 'record')} in {plural(len(files), 'file')}: {good:,} can be embedded, {rejected:,} not")
    for reason, count in reasons.most_common():
        print(f"  {count:,} × {reason.value}: {REMEDY[reason]}")
    if distinct > len(seen):
        print(f"  {distinct - len(seen):,} repeat the sequence of another record, and are computed once")
    if cut:
        print(f"  {plural(cut, 'record')} of more than {long.max_residues:,} residues: {config['long_sequences']}")
    print(f"  {plural(residues, 'residue')} in all")
    return 1 if rejected or not good else 0
