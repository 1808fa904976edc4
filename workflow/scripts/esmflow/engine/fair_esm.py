"""The reference engine: fair-esm's own ESM-2 module on padded batches, as its extract script runs it.

It is what every other engine is held against. Under autocast on a GPU one thing is corrected: fair-esm computes its
rotary tables inside the autocast region, where PyTorch runs `einsum` in low precision. In bf16 the 1024 positions then
share 513 angles, and pooled vectors of long proteins fall to a cosine of 0.7 against fp32. Here the tables are fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import esm
import numpy as np
import torch
from esm.rotary_embedding import RotaryEmbedding

from esmflow.arrays import Array, Outputs
from esmflow.checkpoint.file import load_tensors, read_checkpoint_info
from esmflow.engine.engine import resolve_precision

METHOD = "reference"
TOKS_PER_BATCH = 2048
TOKS_PER_BATCH_LOW_PRECISION = 3072
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SPECIAL_TOKENS = 2


class ReferenceEngine:
    """fair-esm's `ESM2` under `torch.no_grad`, with autocast where the precision asks for it. See `engine.Engine`."""

    def __init__(self, model: esm.ESM2, outputs: Outputs, precision: str, device: torch.device) -> None:
        self.model = model
        self.outputs = outputs
        self.precision = precision
        self.device = device
        self._tokenise = model.alphabet.get_batch_converter()

    @classmethod
    def load(cls, checkpoint: str, outputs: Outputs, precision: str, device: str) -> ReferenceEngine:
        """Loads a converted checkpoint into fair-esm's module, in fp32, on `device`."""
        target = torch.device(device)
        resolved = resolve_precision(precision, target, "bf16")
        return cls(load_fair_esm(checkpoint, target), outputs, resolved, target)

    def default_token_budget(self) -> int:
        """fair-esm's padded tokens per batch: 2048 in fp32, 3072 in lower precision."""
        return TOKS_PER_BATCH if self.precision == "fp32" else TOKS_PER_BATCH_LOW_PRECISION

    def batches(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """fair-esm's batches: sequences in order of length, padded tokens within the budget."""
        batches: list[list[int]] = []
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            # In ascending order the newest sequence is the longest: it decides the padded size.
            if batch and (lengths[index] + _SPECIAL_TOKENS) * (len(batch) + 1) > token_budget:
                batches.append(batch)
                batch = []
            batch.append(index)
        if batch:
            batches.append(batch)
        return batches

    def prepare(self, sequences: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """Tokens `[B, longest + 2]`, padded, and the residue counts."""
        _, _, tokens = self._tokenise([("", sequence) for sequence in sequences])
        return tokens, [len(sequence) for sequence in sequences]

    @torch.no_grad()
    def launch(self, prepared: tuple[torch.Tensor, list[int]]) -> tuple[dict[str, Any], list[int]]:
        """fair-esm's own results for the padded batch, on the device, and the residue counts."""
        tokens, lengths = prepared
        with _autocast(self.device, self.precision):
            result = self.model(
                tokens.to(self.device),
                repr_layers=self.outputs.layers,
                return_contacts="contacts" in self.outputs.include,
            )
        return result, lengths

    @torch.no_grad()
    def fetch(self, launched: tuple[dict[str, Any], list[int]]) -> dict[str, np.ndarray]:
        """Pools over residues only (neither cls nor eos) and copies to the host, in fp32."""
        result, lengths = launched
        arrays: dict[str, torch.Tensor] = {}
        for layer in self.outputs.layers:
            values = result["representations"][layer].float()
            residues = [values[i, 1 : length + 1] for i, length in enumerate(lengths)]
            if "mean" in self.outputs.include:
                arrays[Array("mean", layer).name] = torch.stack([rows.mean(0) for rows in residues])
            if "bos" in self.outputs.include:
                arrays[Array("bos", layer).name] = values[:, 0]
            if "per_residue" in self.outputs.include:
                rows = torch.cat(residues)
                arrays[Array("per_residue", layer).name] = rows.half() if self.outputs.per_residue == "fp16" else rows
        if "contacts" in self.outputs.include:
            arrays["contacts"] = torch.cat(
                [result["contacts"][i, :n, :n].float().flatten() for i, n in enumerate(lengths)]
            )
        if "logits" in self.outputs.include:
            arrays["logits"] = torch.cat([result["logits"][i, 1 : n + 1].float() for i, n in enumerate(lengths)])
        return {name: arrays[name].cpu().numpy() for name in self.outputs.names()}

    def with_outputs(self, outputs: Outputs) -> ReferenceEngine:
        """The same module, computing something else."""
        return ReferenceEngine(self.model, outputs, self.precision, self.device)

    def at_full_precision(self) -> ReferenceEngine:
        """The same module without autocast."""
        return ReferenceEngine(self.model, self.outputs, "fp32", self.device)


def load_fair_esm(checkpoint: str, device: torch.device) -> esm.ESM2:
    """fair-esm's `ESM2` module with the weights of a converted checkpoint, in fp32, on `device`, in evaluation mode.

    A head that the checkpoint does not hold is replaced with the identity: there are never made-up weights.
    """
    dimensions = read_checkpoint_info(checkpoint).dimensions
    # Built without memory, then given the checkpoint's tensors: fair-esm's random start would cost seconds.
    with torch.device("meta"):
        model = esm.ESM2(dimensions.layers, dimensions.hidden, dimensions.heads)
    if not dimensions.has_lm_head:
        model.lm_head = torch.nn.Identity()
    if not dimensions.has_contact_head:
        model.contact_head = torch.nn.Identity()
    state = {key: value.float() for key, value in load_tensors(checkpoint, str(device)).items()}
    if dimensions.has_lm_head:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    for layer in model.layers:
        _keep_rotary_tables_in_fp32(layer.self_attn.rot_emb)
    return model.eval()


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _keep_rotary_tables_in_fp32(rotary: RotaryEmbedding) -> None:
    compute_tables = rotary._update_cos_sin_tables

    def in_fp32(x: torch.Tensor, seq_dimension: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return compute_tables(x, seq_dimension)

    rotary._update_cos_sin_tables = in_fp32  # type: ignore[method-assign]
