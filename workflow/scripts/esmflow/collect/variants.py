"""The scores of variants, from what was computed for them (Meier et al., 2021, doi 10.1101/2021.07.09.450648).

A substitution's wild-type marginal is ln p(new) - ln p(old) where the model sees the whole sequence as it is; its
masked marginal is the same where the residue is masked. Several substitutions have the sum, each place masked by
itself. What the logarithms of a place have in common falls out of the difference, so logits serve as well.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.arrays import MASKED_LOGITS, VOCABULARY_SIZE, Array
from esmflow.collect.joining import CollectError
from esmflow.collect.summary import VariantSummary
from esmflow.collect.tables import open_tsv
from esmflow.failures import Failure, read_failures
from esmflow.files import atomic_path
from esmflow.inputs.residues import DIGEST_BYTES, RESIDUE_TOKEN, sequence_digest
from esmflow.method import Fingerprint
from esmflow.store.gather import SegmentIndex
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import SegmentError, Store
from esmflow.variants.copies import KINDS, Place
from esmflow.variants.head import ID, VARIANT
from esmflow.variants.notation import parse_variant
from esmflow.variants.table import PLANNED_SCHEMA, places_by_sequence

log = logging.getLogger(__name__)

SCORED, UNSCORED = "scored", "unscored"
WILD_TYPE_MARGINAL, MASKED_MARGINAL = "wild_type_marginal", "masked_marginal"
_TEXT = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """What to score, and where to write it.

    planned: the table of variants with each one's sequence. failure_lists: of the groups. table, table_tsv, summary:
    files to write.
    """

    planned: str
    failure_lists: Sequence[str]
    store: str
    fingerprint: Fingerprint
    threads: int
    table: str
    table_tsv: str
    summary: str


def score_variants(settings: VariantSettings) -> VariantSummary:
    """Writes a row for each row of the table, with its scores or the reason why it has none.

    Raises CollectError when something was neither computed nor is accounted for.
    """
    planned = pq.ParquetFile(settings.planned, read_dictionary=["sequence"])
    longest = settings.fingerprint.long.max_residues
    failures = {failure.digest: failure for path in settings.failure_lists for failure in read_failures(path)}
    digests: dict[str, set[bytes]] = {kind: set() for kind in KINDS}
    for block in _blocks(planned):
        for place in chain.from_iterable(places_by_sequence(block, longest).values()):
            for kind in KINDS:
                digests[kind].add(sequence_digest(place.text(kind)))
    computed = {kind: _Computed.of(settings, kind, digests[kind]) for kind in KINDS}
    reasons: Counter[str] = Counter()
    rows = 0
    schema = _schema(planned.schema_arrow)
    with (
        atomic_path(settings.table) as path,
        pq.ParquetWriter(path, schema, compression="zstd") as parquet,
        open_tsv(settings.table_tsv, schema.names) as tsv,
    ):
        for block in _blocks(planned):
            scored = _scored(block, schema, longest, computed, failures)
            rows += len(scored)
            reasons.update(scored["reason"].drop_null().to_pylist())
            parquet.write_table(scored)
            tsv(scored)
    summary = VariantSummary(rows, rows - reasons.total(), dict(reasons.most_common()))
    if summary.rows != planned.metadata.num_rows:
        raise CollectError(f"variants: {planned.metadata.num_rows} rows were planned and {summary.rows} written")
    summary.write(settings.summary)
    log.info("variants %s", summary.line())
    return summary


def _blocks(planned: pq.ParquetFile) -> Iterator[pa.Table]:
    for number in range(planned.num_row_groups):
        yield planned.read_row_group(number)


def _schema(planned: pa.Schema) -> pa.Schema:
    own = {each.name: each for each in PLANNED_SCHEMA if each.name != "sequence"}
    scores = [pa.field(name, pa.float32()) for name in (WILD_TYPE_MARGINAL, MASKED_MARGINAL)]
    last = [own.pop("reason"), own.pop("detail")]
    others = [each for each in planned if each.name not in PLANNED_SCHEMA.names]
    return pa.schema([*own.values(), pa.field("status", _TEXT), *scores, *last, *others])


@dataclass(frozen=True)
class _Computed:
    """What the store has of one kind: the logits at places, `[33]` each."""

    index: SegmentIndex
    array: Array

    @classmethod
    def of(cls, settings: VariantSettings, kind: str, digests: Iterable[bytes]) -> _Computed:
        store = Store(settings.store, settings.fingerprint.of_variants(kind))
        stored = StoredSequences(store)
        found = stored.find(_as_array(digests))
        names = sorted({stored.names[number] for number in np.unique(found[found >= 0])})
        try:
            return cls(SegmentIndex(store, names, settings.threads, check=True), Array(kind))
        except SegmentError as error:
            raise CollectError(f"{error}. Run again with --forcerun plan to compute what is missing") from error

    def logits(self, places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray]:
        """Logits at places, `[N, 33]`, and which of them there are."""
        digests = [sequence_digest(place.text(self.array.kind)) for place in places]
        number = {digest: n for n, digest in enumerate(dict.fromkeys(digests))}
        location = self.index.locate(_as_array(number))
        there = location.segments >= 0
        if not there.any():
            return np.zeros((len(places), VOCABULARY_SIZE), np.float32), np.zeros(len(places), bool)
        values = self.index.gather(location[there], self.array)
        begins = np.zeros(len(number), np.int64)
        begins[there] = self.array.offsets(location.lengths[there])[:-1]
        text = np.array([number[digest] for digest in digests])
        at = 0 if self.array.kind == MASKED_LOGITS else np.array([place.at for place in places])
        return values[np.where(there[text], begins[text] + at, 0)], there[text]


def _as_array(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def _scored(
    block: pa.Table,
    schema: pa.Schema,
    longest: int | None,
    computed: Mapping[str, _Computed],
    failures: Mapping[str, Failure],
) -> pa.Table:
    """A block of the planned table with its scores."""
    by_sequence = places_by_sequence(block, longest)
    places = [place for of_sequence in by_sequence.values() for place in of_sequence]
    keys = ((sequence, place.place) for sequence, of_sequence in by_sequence.items() for place in of_sequence)
    number = {key: n for n, key in enumerate(keys)}
    # Of each substitution: its row, its place's number, and the tokens of the residues before and after it.
    substitutions = [
        (row, number[sequence, each.place], RESIDUE_TOKEN[each.before], RESIDUE_TOKEN[each.after])
        for row, (variant, sequence) in enumerate(zip(block[VARIANT].to_pylist(), block["sequence"].to_pylist()))
        if sequence is not None
        for each in parse_variant(variant)
    ]
    row, at, before, after = np.array(substitutions, np.int64).reshape(-1, 4).T
    reasons, details = block["reason"].to_pylist(), block["detail"].to_pylist()
    columns: dict[str, Any] = {name: block[name] for name in block.column_names}
    for kind, name in zip(KINDS, (WILD_TYPE_MARGINAL, MASKED_MARGINAL), strict=True):
        logits, there = computed[kind].logits(places)
        columns[name] = np.zeros(len(block))
        np.add.at(columns[name], row, (logits[at, after] - logits[at, before]).astype(np.float64))
        for of, lost in zip(row[~there[at]].tolist(), at[~there[at]].tolist()):
            failure = failures.get(sequence_digest(places[lost].text(kind)).hex())
            if failure is None:
                raise CollectError(
                    f"variants: {block[ID][of]} {block[VARIANT][of]} was neither computed nor has it failed; run again "
                    "with --forcerun plan"
                )
            reasons[of], details[of] = failure.reason.value, failure.detail
    unscored = np.array([reason is not None for reason in reasons], bool)
    for name in (WILD_TYPE_MARGINAL, MASKED_MARGINAL):
        columns[name] = pa.array(columns[name], pa.float32(), mask=unscored)
    status = np.where(unscored, UNSCORED, SCORED).tolist()
    columns |= {"status": status, "reason": reasons, "detail": details}
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
