"""What an embed job needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from esmflow.method import Fingerprint
from esmflow.slots.leases import SlotSettings


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What an embed job needs to know.

    group: the name of the shard group; shards: its folder. run, failures: where `run.json` and the failure list go.
    checkpoint_stamp: see `checkpoint.file.file_stamp`. store: its folder.
    token_budget: tokens in a batch on the first attempt, None for the engine's own choice; halved at every attempt.
    workers: slots to lease at once, each with a worker of its own; threads: CPU threads of each.
    grace_seconds: how long a shard in hand may take to end after SIGTERM. hang_seconds: after how long without progress
    a worker is ended.
    attempt, last_attempt: counted from 1. On the last attempt shards that fail are recorded instead of raised.
    retry_failed: compute finished shards again if any of their sequences failed.
    """

    group: str
    shards: str
    run: str
    failures: str
    checkpoint: str
    checkpoint_stamp: tuple[int, ...] | None
    fingerprint: Fingerprint
    store: str
    slots: SlotSettings
    workers: int
    threads: int
    token_budget: int | None
    grace_seconds: float
    hang_seconds: float
    attempt: int
    last_attempt: int
    retry_failed: bool
    log_file: str
