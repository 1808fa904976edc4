"""What each GPU slot did when, from the groups' `run.json`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esmflow.embedding.run_record import LeasedSlot, RunRecord, WorkerRecord
from esmflow.text import percent

# Beyond these a figure is neither quick nor readable.
MOST_PIECES = 3000
MOST_SLOTS = 60

LOAD, COMPUTE, WRITE, IDLE = "load", "compute", "write", "idle"


@dataclass(frozen=True)
class Piece:
    """What a slot did for a while. Times are seconds since 1970; `what` is for a person."""

    slot: str
    group: str
    kind: str
    started: float
    ended: float
    what: str

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def slot_name(host: str, slot: LeasedSlot) -> str:
    """A slot as a figure names it: what tells it from every other, in few letters."""
    name = slot.token
    if slot.device == "cuda" and name.isdecimal():
        name = f"GPU {name}"
    if len(name) > 14:
        name = f"{name[:12]}…"
    return f"{name} on {host}"


def slot_pieces(runs: Iterable[RunRecord]) -> list[Piece]:
    """Cuts every lease into load (from the lease to the first shard), compute, write and idle, in order of time."""
    pieces = [piece for run in runs for worker in run.workers for piece in _lease_pieces(run, worker)]
    return sorted(pieces, key=lambda piece: (piece.started, piece.slot))


def _lease_pieces(run: RunRecord, worker: WorkerRecord) -> list[Piece]:
    slot = slot_name(run.host, worker.slot)
    mine = [shard for shard in run.shards if len(run.workers) == 1 or shard.device == worker.device]
    shards = sorted(mine, key=lambda shard: shard.started)

    def piece(kind: str, started: float, ended: float, what: str) -> Piece:
        return Piece(slot, run.group, kind, started, ended, what)

    if not shards:
        return [piece(IDLE, worker.leased, worker.released, "no shard was finished")]
    loaded = worker.model_load_seconds or shards[0].model_load_seconds
    load = f"starting the worker; {loaded:.1f} s of it reading the model"
    pieces = [piece(LOAD, worker.leased, shards[0].started, load)]
    before = shards[0].started
    for shard in shards:
        pieces.append(piece(IDLE, before, shard.started, "between shards"))
        computed = shard.ended - shard.write_seconds
        name = shard.shard.removesuffix(".fasta")
        work = f"{name}: {shard.sequences:,} sequences, {shard.residues:,} residues"
        pieces.append(piece(COMPUTE, shard.started, computed, work))
        pieces.append(piece(WRITE, computed, shard.ended, f"{name} to the store"))
        before = shard.ended
    pieces.append(piece(IDLE, before, worker.released, "the worker ends"))
    return [p for p in pieces if p.seconds > 0]


def kind_seconds(pieces: Iterable[Piece]) -> dict[str, float]:
    """Seconds that slots spent on each kind of work, all slots together."""
    totals = dict.fromkeys((LOAD, COMPUTE, WRITE, IDLE), 0.0)
    for piece in pieces:
        totals[piece.kind] += piece.seconds
    return totals


def drawable(pieces: Sequence[Piece]) -> list[Piece]:
    """As many pieces as a figure can hold: of more, what each of the first slots did most in equal spans of time."""
    if len(pieces) <= MOST_PIECES:
        return list(pieces)
    slots = sorted({piece.slot for piece in pieces})[:MOST_SLOTS]
    began, ended = min(piece.started for piece in pieces), max(piece.ended for piece in pieces)
    span = (ended - began) / (MOST_PIECES // len(slots))
    did: dict[tuple[str, int], dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for piece in pieces:
        first, last = (piece.started - began) / span, (piece.ended - began) / span
        for cell in range(int(first), math.ceil(last)):
            did[piece.slot, cell][piece.group, piece.kind] += min(last, cell + 1) - max(first, cell)
    drawn = []
    for (slot, cell), shares in did.items():
        if slot in slots:
            group, kind = max(shares, key=lambda key: shares[key])
            start, what = began + cell * span, f"{percent(shares[group, kind])} of this time"
            drawn.append(Piece(slot, group, kind, start, start + span, what))
    return drawn
