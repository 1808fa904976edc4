"""Find a checkpoint on this machine or download it, saying every place that was looked at."""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import OFFICIAL_MODELS, is_path
from esmflow.files import LEFT_OVER_SECONDS, atomic_path, remove_left_overs

log = logging.getLogger(__name__)

_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"
_REGRESSION_URL = "https://dl.fbaipublicfiles.com/fair-esm/regression/{name}-contact-regression.pt"
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

    Looks in `folder`, then torch hub's cache, then Hugging Face's cache, then downloads fair-esm's file into torch
    hub's cache. Raises CheckpointError listing every place looked at and how to put the file there by hand.
    """
    if is_path(model):
        path = Path(model).expanduser()
        if not path.exists():
            raise CheckpointError(f"model: {model} does not exist; give a .pt file, a Hugging Face folder or a name")
        return path
    if model not in OFFICIAL_MODELS:
        raise CheckpointError(f"model: {model} is not an ESM-2 name ({', '.join(OFFICIAL_MODELS)}) and not a path")
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
        f"To put it there by hand, fetch {_WEIGHTS_URL.format(name=model)} on a machine that is online"
        f" (and {_REGRESSION_URL.format(name=model)} for contacts), copy both into one folder, "
        "and name that folder as model_folder in the configuration."
    )


def _places(name: str, folder: str | None) -> list[Place]:
    hub = _torch_hub_checkpoints()
    hugging_face = Path(os.environ.get("HF_HOME", _user_cache() / "huggingface")).expanduser() / "hub"
    hugging_face = Path(os.environ.get("HF_HUB_CACHE", hugging_face)).expanduser()
    snapshots = hugging_face / f"models--facebook--{name}" / "snapshots"
    places = []
    if folder:
        given = Path(folder).expanduser()
        places += [Place(given / f"{name}.pt", "model_folder"), Place(given / name, "model_folder")]
    places.append(Place(hub / f"{name}.pt", "torch hub's cache"))
    newest_first = sorted(snapshots.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
    complete = [p for p in newest_first if any(p.glob("*.safetensors")) or any(p.glob("*.bin"))]
    places += [Place(path, "Hugging Face's cache") for path in complete or [snapshots / "*"]]
    return places


def _torch_hub_checkpoints() -> Path:
    # As torch.hub.get_dir does, without importing torch.
    home = Path(os.environ.get("TORCH_HOME", _user_cache() / "torch")).expanduser()
    return home / "hub" / "checkpoints"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()


def _download(name: str) -> Path:
    """Downloads fair-esm's two files into torch hub's cache; each appears whole or not at all."""
    target = _torch_hub_checkpoints() / f"{name}.pt"
    for url, path in (
        (_REGRESSION_URL.format(name=name), target.with_name(f"{name}-contact-regression.pt")),
        (_WEIGHTS_URL.format(name=name), target),
    ):
        log.info("downloading %s to %s", url, path)
        remove_left_overs([path], LEFT_OVER_SECONDS)
        with atomic_path(path) as temporary:
            with urllib.request.urlopen(url, timeout=_SILENCE) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                length = int(answer.headers.get("Content-Length", file.tell()))
                if file.tell() != length:
                    raise OSError(f"{url} broke off: {file.tell():,} of {length:,} bytes came")
            if damage := _damage(temporary):
                raise OSError(f"what came from {url} {damage}")
    return target


def _damage(path: Path) -> str:
    """What is wrong with a file that was downloaded, in words, if anything is.

    No digests of these files are published, but a zip archive, as torch saves it, has a checksum of each tensor.
    """
    if not zipfile.is_zipfile(path):
        # Older versions of torch saved a row of pickles, which has no checksums.
        with open(path, "rb") as file:
            return "" if file.read(len(_PICKLE)) == _PICKLE else "is no checkpoint"
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    return f"is damaged: the checksum of its {damaged} is not right" if damaged else ""
