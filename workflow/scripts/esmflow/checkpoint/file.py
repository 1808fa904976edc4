"""The converted checkpoint: one `.safetensors` file that says what it is. Writing, verifying and opening it.

It holds fair-esm's parameter names without prefixes, every tensor in the precision it was stored in,
`inv_freq` included: the published checkpoints hold rotary frequencies rounded to fp16, and recomputing them would
shift the phase of late positions. A GPU job maps the file and never unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from esmflow.checkpoint.models import FORMAT, ModelDimensions
from esmflow.errors import EsmflowError
from esmflow.files import JsonFile, atomic_path, file_stamp

if TYPE_CHECKING:
    import torch

# Where rotary frequencies are from.
AS_STORED = "as stored, for each layer"
COMPUTED = "computed"
NO_FREQUENCIES = "none: positions are learned"


class CheckpointError(EsmflowError):
    """A checkpoint that cannot be used. The message says which file, what is wrong, and what to do."""

    mendable = False


@dataclass(frozen=True)
class CheckpointInfo(JsonFile):
    """What a converted checkpoint says of itself, and `model.json` of it.

    digest: BLAKE2b of every tensor's name, type, shape and content: the model's part of the fingerprint.
    source: name of the file that was converted; source_sha256: its digest. frequencies: where the rotary frequencies
    are from. base: the model that the adapter in `source` was merged into, if it is one.
    """

    name: str
    digest: str
    source: str
    source_sha256: str
    dimensions: ModelDimensions
    frequencies: str = AS_STORED
    base: str = ""


def write_checkpoint(
    target: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    name: str,
    dimensions: ModelDimensions,
    source: str = "",
    source_sha256: Future[str] | None = None,
    frequencies: str = AS_STORED,
    base: str = "",
) -> CheckpointInfo:
    """Writes tensors, by fair-esm's names, as a converted checkpoint; atomically.

    source_sha256: the digest of `source`, which may still be under way.
    """
    content = {k: (_dtype_name(t), tuple(t.shape), raw_bytes(t)) for k, t in tensors.items()}
    sha256 = "0" * 64 if source_sha256 else ""
    info = CheckpointInfo(name, "0" * 32, source, sha256, dimensions, frequencies, base)
    with ThreadPoolExecutor(1) as beside, atomic_path(target) as temporary:
        # Digests take as long as the writing: until they are there, zeros keep their place in the header.
        digest = beside.submit(_content_digest, content)
        with open(temporary, "wb") as handle:
            handle.write(_safetensors_header(tensors, info))
            # One at a time: safetensors' own writer holds every tensor in memory twice.
            for key in sorted(tensors):
                handle.write(raw_bytes(tensors[key]))
            info = replace(info, digest=digest.result(), source_sha256=source_sha256.result() if source_sha256 else "")
            handle.seek(0)
            handle.write(_safetensors_header(tensors, info))
    return info


def read_checkpoint_info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Reads what a converted checkpoint says of itself, without loading tensors or torch.

    Raises CheckpointError if the file is missing, truncated or was not written by `convert_checkpoint`.
    """
    # Here and not above: a dry run imports this module, where there may be nothing but Snakemake.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; run the workflow's model step again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole .safetensors file ({error}); delete it and run again") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not converted by this version of esmflow; delete it and run again")
    fields = json.loads(metadata["checkpoint"])
    return CheckpointInfo(**{**fields, "dimensions": ModelDimensions(**fields["dimensions"])})


def check_unchanged(path: str | os.PathLike[str], digest: str, stamp: tuple[int, ...] | None) -> None:
    """Raises CheckpointError unless the checkpoint is whole and has the content `digest`.

    A file that was not touched since `stamp` was taken is only looked at from outside; any other, or any without a
    stamp, is read in full.
    """
    info = read_checkpoint_info(path) if file_stamp(path) == stamp else verify_checkpoint(path)
    if info.digest != digest:
        raise CheckpointError(f"{path}: not the checkpoint that this run was planned with; run again")


def verify_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Checks every byte of a converted checkpoint against the digest that it carries.

    Needs no torch, and reads the file once, which brings it into the page cache for whoever loads it next. Raises
    CheckpointError when the file is truncated or a tensor was changed after conversion.
    """
    info = read_checkpoint_info(path)
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        content = memoryview(mapped)
        digest = _content_digest(
            {
                key: (
                    entry["dtype"],
                    tuple(entry["shape"]),
                    content[slice(*(start + o for o in entry["data_offsets"]))],
                )
                for key, entry in header.items()
                if key != "__metadata__"
            }
        )
        content.release()
    if digest != info.digest:
        raise CheckpointError(f"{path}: the weights are not the ones that were converted; delete it and run again")
    return info


def _dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors format's name of a tensor's type."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in names:
        raise CheckpointError(f"a tensor of type {dtype}: an ESM-2 checkpoint holds {', '.join(names)} only")
    return names[dtype]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The content of a tensor on the host."""
    import torch

    # Viewed as bytes, since numpy has no bfloat16.
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _content_digest(tensors: dict[str, tuple[str, tuple[int, ...], memoryview]]) -> str:
    """The digest of all tensors, given by name as type, shape and bytes: of the digests of each, in order of name.

    Hashing lets go of Python's lock, so threads hash several tensors at once.
    """

    def digest(key: str) -> bytes:
        dtype, shape, content = tensors[key]
        hasher = hashlib.blake2b(f"{key} {dtype} {shape}\n".encode(), digest_size=16)
        hasher.update(content)
        content.release()
        return hasher.digest()

    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        return hashlib.blake2b(b"".join(pool.map(digest, sorted(tensors))), digest_size=16).hexdigest()


def _safetensors_header(tensors: Mapping[str, torch.Tensor], info: CheckpointInfo) -> bytes:
    """What the safetensors format begins with: 8 bytes of length (little endian), and what is where as JSON.

    The tensors' bytes follow, in order of name.
    """
    said = asdict(info)
    # What is as in ESM-2 goes without saying, as it did when there was nothing else: the file is the same to the byte.
    said["dimensions"] = {k: v for k, v in said["dimensions"].items() if v != getattr(ModelDimensions, k, None)}
    if not info.base:
        del said["base"]
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, "checkpoint": json.dumps(said)}}
    offset = 0
    for key in sorted(tensors):
        tensor = tensors[key]
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _dtype_name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
