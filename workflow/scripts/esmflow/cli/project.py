"""The folder of a run: its configuration and its sample sheet, from what was typed; and one to edit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from esmflow.config.configuration import validated
from esmflow.errors import EsmflowError
from esmflow.files import PROJECT, atomic_path
from esmflow.inputs.sheet import (
    InputError,
    InputFile,
    elsewhere,
    expand,
    fasta_stem,
    is_glob,
    read_samples,
    why_no_file,
)
from esmflow.inputs.streams import first_bytes

SNAKEFILE = PROJECT / "workflow" / "Snakefile"
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
DEFAULT_MODEL = "650M"
_MARK = "# Written by esmflow embed, which writes it anew; to edit it by hand, remove this line.\n"
# Keys that are paths: relative ones are meant from where the command was typed.
_PATHS = ("model_folder", "store", "slot_lock_folder", "variants")


class CommandError(EsmflowError):
    """Something typed that cannot be done. The message says what, and what to do."""


def find_inputs(places: Sequence[str]) -> list[InputFile]:
    """The input files that files, folders, globs and sample sheets stand for, each once, by absolute paths.

    Raises CommandError for a place that is not there or has no input, and InputError for a sheet that is wrong.
    """
    found: dict[str, InputFile] = {}
    for place in places:
        for file in _files_of(os.path.expanduser(place)):
            path = os.path.abspath(file.path)
            if set(path) & set("\t\n\r"):
                raise CommandError(f"{path!r}: a tab or a line end in the name; rename it, or link to it")
            found.setdefault(os.path.realpath(path), InputFile(file.sample, path, file.annotations))
    return list(found.values())


def _files_of(place: str) -> list[InputFile]:
    if not os.path.lexists(place) and not is_glob(place):
        raise CommandError(f"{place}: there is no such file or folder{elsewhere(place)}")
    try:
        if os.path.isfile(place) and _is_sheet(place):
            return read_samples(place)
        files = expand(place)
    except InputError as error:
        raise CommandError(str(error)) from error
    for path in files:
        if why := why_no_file(path):
            raise CommandError(f"{path} {why}")
        if not os.access(path, os.R_OK):
            raise CommandError(f"{path}: cannot be read; ask its owner")
    return [InputFile(fasta_stem(path), path) for path in files]


def _is_sheet(path: str) -> bool:
    try:
        first = first_bytes(path).partition(b"\n")[0]
    except (OSError, ValueError):
        return False
    return {b"sample", b"fasta"} <= {cell.strip() for cell in first.split(b"\t")}


def sheet_text(files: Sequence[InputFile]) -> str:
    """The sample sheet of input files; a sample's name that occurs again gets a number."""
    names = list(dict.fromkeys(name for file in files for name, _ in file.annotations))
    lines = ["\t".join(["sample", "fasta", *names])]
    taken: set[str] = set()
    for file in files:
        sample, number = file.sample, 2
        while sample in taken or sample.startswith("#"):
            sample, number = f"{file.sample.lstrip('#')}_{number}", number + 1
        taken.add(sample)
        about = dict(file.annotations)
        lines.append("\t".join([sample, file.path, *(about.get(name, "") for name in names)]))
    return "\n".join(lines) + "\n"


def configuration(options: Mapping[str, Any], settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that was typed, and the same checked and with defaults.

    options: by key; what is empty was not given. settings: `key=value`, or `key.key=value`, with values in YAML.
    Raises CommandError, and ConfigurationError for what the schema does not have.
    """
    typed: dict[str, Any] = {"samples": "config/samples.tsv"}
    for key, value in options.items():
        if value:
            typed[key] = ",".join(value) if isinstance(value, list) else value
    for setting in settings:
        _set(typed, setting)
    typed.setdefault("model", DEFAULT_MODEL)
    for key in _PATHS:
        if isinstance(typed.get(key), str):
            typed[key] = os.path.abspath(os.path.expanduser(typed[key]))
    checked = validated(typed, SCHEMA)
    for key in ("include", "formats", "layers"):
        if key in typed:
            typed[key] = checked[key]
    for key in ("model", "base_model"):
        if checked[key]:
            path = os.path.expanduser(checked[key])
            typed[key] = os.path.abspath(path) if os.path.exists(path) else checked[key]
    return typed, checked


def _set(typed: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise CommandError(f"--set {setting}: write --set KEY=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CommandError(f"--set {setting}: {text} is no YAML; quote it") from error
    *parents, last = key.strip().split(".")
    if last == "samples" or "pathvars" in (last, *parents):
        raise CommandError(f"--set {setting}: the inputs are arguments, and -o says where results go")
    at = typed
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise CommandError(f"--set {setting}: {parent} has been given a value and not keys")
    at[last] = value


def write_run(folder: Path, files: Sequence[InputFile], config: Mapping[str, Any]) -> None:
    """Writes the configuration and the sample sheet of a run into its folder, which is made if it is not there.

    Raises CommandError for a folder with other things in it, so that nothing of them is overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file; give -o a folder")
    target = folder / "config" / "config.yaml"
    if target.exists():
        if not target.read_text(encoding="utf-8").startswith(_MARK):
            raise CommandError(
                f"{target} was not written by esmflow embed, or was edited; run it with "
                f"`snakemake --snakefile {SNAKEFILE}` in that folder, or choose another -o"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} has other things in it; choose a folder of its own, such as {folder / 'esmflow'}")
    for path, text in (
        (folder / "config" / "samples.tsv", sheet_text(files)),
        (target, _MARK + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)),
    ):
        # Untouched where it says the same: their times are reasons to run things.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def make_project(folder: Path, profile: str) -> list[str]:
    """Makes a folder with a configuration, a sample sheet and profiles to edit. Returns what to do next, in lines."""
    profiles = PROJECT / "profiles"
    known = sorted(path.parent.name for path in profiles.glob("*/config.yaml") if path.parent.name != "default")
    if profile not in known:
        raise CommandError(f"--profile {profile}: there is none of this name, only {', '.join(known)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} is there already and not empty; give a new folder")
    (folder / "config").mkdir(parents=True)
    for name in ("config.yaml", "README.md"):
        shutil.copyfile(PROJECT / "config" / name, folder / "config" / name)
    (folder / "config" / "samples.tsv").write_text("sample\tfasta\n#gut\t/data/gut.faa.gz\n#soil\t/data/soil/*.faa\n")
    for name in ("default", profile):
        shutil.copytree(profiles / name, folder / "profiles" / name, copy_function=shutil.copyfile)
    return [
        f"Edit in {folder}:",
        "  config/samples.tsv    your files, one sample a line",
        "  config/config.yaml    model, layers, outputs; config/README.md explains every key",
        f"  profiles/{profile}/config.yaml    GPUs and cores",
        "Then, in that folder, with -n first to see what would run:",
        f"  snakemake --snakefile {SNAKEFILE} --profile profiles/{profile}",
    ]
