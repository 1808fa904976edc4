"""Produces the embeddings in the formats asked for, the manifest, the failures and the summary."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.collecting import CollectSettings, collect
from esmflow.step import logged_step, make_fingerprint


def collect_settings(snakemake) -> CollectSettings:
    inputs, outputs, params = snakemake.input, snakemake.output, snakemake.params
    model = CheckpointInfo.read(inputs.model)
    return CollectSettings(
        records=inputs.records,
        plan=inputs.plan,
        runs=inputs.runs,
        failure_lists=inputs.failures,
        embeddings=outputs.embeddings,
        manifest=outputs.manifest,
        manifest_tsv=outputs.manifest_tsv,
        failures=outputs.failures,
        summary=outputs.summary,
        note=params.note,
        note_number=params.written["written"],
        store=params.store,
        fingerprint=make_fingerprint(model, params.method),
        model=model.name,
        formats=params.formats,
        pooled_precision=params.pooled_precision,
        gaps=params.reading["gaps"],
        threads=snakemake.threads,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], [*snakemake.output, snakemake.params.note]):
        collect(collect_settings(snakemake))
