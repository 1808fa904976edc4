"""Produces the embeddings in the formats asked for, the manifest, the failures, the summary and the joined log."""

from pathlib import Path

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.collecting import CollectInputs, CollectOutputs, collect
from esmflow.logs import join_logs
from esmflow.step import logged_step, make_fingerprint
from esmflow.store.segments import Store


def main(snakemake) -> None:
    inputs, outputs, params = snakemake.input, snakemake.output, snakemake.params
    model = CheckpointInfo.read(inputs.model)
    fingerprint = make_fingerprint(model, params.method)
    summary = collect(
        CollectInputs(inputs.records, inputs.plan, inputs.runs, inputs.failures),
        CollectOutputs(outputs.embeddings, outputs.manifest, outputs.manifest_tsv, outputs.failures),
        Store(params.store, fingerprint),
        params.formats,
        model=model.name,
        pooled_precision=params.pooled_precision,
        gaps=params.reading["gaps"],
        threads=snakemake.threads,
    )
    summary.write(outputs.summary)
    join_logs([Path(path) for path in params.logs], outputs.joined_log)


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
