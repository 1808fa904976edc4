"""Produces the embeddings in the formats asked for, the manifest, the failures, the summary and the joined log."""

from pathlib import Path

from esmflow.collect.collecting import CollectInputs, CollectOutputs, collect
from esmflow.files import write_json
from esmflow.logs import join_logs
from esmflow.step import logged_step, make_fingerprint, read_model_info
from esmflow.store.segments import Store


def main(snakemake) -> None:
    inputs, outputs, params = snakemake.input, snakemake.output, snakemake.params
    model = read_model_info(inputs.model)
    fingerprint = make_fingerprint(model, params.method)
    summary = collect(
        CollectInputs(inputs.records, inputs.plan, inputs.runs, inputs.failures),
        CollectOutputs(outputs.embeddings, outputs.manifest, outputs.manifest_tsv, outputs.failures),
        Store(params.store, fingerprint),
        params.formats,
        model=model.name,
        pooled_precision=params.pooled_precision,
        threads=snakemake.threads,
    )
    write_json(outputs.summary, summary)
    join_logs([Path(path) for path in params.logs], outputs.joined_log)


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
