"""The sample sheet: which files there are to read, named one by one, as folders, or by a glob."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esmflow.errors import EsmflowError
from esmflow.files import safe_name, shortened
from esmflow.inputs.columns import TAB, TableError, check_columns, is_table_of_proteins, read_rows, repeated_column
from esmflow.inputs.streams import NO_FILE, first_bytes, is_fasta, is_table, suffix, text_chunks, without_compression

if TYPE_CHECKING:
    from esmflow.inputs.kinds import Kind

# What a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
FASTA_SUFFIXES = (".fasta", ".fas", ".fa", ".faa", ".fsa", ".pep", ".aa")

# What Snakemake would replace in a file's name.
# File systems allow 255 bytes, of which `_ESM.pt` needs seven.
_LONGEST_STEM = 248
WILDCARD = re.compile(r"\{\s*[.\w]+\s*(?:,[^{}]*)?\}|<\w+>")


class InputError(EsmflowError):
    """A sample sheet that cannot be used, or a place where no input is. The message names the line or the place."""


@dataclass(frozen=True)
class InputFile:
    """One file of the sample sheet. annotations: what the sheet says about it in further columns, by their names."""

    sample: str
    path: str
    annotations: tuple[tuple[str, str], ...] = ()


def read_samples(samples: str, named_after_inputs: Sequence[str] = ()) -> list[InputFile]:
    """The input files: those of a sample sheet (TSV with the columns `sample` and `fasta`), of a glob, or just one.

    In a sheet too, `fasta` may be a folder or a glob, in the working directory, in the home of `~`, or in the sheet's
    own folder. named_after_inputs: the formats of the run that name their files after the inputs. Raises
    InputError for a sheet that is missing or malformed, for what is no file, a table without its columns, a sample or a
    file that is listed twice, and two files that would write one output.
    """
    if is_glob(samples) or _is_input(samples):
        files = [InputFile(fasta_stem(path), path) for path in _expand(samples, "samples")]
    else:
        files = _read_sheet(os.path.expanduser(samples))
    paths = [os.path.normpath(file.path) for file in files]
    _refuse_repeats(paths, "{samples}: the file {name} is listed twice; remove one", samples)
    wrong = [f"{file.path} {why}" for file in files if (why := why_no_file(file.path))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{samples}: fasta: {wrong[0]}{more}; correct the path")
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


def _is_input(path: str) -> bool:
    """Whether this is no sheet, but itself a file of proteins."""
    try:
        head = first_bytes(path)
        kind = _kind_of_no_sheet(path, head)
        return is_fasta(head) or bool(kind and kind.parser) or (is_table(path) and is_table_of_proteins(path))
    except (OSError, ValueError):
        return False


def _kind_of_no_sheet(path: str, head: bytes) -> Kind | None:
    """What a file is that was given as the sheet, if it does not look like one."""
    if {b"sample", b"fasta"} <= set(head.partition(b"\n")[0].split()):
        return None
    # A dry run should load little.
    from esmflow.inputs.kinds import kind_of

    return kind_of(path, head)


def why_no_file(path: str) -> str:
    """What is in the way of reading a path as a file, in words; nothing if it is one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.islink(path):
            return f"is a symbolic link to {os.readlink(path)}, which does not exist"
        words = {errno.ENOENT: f"does not exist{elsewhere(path)}", errno.ELOOP: "is a loop of symbolic links"}
        return words.get(error.errno or 0, f"cannot be read ({error.strerror})")
    if stat.S_ISREG(mode):
        return ""
    return "is a folder" if stat.S_ISDIR(mode) else NO_FILE


def _read_sheet(path: str) -> list[InputFile]:
    try:
        kind = _kind_of_no_sheet(path, first_bytes(path))
        if kind is not None:
            raise InputError(
                f"samples: {path} is not a text file in UTF-8, but {kind.name}; save it as tab-separated UTF-8 text"
            )
        rows = [(row.line, [cell.decode().strip() for cell in row.cells]) for row in read_rows(text_chunks(path), TAB)]
    except UnicodeDecodeError as error:
        raise InputError(
            f"samples: {path} is not a text file in UTF-8 ({error}); save it as tab-separated UTF-8 text"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"samples: {path} cannot be read ({getattr(error, 'strerror', None) or error}); "
            "give a TSV file with the columns sample and fasta, or a glob"
        ) from error
    columns = rows[0][1] if rows else []
    if not {"sample", "fasta"} <= set(columns):
        raise InputError(
            f"{path}: needs the tab-separated columns sample and fasta; its first line has: "
            f"{', '.join(columns) or 'none'}"
        )
    if repeated := repeated_column(columns):
        raise InputError(f"{path}: its column {repeated} is there twice; rename or remove one")
    lines = [(line, dict.fromkeys(columns, "") | dict(zip(columns, cells))) for line, cells in rows[1:]]
    lines = [(n, row) for n, row in lines if (row["sample"] or row["fasta"]) and not row["sample"].startswith("#")]
    if not lines:
        raise InputError(f"{path}: lists no sample")
    files: list[InputFile] = []
    names = [row["sample"] for _, row in lines]
    for line, row in lines:
        sample, fasta = row.pop("sample"), row.pop("fasta")
        if not sample or not fasta:
            raise InputError(f"{path}, line {line}: sample and fasta must both be filled in")
        about = tuple((name, value) for name, value in row.items() if name)
        found = _expand(fasta, f"{path}, line {line}: fasta", os.path.dirname(path))
        files += [InputFile(sample, file, about) for file in found]
    _refuse_repeats(names, "{samples}: sample {name} is listed twice; give each its own name", path)
    return files


def _expand(place: str, where: str, folder: str = "") -> list[str]:
    """The files of a place, which is looked for here, in the home of `~`, and in a folder."""
    if "\0" in place:
        raise InputError(f"{where}: {place!r} has a NUL character in it; correct the path")
    candidates = (place, os.path.expanduser(place), os.path.join(folder, place))
    there = next((path for path in candidates if os.path.lexists(path) or glob.glob(path, recursive=True)), place)
    try:
        files = expand(there)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for file in files:
        name = os.fsencode(file).decode(errors="backslashreplace")
        if name != file:
            raise InputError(f"{where}: the name {name} is not UTF-8; rename it, or link to it by another name")
        if WILDCARD.search(file):
            raise InputError(
                f"{where}: the name {name} has braces or angle brackets around a word, which Snakemake takes for a "
                "wildcard; rename it, or link to it by another name"
            )
    return files


def _refuse_repeats(names: Sequence[str], message: str, samples: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(message.format(samples=samples, name=repeated[0]))


def expand(place: str) -> list[str]:
    """The files that a path, a folder or a glob stands for, sorted. Raises InputError if there are none.

    Of a folder all files with a FASTA suffix, compressed or not, and none of its subfolders. A path that is neither a
    folder nor a glob is not looked at. Folders that a glob meets are passed over, unless it meets nothing else.
    """
    if os.path.isdir(place):
        found = _fasta_files(place)
        if not found:
            raise InputError(f"the folder {place} holds no FASTA file; their names end in {', '.join(FASTA_SUFFIXES)}, "
                             "and .gz, .bz2, .xz or .zst after that if they are compressed")  # fmt: skip
        return found
    if is_glob(place):
        matched = sorted(glob.glob(place, recursive=True))
        files = [path for path in matched if not os.path.isdir(path)]
        files = files or [file for folder in matched for file in _fasta_files(folder)]
        if not files:
            folders = " and no folder with FASTA files" if matched else ""
            raise InputError(f"{place} matches no file{folders}{elsewhere(place)}")
        return files
    return [place]


def elsewhere(place: str) -> str:
    """What to do about what is not on this machine's disk; nothing for a path."""
    if place == "-":
        return ": write what comes from standard input to a file first"
    return ": it is an address; download it to a file first" if "://" in place else ""


def is_glob(place: str) -> bool:
    """Whether this is a pattern, and not the name of a file with such letters in it."""
    return any(character in place for character in "*?[") and not os.path.exists(place)


def _fasta_files(folder: str) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    return [os.path.join(folder, name) for name in names if suffix(name) in FASTA_SUFFIXES]


def fasta_stem(path: str | os.PathLike[str]) -> str:
    """The file's name without its compression and FASTA suffixes: `a/b.faa.gz` gives `b`.

    Shortened where there would be no room for the suffix of an output.
    """
    name = without_compression(path)
    return shortened(name.rsplit(".", 1)[0] if "." in name.lstrip(".") else name, _LONGEST_STEM)
