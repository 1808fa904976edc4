"""Produces the summary that a run ends with and the joined log, and ends the run with an error if there is reason."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.report.finishing import FinishSettings, finish
from esmflow.report.summary import Places, command_of
from esmflow.step import logged_step, run_command_line


def finish_settings(snakemake) -> FinishSettings:
    inputs = snakemake.input
    return FinishSettings(
        summary=inputs.summary,
        certificate=inputs.certificate[0] if inputs.certificate else None,
        variants=inputs.variants[0] if inputs.variants else None,
        runs=inputs.runs,
        model=CheckpointInfo.read(inputs.model).name,
        places=Places(
            embeddings=inputs.embeddings,
            manifest=inputs.manifest,
            report=inputs.report[0] if inputs.report else None,
            failures=inputs.failures,
            command=command_of(run_command_line()),
        ),
        fail_without_embedding=snakemake.params.failure_policy == "error",
        output=snakemake.output[0],
        logs=snakemake.params.logs,
        joined_log=snakemake.params.joined_log,
        shows_summary=snakemake.params.shows_summary,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], [*snakemake.output, snakemake.params.joined_log]):
        finish(finish_settings(snakemake))
