"""Produces the embeddings of one shard group as segments in the store, its `run.json` and its failure list."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.embed.job import EmbedSettings, embed_group, gpus_to_use
from esmflow.plan.run_plan import Plan
from esmflow.step import logged_step, make_fingerprint


def main(snakemake) -> None:
    params = snakemake.params
    model = CheckpointInfo.read(snakemake.input.model)
    embed_group(
        snakemake.wildcards.group,
        snakemake.input.shards,
        snakemake.output.run,
        snakemake.output.failures,
        EmbedSettings(
            checkpoint=snakemake.input.checkpoint,
            checkpoint_stamp=Plan.read(snakemake.input.plan).checkpoint_stamp,
            fingerprint=make_fingerprint(model, params.method),
            store=params.store,
            batch_tokens=None if params.batch_tokens == "auto" else params.batch_tokens,
            gpus=gpus_to_use(params.gpus_per_job, snakemake.resources.gpu),
            device=params.device,
            cpu_slots=params.cpu_slots,
            lock_folder=params.lock_folder,
            wait_seconds=60 * params.wait_minutes,
            grace_seconds=params.grace_seconds,
            hang_seconds=60 * params.hang_minutes,
            threads=max(1, snakemake.threads // params.gpus_per_job),
            attempt=snakemake.resources.attempt,
            last_attempt=params.last_attempt,
            retry_failed=params.failure_policy == "error",
            log_file=snakemake.log[0],
        ),
    )


if __name__ == "__main__":
    # A spawned worker would run this file once more, and not find it if the workflow was deployed from a git host.
    del __file__
    with logged_step(snakemake.log[0], snakemake.resources.attempt):
        main(snakemake)
