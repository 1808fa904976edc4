"""The command line: what there is to type, and errors as sentences.

Starting it must take no time: what a command needs is imported when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from esmflow.arrays import ATTENTION, INCLUDE
from esmflow.errors import EsmflowError

app = typer.Typer(
    name="esmflow",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embeds protein FASTA files with ESM-2, and accounts for every record.",
)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="FASTA...", help="FASTA files, tables, folders, globs or sample sheets.", show_default=False
    ),
]
Folder = Annotated[str, typer.Argument(metavar="OUT", help="The folder of a run.", show_default=False)]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any key of the configuration, such as verify.sample=0. Repeatable."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"esmflow {version('esmflow')}")
        raise typer.Exit


@app.callback()
def esmflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Embeds protein FASTA files with ESM-2, and accounts for every record."""


@app.command()
def embed(
    inputs: Inputs,
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="The folder of the run.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="8M, 35M, 150M, 650M, 3B, 15B, a whole name, a .pt file or a Hugging Face folder. "
            "[dim]\\[default: 650M][/dim]",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str],
        typer.Option(metavar="KIND", help=f"{', '.join((*INCLUDE, ATTENTION))}. Several with commas."),
    ] = [],  # noqa: B006
    formats: Annotated[
        list[str],
        typer.Option(
            "--format", metavar="FORMAT", help="h5, h5_per_protein, npy, parquet, h5ad, skbio, pt, esm. With commas."
        ),
    ] = [],  # noqa: B006
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs to use at once; 0 is the CPU. [dim]\\[default: all there are][/dim]"),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores to use. [dim]\\[default: all there are][/dim]")
    ] = None,
    settings: Settings = [],  # noqa: B006
    profile: Annotated[
        str | None, typer.Option(help="A Snakemake profile, such as one for your cluster: it says cores and GPUs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Show what would run, and run nothing.")] = False,
) -> None:
    """Embeds proteins: the vectors are in OUT/results, see docs/command.md.

    The same command again goes on where it stopped, and computes nothing twice.
    """
    from esmflow.cli.run import Compute, embed_inputs

    options = {"model": model, "include": include, "formats": formats}
    sys.exit(embed_inputs(inputs, out, options, settings, Compute(gpus, cores, profile), dry_run=dry_run))


@app.command()
def check(
    inputs: Inputs,
    settings: Settings = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="List every rejected record, not only the first.")] = False,
) -> None:
    """Says which records would be rejected and why, without a model. Exit code 1 if there are any."""
    from esmflow.cli.checking import check_inputs

    sys.exit(check_inputs(inputs, settings, everything))


@app.command()
def status(
    out: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every few seconds until the run is over.")
    ] = False,
) -> None:
    """Shows what every group of a run is doing."""
    from esmflow.embedding.status import show_status
    from esmflow.files import results_folder

    show_status(results_folder(out), 5.0 if watch else None)


@app.command()
def report(out: Folder) -> None:
    """Shows how a run ended, and where its report is; makes the report if the run was told not to."""
    from esmflow.cli.run import show_report

    sys.exit(show_report(out))


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder to make.", show_default=False)],
    profile: Annotated[str, typer.Option(help="The Snakemake profile to start from.")] = "workstation",
) -> None:
    """Makes a folder with a configuration, a sample sheet and a profile to edit, for `snakemake` itself."""
    from esmflow.cli.project import make_project

    print("\n".join(make_project(Path(folder).expanduser(), profile)))


def main() -> None:
    """Runs the command; what is wrong is said in one sentence."""
    try:
        app()
    except BrokenPipeError:
        # Whoever reads has seen enough, such as `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (EsmflowError, OSError) as error:
        print(f"esmflow: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
