"""Produces the certificate: a sample of the run's embeddings, computed again with fair-esm's own model."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.plan.run_plan import Plan
from esmflow.slots.leases import SlotSettings
from esmflow.step import logged_step, make_fingerprint
from esmflow.verify.verifying import VerifySettings, verify


def verify_settings(snakemake) -> VerifySettings:
    inputs, params = snakemake.input, snakemake.params
    model = CheckpointInfo.read(inputs.model)
    plan = Plan.read(inputs.plan)
    return VerifySettings(
        candidates=inputs.candidates,
        manifest=inputs.manifest,
        embeddings=inputs.embeddings,
        formats=params.formats,
        store=params.store,
        stored_segments=plan.stored_segments,
        model=model.name,
        checkpoint=inputs.checkpoint,
        checkpoint_stamp=plan.checkpoint_stamp,
        fingerprint=make_fingerprint(model, params.method),
        sample=params.sample,
        seed=params.seed,
        min_cosine=None if params.min_cosine == "auto" else params.min_cosine,
        max_relative_error=None if params.max_relative_error == "auto" else params.max_relative_error,
        slots=SlotSettings(
            params.device,
            None if params.cpu_slots == "auto" else params.cpu_slots,
            params.lock_folder,
            60 * params.wait_minutes,
        ),
        threads=snakemake.threads,
        log_file=snakemake.log[0],
    )


if __name__ == "__main__":
    # A spawned worker would run this file once more, and not find it if the workflow was deployed from a git host.
    del __file__
    with logged_step(snakemake.log[0], snakemake.output, snakemake.resources.attempt):
        verify(verify_settings(snakemake)).write(snakemake.output[0])
