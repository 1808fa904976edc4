"""Produces the report of the run: one page, and its figures for Snakemake's own report."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.report.page import write_report
from esmflow.report.run_files import RunFiles
from esmflow.report.summary import command_of
from esmflow.step import logged_step, run_command_line


def report_files(snakemake) -> RunFiles:
    inputs = snakemake.input
    return RunFiles.read(
        manifest=inputs.manifest,
        embeddings=inputs.embeddings,
        checkpoint=inputs.checkpoint,
        model=CheckpointInfo.read(inputs.model),
        plan=inputs.plan,
        store=snakemake.params.store,
        summary=inputs.summary,
        runs=inputs.runs,
        certificate=inputs.certificate[0] if inputs.certificate else None,
        variants=inputs.variants[0] if inputs.variants else None,
        command=command_of(run_command_line()),
        configuration=snakemake.config,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], snakemake.output):
        figures = dict(snakemake.output.items())
        write_report(report_files(snakemake), figures.pop("page"), figures)
