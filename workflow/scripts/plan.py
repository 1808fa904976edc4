"""Produces the table of records and the shards of each group."""

from dataclasses import asdict

from esmflow.fasta import ResiduePolicy
from esmflow.files import write_json
from esmflow.planning import CostModel, InputFile, plan
from esmflow.segments import Store
from esmflow.steps import logged_step, make_fingerprint, read_model


def main(snakemake) -> None:
    params = snakemake.params
    model = read_model(snakemake.input.model).info
    fingerprint = make_fingerprint(model, params.method)
    summary = plan(
        [InputFile(*pair) for pair in zip(params.samples, snakemake.input.fasta, strict=True)],
        snakemake.output.records,
        snakemake.output.groups,
        cost_model=CostModel(model.dimensions, fingerprint.max_residues),
        policy=ResiduePolicy(
            invalid=fingerprint.invalid_residues,
            nucleotides=params.nucleotide_sequences,
            max_residues=params.max_residues if fingerprint.long_sequences == "reject" else None,
        ),
        assignment=params.assignment,
        shard_residues=params.shard_residues,
        held=Store(params.store, fingerprint).held_digests(),
    )
    write_json(snakemake.output.plan, {"fingerprint": fingerprint.digest(), **asdict(summary)})


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
