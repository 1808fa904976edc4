"""Produces the table of records and the shards of each group."""

from pathlib import Path

from esmflow.checkpoint.file import CheckpointInfo, check_unchanged, file_stamp
from esmflow.config.disk_forecast import check_disks, forecast, sentence
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.plan.cost import CostModel
from esmflow.plan.freshness import input_stamps, write_basis
from esmflow.plan.planning import plan
from esmflow.plan.run_plan import Plan
from esmflow.step import logged_step, make_fingerprint, tell
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Store


def main(snakemake) -> None:
    params = snakemake.params
    model = CheckpointInfo.read(snakemake.input.model)
    fingerprint = make_fingerprint(model, params.method)
    stamps = input_stamps(snakemake.input.fasta)
    # Read in full here, once, so that no GPU job has to as long as nobody touches the file.
    stamp = file_stamp(snakemake.input.checkpoint)
    check_unchanged(snakemake.input.checkpoint, model.digest, stamp=None)
    summary = plan(
        [InputFile(*file) for file in zip(params.samples, snakemake.input.fasta, params.annotations, strict=True)],
        snakemake.output.records,
        snakemake.output.groups,
        cost_model=CostModel(model.dimensions, fingerprint.long),
        policy=ResiduePolicy(
            invalid=fingerprint.invalid_residues,
            nucleotides=params.nucleotide_sequences,
            max_residues=params.max_residues if fingerprint.long_sequences == "reject" else None,
            gaps=params.reading["gaps"],
        ),
        id_rule=params.reading["id"],
        assignment=params.assignment,
        shard_residues=params.shard_residues,
        workers=params.gpus_per_job,
        candidates_path=snakemake.output.candidates,
        stored=StoredSequences(Store(params.store, fingerprint)),
        processes=snakemake.threads,
    )
    # From the configuration and not from params: other formats are no reason to plan again.
    config = snakemake.config
    expected = forecast(
        summary, fingerprint, model.dimensions, config["formats"], pooled_precision=config["pooled_precision"]
    )
    tell(sentence(expected))
    if config["disk_check"]:
        check_disks(expected, params.store, Path(snakemake.output.plan).parents[1])
    Plan(
        fingerprint=fingerprint.digest(),
        checkpoint_stamp=stamp,
        **{**vars(summary), "held_segments": tuple(summary.held_segments), "groups": tuple(summary.groups)},
        disk_forecast=expected,
    ).write(snakemake.output.plan)
    basis = Path(snakemake.output.plan).with_name("basis.json")
    write_basis(basis, params.basis["basis"], fingerprint.digest(), summary.held_segments, stamps)


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
