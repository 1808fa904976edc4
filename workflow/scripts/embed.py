"""Produces the embeddings of one shard group as segments in the store, its `run.json` and its failure list."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.embedding.job import embed_group, workers_to_use
from esmflow.embedding.settings import EmbedSettings
from esmflow.plan.run_plan import Plan
from esmflow.slots.leases import SlotSettings
from esmflow.step import logged_step, make_fingerprint


def embed_settings(snakemake) -> EmbedSettings:
    inputs, params = snakemake.input, snakemake.params
    return EmbedSettings(
        group=snakemake.wildcards.group,
        shards=inputs.shards,
        run=snakemake.output.run,
        failures=snakemake.output.failures,
        checkpoint=inputs.checkpoint,
        checkpoint_stamp=Plan.read(inputs.plan).checkpoint_stamp,
        fingerprint=make_fingerprint(CheckpointInfo.read(inputs.model), params.method),
        store=params.store,
        slots=SlotSettings(
            params.device,
            None if params.cpu_slots == "auto" else params.cpu_slots,
            params.lock_folder,
            60 * params.wait_minutes,
        ),
        workers=workers_to_use(params.gpus_per_job, snakemake.resources.gpu),
        threads=max(1, snakemake.threads // params.gpus_per_job),
        token_budget=None if params.batch_tokens == "auto" else params.batch_tokens,
        grace_seconds=params.grace_seconds,
        hang_seconds=60 * params.hang_minutes,
        attempt=snakemake.resources.attempt,
        last_attempt=params.last_attempt,
        retry_failed=params.failure_policy == "error",
        log_file=snakemake.log[0],
    )


if __name__ == "__main__":
    # A spawned worker would run this file once more, and not find it if the workflow was deployed from a git host.
    del __file__
    with logged_step(snakemake.log[0], snakemake.output, snakemake.resources.attempt):
        embed_group(embed_settings(snakemake))
