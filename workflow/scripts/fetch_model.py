"""Produces the converted checkpoint and `model.json`, which says what it is."""

from dataclasses import asdict
from pathlib import Path

from esmflow.arrays import resolve_layers
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.sources import find_checkpoint
from esmflow.engine.engine import check_heads
from esmflow.files import write_json
from esmflow.step import StepError, logged_step


def main(snakemake) -> None:
    source = find_checkpoint(snakemake.params.model, snakemake.params.folder, snakemake.params.download)
    info = convert_checkpoint(source, Path(snakemake.output.checkpoint), name=source.stem)
    try:
        resolve_layers(snakemake.params.layers, info.dimensions.layers)
        check_heads(snakemake.params.include, info.dimensions)
    except ValueError as error:
        raise StepError(str(error)) from error
    write_json(snakemake.output.info, asdict(info))


if __name__ == "__main__":
    with logged_step(snakemake.log[0]):
        main(snakemake)
