"""Produces the summary that a run ends with, and applies the failure policy."""

from pathlib import Path

from esmflow.files import atomic_path, read_json
from esmflow.steps import StepError, logged_step, read_model_info
from esmflow.summary import summary_lines


def main(snakemake) -> None:
    inputs = snakemake.input
    summary = read_json(inputs.summary)
    lines = summary_lines(
        summary, read_model_info(inputs.model).name, inputs.embeddings, inputs.manifest, inputs.failures
    )
    without = summary["records"] - summary["embedded"]
    if snakemake.params.failure_policy == "error" and without:
        # A group without its run.json is one that Snakemake runs again; the shards that succeeded are in the store.
        for run in inputs.runs:
            if read_json(run)["failed_sequences"]:
                Path(run).replace(Path(run).with_name("failed-run.json"))
        again = "the same command again tries the failed shards once more" if summary["failed"] else "mend the input"
        raise StepError(
            "\n".join([*lines, f"failures.policy is error and {without} records have no embedding; {again}"])
        )
    with atomic_path(snakemake.output[0]) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
