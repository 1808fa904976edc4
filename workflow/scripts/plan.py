"""Produces the plan: the table of records, the shards of each group, and `plan.json`."""

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.collect.formats import FORMATS
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.plan.cost import CostModel, shard_limit
from esmflow.plan.freshness import note_path
from esmflow.plan.planning import plan
from esmflow.plan.settings import PlanSettings
from esmflow.step import logged_step, make_fingerprint


def plan_settings(snakemake) -> PlanSettings:
    inputs, outputs, params = snakemake.input, snakemake.output, snakemake.params
    model = CheckpointInfo.read(inputs.model)
    fingerprint = make_fingerprint(model, params.method)
    # From the configuration and not from params: other formats are no reason to plan again.
    config = snakemake.config
    return PlanSettings(
        inputs=[InputFile(*file) for file in zip(params.samples, inputs.fasta, params.annotations, strict=True)],
        records=outputs.records,
        candidates=outputs.candidates,
        plan=outputs.plan,
        groups=outputs.groups,
        work=params.groups["work"],
        least_cost=params.groups["least"],
        checkpoint=inputs.checkpoint,
        fingerprint=fingerprint,
        store=params.store,
        cost_model=CostModel(model.dimensions, fingerprint.long),
        policy=ResiduePolicy.configured(
            {
                "invalid_residues": fingerprint.invalid_residues,
                "nucleotide_sequences": params.nucleotide_sequences,
                "long_sequences": fingerprint.long_sequences,
                "max_residues": params.max_residues,
                "gaps": params.reading["gaps"],
            },
            model.dimensions.longest,
        ),
        id_rule=params.reading["id"],
        assignment=params.assignment,
        shard_residues=min(
            params.shard_residues,
            shard_limit(fingerprint.outputs, model.dimensions, fingerprint.max_residues or params.max_residues),
        ),
        workers=params.gpus_per_job,
        processes=snakemake.threads,
        formats=[FORMATS[name] for name in config["formats"]],
        pooled_precision=config["pooled_precision"],
        most_bytes_of_maps=1e9 * config["attention"]["max_gigabytes"],
        disk_check=config["disk_check"],
        number=params.plan_number["plan number"],
        variants=(inputs.variants[0], outputs.variants[0]) if inputs.variants else None,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], [*snakemake.output, note_path(snakemake.output.plan)]):
        plan(plan_settings(snakemake))
