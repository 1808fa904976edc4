"""Find a checkpoint on this machine or download it, saying every place that was looked at."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import OFFICIAL_MODELS, is_path
from esmflow.files import LEFT_OVER_SECONDS, atomic_path, read_json, remove_left_overs

log = logging.getLogger(__name__)

_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"
_REGRESSION_URL = "https://dl.fbaipublicfiles.com/fair-esm/regression/{name}-contact-regression.pt"
# HF_ENDPOINT, as Hugging Face's own library reads it, names a mirror.
_HUB_URL = "{endpoint}/{owner}/{name}/resolve/main/{file}"
_PICKLE = b"\x80\x02"
# Seconds that a server may say nothing.
_SILENCE = 60


@dataclass(frozen=True)
class Place:
    """One place where a checkpoint may be: a path, and how a person would name it."""

    path: Path
    what: str


def find_checkpoint(model: str, folder: str | None = None, download: bool = True) -> Path:
    """Resolves an official name or a path to a fair-esm `.pt` file or a Hugging Face folder.

    Looks in `folder`, then in torch hub's cache for fair-esm's models and in esmflow's for the others, then in Hugging
    Face's, then downloads to the second. Raises CheckpointError listing every place looked at and how to put the file
    there by hand.
    """
    if is_path(model):
        path = Path(model).expanduser()
        if not path.exists():
            raise CheckpointError(f"model: {model} does not exist; give a .pt file, a Hugging Face folder or a name")
        return path
    if model not in OFFICIAL_MODELS:
        raise CheckpointError(f"model: {model} is no known name ({', '.join(OFFICIAL_MODELS)}) and not a path")
    places = _places(model, folder)
    for place in places:
        if place.path.exists():
            log.info("using %s from %s: %s", model, place.what, place.path)
            return place.path
    reason = "downloading is switched off"
    if download:
        try:
            return _download(model)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
    looked = "\n".join(f"  - {place.what}: {place.path}" for place in places)
    raise CheckpointError(
        f"{model} is not on this machine and could not be downloaded ({reason}). Looked at:\n{looked}\n"
        f"To put it there by hand, {_by_hand(model)} and name that folder as model_folder in the configuration."
    )


def _by_hand(name: str) -> str:
    family = OFFICIAL_MODELS[name].family
    if not family.in_fair_esm:
        files = f"config.json and all .safetensors files of {_hub_url(name, '').removesuffix('/resolve/main/')}"
        return f"fetch {files} on a machine that is online, copy them into a folder {name} within another folder,"
    regression = f" (and {_REGRESSION_URL.format(name=name)} for contacts)" if family.contacts else ""
    return (
        f"fetch {_WEIGHTS_URL.format(name=name)} on a machine that is online{regression}, copy "
        f"{'both' if regression else 'it'} into one folder,"
    )


def _hub_url(name: str, file: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return _HUB_URL.format(endpoint=endpoint, owner=OFFICIAL_MODELS[name].family.owner, name=name, file=file)


def _places(name: str, folder: str | None) -> list[Place]:
    family = OFFICIAL_MODELS[name].family
    hugging_face = Path(os.environ.get("HF_HOME", _user_cache() / "huggingface")).expanduser() / "hub"
    hugging_face = Path(os.environ.get("HF_HUB_CACHE", hugging_face)).expanduser()
    names = [name] if family.in_fair_esm else [name, f"{name}-hf"]
    places = []
    if folder:
        given = Path(folder).expanduser()
        files = [f"{name}.pt", *names] if family.in_fair_esm else names
        places += [Place(given / file, "model_folder") for file in files]
    places.append(Place(_downloaded(name), "torch hub's cache" if family.in_fair_esm else "esmflow's cache"))
    for each in names:
        snapshots = hugging_face / f"models--{family.owner}--{each}" / "snapshots"
        newest_first = sorted(snapshots.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
        complete = [p for p in newest_first if any(p.glob("*.safetensors")) or any(p.glob("*.bin"))]
        places += [Place(path, "Hugging Face's cache") for path in complete or [snapshots / "*"]]
    return places


def _downloaded(name: str) -> Path:
    """Where a download goes."""
    if not OFFICIAL_MODELS[name].family.in_fair_esm:
        return _user_cache() / "esmflow" / "models" / name
    # As torch.hub.get_dir does, without importing torch.
    home = Path(os.environ.get("TORCH_HOME", _user_cache() / "torch")).expanduser()
    return home / "hub" / "checkpoints" / f"{name}.pt"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()


def _download(name: str) -> Path:
    """Downloads a model; it is there whole or not at all."""
    target, family = _downloaded(name), OFFICIAL_MODELS[name].family
    if not family.in_fair_esm:
        _download_folder(name, target)
        return target
    if family.contacts:
        regression = target.with_name(f"{name}-contact-regression.pt")
        _fetch(_REGRESSION_URL.format(name=name), regression)
    _fetch(_WEIGHTS_URL.format(name=name), target)
    return target


def _download_folder(name: str, target: Path) -> None:
    """Downloads a Hugging Face folder, which has its name when all is there. What an earlier attempt left is kept."""
    partial = target.with_name(f".{name}.partial")
    _fetch(_hub_url(name, "config.json"), partial / "config.json")
    weights = ["model.safetensors"]
    index = partial / "model.safetensors.index.json"
    try:
        _fetch(_hub_url(name, index.name), index)
        weights = sorted(set(read_json(index)["weight_map"].values()))
    except urllib.error.HTTPError as error:
        # Small models are one file, without an index.
        if error.code != HTTPStatus.NOT_FOUND:
            raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise OSError(f"what came from {_hub_url(name, index.name)} is no index of weight files") from error
    for file in weights:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise OSError(f"{_hub_url(name, index.name)} names {file!r}, which is no such file beside it")
        if not (partial / file).exists():
            _fetch(_hub_url(name, file), partial / file)
    try:
        partial.rename(target)
    except OSError:
        # Another process may have been at the same.
        if not target.exists():
            raise


def _fetch(url: str, path: Path) -> None:
    """Downloads one file, which appears whole or not at all. Raises OSError when what came is not whole."""
    log.info("downloading %s to %s", url, path)
    remove_left_overs([path], LEFT_OVER_SECONDS)
    with atomic_path(path) as temporary:
        with urllib.request.urlopen(url, timeout=_SILENCE) as answer, open(temporary, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            length = int(answer.headers.get("Content-Length", file.tell()))
            if file.tell() != length:
                raise OSError(f"{url} broke off: {file.tell():,} of {length:,} bytes came")
        if damage := _DAMAGE[path.suffix](temporary):
            raise OSError(f"what came from {url} {damage}")


def _damage_of_json(path: Path) -> str:
    try:
        return "" if isinstance(read_json(path), dict) else "is no configuration"
    except ValueError:
        return "is no configuration"


def _damage_of_safetensors(path: Path) -> str:
    """No checksum is in them; but their head says how long they are."""
    try:
        with open(path, "rb") as file:
            head = 8 + int.from_bytes(file.read(8), "little")
            ends = [entry.get("data_offsets", (0, 0))[1] for entry in json.loads(file.read(head - 8)).values()]
    except (ValueError, AttributeError, OverflowError, MemoryError):
        return "is no checkpoint"
    return "" if head + max(ends) == path.stat().st_size else "is not whole"


def _damage_of_pickle(path: Path) -> str:
    """No digests of these files are published, but a zip archive, as torch saves it, has a checksum of each tensor."""
    if not zipfile.is_zipfile(path):
        # Older versions of torch saved a row of pickles, which has no checksums.
        with open(path, "rb") as file:
            return "" if file.read(len(_PICKLE)) == _PICKLE else "is no checkpoint"
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    return f"is damaged: the checksum of its {damaged} is not right" if damaged else ""


_DAMAGE = {".pt": _damage_of_pickle, ".json": _damage_of_json, ".safetensors": _damage_of_safetensors}
"""What is wrong with a file that was downloaded, in words, if anything is."""
