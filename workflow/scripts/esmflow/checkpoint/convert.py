"""Convert a checkpoint of any origin, a `.pt` or `.pth` file or a Hugging Face folder, to one `.safetensors` file.

This is the only place that unpickles, and it takes nothing from a pickle but tensors and an argparse.Namespace.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from esmflow.checkpoint.adapter import WITH_PEFT, adapter_file, merge_adapter
from esmflow.checkpoint.esm_c import esm_c_tensors, is_esm_c
from esmflow.checkpoint.families import ESM1B, ESM1V, ESM2
from esmflow.checkpoint.file import NO_FREQUENCIES, CheckpointError, CheckpointInfo, write_checkpoint
from esmflow.checkpoint.hugging_face import fair_esm_tensors, read_config
from esmflow.checkpoint.shapes import Stored, check_tensors, read_dimensions
from esmflow.files import file_sha256

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_MASK = 32
_FAIR_ESM_PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")


def convert_checkpoint(source: Path, target: Path, name: str, base: Path | None = None) -> CheckpointInfo:
    """Converts a fair-esm `.pt` file, a `.pth` of ESM C or a Hugging Face folder to one `.safetensors`, atomically.

    base: what to merge the adapter in `source` into, where that is the folder of one.

    The source is memory-mapped where its format allows and written tensor by tensor: memory stays far below twice its
    size. Raises CheckpointError for a file that is truncated, of another model family, or incomplete.
    """
    model = base or source
    weights = _weight_files(model)
    adapters = [adapter_file(source)] if base else []
    with ThreadPoolExecutor(1) as beside:
        # Hashing takes seconds, as do importing torch and writing, and keeps no other thread from working.
        source_digest = beside.submit(_digest_of_files, [*weights, *adapters])
        stored = _read_hugging_face(model, weights) if model.is_dir() else _read_file(model)
        check_tensors(stored.tensors, model)
        for file in adapters:
            adapter = _tensors_in(file)
            check_tensors(adapter, source)
            merge_adapter(stored, adapter, source)
        dimensions = read_dimensions(stored, source)
        info = write_checkpoint(
            target,
            stored.tensors,
            name=name,
            dimensions=dimensions,
            source=source.name,
            source_sha256=source_digest,
            base=base.stem if base else "",
            frequencies=stored.frequencies,
        )
    family = dimensions.family.name
    shape = dimensions.layers, dimensions.hidden, dimensions.heads
    converted = f"{source}, merged into {base}" if base else source
    log.info("%s: %s, %d layers of width %d, %d heads", converted, family, *shape)
    return info


def _digest_of_files(files: list[Path]) -> str:
    """SHA-256 of one file; of the files' digests if there are several."""
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _weight_files(source: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that an index file lists."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such checkpoint")
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: neither a file nor a folder; give a .pt file or a Hugging Face folder")
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (source / single).exists():
            return [source / single]
        if (source / index).exists():
            names = _shards_listed_in(source / index)
            missing = [n for n in names if not (source / n).exists()]
            if missing:
                raise CheckpointError(f"{source}: {index} names {', '.join(missing)}, which is not there; fetch it")
            return [source / n for n in names]
    if (source / "adapter_config.json").exists():
        raise CheckpointError(
            f"{source}: holds an adapter and no model, and cannot be the base of another; {WITH_PEFT}"
        )
    raise CheckpointError(
        f"{source}: a Hugging Face folder holds model.safetensors or pytorch_model.bin; this one has neither"
    )


def _shards_listed_in(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name that is no text")
        return sorted(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weight files ({error!r}); fetch it again") from error


def _unpickle_tensors(path: Path) -> dict:
    """`torch.load` restricted to tensors and the argparse.Namespace that fair-esm's files hold."""
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Only the zip format can be mapped; the older one is read into memory.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Which kind cannot be foreseen: on bytes that are no pickle, the unpickler raises KeyError, IndexError, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable PyTorch file, truncated or of another kind ({reason}); fetch it again"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, not a model's weights; "
            "give an esm2_….pt file or a Hugging Face folder"
        )
    return loaded


def _read_file(path: Path) -> Stored:
    loaded = _unpickle_tensors(path)
    if is_esm_c(map(str, loaded)):
        return esm_c_tensors({str(key): value for key, value in loaded.items()}, {}, path)
    if not isinstance(loaded.get("model"), dict) or not {"cfg", "args"} & loaded.keys():
        raise CheckpointError(
            f"{path}: not a checkpoint of fair-esm (no 'cfg' or 'args' and 'model' inside), nor of ESM C; "
            "give an esm2_….pt, esm1b_….pt or esm1v_….pt file, or a Hugging Face folder"
        )
    tensors = {_FAIR_ESM_PREFIX.sub("", key): value for key, value in loaded["model"].items()}
    family = ESM2 if "cfg" in loaded else ESM1B if "emb_layer_norm_before.weight" in tensors else ESM1V
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.exists():
        head = _unpickle_tensors(regression).get("model")
        if not isinstance(head, dict):
            raise CheckpointError(
                f"{regression}: not fair-esm's contact regression (no 'model' inside); fetch it again"
            )
        tensors.update(head)
    elif family.contacts:
        log.warning("%s is not beside the checkpoint: contacts cannot be computed", regression.name)
    tensors = {key: value for key, value in tensors.items() if not key.endswith("version")}
    if family is ESM2:
        return Stored(tensors, family)
    check_tensors(tensors, path)
    for name in {"embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        # As fair-esm does when it loads one.
        tensors[name] = tensors[name].clone()
        if tensors[name].ndim:
            tensors[name][_MASK:][:1] = 0
    return Stored(tensors, family, _heads(loaded["args"], path), NO_FREQUENCIES)


def _heads(arguments: Any, path: Path) -> int:
    """Attention heads, from the arguments that a model was trained with, which its tensors do not tell."""
    said = {key.removeprefix("encoder_"): value for key, value in getattr(arguments, "__dict__", {}).items()}
    if said.get("arch") != "roberta_large" or not said.get("token_dropout"):
        raise CheckpointError(
            f"{path}: has arch {said.get('arch')!r} and token_dropout {said.get('token_dropout')!r}, where ESM-1b and "
            "ESM-1v have 'roberta_large' and True: it is another model"
        )
    if not isinstance(heads := said.get("attention_heads"), int):
        raise CheckpointError(f"{path}: does not say how many attention heads it has; fetch it again")
    return heads


def _read_hugging_face(folder: Path, files: list[Path]) -> Stored:
    config = read_config(folder)
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored.update(_tensors_in(file))
    return fair_esm_tensors(stored, config, folder)


def _tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file of a Hugging Face folder, by the names that it has for them."""
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        return _unpickle_tensors(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); fetch it again") from error
