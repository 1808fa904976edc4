"""The sample sheet: which files there are to read, named one by one, as folders, or by a glob."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esmflow.errors import EsmflowError
from esmflow.files import safe_name
from esmflow.inputs.columns import TAB, TableError, check_columns, read_rows
from esmflow.inputs.streams import is_table, text_chunks, without_compression

# What a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
FASTA_SUFFIXES = (".fasta", ".fas", ".fa", ".faa", ".fsa", ".pep", ".aa")


class InputError(EsmflowError):
    """A sample sheet that cannot be used, or a place where no input is. The message names the line or the place."""


@dataclass(frozen=True)
class InputFile:
    """One file of the sample sheet: FASTA or a table."""

    sample: str
    path: str


def read_samples(samples: str, named_after_inputs: Sequence[str] = ()) -> list[InputFile]:
    """The input files: those of a sample sheet (TSV with the columns `sample` and `fasta`), or those a glob matches.

    In a sheet too, `fasta` may be a folder or a glob. named_after_inputs: the formats of the run that name their files
    after the inputs. Raises InputError for a sheet that is missing or
    malformed, a file that does not exist, a table without its columns, a sample or a file that is listed twice, and two
    files that would write one output.
    """
    if is_glob(samples):
        files = [InputFile(fasta_stem(path), path) for path in _expand(samples, "samples")]
    else:
        files = _read_sheet(samples)
    paths = [os.path.normpath(file.path) for file in files]
    _refuse_repeats(paths, "{samples}: the file {name} is listed twice; remove one", samples)
    missing = [file.path for file in files if not os.path.isfile(file.path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{samples}: fasta: {missing[0]} does not exist{more}; correct the path")
    for file in files:
        if is_table(file.path):
            try:
                check_columns(file.path)
            except TableError as error:
                raise InputError(f"{samples}: fasta: {error}") from error
    if named_after_inputs:
        try:
            output_names(files)
        except InputError as error:
            formats = " and ".join(named_after_inputs)
            raise InputError(f"{samples}: {error}, rename one, or leave {formats} out of formats") from error
    return files


def output_names(files: Sequence[InputFile]) -> dict[str, str]:
    """By the path of each input file, what is called after it: its stem, or its sample where several share that stem.

    Raises InputError if two would have one name.
    """
    sharing: dict[str, list[InputFile]] = {}
    for file in files:
        sharing.setdefault(fasta_stem(file.path), []).append(file)
    names: dict[str, str] = {}
    taken = {stem: some[0].path for stem, some in sharing.items()}
    for stem, some in sharing.items():
        if len(some) == 1:
            names[some[0].path] = stem
            continue
        for file in some:
            name = names[file.path] = safe_name(file.sample)
            if name in taken:
                other = taken[name] if taken[name] != file.path else some[1].path
                raise InputError(
                    f"{other} and {file.path} would both be written under the name {name}; "
                    "list each by itself, with a sample name of its own"
                )
            taken[name] = file.path
    return names


def _read_sheet(path: str) -> list[InputFile]:
    try:
        rows = [(row.line, [cell.decode().strip() for cell in row.cells]) for row in read_rows(text_chunks(path), TAB)]
    except UnicodeDecodeError as error:
        raise InputError(
            f"samples: {path} is not a text file in UTF-8 ({error}); save it as tab-separated UTF-8 text"
        ) from error
    except OSError as error:
        raise InputError(
            f"samples: {path} cannot be read ({error.strerror or error}); "
            "give a TSV file with the columns sample and fasta, or a glob"
        ) from error
    columns = rows[0][1] if rows else []
    if not {"sample", "fasta"} <= set(columns):
        raise InputError(
            f"{path}: needs the tab-separated columns sample and fasta; its first line has: "
            f"{', '.join(columns) or 'none'}"
        )
    lines = [(line, dict.fromkeys(columns, "") | dict(zip(columns, cells))) for line, cells in rows[1:]]
    lines = [(n, row) for n, row in lines if (row["sample"] or row["fasta"]) and not row["sample"].startswith("#")]
    if not lines:
        raise InputError(f"{path}: lists no sample")
    files = []
    for line, row in lines:
        sample, fasta = row["sample"], row["fasta"]
        if not sample or not fasta:
            raise InputError(f"{path}, line {line}: sample and fasta must both be filled in")
        files += [InputFile(sample, file) for file in _expand(fasta, f"{path}, line {line}: fasta")]
    names = [row["sample"] for _, row in lines]
    _refuse_repeats(names, "{samples}: sample {name} is listed twice; give each its own name", path)
    return files


def _expand(place: str, where: str) -> list[str]:
    try:
        return expand(place)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _refuse_repeats(names: Sequence[str], message: str, samples: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(message.format(samples=samples, name=repeated[0]))


def expand(place: str) -> list[str]:
    """The files that a path, a folder or a glob stands for, sorted. Raises InputError if there are none.

    Of a folder all files with a FASTA suffix, compressed or not, and none of its subfolders. A path that is neither a
    folder nor a glob is not looked at.
    """
    if os.path.isdir(place):
        found = sorted(entry.name for entry in os.scandir(place) if entry.is_file() and _is_fasta(entry.name))
        if not found:
            raise InputError(f"the folder {place} holds no FASTA file; their names end in {', '.join(FASTA_SUFFIXES)}, "
                             "and .gz, .bz2, .xz or .zst after that if they are compressed")  # fmt: skip
        return [os.path.join(place, name) for name in found]
    if is_glob(place):
        matched = sorted(glob.glob(place, recursive=True))
        if not matched:
            raise InputError(f"{place} matches no file")
        return matched
    return [place]


def is_glob(place: str) -> bool:
    """Whether this is a pattern, and not the name of a file with such letters in it."""
    return any(character in place for character in "*?[") and not os.path.exists(place)


def _is_fasta(name: str) -> bool:
    return not name.startswith(".") and Path(without_compression(name)).suffix.lower() in FASTA_SUFFIXES


def fasta_stem(path: str | os.PathLike[str]) -> str:
    """The file's name without its compression and FASTA suffixes: `a/b.faa.gz` gives `b`."""
    name = without_compression(path)
    return name.rsplit(".", 1)[0] if "." in name.lstrip(".") else name
