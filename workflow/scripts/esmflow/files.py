"""The one place for atomic writes, for JSON, and for digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import quote

from esmflow.errors import EsmflowError

T = TypeVar("T")

_HERE = Path(__file__).resolve().parent
PROJECT = _HERE / "project" if (_HERE / "project").is_dir() else _HERE.parents[2]
"""The folder with workflow/, config/ and profiles/: around the library in a clone, inside it where it was installed."""


def results_folder(folder: str | os.PathLike[str]) -> Path:
    """The results of a run, given as themselves or as the folder that Snakemake works in, where they are `results`."""
    given = Path(folder).expanduser()
    return given / "results" if (given / "results").is_dir() and not (given / "plan").is_dir() else given


LEFT_OVER_SECONDS = 86_400
"""After so long without a change, a temporary file in a place that others write to as well is what a kill left."""

# What `tempfile` makes of a target's name.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part", re.DOTALL)


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `target`; on success it is flushed to disk and renamed to `target`.

    A reader sees the whole file or none, and nothing is left behind when the body raises. Only a rename is relied on,
    so it also holds on NFS.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Only the beginning of the name, which may be as long as the file system allows.
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:50]}.", suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; results are meant to be read by others as any new file is.
        open_to_others(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder beside `target`; on success its files are flushed to disk and it is renamed.

    A folder that is there already is replaced. Nothing is left behind when the body raises.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:50]}.", suffix=".part", dir=target.parent))
    try:
        yield temporary
        # One flush for all: the folder may hold millions of small files.
        os.sync()
        open_to_others(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_overs(targets: Iterable[str | os.PathLike[str]], seconds: float = 0.0) -> None:
    """Removes what writers of these files and folders left beside them when they were killed, see `atomic_path`.

    seconds: keeps what was changed since: for places where others may be writing.
    """
    names: dict[Path, set[str]] = {}
    for target in map(Path, targets):
        names.setdefault(target.parent, set()).add(target.name[:50])
    for folder, written in names.items():
        for path in folder.glob(".*.part"):
            found = _TEMPORARY.fullmatch(path.name)
            with suppress(OSError):
                if found and found[1] in written and time.time() - path.lstat().st_mtime >= seconds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(target: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads one JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


class DamagedJsonError(EsmflowError, ValueError):
    """A file of a run whose JSON cannot be read or lacks something. The message names the file and says what to do."""


class JsonFile:
    """A dataclass that is the content of one JSON file: its fields are the keys, in their order.

    A field whose `metadata` has a `key` goes by that in the file: keys are a promise to users, names may get better.
    """

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads one file. Raises OSError when it is not there, and DamagedJsonError when it is not what was written."""
        try:
            return from_json(cls, read_json(path))
        except ValueError as error:
            raise DamagedJsonError(
                f"{path}: not what esmflow wrote ({error}); delete it, and the same command again makes it anew"
            ) from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, atomically."""
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The content of the file, by its keys."""
        content = asdict(self)  # type: ignore[call-overload]
        return {field.metadata.get("key", field.name): content[field.name] for field in fields(self)}  # type: ignore[arg-type]


def from_json(kind: type[T], content: Any) -> T:
    """Makes a dataclass, with those inside it, of what `asdict` gave and JSON kept.

    Keys that it does not know are passed over and fields without a key have their defaults, so files of other versions
    are read. Raises ValueError when a field without a default has no key, or a value cannot be what the field is.
    """
    try:
        makers = _makers(kind)  # type: ignore[arg-type]
        return kind(**{name: make(content[key]) for key, (name, make) in makers.items() if key in content})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"no {kind.__name__}: {error}") from error


@cache
def _makers(kind: Any) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """For each key the field of a dataclass, and what makes its value of JSON's."""
    types = get_type_hints(kind)
    return {field.metadata.get("key", field.name): (field.name, _maker(types[field.name])) for field in fields(kind)}


def _maker(kind: Any) -> Callable[[Any], Any]:
    container, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return partial(from_json, kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if container is tuple:
        make = _maker(arguments[0])
        return lambda values: tuple(map(make, values))
    if container is dict:
        make = _maker(arguments[1])
        return lambda values: {key: make(value) for key, value in values.items()}
    if type(None) in arguments:
        make = _maker(arguments[0])
        return lambda value: None if value is None else make(value)
    return lambda value: value


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Size in bytes and time of the last change in nanoseconds: what tells that a file was not touched since."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def stats_below(path: str | os.PathLike[str]) -> Iterator[os.stat_result]:
    """What is known of a file, or of a folder and all that is in it; links are not followed. Nothing if not there."""
    try:
        status = os.lstat(path)
        names = os.listdir(path) if stat.S_ISDIR(status.st_mode) else []
    except FileNotFoundError:
        return
    yield status
    for name in names:
        yield from stats_below(os.path.join(path, name))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# Everything printable but the percent sign, which is the escape, and the slash; other characters stay as they are.
_SAFE_IN_NAMES = "".join(chr(code) for code in range(33, 127) if chr(code) not in "%/")
# File systems allow 255 bytes, of which suffixes and numbers need some.
_LONGEST_NAME = 200


def safe_name(identifier: str) -> str:
    """The id where it can be a name; else with `/`, `%`, a leading dot and control characters as `%2F` and so on.

    `urllib.parse.unquote` gives the id back, unless it was longer than 200 bytes: then it is cut, and ends in `~` and a
    digest of the whole. An empty id is `unnamed`.
    """
    if not identifier:
        return "unnamed"
    name = "".join(c if ord(c) > 127 and c.isprintable() else quote(c, safe=_SAFE_IN_NAMES) for c in identifier)
    if name.startswith("."):
        name = "%2E" + name[1:]
    return shortened(name, _LONGEST_NAME, identifier)


def shortened(text: str, longest: int, identifier: str | None = None) -> str:
    """The text if it has no more than `longest` bytes; else as much of it as there is room for, `~` and a digest.

    The digest is of `identifier`, or of the text itself.
    """
    encoded = text.encode("utf-8")
    if len(encoded) <= longest:
        return text
    digest = hashlib.blake2b((text if identifier is None else identifier).encode(), digest_size=8).hexdigest()
    return f"{encoded[: longest - 17].decode('utf-8', 'ignore')}~{digest}"


def open_to_others(path: Path) -> None:
    """Gives a new file or folder of this user the mode that any new one has under the umask.

    In a folder with the set-group-ID bit, which a group shares, the group may do with it what it may do with the
    folder: else the first user's umask would lock out the others.
    """
    everything = 0o777 if path.is_dir() else 0o666
    above = path.parent.stat().st_mode
    shared = above & stat.S_IRWXG if above & stat.S_ISGID else 0
    os.chmod(path, everything & (~_umask() | shared) | (path.stat().st_mode & stat.S_ISGID))


def _umask() -> int:
    # There is no call that only reads the mask. Linux shows it in /proc, which is safe with threads.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
