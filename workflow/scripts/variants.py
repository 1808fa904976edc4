"""Produces the scores of the variants: `variants.parquet`, the same as TSV, and their counts."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.variants import VariantSettings, score_variants
from esmflow.step import logged_step, make_fingerprint


def variant_settings(snakemake) -> VariantSettings:
    inputs, outputs, params = snakemake.input, snakemake.output, snakemake.params
    return VariantSettings(
        planned=inputs.planned,
        failure_lists=inputs.failures,
        store=params.store,
        fingerprint=make_fingerprint(CheckpointInfo.read(inputs.model), params.method),
        threads=snakemake.threads,
        table=outputs.table,
        table_tsv=outputs.table_tsv,
        summary=outputs.summary,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], snakemake.output):
        score_variants(variant_settings(snakemake))
