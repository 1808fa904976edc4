"""How long a job on a slot takes and how much memory it needs, estimated before it runs, without torch.

docs/resources.md says in words how the estimates are made and what they were held against.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.arrays import ATTENTION, Outputs
from esmflow.checkpoint.models import ModelDimensions, guess_model
from esmflow.inputs.streams import COMPRESSED_SUFFIXES
from esmflow.method import LongSequences
from esmflow.plan.cost import SHORTEST_JOB_SECONDS, CostModel, Workload, shard_limit, useful_groups
from esmflow.verify import CONTACT_MAP_BYTES, LONGEST, RESIDENT_BYTES, TOKENS_BY_LAYER

if TYPE_CHECKING:
    from esmflow.plan.run_plan import Plan

# Sustained speed under `device_tflops: auto`: of one CPU thread, of one GPU.
_TFLOPS = {"cpu": 0.05, "cuda": 100.0}
# On a GPU, of the packed engine's: the reference engine pads, and its kernels are smaller.
_REFERENCE_ENGINE_SPEED = 0.2
_START_SECONDS = {"cpu": 2.0, "cuda": 10.0}
_WEIGHTS_PER_SECOND = 250e6
# Of FASTA as it comes, headers and line ends included: 0.65 to 0.9 plain, 1.2 to 1.7 compressed.
_RESIDUES_PER_BYTE, _RESIDUES_PER_COMPRESSED_BYTE = 0.75, 1.4
_RESIDUES_PER_SEQUENCE = 300
# Of a table of variants: rows of some 16 bytes, of which four share a place, and with it a masked copy.
_MASKED_RESIDUES_PER_BYTE = _RESIDUES_PER_SEQUENCE / (16 * 4)
_CPU_BATCH_TOKENS = 4096
# Of a sequence that the certificate draws, from every length bin the same number.
_SAMPLED_RESIDUES = 600
# In fp32, as a part of a GPU's speed in 16 bits.
_FP32_SPEED = 0.1
# MB: the job's own process and Snakemake's; a worker's interpreter and libraries, on a GPU with CUDA's host side.
_JOB_MB = 250
_WORKER_MB = {"cpu": 280, "cuda": 3000}


@dataclass(frozen=True)
class GroupWork:
    """What one shard group has to do; `planned` tells whether that is known or guessed from the inputs' sizes."""

    residues: int
    sequences: int
    planned: bool


@dataclass(frozen=True)
class JobSettings:
    """What of the configuration matters to a job's size. device: `cpu` or `cuda`. workers: GPUs of the job."""

    device: str
    workers: int
    threads: int
    tflops: float
    engine: str
    outputs: Outputs
    shard_residues: int
    long: LongSequences
    token_budget: int | None


@dataclass(frozen=True)
class JobEstimate:
    """Seconds from the start of a job to its end with its slots free, and MB of host memory at its peak."""

    seconds: float
    memory_mb: float

    def runtime_minutes(self, attempt: int) -> int:
        """What to ask a scheduler for: twice the estimate, ten minutes at least, times the attempt."""
        return attempt * max(10, math.ceil(2 * self.seconds / 60))

    def memory_mb_to_ask_for(self, attempt: int) -> int:
        """What to ask a scheduler for: a half more than the estimate, in steps of 100, times the attempt."""
        return attempt * 100 * math.ceil(1.5 * self.memory_mb / 100)


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver, or that of WSL, is on this machine: told without a library that Snakemake lacks."""
    return any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg"))


def job_settings(config: Mapping[str, Any], device: str) -> JobSettings:
    """The settings of a validated configuration."""
    return JobSettings(
        device=device,
        workers=config["gpus_per_job"],
        threads=config["threads"],
        tflops=_TFLOPS[device] if config["device_tflops"] == "auto" else config["device_tflops"],
        engine=config["engine"],
        # Layers as the user counts them: how many they are is what matters.
        outputs=Outputs(tuple(config["layers"]), tuple(config["include"]), config["per_residue_precision"]),
        shard_residues=config["shard_residues"],
        long=LongSequences.configured(config),
        token_budget=None if config["batch_tokens"] == "auto" else config["batch_tokens"],
    )


def estimate_job(work: GroupWork, model: ModelDimensions, settings: JobSettings) -> JobEstimate:
    """Estimates one embed job. An empty group loads no model and takes a moment."""
    if not work.residues:
        return JobEstimate(1.0, _JOB_MB)
    parameters = model.parameters
    length = _mean_length(work)
    load = _START_SECONDS[settings.device] + parameters / _WEIGHTS_PER_SECOND
    worker = _WORKER_MB[settings.device] + _weights_mb(parameters, settings) + _working_mb(model, settings)
    results = _shard_mb(work, model, settings, length)
    seconds = load + _operations(work, model, settings.long) / _speed(settings)
    return JobEstimate(seconds, _JOB_MB + settings.workers * (worker + results))


def _mean_length(work: GroupWork) -> int:
    """Stands for all lengths: attention's share, the only part that is not linear, is small at these."""
    return max(1, round(work.residues / max(1, work.sequences)))


def _operations(work: GroupWork, model: ModelDimensions, long: LongSequences) -> float:
    return work.sequences * CostModel(model, long).cost(_mean_length(work))


def _speed(settings: JobSettings) -> float:
    """Operations a second of all workers of a job."""
    on_cpu = settings.device == "cpu"
    speed = settings.tflops * 1e12 * settings.workers * (settings.threads if on_cpu else 1)
    return speed if on_cpu or settings.engine == "packed" else speed * _REFERENCE_ENGINE_SPEED


@dataclass(frozen=True)
class Given:
    """What a run was given for all of its jobs together, each None where that was not said.

    jobs: on a cluster. gpus: `--resources gpu`. memory_mb: of this machine.
    """

    cores: int | None
    jobs: int | None
    gpus: int | None
    memory_mb: float

    def jobs_at_once(self, settings: JobSettings) -> int:
        """How many embed jobs run side by side: as Snakemake counts, and no more than there are GPUs here."""
        limits = [1_000_000 if self.jobs is None else self.jobs]
        # On CPUs a run may well say gpu=0.
        if self.gpus:
            limits.append(self.gpus // settings.workers)
        elif self.jobs is None and settings.device == "cuda":
            limits.append(_gpus_here() // settings.workers)
        if self.cores is not None and self.jobs is None:
            limits.append(self.cores // (settings.workers * settings.threads))
        return max(1, min(limits))


def resolve_threads(config: Mapping[str, Any], device: str, given: Given, inputs: Sequence[str]) -> int:
    """The threads of a worker. `auto`: OMP_NUM_THREADS where it is set, else 2 beside a GPU, and on a CPU 1.

    Small models are fastest so, with as many jobs as there are cores. Cores for which there is no job, since few GPUs
    or little memory are given, are shared out among the jobs.
    """
    if config["threads"] != "auto":
        return config["threads"]
    if (wanted := os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]).isdecimal() and int(wanted):
        return int(wanted)
    if device == "cuda":
        return 2
    if given.cores is None or given.jobs is not None:
        return 1
    settings = job_settings({**config, "threads": 1}, device)
    memory = estimate_job(_guessed(inputs), guess_model(config["base_model"] or config["model"]), settings).memory_mb
    jobs = min(given.jobs_at_once(settings), max(1, int(given.memory_mb / memory)))
    return max(1, given.cores // (jobs * settings.workers))


@dataclass(frozen=True)
class Groups:
    """How many shard groups a run has, and what planning needs to know of why.

    work: operations, guessed from the inputs' sizes; a number that was decided for it stays when all is done. least: of
    one group, where there is less than was guessed. Both are 0 where the configuration says how many groups there are.
    """

    number: int
    work: float = 0.0
    least: float = 0.0


def decide_groups(
    config: Mapping[str, Any], device: str, given: Given, plan: str | os.PathLike[str], inputs: Sequence[str]
) -> Groups:
    """The number of shard groups, see `useful_groups`. What a run that has ended was cut into stays as it is."""
    if config["groups"] != "auto":
        return Groups(config["groups"])
    settings = job_settings(config, device)
    # The model as its name says: what is known of it must not change while a run goes on.
    masked = _MASKED_RESIDUES_PER_BYTE * os.path.getsize(config["variants"]) if config["variants"] else 0
    model = guess_model(config["base_model"] or config["model"])
    work = _operations(_guessed(inputs, more=masked), model, settings.long)
    least = SHORTEST_JOB_SECONDS * settings.tflops * 1e12
    found = _read_plan(plan)
    if found and found.work == work and all(run.exists() for run in _runs(plan, len(found.groups))):
        return Groups(len(found.groups), work, least)
    return Groups(useful_groups(work / _speed(settings), given.jobs_at_once(settings)), work, least)


def group_names(number: int) -> list[str]:
    """What groups are called: their numbers, all of one width."""
    return [f"{group:0{len(str(number - 1))}d}" for group in range(number)]


def _runs(plan: str | os.PathLike[str], groups: int) -> list[Path]:
    return [Path(plan).parents[1] / "embed" / f"group-{group}" / "run.json" for group in group_names(groups)]


def _gpus_here() -> int:
    """How many GPUs this process may use, told without a library that Snakemake lacks."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([token for token in visible.split(",") if token.strip()])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 1


def estimate_verification(
    model: ModelDimensions, settings: JobSettings, sample: int, plan: str | os.PathLike[str]
) -> JobEstimate:
    """Estimates the certificate's job, which computes `sample` sequences with fair-esm's module in fp32.

    Twice as many where a few of very many are new. plan: `plan.json`, which may not be there yet.
    """
    sampled = Workload(sequences=2 * sample, residues=2 * sample * _SAMPLED_RESIDUES)
    sampled.pairs = sampled.residues * _SAMPLED_RESIDUES
    parameters, on_cpu = model.parameters, settings.device == "cpu"
    # What is too large to stay in memory is read layer by layer, for each batch anew.
    stays = 4 * parameters <= RESIDENT_BYTES
    loads = 1 if stays else math.ceil(sampled.residues / TOKENS_BY_LAYER)
    load = _START_SECONDS[settings.device] + loads * parameters / _WEIGHTS_PER_SECOND
    operations = sampled.sequences * CostModel(model, settings.long).cost(_SAMPLED_RESIDUES)
    speed = settings.tflops * 1e12 * (settings.threads if on_cpu else _FP32_SPEED)
    weights = 4 * parameters if stays and on_cpu else 2 * 4 * parameters / model.layers
    memory = _JOB_MB + _WORKER_MB[settings.device] + (weights + 28 * _planned_records(plan)) / 1e6
    # Maps are read sequence by sequence, all else at once.
    kinds = tuple(kind for kind in settings.outputs.include if kind != ATTENTION)
    memory += _results_mb(sampled, model, replace(settings, outputs=replace(settings.outputs, include=kinds)))
    if on_cpu:
        longest = max(end - start for start, end in settings.long.pieces(LONGEST))
        tokens = longest if stays else max(longest, TOKENS_BY_LAYER)
        layers = len(settings.outputs.layers)
        # fair-esm has a layer's attention maps three times; and the layers that are asked for, with their neighbours.
        memory += 4 * tokens * (3 * model.heads * longest + (16 + 3 * layers) * model.hidden) / 1e6
        if {"contacts", ATTENTION} & set(settings.outputs.include):
            memory += min(CONTACT_MAP_BYTES, 12 * model.layers * model.heads * longest**2) / 1e6
    return JobEstimate(load + operations / speed, memory)


def _weights_mb(parameters: int, settings: JobSettings) -> float:
    """On a CPU they stay in fp32; on their way to a GPU only a part of them is on the host at a time."""
    return 4 * parameters / 1e6 if settings.device == "cpu" else 1 * parameters / 1e6


def _working_mb(model: ModelDimensions, settings: JobSettings) -> float:
    """A batch in flight on a CPU: the stream, its norm, q k v, attention's result and fc1's, in fp32."""
    if settings.device != "cpu":
        return 0.0
    tokens = max(settings.token_budget or _CPU_BATCH_TOKENS, settings.long.max_residues or 0)
    return tokens * (12 * model.hidden + model.activations) * 4 / 1e6


def _shard_mb(work: GroupWork, model: ModelDimensions, settings: JobSettings, length: int) -> float:
    residues = min(work.residues, settings.shard_residues, shard_limit(settings.outputs, model, length))
    shard = Workload(sequences=math.ceil(residues / length), residues=residues, pairs=residues * length)
    return _results_mb(shard, model, settings)


def _results_mb(work: Workload, model: ModelDimensions, settings: JobSettings) -> float:
    """Results: batch by batch, put together, and once more on their way to the disk."""
    outputs = settings.outputs
    shape = model.hidden, model.heads
    return 3 * sum(work.rows(array) * outputs.row_bytes(array, *shape) for array in outputs.arrays()) / 1e6


def guess_work(
    group: int, groups: int, plan: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]
) -> GroupWork:
    """A group's share: from `plan.json` where it is there, else an equal part of what the inputs' sizes suggest."""
    found = _read_plan(plan)
    planned = found.groups if found else ()
    if len(planned) == groups:
        return GroupWork(planned[group].residues, planned[group].sequences, True)
    return _guessed(inputs, groups)


def _guessed(inputs: Sequence[str | os.PathLike[str]], groups: int = 1, more: float = 0.0) -> GroupWork:
    residues = math.ceil((_residues_in(tuple(map(str, inputs))) + more) / groups)
    return GroupWork(residues, math.ceil(residues / _RESIDUES_PER_SEQUENCE), False)


def _planned_records(plan: str | os.PathLike[str]) -> int:
    found = _read_plan(plan)
    return found.records if found else 0


def _read_plan(plan: str | os.PathLike[str]) -> Plan | None:
    """`plan.json`, None where there is none yet, or none that can be read."""
    try:
        return _read_plan_once(str(plan), os.stat(plan).st_mtime_ns)
    except (OSError, ValueError):
        return None


# Asked once for each of thousands of groups, of thousands of files: remembered.
@lru_cache(maxsize=4)
def _read_plan_once(plan: str, changed: int) -> Plan:
    # Here and not above: a dry run without a plan does without.
    from esmflow.plan.run_plan import Plan

    return Plan.read(plan)


@lru_cache(maxsize=4)
def _residues_in(paths: tuple[str, ...]) -> float:
    found = 0.0
    for path in paths:
        compressed = Path(path).suffix.lower() in COMPRESSED_SUFFIXES
        found += os.path.getsize(path) * (_RESIDUES_PER_COMPRESSED_BYTE if compressed else _RESIDUES_PER_BYTE)
    return found
