"""Convert an ESM-2 checkpoint of any origin, fair-esm's `.pt` or a Hugging Face folder, to one `.safetensors` file.

This is the only place that unpickles, and it takes nothing from a pickle but tensors and an argparse.Namespace.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from esmflow.checkpoint.adapter import WITH_PEFT, adapter_file, merge_adapter
from esmflow.checkpoint.file import AS_STORED, CheckpointError, CheckpointInfo, raw_bytes, write_checkpoint
from esmflow.checkpoint.hugging_face import fair_esm_tensors, read_config
from esmflow.checkpoint.models import ModelDimensions
from esmflow.files import file_sha256

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_FAIR_ESM_PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")


def convert_checkpoint(source: Path, target: Path, name: str, base: Path | None = None) -> CheckpointInfo:
    """Converts a fair-esm `.pt` file or a Hugging Face folder to one `.safetensors` file, atomically.

    base: what to merge the adapter in `source` into, where that is the folder of one.

    The source is memory-mapped where its format allows and written tensor by tensor: memory stays far below twice its
    size. Raises CheckpointError for a file that is truncated, of another model family, or incomplete.
    """
    model = base or source
    files = _weight_files(model)
    tensors, frequencies = _read_hugging_face(model, files) if model.is_dir() else (_read_fair_esm(model), "")
    _check_tensors(tensors, model)
    if base:
        files.append(adapter_file(source))
        adapter = _tensors_in(files[-1])
        _check_tensors(adapter, source)
        merge_adapter(tensors, adapter, source)
    dimensions = _dimensions(tensors, source)
    info = write_checkpoint(
        target,
        tensors,
        name=name,
        dimensions=dimensions,
        source=source.name,
        source_sha256=_digest_of_files(files),
        base=base.stem if base else "",
        frequencies=frequencies or AS_STORED,
    )
    log.info("%s: %d layers of width %d, %d heads", source, dimensions.layers, dimensions.hidden, dimensions.heads)
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


def _read_fair_esm(path: Path) -> dict[str, torch.Tensor]:
    loaded = _unpickle_tensors(path)
    if not isinstance(loaded.get("model"), dict) or "cfg" not in loaded:
        raise CheckpointError(
            f"{path}: not an ESM-2 checkpoint of fair-esm (no 'cfg' and 'model' inside); "
            "give an esm2_….pt file or a Hugging Face folder"
        )
    tensors = {_FAIR_ESM_PREFIX.sub("", key): value for key, value in loaded["model"].items()}
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.exists():
        head = _unpickle_tensors(regression).get("model")
        if not isinstance(head, dict):
            raise CheckpointError(
                f"{regression}: not fair-esm's contact regression (no 'model' inside); fetch it again"
            )
        tensors.update(head)
    else:
        log.warning("%s is not beside the checkpoint: contacts cannot be computed", regression.name)
    return {key: value for key, value in tensors.items() if not key.endswith("version")}


def _read_hugging_face(folder: Path, files: list[Path]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a folder under fair-esm's names, and where their rotary frequencies are from."""
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


def _check_tensors(tensors: dict[str, Any], source: Path) -> None:
    """Raises CheckpointError for what is no dense tensor, before anything looks at its shape."""
    import torch

    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{source}: {key} is a {type(value).__name__} and no tensor: the file is damaged")
        if value.layout is not torch.strided:
            raise CheckpointError(f"{source}: {key} is a sparse tensor, which no ESM-2 has: it is another model")


def _dimensions(tensors: dict[str, torch.Tensor], source: Path) -> ModelDimensions:
    """Reads the dimensions and checks that no tensor is missing or misshapen; ties the LM head to the embedding."""
    embedding = tensors.get("embed_tokens.weight")
    frequencies = tensors.get("layers.0.self_attn.rot_emb.inv_freq")
    if embedding is None or frequencies is None or embedding.shape[0] != 33:
        raise CheckpointError(f"{source}: not an ESM-2 model (no 33-token embedding with rotary positions)")
    if embedding.ndim != 2 or frequencies.ndim != 1 or not frequencies.shape[0]:
        raise CheckpointError(f"{source}: its token embedding or its rotary frequencies are empty or misshapen")
    hidden = embedding.shape[1]
    numbers = {int(match.group(1)) for key in tensors if (match := re.match(r"layers\.(\d+)\.", key))}
    layers = len(numbers)
    # Before anything is done for each of them: one wrong number may say three million.
    if max(numbers) != layers - 1:
        raise CheckpointError(f"{source}: has a layer {max(numbers)}, and {layers} layers in all: it is incomplete")
    heads = hidden // (2 * frequencies.shape[0])
    expected = {
        "embed_tokens.weight": (33, hidden),
        **_weight_and_bias("emb_layer_norm_after", hidden),
    }
    for n in range(layers):
        layer, attention = f"layers.{n}", f"layers.{n}.self_attn"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= _weight_and_bias(f"{attention}.{projection}", hidden, hidden)
        expected[f"{attention}.rot_emb.inv_freq"] = tuple(frequencies.shape)
        expected |= _weight_and_bias(f"{attention}_layer_norm", hidden)
        expected |= _weight_and_bias(f"{layer}.final_layer_norm", hidden)
        expected |= _weight_and_bias(f"{layer}.fc1", 4 * hidden, hidden)
        expected |= _weight_and_bias(f"{layer}.fc2", hidden, 4 * hidden)
    decoder = tensors.pop("lm_head.weight", None)
    has_lm_head = any(key.startswith("lm_head.") for key in tensors)
    has_contact_head = any(key.startswith("contact_head.") for key in tensors)
    if has_lm_head:
        expected |= _weight_and_bias("lm_head.dense", hidden, hidden) | _weight_and_bias("lm_head.layer_norm", hidden)
        expected["lm_head.bias"] = (33,)
    if has_contact_head:
        expected |= _weight_and_bias("contact_head.regression", 1, layers * heads)
    for key, shape in expected.items():
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != shape:
            raise CheckpointError(f"{source}: {key} should have shape {shape} and has {found}: the file is incomplete")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(f"{source}: holds {unexpected[0]}, which no ESM-2 has: it is another model")
    if decoder is not None and not _same(decoder, embedding):
        raise CheckpointError(f"{source}: its LM head is not tied to the token embedding, as every ESM-2's is")
    return ModelDimensions(layers, hidden, heads, has_lm_head, has_contact_head)


def _weight_and_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    # By their bytes: NaN is not equal to itself.
    return a.dtype == b.dtype and raw_bytes(a) == raw_bytes(b)
