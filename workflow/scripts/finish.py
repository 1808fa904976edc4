"""Produces the summary that a run ends with, and ends the run with an error if there is reason to."""

from pathlib import Path

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.summary import Summary
from esmflow.embed.run_record import RunRecord
from esmflow.failures import Reason
from esmflow.files import atomic_path
from esmflow.report.summary import Places, command_of, summary_lines
from esmflow.step import StepError, logged_step, run_command_line
from esmflow.verify.certificate import Certificate


def main(snakemake) -> None:
    inputs = snakemake.input
    summary = Summary.read(inputs.summary)
    certificate = Certificate.read(inputs.certificate[0]) if inputs.certificate else None
    report = inputs.report[0] if inputs.report else None
    places = Places(inputs.embeddings, inputs.manifest, report, inputs.failures, command_of(run_command_line()))
    lines = summary_lines(summary, certificate, CheckpointInfo.read(inputs.model).name, places)
    ends = []
    if certificate and certificate.passed is False:
        ends += [f"the certificate was not passed ({inputs.certificate[0]}):", *certificate.problem_lines()]
    with_content = summary.records - summary.reasons.get(Reason.EMPTY_FILE, 0)
    if with_content and not summary.embedded:
        ends.append(f"nothing was embedded: none of {with_content} records; {inputs.failures} says why of each")
    without = summary.records - summary.embedded
    if snakemake.params.failure_policy == "error" and without:
        # A group without its run.json is one that Snakemake runs again; the shards that succeeded are in the store.
        for run in inputs.runs:
            if RunRecord.read(run).failed_sequences:
                Path(run).replace(Path(run).with_name("failed-run.json"))
        again = "the same command again tries the failed shards once more" if summary.failed else "mend the input"
        ends.append(f"failures.policy is error and {without} records have no embedding; {again}")
    if ends:
        raise StepError("\n".join([*lines, *ends]))
    with atomic_path(snakemake.output[0]) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
