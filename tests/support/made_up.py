"""Made-up inputs: FASTA files, proteins, and checkpoints with random weights in every format that people have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import esm
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from esmflow.arrays import VOCABULARY_SIZE
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.fetch import ModelSettings, fetch_model
from esmflow.checkpoint.file import read_checkpoint_info, write_checkpoint
from esmflow.inputs.fasta import read_records
from esmflow.inputs.residues import sequence_digest
from esmflow.method import Fingerprint
from esmflow.store.lookup import StoredSequences
from esmflow.store.segments import Segment, Store

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
RARE_RESIDUES = "XBUZO"

# Names in transformers, written out by hand: the library's own table is what they test.
_HUGGING_FACE_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.rot_emb": "attention.self.rotary_embeddings",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_HUGGING_FACE_REST = {
    "embed_tokens.weight": "esm.embeddings.word_embeddings.weight",
    "emb_layer_norm_after.weight": "esm.encoder.emb_layer_norm_after.weight",
    "emb_layer_norm_after.bias": "esm.encoder.emb_layer_norm_after.bias",
    "contact_head.regression.weight": "esm.contact_head.regression.weight",
    "contact_head.regression.bias": "esm.contact_head.regression.bias",
    "lm_head.weight": "lm_head.decoder.weight",
}


def write_fasta(path: Path, records: Iterable[tuple[str, str]]) -> Path:
    """Writes (title, sequence) pairs, one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">{title}\n{sequence}\n" for title, sequence in records), encoding="utf-8")
    return path


def proteins(count: int, shortest: int, longest: int, seed: int = 0, letters: str = RESIDUES) -> list[str]:
    """Random residues, lengths between the two (both included)."""
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest + 1, count)
    return ["".join(random.choice(list(letters), length)) for length in lengths]


def with_digests(sequences: Iterable[str]) -> list[tuple[bytes, str]]:
    """Sequences as `extract_esm_features` takes them."""
    return [(sequence_digest(sequence), sequence) for sequence in sequences]


def stored_sequences(folder: Path, segments: dict[str, list[str]]) -> StoredSequences:
    """What a store holds that has these sequences, by the names of their segments."""
    store = Store(folder, Fingerprint("c", (1,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject"))
    store.create()
    for name, sequences in segments.items():
        digests = np.array([list(sequence_digest(s)) for s in sequences], np.uint8).reshape(-1, 16)
        store.write(name, Segment(digests, np.array([len(s) for s in sequences], np.int64), {}, "fp32"))
    return StoredSequences(store)


def sample_proteins(data: Path) -> Iterator[str]:
    """The residues of the UniProt sample's records."""
    for record in read_records(data / "uniprot_sample_500.fasta.gz"):
        assert record.reason is None
        yield record.sequence


def random_model(layers: int = 2, hidden: int = 32, heads: int = 2, seed: int = 0) -> esm.ESM2:
    """fair-esm's module with random weights, no bias and no norm left at its neutral start.

    Its rotary frequencies are rounded to fp16, as those of the published checkpoints are.
    """
    torch.manual_seed(seed)
    model = esm.ESM2(layers, hidden, heads).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.layers:
            frequencies = layer.self_attn.rot_emb.inv_freq
            frequencies.copy_(frequencies.half().float())
    return model


def stored_tensors(model: esm.ESM2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The module's tensors under fair-esm's names, in the precision they are to be stored in."""
    return {name: tensor.detach().clone().to(dtype) for name, tensor in model.state_dict().items()}


def write_fair_esm(path: Path, tensors: dict[str, torch.Tensor], contact_regression: bool = True) -> Path:
    """A `.pt` as fair-esm publishes them: prefixed names, a Namespace inside, the contact regression beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in tensors.items():
        if not name.startswith("contact_head."):
            prefix = "encoder." if name.startswith("lm_head.") else "encoder.sentence_encoder."
            weights[prefix + name] = tensor
    cfg = {"model": argparse.Namespace(arch="roberta_large", token_dropout=True, layers=0)}
    torch.save({"cfg": cfg, "model": weights}, path)
    if contact_regression:
        regression = {name: tensor for name, tensor in tensors.items() if name.startswith("contact_head.")}
        torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def write_hugging_face(
    folder: Path, tensors: dict[str, torch.Tensor], kind: str = "safetensors", shards: int = 1
) -> Path:
    """A folder as transformers saves it; `kind` is `safetensors` or `bin`; more than one shard with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {_hugging_face_name(name): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    # What such folders hold besides, and no ESM-2 needs.
    renamed["esm.embeddings.position_ids"] = torch.arange(8)[None]
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = sorted(renamed)
    files = {}
    for shard in range(shards):
        name = f"{stem}{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        content = {key: renamed[key] for key in names[shard::shards]}
        files |= dict.fromkeys(content, name)
        if kind == "safetensors":
            save_file(content, folder / name, {"format": "pt"})
        else:
            torch.save(content, folder / name)
    if shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    layers = sum(name.endswith("fc1.weight") for name in tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "esm", "num_hidden_layers": layers}))
    return folder


def _hugging_face_name(name: str) -> str:
    if name in _HUGGING_FACE_REST:
        return _HUGGING_FACE_REST[name]
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        module, _, parameter = rest.rpartition(".")
        return f"esm.encoder.layer.{number}.{_HUGGING_FACE_LAYER[module]}.{parameter}"
    return name


def write_converted(path: Path, model: esm.ESM2) -> Path:
    """A converted checkpoint with the module's weights."""
    source = write_fair_esm(path.with_suffix(".pt"), stored_tensors(model))
    convert_checkpoint(source, path, "made up")
    return path


def with_made_up_head(checkpoint: Path, path: Path) -> Path:
    """A converted checkpoint of an encoder with a language model head of random weights added to it.

    Whoever publishes a fine-tuned encoder leaves the head out, and this has the arithmetic of one.
    """
    info = read_checkpoint_info(checkpoint)
    hidden, random = info.dimensions.hidden, torch.Generator().manual_seed(7)
    shapes = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,), "bias": (VOCABULARY_SIZE,)}
    shapes |= {"layer_norm.weight": (hidden,), "layer_norm.bias": (hidden,)}
    head = {name: 0.05 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    head["layer_norm.weight"] += 0.2
    tensors = load_file(checkpoint) | {f"lm_head.{name}": tensor for name, tensor in head.items()}
    write_checkpoint(path, tensors, name=info.name, dimensions=replace(info.dimensions, has_lm_head=True))
    return path


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of whole arrays, in the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def fetch(model: Path, folder: Path) -> Path:
    """Does what a run's rule `model` does, with its results in `folder`. Returns the converted checkpoint."""
    checkpoint = folder / "checkpoint.safetensors"
    fetch_model(
        ModelSettings(
            model=str(model),
            base=None,
            folder=None,
            download=False,
            checkpoint=str(checkpoint),
            info=str(folder / "model.json"),
        )
    )
    return checkpoint
