# ruff: noqa: E501  (a table has one line for each entry)
"""Small changes to the code, as a careless colleague might make them, and the tests that must notice each.

`make mutants` makes them one at a time in copies of the project, never in the working tree, runs the tests named, and
prints those that no test noticed. `make mutants ONLY=lease` tries those whose name, file or test has the word.
A plain list rather than a tool that invents mutants: each is a mistake that would cost a user something.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = "workflow/scripts"
LIBRARY = f"{SCRIPTS}/esmflow"
_SECONDS = 900


@dataclass(frozen=True)
class Mutant:
    """`old`, which a file has exactly once, becomes `new`. tests: as pytest is given them, below `tests/`."""

    name: str
    file: str
    old: str
    new: str
    tests: str


SETTINGS = "unit/scripts/test_settings.py"
FAMILIES = "unit/engine/test_other_families.py"
LEASES = "unit/slots/test_leases.py"
GPUS = "unit/slots/test_gpus.py"
MANAGER = "unit/workers/test_manager.py"
QUEUE = "unit/workers/test_queue.py"
EXTRACTION = "unit/engine/test_extraction.py"
PACKED = "unit/engine/test_packed.py"
PACKING = "unit/engine/test_packing.py"
KERNELS = "unit/engine/test_kernels.py"
WINDOWS = "unit/engine/test_windows.py"
SEGMENTS = "unit/store/test_segments.py"
GATHER = "unit/store/test_gather.py"
LOOKUP = "unit/store/test_lookup.py"
DIGESTS = "unit/store/test_digests.py"
METHOD = "unit/test_method.py"
ADAPTER = "unit/checkpoint/test_adapter.py"
MAPS = "unit/engine/test_attention_maps.py"
FILES = "unit/test_files.py"
PLANNING = "unit/plan/test_planning.py"
COLLECTING = "unit/collect/test_collecting.py"
VARIANTS = "unit/collect/test_variants.py"
FORMATS = "unit/collect/test_formats.py"
ESTIMATES = "unit/config/test_job_estimates.py"
RECOMPUTE = "unit/verify/test_recompute.py"
CERTIFICATE = "workflow/test_certificate.py"
FASTA = "unit/inputs/test_fasta.py"

MUTANTS = [
    # What the steps are told
    Mutant("hang_minutes are seconds", f"{SCRIPTS}/embed.py", "60 * params.hang_minutes", "params.hang_minutes", SETTINGS),
    Mutant("slot_wait_minutes are seconds", f"{SCRIPTS}/embed.py", "60 * params.wait_minutes", "params.wait_minutes", SETTINGS),
    Mutant("threads are not divided by GPUs", f"{SCRIPTS}/embed.py", "snakemake.threads // params.gpus_per_job", "snakemake.threads", SETTINGS),
    Mutant("batch_tokens is not passed", f"{SCRIPTS}/embed.py", "else params.batch_tokens", "else None", SETTINGS),
    Mutant("a failed record is never tried again", f"{SCRIPTS}/embed.py", 'params.failure_policy == "error"', "False", SETTINGS),
    Mutant("long_sequences: reject is ignored", f"{SCRIPTS}/plan.py", '"long_sequences": fingerprint.long_sequences', '"long_sequences": "truncate"', SETTINGS),
    Mutant("pooled_precision is not forecast", f"{SCRIPTS}/plan.py", 'config["pooled_precision"]', '"fp32"', SETTINGS),
    Mutant("pooled_precision is not collected", f"{SCRIPTS}/collect.py", "params.pooled_precision", '"fp32"', SETTINGS),
    Mutant("min_cosine is not passed", f"{SCRIPTS}/verify.py", "else params.min_cosine", "else None", SETTINGS),
    Mutant("the verify seed is not passed", f"{SCRIPTS}/verify.py", "seed=params.seed", "seed=1", SETTINGS),
    Mutant("failures.policy: error ends well", f"{SCRIPTS}/finish.py", 'snakemake.params.failure_policy == "error"', "False", SETTINGS),
    Mutant("last_attempt is off by one", "workflow/rules/embed.smk", '["retries"] + 1', '["retries"]', SETTINGS),
    Mutant("memory does not grow with the attempt", f"{LIBRARY}/config/job_estimates.py", "attempt * 100 * math.ceil", "100 * math.ceil", ESTIMATES),
    Mutant("time does not grow with the attempt", f"{LIBRARY}/config/job_estimates.py", "attempt * max(10", "max(10", ESTIMATES),
    Mutant("more GPUs in a job take no more memory", f"{LIBRARY}/config/job_estimates.py", "_JOB_MB + settings.workers * (worker + results)", "_JOB_MB + (worker + results)", ESTIMATES),
    # Slots
    Mutant("CUDA_VISIBLE_DEVICES is not set", f"{LIBRARY}/slots/gpus.py", 'os.environ["CUDA_VISIBLE_DEVICES"] = slot.visible_devices', "pass", "unit/embedding/test_worker.py"),
    Mutant("an empty CUDA_VISIBLE_DEVICES means every GPU", f"{LIBRARY}/slots/gpus.py", 'not value.strip() and device != "cpu"', "False", GPUS),
    Mutant("what follows an invalid token is used", f"{LIBRARY}/slots/gpus.py", "token)\n            break", "token)\n            continue", GPUS),
    Mutant("an index counts as the bus does", f"{LIBRARY}/slots/gpus.py", "return [by_uuid[uuid] for uuid in ordered]", "return gpus", GPUS),
    Mutant("a lock is named after the token", f"{LIBRARY}/slots/gpus.py", '"_", self.uuid or self.token) + ".lock"', '"_", self.token) + ".lock"', GPUS),
    Mutant("links are followed", f"{LIBRARY}/slots/leases.py", "os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK\n", "os.O_CLOEXEC | os.O_NONBLOCK\n", LEASES),
    Mutant("the umask makes the lock private", f"{LIBRARY}/slots/leases.py", "os.fchmod(descriptor, 0o644)", "pass", LEASES),
    Mutant("the lock folder is private", f"{LIBRARY}/slots/leases.py", "folder.chmod(mode)", "pass", LEASES),
    Mutant("a removed lock file is a lease", f"{LIBRARY}/slots/leases.py", "if _is_at(path, descriptor):\n        return descriptor", "if True:\n        return descriptor", LEASES),
    Mutant("half of the slots are held while waiting", f"{LIBRARY}/slots/leases.py", "_release_all(leases)\n    return None", "return None", LEASES),
    Mutant("a hard link is written into", f"{LIBRARY}/slots/leases.py", "and status.st_nlink == 1", "", LEASES),
    Mutant("waiting for a slot never ends", f"{LIBRARY}/slots/leases.py", "if now - started >= wait_seconds:", "if now - started >= 2 * wait_seconds + 60:", f"{LEASES} -k waiting_ends --timeout 20"),
    # Workers
    Mutant("no second try", f"{LIBRARY}/workers/queue.py", "if file in first:", "if not first:", QUEUE),
    Mutant("a second try by the same worker", f"{LIBRARY}/workers/queue.py", "if not others or a.not_by != worker), None)", "if True), None)", QUEUE),
    Mutant("the last file of the fullest list is lost", f"{LIBRARY}/workers/queue.py", "self._in_hand[worker].append(file)\n        return file", "return file", QUEUE),
    Mutant("two failures in a row abort", f"{LIBRARY}/workers/manager.py", "if len(self._failed_in_a_row) >= FAILURES_IN_A_ROW and", "if len(self._failed_in_a_row) >= FAILURES_IN_A_ROW - 1 and", f"{MANAGER} -k in_a_row"),
    Mutant("a success does not end the row of failures", f"{LIBRARY}/workers/manager.py", "self._failed_in_a_row.clear()", "pass", f"{MANAGER} -k in_a_row"),
    Mutant("silence is not counted", f"{LIBRARY}/workers/manager.py", "worker.silent_seconds += waited", "pass", f"{MANAGER} -k silent --timeout 60"),
    Mutant("a waiting worker counts as hanging", f"{LIBRARY}/workers/manager.py", "self._hang_seconds and not worker.asking and", "self._hang_seconds and", f"{MANAGER} -k waits_for_a_file"),
    Mutant("lost progress counts", f"{LIBRARY}/workers/manager.py", "self._on_progress(-worker.progress_in_hand)", "pass", f"{MANAGER} -k dead_worker"),
    Mutant("workers do not inherit the lease", f"{LIBRARY}/workers/worker.py", "send_handle(ours, descriptor, process.pid)", "pass", f"{MANAGER} -k lock --timeout 30"),
    Mutant("workers outlive their parent", f"{LIBRARY}/workers/lifetime.py", ".prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)", "", f"{MANAGER} -k dies_with --timeout 30"),
    Mutant("the wrong parent is served", f"{LIBRARY}/workers/lifetime.py", "if os.getppid() != parent:", "if False:", "unit/workers/test_lifetime.py --timeout 30"),
    # Embedding
    Mutant("retries have as many tokens", f"{LIBRARY}/embedding/worker.py", ">> (settings.attempt - 1)", ">> 0", "workflow/test_failure_policies.py -k half_the_tokens"),
    Mutant("the budget is not halved after a shortage", f"{LIBRARY}/embedding/worker.py", "token_budget = max(1, token_budget // 2)", "pass", "unit/embedding/test_worker.py"),
    Mutant("the last attempt fails too", f"{LIBRARY}/embedding/job.py", "settings.attempt < settings.last_attempt", "settings.attempt <= settings.last_attempt", "unit/embedding workflow/test_failure_policies.py -k 'disk or last_attempt'"),
    Mutant("failures are not written", f"{LIBRARY}/embedding/job.py", "failures += [failure for file in failed for failure in _shard_failures(file)]", "", "workflow/test_failure_policies.py -k 'last_attempt or abort'"),
    Mutant("failures in segments are not written", f"{LIBRARY}/embedding/job.py", "for failure in stores[path].read(shards[path]).failures]", "for failure in ()]", "workflow/test_failure_policies.py -k success"),
    Mutant("the checkpoint is not looked at before a slot is taken", f"{LIBRARY}/embedding/job.py", "check_unchanged(settings.checkpoint, settings.fingerprint.checkpoint, settings.checkpoint_stamp)", "pass", "unit/embedding/test_faults.py -k before_the_job"),
    # Engine
    Mutant("epsilon is PyTorch's of another layer", f"{LIBRARY}/checkpoint/families.py", "EPSILON = 1e-5", "EPSILON = 1e-3", PACKED),
    Mutant("the last layer is not normalised", f"{LIBRARY}/engine/transformer.py", "self.operations.straight(x), *self.weights.last_norm, EPSILON, torch.float32\n", "self.operations.straight(x), *layer.ffn_norm, EPSILON, torch.float32\n", PACKED),
    Mutant("a representation is the stream itself", f"{LIBRARY}/engine/transformer.py", "straight(x).to(torch.float32, copy=True)", "straight(x).to(torch.float32)", PACKED),
    Mutant("what a layer of ESM C adds is not divided", f"{LIBRARY}/engine/weights.py", " / (dimensions.layers / depth) ** 0.5", "", FAMILIES),
    Mutant("learned positions begin at the padding's", f"{LIBRARY}/engine/weights.py", "[PAD + 1 :]", "[PAD:]", FAMILIES),
    Mutant("the gate is the other half", f"{LIBRARY}/engine/transformer.py", "F.silu(gate) * up", "F.silu(up) * gate", FAMILIES),
    Mutant("norms of queries and keys have no weights", f"{LIBRARY}/engine/attention.py", "eps=EPSILON) * weight.view(2, -1)", "eps=EPSILON)", FAMILIES),
    Mutant("the mask of ESM-1b keeps its embedding", f"{LIBRARY}/checkpoint/convert.py", "tensors[name][_MASK:][:1] = 0", "pass", FAMILIES),
    Mutant("int8 is for every family", f"{LIBRARY}/checkpoint/models.py", 'method["precision"] == "int8" and not family.eight_bits', "False", FAMILIES),
    Mutant("gate and up are not neighbours in 8 bits", f"{LIBRARY}/engine/eight_bit.py", "(paired(rows, 1) for rows in fc1)", "fc1", f"{FAMILIES} -k 8_bits"),
    Mutant("the gate is the other one in 8 bits", f"{LIBRARY}/engine/kernels/plain_eight_bits.py", "F.silu(gate) * up", "F.silu(up) * gate", f"{FAMILIES} -k 8_bits"),
    Mutant("in 8 bits queries of ESM C are paired", f"{LIBRARY}/engine/eight_bit.py", "if not family.query_key_norms:", "if True:", f"{FAMILIES} -k 8_bits"),
    Mutant("in 8 bits weights of norms are biases", f"{LIBRARY}/engine/eight_bit.py", "(of_qk, layer.qk) if family.query_key_norms else", "(layer.qk, layer.qk) if family.query_key_norms else", f"{FAMILIES} -k 8_bits"),
    Mutant("more residues than positions reach the model", f"{LIBRARY}/engine/packed.py", "longest is not None and (most", "False and (most", FAMILIES),
    Mutant("the fingerprint does not name the family", f"{LIBRARY}/method.py", 'arithmetic if name == "ESM-2" else', "arithmetic if True else", FAMILIES),
    Mutant("any heads that a configuration says", f"{LIBRARY}/checkpoint/esm_c.py", "or width % (2 * heads):", "or False:", "unit/checkpoint/test_esm_c_layouts.py"),
    Mutant("the mean has cls in it", f"{LIBRARY}/engine/packing.py", "= first, first + 1, first + 1 + residues\n", "= first, first, first + 1 + residues\n", f"{PACKED} {PACKING}"),
    Mutant("positions go on through a pack", f"{LIBRARY}/engine/packing.py", "np.arange(total) - np.repeat(starts[:-1], every_length)", "np.arange(total)", f"{PACKED} {PACKING}"),
    Mutant("eos is a residue", f"{LIBRARY}/engine/packing.py", "is_residue[first + 1 + residues] = False", "pass", f"{PACKED} {PACKING}"),
    Mutant("packs are over the budget by a frame", f"{LIBRARY}/engine/packing.py", "tokens = lengths[index] + FRAME", "tokens = lengths[index]", PACKING),
    Mutant("no tail mask", f"{LIBRARY}/engine/kernels/sixteen_bits.py", 'scores = tl.where((row < keys_left)[None, :], scores, -float("inf"))', "pass", KERNELS),
    Mutant("a dropped rescale", f"{LIBRARY}/engine/kernels/sixteen_bits.py", "value, mixed * shrink[:, None])", "value, mixed)", KERNELS),
    Mutant("a flipped rotation", f"{LIBRARY}/engine/kernels/sixteen_bits.py", "(first * c - second * s)", "(first * c + second * s)", KERNELS),
    Mutant("windows end one residue early", f"{LIBRARY}/method.py", "last = residues - length\n", "last = residues - length - 1\n", METHOD),
    Mutant("windows do not overlap", f"{LIBRARY}/method.py", "(*range(0, last, length - self.window_overlap), last)", "(*range(0, last, length), last)", METHOD),
    Mutant("a residue in two windows counts twice", f"{LIBRARY}/engine/windows.py", "(total.T / times).T", "total", f"{WINDOWS} {EXTRACTION} -k 'windows or truncated'"),
    Mutant("a maximum may be that of cls", f"{LIBRARY}/engine/packed.py", '"max", offsets=pack.runs, axis=0, unsafe=True)[1::3]', '"max", offsets=pack.runs, axis=0, unsafe=True)[::3]', f"{PACKED} -k everything"),
    Mutant("a pseudo-perplexity is of a sum", f"{LIBRARY}/engine/packed.py", 'torch.segment_reduce(own, "mean"', 'torch.segment_reduce(own, "sum"', f"{PACKED} -k everything"),
    Mutant("a sequence is truncated one residue early", f"{LIBRARY}/engine/extraction.py", "residues = [sequence[: long.embedded(len(sequence))]", "residues = [sequence[: long.embedded(len(sequence)) - 1]", f"{EXTRACTION} -k truncated"),
    Mutant("what is in flight is not waited for", f"{LIBRARY}/engine/extraction.py", "while self._in_flight:\n            if another", "while False:\n            if another", f"{EXTRACTION} -k 'fit or memory'"),
    Mutant("the engine's budget stays after a shortage", f"{LIBRARY}/engine/extraction.py", "self.budget = max(self.budget // 2, 1)", "pass", f"{EXTRACTION} -k budget --timeout 30"),
    Mutant("only the first column is looked at for NaN", f"{LIBRARY}/engine/extraction.py", "np.isfinite(array).reshape(len(array), -1).all(axis=1)", "np.isfinite(array).reshape(len(array), -1)[:, 0]", f"{EXTRACTION} -k finite"),
    Mutant("NaN is not tried in fp32", f"{LIBRARY}/engine/extraction.py", "if self._non_finite:\n", "if False:\n", f"{EXTRACTION} -k 'nan or overflows'"),
    Mutant("weights of both precisions stay", f"{LIBRARY}/engine/packed.py", "self.model.unload()\n        release_memory()\n        exact", "exact", f"{EXTRACTION} -k never_in_memory"),
    Mutant("cuBLAS's shortage is no shortage", f"{LIBRARY}/engine/memory.py", '"alloc_failed",', "", f"{EXTRACTION} -k shortage"),
    # Variants
    Mutant("what is not masked stays as it was", f"{LIBRARY}/engine/transformer.py", "x / pack.unmasked[:, None]", "x", f"{VARIANTS} -k fair_esms"),
    Mutant("a mask is a token like others", f"{LIBRARY}/engine/weights.py", "scaled[MASK] = 0", "pass", f"{VARIANTS} -k fair_esms"),
    Mutant("a place is at the end of its window", f"{LIBRARY}/variants/copies.py", "place - 1 - longest // 2", "place - longest", "unit/variants/test_copies.py"),
    Mutant("of several substitutions the last one counts", f"{LIBRARY}/collect/variants.py", "np.add.at(columns[name], row, (", "columns[name].__setitem__(row, (", f"{VARIANTS} -k fair_esms"),
    Mutant("a failed copy's rows are scored", f"{LIBRARY}/collect/variants.py", "reasons[of], details[of] = failure.reason.value, failure.detail", "pass", f"{VARIANTS} -k copy_that_failed"),
    Mutant("what is stored is computed again", f"{LIBRARY}/plan/planning.py", "StoredSequences(store), work[kind]", "None, work[kind]", f"{VARIANTS} -k only_what_is_new"),
    # Store
    Mutant("segments of another fingerprint are read", f"{LIBRARY}/store/segments.py", ' or metadata.get("fingerprint") != fingerprint', "", SEGMENTS),
    Mutant("digests are not compared with their checksum", f"{LIBRARY}/store/segments.py", '("digests", "lengths", *arrays))', "())", SEGMENTS),
    Mutant("a segment with failures stays for good", f"{LIBRARY}/store/segments.py", "(not there.failures or len(there) > len(segment))", "(True)", SEGMENTS),
    Mutant("live temporary files are removed", f"{LIBRARY}/store/segments.py", "> LEFT_OVER_SECONDS:", "> 0:", SEGMENTS),
    Mutant("a replaced segment is noticed by its length only", f"{LIBRARY}/store/gather.py", "zlib.crc32(np.ascontiguousarray(segment.digests).data)", "len(segment.digests)", GATHER),
    Mutant("rows come in the order of the segments", f"{LIBRARY}/store/gather.py", "target[places[part]] = copied", "target[np.sort(places)[part]] = copied", GATHER),
    Mutant("half a digest is a digest", f"{LIBRARY}/store/digests.py", "here = self.low[at[looking]] == low[looking]", "here = np.ones(len(looking), bool)", DIGESTS + " " + GATHER),
    Mutant("a damaged segment is counted on", f"{LIBRARY}/store/lookup.py", "(lambda name: store.find(name, check=True) is not None)", "(lambda name: True)", LOOKUP),
    Mutant("a changed segment keeps its place in the index", f"{LIBRARY}/store/lookup.py", "if stamps.get(name) == stamp}", "if name in stamps}", LOOKUP),
    Mutant("results are private under mkstemp", f"{LIBRARY}/files.py", "os.chmod(path, everything & (~_umask() | shared) | (path.stat().st_mode & stat.S_ISGID))", "pass", FILES),
    Mutant("files are written in place", f"{LIBRARY}/files.py", "yield temporary\n        with open", "yield target\n        with open", FILES),
    # Plan
    Mutant("the digest is of the wrong length", f"{LIBRARY}/inputs/residues.py", "hasher.update(residues[start:end])", "hasher.update(residues[start : end - 1])", DIGESTS),
    Mutant("a stop at the end stays", f"{LIBRARY}/inputs/residues.py", 'return "*" if self.gaps == "keep" else "*."', 'return ""', FASTA),
    Mutant("too long is one residue more", f"{LIBRARY}/inputs/residues.py", "lengths > policy.max_residues", "lengths > policy.max_residues + 1", f"{FASTA} -k limit"),
    Mutant("names of segments depend on the order", f"{LIBRARY}/plan/shards.py", "for digest in sorted(digests):", "for digest in digests:", SEGMENTS),
    Mutant("a damaged shard is embedded", f"{LIBRARY}/plan/shards.py", "if header[1:].strip() != sequence_digest(sequence).hex():", "if False:", f"{PLANNING} -k shard"),
    Mutant("repeats are planned again", f"{LIBRARY}/plan/dealing.py", "self._seen.find(window.digests[first]) < 0]", "self._seen.find(window.digests[first]) < 9]", f"{PLANNING} -k 'once or repeats'"),
    Mutant("groups are dealt by number, not by cost", f"{LIBRARY}/plan/dealing.py", "(load + cost, number)", "(load + 1, number)", f"{PLANNING} -k groups_differ"),
    Mutant("an older input is no change", f"{LIBRARY}/files.py", "return status.st_size, status.st_mtime_ns", "return status.st_size, 0", "unit/plan/test_freshness.py"),
    # Collect
    Mutant("lost records are not noticed", f"{LIBRARY}/collect/joining.py", "if self.lost:", "if False:", COLLECTING),
    Mutant("records need not add up", f"{LIBRARY}/collect/joining.py", "if self.records != planned or", "if", COLLECTING),
    Mutant("a failure of an earlier run goes before a vector", f"{LIBRARY}/collect/joining.py", "planned & ~embedded, failures)", "planned, failures)", COLLECTING),
    Mutant("the store is not read through before collecting", f"{LIBRARY}/collect/collecting.py", "settings.threads, check=True)", "settings.threads, check=False)", COLLECTING),
    Mutant("what an earlier run stored is not collected", f"{LIBRARY}/collect/collecting.py", "sorted(names.union(plan.stored_segments))", "sorted(names)", COLLECTING),
    Mutant("pooled vectors are not rounded", f"{LIBRARY}/collect/collecting.py", 'half=settings.pooled_precision == "fp16"', "half=False", FORMATS + " -k rounded"),
    Mutant("truncated records are marked windowed", f"{LIBRARY}/collect/joining.py", '"truncated": cut & (not long.windows)', '"truncated": cut & long.windows', COLLECTING),
    # Certificate and end
    Mutant("a certificate over nothing passes", f"{LIBRARY}/verify/verdict.py", "passed = None if not (problems or common or outputs) else", "passed =", CERTIFICATE + " -k nothing"),
    Mutant("cosine has no limit", f"{LIBRARY}/verify/agreement.py", "agreement.cosine >= self.min_cosine and", "", f"{CERTIFICATE} {RECOMPUTE} -k 'limit or caught'"),
    Mutant("relative error has no limit", f"{LIBRARY}/verify/agreement.py", " and agreement.relative_error <= self.max_relative_error", "", f"{CERTIFICATE} {RECOMPUTE} -k 'limit or caught'"),
    Mutant("the median has no limit", f"{LIBRARY}/verify/agreement.py", "if mistake is None and error > allowed:", "if False:", f"{CERTIFICATE} {RECOMPUTE} -k 'limit or caught'"),
    Mutant("vectors of another length pass", f"{LIBRARY}/verify/agreement.py", "if abs(scale - 1) > limits.scale:", "if False:", RECOMPUTE + " -k length"),
    Mutant("what was verified stays verified for other numbers", f"{LIBRARY}/verify/remembered.py", "if numbers.get(line.digest) == line.numbers:", "if True:", CERTIFICATE + " -k 'changed or remember'"),
    Mutant("a failed certificate ends well", f"{LIBRARY}/report/finishing.py", "if certificate and certificate.passed is False:", "if False:", CERTIFICATE + " -k advice"),
    Mutant("nothing embedded ends well", f"{LIBRARY}/report/finishing.py", "if with_content and not summary.embedded:", "if False:", "unit/report/test_finishing.py"),
    Mutant("an earlier certificate stays beside a run without", f"{LIBRARY}/report/finishing.py", '(results / "certificate.json").unlink()', "pass", "unit/report/test_finishing.py"),
    Mutant("an adapter counts for half of its rank", f"{LIBRARY}/checkpoint/adapter.py", 'config.get("use_rslora") else rank)', 'config.get("use_rslora") else 2 * rank)', ADAPTER),
    Mutant("an adapter's factors change places", f"{LIBRARY}/checkpoint/adapter.py", 'product.T if kind == "embedding" else product', "product.T", ADAPTER),
    Mutant("an adapter of another kind is merged", f"{LIBRARY}/checkpoint/adapter.py", "if variants := [name for name in _VARIANTS if config.get(name)]:", "if variants := []:", ADAPTER),
    Mutant("an adapter of the classifier alone passes for one", f"{LIBRARY}/checkpoint/adapter.py", "if not changed:", "if False:", ADAPTER),
    Mutant("maps are those of the layer above", f"{LIBRARY}/engine/attention.py", "self._layer += 1", "self._layer += 1 if self._layer else 0", MAPS),
    Mutant("a map's heads are its tokens", f"{LIBRARY}/collect/writers/base.py", "part.T.reshape(-1, n + 2, n + 2)", "part.reshape(-1, n + 2, n + 2)", MAPS),
    Mutant("the rows of cls and eos are not counted", f"{LIBRARY}/plan/cost.py", "self.pairs + 4 * self.residues + 4 * self.sequences", "self.pairs", MAPS),
    Mutant("long sequences get maps", f"{LIBRARY}/config/configuration.py", 'if config["long_sequences"] == "whole" or longest > most:', "if False:", MAPS),
    Mutant("what a killed step left stays", f"{LIBRARY}/files.py", "if found and found[1] in written and", "if False and found[1] in written and", FILES),
]  # fmt: skip


class Copies:
    """Copies of the project, one for each thread: what git tracks or would, and links to what it ignores."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine = threading.local()

    def mine(self) -> Path:
        if not hasattr(self._mine, "copy"):
            self._mine.copy = self._folder / threading.current_thread().name
            self._make(self._mine.copy)
        return self._mine.copy

    @staticmethod
    def _make(copy: Path) -> None:
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0"):
            if (PROJECT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, copy / name)
        (copy / "resources" / "models").symlink_to(PROJECT / "resources" / "models")
        (copy / ".venv").symlink_to(PROJECT / ".venv")


def survives(mutant: Mutant, copy: Path) -> str | None:
    """Why the mutant counts as alive, None if a test failed because of it."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"{mutant.file} has the line {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(mutant.tests)],
            cwd=copy / "tests",
            # What is compiled of a change must not be taken for the file as it was, nor the other way round.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            timeout=_SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return f"its tests had not ended after {_SECONDS} seconds ({mutant.tests})"
    finally:
        path.write_text(text)
    if ran.returncode == pytest.ExitCode.TESTS_FAILED:
        return None
    return f"{ran.stdout.strip().splitlines()[-1:]} ({mutant.tests})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only.lower() in f"{m.name} {m.file} {m.tests}".lower()]
    alive = []
    with tempfile.TemporaryDirectory(prefix="esmflow-mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies = Copies(Path(folder))

        def try_one(mutant: Mutant) -> tuple[Mutant, str | None, float]:
            began = time.monotonic()
            return mutant, survives(mutant, copies.mine()), time.monotonic() - began

        for number, (mutant, why, seconds) in enumerate(pool.map(try_one, chosen), start=1):
            print(f"{number:3d}. {'SURVIVED' if why else 'killed  '} {seconds:5.1f} s  {mutant.name}", flush=True)
            if why:
                print(f"     {mutant.file}: {why}", flush=True)
                alive.append(mutant)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants killed; survivors: {len(alive)}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
