"""The certificate of a run: a sample of its embeddings, computed again with fair-esm's own model, and the verdict."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from esmflow.checkpoint.file import check_unchanged, read_checkpoint_info
from esmflow.errors import EsmflowError
from esmflow.method import Fingerprint
from esmflow.plan.shards import read_shard
from esmflow.plan.spot_check import length_bin
from esmflow.slots.gpus import candidate_slots
from esmflow.slots.leases import SlotSettings, leased_slots
from esmflow.store.segments import Store
from esmflow.text import versions
from esmflow.verify import LONGEST
from esmflow.verify.agreement import LIMITS, Limits
from esmflow.verify.certificate import Certificate
from esmflow.verify.manifest_check import ManifestCheck, check_manifest
from esmflow.verify.read_back import READERS, Embeddings, Sampled
from esmflow.verify.remembered import add_verified, read_verified
from esmflow.verify.verdict import judge
from esmflow.verify.worker import Verified, VerifyTask, verify_sequences
from esmflow.workers.one_call import WorkerError, run_one

log = logging.getLogger(__name__)

MOST_RECORDS_OF_PT = 1_000_000
"""`pt` files of more records take too much memory to open; the sample is then read from the store."""


class VerifyError(EsmflowError):
    """The sample could not be computed again. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """What to verify, and how.

    candidates: sequences to draw from, written while planning. formats: those that were written, in order.
    stored_segments: what the store had before the run.
    sample: sequences to compute again. seed: another one draws others. min_cosine, max_relative_error: None for what
    suits the precision of each embedding. The rest is as for `EmbedSettings`.
    """

    candidates: str
    manifest: str
    embeddings: str
    formats: Sequence[str]
    store: str
    stored_segments: Collection[str]
    model: str
    checkpoint: str
    checkpoint_stamp: tuple[int, ...] | None
    fingerprint: Fingerprint
    sample: int
    seed: int
    min_cosine: float | None
    max_relative_error: float | None
    slots: SlotSettings
    threads: int
    log_file: str

    def limits(self, precision: str) -> Limits:
        """What an embedding of this precision must keep to."""
        limits = LIMITS[precision]
        if self.min_cosine is not None:
            limits = replace(limits, min_cosine=self.min_cosine)
        if self.max_relative_error is not None:
            limits = replace(limits, max_relative_error=self.max_relative_error)
        return limits


def verify(settings: VerifySettings) -> Certificate:
    """Draws a sample of a run's embeddings, computes it again on a slot of its own, and returns the certificate.

    What an earlier run verified, and the store still has, is not computed again. Also holds the sample's files against
    the store, and the manifest, for every record. A certificate that was not passed is returned like any other. Raises
    VerifyError when the sample cannot be computed again, SlotError when no slot can be had.
    """
    started = time.time()
    fingerprint = settings.fingerprint
    store = Store(settings.store, fingerprint)
    candidates = dict(read_shard(settings.candidates))
    check = check_manifest(settings.manifest, store, candidates)
    sampled = _draw(check, settings)
    read_from = _read_from(settings.formats, check.records)
    embeddings = Embeddings(settings.embeddings, settings.store, fingerprint, read_from)
    try:
        numbers, differ = embeddings.compare_with_store(sampled)
    except (OSError, LookupError, ValueError, RuntimeError) as error:
        raise VerifyError(
            f"{settings.embeddings}: the {read_from} files are not those that were written ({error}); "
            "write them again from the store: the same command with --forcerun collect"
        ) from error
    # What the files have instead of what was verified is looked at as well.
    before = {digest: found for digest, found in read_verified(store, numbers).items() if digest not in differ}
    verified = Verified()
    if new := tuple(record for record in sampled if record.digest not in before):
        # Before a slot is taken, which a job that cannot work should not keep from others.
        check_unchanged(settings.checkpoint, fingerprint.checkpoint, settings.checkpoint_stamp)
        verified = _compute(VerifyTask(settings.checkpoint, fingerprint, new, embeddings, settings.threads), settings)
    computed = {digest: found for digest, found in verified.agreements.items() if found}
    verified = replace(verified, agreements={**before, **computed}, before=frozenset(before), differ=differ)
    verdict = judge(sampled, verified, check, fingerprint.outputs.names(), settings.limits, store)
    if verdict.passed and computed:
        add_verified(store, numbers, computed)
    certificate = Certificate(
        **vars(verdict),
        model=settings.model,
        checkpoint=fingerprint.checkpoint,
        fingerprint=fingerprint.digest(),
        engine=fingerprint.engine,
        verified_with=read_checkpoint_info(settings.checkpoint).dimensions.family.reference,
        device=verified.device,
        versions=versions("torch", "fair-esm", "numpy"),
        read_from=read_from,
        sample=settings.sample,
        seed=settings.seed,
        limits={p: settings.limits(p) for p in sorted({record.precision for record in sampled})},
        records_checked=check.records,
        computed_again=len(computed),
        verified_before=len(before),
        files_checked=0 if read_from == "store" else len(sampled),
        not_computed=len(new) - len(computed),
        model_load_seconds=verified.model_load_seconds,
        seconds=time.time() - started,
    )
    log.info("%s in %.1f seconds", certificate.line(), certificate.seconds)
    for problem in certificate.problems:
        log.error("%s", problem)
    return certificate


def _read_from(formats: Sequence[str], records: int) -> str:
    """The format that the sample is read back from."""
    readable = [name for name in READERS if name in formats and (name != "pt" or records <= MOST_RECORDS_OF_PT)]
    return readable[0] if readable else "store"


def _draw(check: ManifestCheck, settings: VerifySettings) -> list[Sampled]:
    """A sample of everything, and one of what is new, which is the same if everything is."""
    residues = {digest: settings.fingerprint.long.embedded(s.length) for digest, s in check.located.items()}
    short = {digest: count for digest, count in residues.items() if count <= LONGEST}
    if len(short) < len(residues):
        log.info("%d candidates of more than %d residues are left out", len(residues) - len(short), LONGEST)
    stored = frozenset(settings.stored_segments)
    new = {digest: count for digest, count in short.items() if check.located[digest].segment not in stored}
    drawn = [*draw_sample(short, settings.sample, settings.seed), *draw_sample(new, settings.sample, settings.seed)]
    return [check.located[digest] for digest in dict.fromkeys(drawn)]


def _compute(task: VerifyTask, settings: VerifySettings) -> Verified:
    with leased_slots(
        candidate_slots(settings.slots.device, settings.slots.cpu_slots),
        lock_folder=settings.slots.lock_folder,
        purpose="the certificate",
        wait_seconds=settings.slots.wait_seconds,
    ) as (lease,):
        try:
            return run_one(
                verify_sequences,
                inherited=[lease.descriptor],
                log_file=settings.log_file,
                on_tick=lease.keep,
                slot=lease.slot,
                task=task,
            )
        except WorkerError as error:
            raise VerifyError(
                f"the sample could not be computed again: {error}. The embeddings are untouched; "
                f"run again, or set verify.sample: 0 to go without a certificate. Log: {settings.log_file}"
            ) from error


def draw_sample(residues: Mapping[bytes, int], sample: int, seed: int) -> list[bytes]:
    """Draws `sample` of the sequences, given by digest with their residues, from every length bin the same number.

    Bins that have fewer leave their share to the others. The same sequences, sample and seed give the same draw, and
    where sequences are added most of a draw stays.
    """

    def shuffled(digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest()

    bins: dict[int, list[bytes]] = {}
    for digest in sorted(residues, key=shuffled):
        bins.setdefault(length_bin(residues[digest]), []).append(digest)
    turns = itertools.zip_longest(*(bins[number] for number in sorted(bins)))
    drawn = [digest for turn in turns for digest in turn if digest is not None]
    return drawn[:sample]
