"""Produces the converted checkpoint and `model.json`, which says what it is."""

from esmflow.checkpoint.fetch import ModelSettings, fetch_model
from esmflow.step import logged_step


def model_settings(snakemake) -> ModelSettings:
    params = snakemake.params
    return ModelSettings(
        model=params.model,
        base=params.base_model,
        folder=params.folder,
        download=params.download,
        checkpoint=snakemake.output.checkpoint,
        info=snakemake.output.info,
    )


if __name__ == "__main__":
    with logged_step(snakemake.log[0], snakemake.output):
        fetch_model(model_settings(snakemake))
