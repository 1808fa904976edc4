"""How long an embed job takes and how much memory it needs, estimated before it runs, without torch.

docs/resources.md says in words how the estimates are made and what they were held against.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.arrays import Outputs
from esmflow.checkpoint.file import CheckpointInfo, ModelDimensions
from esmflow.checkpoint.sources import OFFICIAL_MODELS, is_path
from esmflow.files import read_json
from esmflow.inputs.streams import COMPRESSED_SUFFIXES
from esmflow.method import LongSequences
from esmflow.plan.cost import CostModel, Workload

if TYPE_CHECKING:
    from esmflow.plan.run_plan import GroupPlan

# Sustained speed under `device_tflops: auto`: of one CPU thread, of one GPU.
_TFLOPS = {"cpu": 0.05, "cuda": 100.0}
# On a GPU, of the packed engine's: the reference engine pads, and its kernels are smaller.
_REFERENCE_ENGINE_SPEED = 0.2
_START_SECONDS = {"cpu": 2.0, "cuda": 10.0}
_WEIGHTS_PER_SECOND = 250e6
# Of FASTA as it comes, headers and line ends included: 0.65 to 0.9 plain, 1.2 to 1.7 compressed.
_RESIDUES_PER_BYTE, _RESIDUES_PER_COMPRESSED_BYTE = 0.75, 1.4
_RESIDUES_PER_SEQUENCE = 300
_CPU_BATCH_TOKENS = 4096
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
    parameters = count_parameters(model)
    # The mean length stands for all: attention's share, the only part that is not linear, is small at these lengths.
    length = max(1, round(work.residues / max(1, work.sequences)))
    operations = work.sequences * CostModel(model, settings.long).cost(length)
    speed = settings.tflops * 1e12 * settings.workers * (settings.threads if settings.device == "cpu" else 1)
    if settings.engine == "reference" and settings.device == "cuda":
        speed *= _REFERENCE_ENGINE_SPEED
    load = _START_SECONDS[settings.device] + parameters / _WEIGHTS_PER_SECOND
    worker = _WORKER_MB[settings.device] + _weights_mb(parameters, settings) + _working_mb(model, settings)
    results = _shard_mb(work, model, settings, length)
    return JobEstimate(load + operations / speed, _JOB_MB + settings.workers * (worker + results))


def count_parameters(model: ModelDimensions) -> int:
    """Weights of the model: 12 D² in each layer, and the token embedding."""
    return model.layers * 12 * model.hidden**2 + 33 * model.hidden


def _weights_mb(parameters: int, settings: JobSettings) -> float:
    """On a CPU they stay in fp32; on their way to a GPU only a part of them is on the host at a time."""
    return 4 * parameters / 1e6 if settings.device == "cpu" else 1 * parameters / 1e6


def _working_mb(model: ModelDimensions, settings: JobSettings) -> float:
    """A batch in flight on a CPU: the stream, its norm, q k v, attention's result and fc1's, in fp32."""
    if settings.device != "cpu":
        return 0.0
    tokens = max(settings.token_budget or _CPU_BATCH_TOKENS, settings.long.max_residues or 0)
    return tokens * model.hidden * 16 * 4 / 1e6


def _shard_mb(work: GroupWork, model: ModelDimensions, settings: JobSettings, length: int) -> float:
    """A shard's results: batch by batch, put together, and once more on their way to the disk."""
    residues = min(work.residues, settings.shard_residues)
    shard = Workload(sequences=math.ceil(residues / length), residues=residues, pairs=residues * length)
    outputs = settings.outputs
    once = sum(shard.rows(array) * outputs.row_bytes(array, model.hidden) for array in outputs.arrays())
    return 3 * once / 1e6


def guess_model(model: str, model_info: str | os.PathLike[str]) -> ModelDimensions:
    """The model's dimensions: from `model.json` where it is there, else from the name, or the path."""
    info = Path(model_info)
    if info.exists():
        return CheckpointInfo.read(info).dimensions
    if not is_path(model):
        return OFFICIAL_MODELS[model]
    path = Path(model).expanduser()
    if path.stem in OFFICIAL_MODELS:
        return OFFICIAL_MODELS[path.stem]
    try:
        found = read_json(path / "config.json")
        return ModelDimensions(
            found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"], True, True
        )
    except (OSError, ValueError, KeyError):
        size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.bin"))
    # In fp32, as all but the largest are stored; of those half the size says enough to tell them from the others.
    fitting = [dimensions for dimensions in OFFICIAL_MODELS.values() if count_parameters(dimensions) >= 0.9 * size / 4]
    return fitting[0] if fitting else OFFICIAL_MODELS["esm2_t48_15B_UR50D"]


def guess_work(
    group: int, groups: int, plan: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]
) -> GroupWork:
    """A group's share: from `plan.json` where it is there, else an equal part of what the inputs' sizes suggest."""
    try:
        planned = _planned_groups(str(plan), os.stat(plan).st_mtime_ns)
    except (OSError, ValueError):
        planned = ()
    if len(planned) == groups:
        return GroupWork(planned[group].residues, planned[group].sequences, True)
    residues = math.ceil(_residues_in(tuple(map(str, inputs))) / groups)
    return GroupWork(residues, math.ceil(residues / _RESIDUES_PER_SEQUENCE), False)


# Asked once for each of thousands of groups, of thousands of files: remembered.
@lru_cache(maxsize=4)
def _planned_groups(plan: str, changed: int) -> tuple[GroupPlan, ...]:
    # Here and not above: a dry run without a plan does without.
    from esmflow.plan.run_plan import Plan

    return Plan.read(plan).groups


@lru_cache(maxsize=4)
def _residues_in(paths: tuple[str, ...]) -> float:
    found = 0.0
    for path in paths:
        compressed = Path(path).suffix.lower() in COMPRESSED_SUFFIXES
        found += os.path.getsize(path) * (_RESIDUES_PER_COMPRESSED_BYTE if compressed else _RESIDUES_PER_BYTE)
    return found
