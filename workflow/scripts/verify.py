"""Produces the certificate: a sample of the run's embeddings, computed again with fair-esm's own model."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.plan.run_plan import Plan
from esmflow.step import logged_step, make_fingerprint
from esmflow.verify.verifying import VerifiedRun, VerifySettings, verify


def main(snakemake) -> None:
    inputs, params = snakemake.input, snakemake.params
    model = CheckpointInfo.read(inputs.model)
    plan = Plan.read(inputs.plan)
    certificate = verify(
        VerifiedRun(
            inputs.candidates, inputs.manifest, inputs.embeddings, params.formats, params.store, plan.held_segments
        ),
        model,
        make_fingerprint(model, params.method),
        VerifySettings(
            checkpoint=inputs.checkpoint,
            checkpoint_stamp=plan.checkpoint_stamp,
            sample=params.sample,
            seed=params.seed,
            min_cosine=None if params.min_cosine == "auto" else params.min_cosine,
            max_relative_error=None if params.max_relative_error == "auto" else params.max_relative_error,
            device=params.device,
            cpu_slots=params.cpu_slots,
            lock_folder=params.lock_folder,
            wait_seconds=60 * params.wait_minutes,
            threads=snakemake.threads,
            log_file=snakemake.log[0],
        ),
    )
    certificate.write(snakemake.output[0])


if __name__ == "__main__":
    # A spawned worker would run this file once more, and not find it if the workflow was deployed from a git host.
    del __file__
    with logged_step(snakemake.log[0]):
        main(snakemake)
