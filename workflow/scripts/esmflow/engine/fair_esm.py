"""fair-esm's own modules of ESM-2, ESM-1b and ESM-1v, filled from a converted checkpoint; and the reference engine,
which runs them on padded batches as fair-esm's extract script does.

It is what every other engine and every run's certificate is held against. Under autocast on a GPU one thing is
corrected: fair-esm computes its rotary tables inside the autocast region, where PyTorch runs `einsum` in low precision.
In bf16 the 1024 positions then share 513 angles, and pooled vectors of long proteins fall to a cosine of 0.7 against
fp32. Here the tables are fp32.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import esm
import numpy as np
import torch
import torch.nn.functional as F
from esm.rotary_embedding import RotaryEmbedding
from safetensors import safe_open

from esmflow.arrays import ATTENTION, LOG_LIKELIHOOD, MASKED_LOGITS, Array, Outputs
from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.checkpoint.models import ModelDimensions
from esmflow.engine.engine import resolve_precision
from esmflow.inputs.residues import MASK, MASKED

TOKS_PER_BATCH = 2048
TOKS_PER_BATCH_LOW_PRECISION = 3072
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SPECIAL_TOKENS = 2


@dataclass
class ReferenceEngine:
    """fair-esm's module under `torch.no_grad`, with autocast where the precision asks for it. See `engine.Engine`."""

    model: Any
    outputs: Outputs
    precision: str
    device: torch.device

    @classmethod
    def load(cls, checkpoint: str, outputs: Outputs, precision: str, device: str) -> ReferenceEngine:
        """Loads a converted checkpoint into fair-esm's module, in fp32, on `device`."""
        target = torch.device(device)
        resolved = resolve_precision(precision, target)
        model = load_fair_esm(checkpoint, target)
        if isinstance(model, esm.ESM2):
            for layer in model.layers:
                _keep_rotary_tables_in_fp32(layer.self_attn.rot_emb)
        return cls(model, outputs, resolved, target)

    def default_token_budget(self) -> int:
        """fair-esm's padded tokens per batch: 2048 in fp32, 3072 in lower precision."""
        return TOKS_PER_BATCH if self.precision == "fp32" else TOKS_PER_BATCH_LOW_PRECISION

    def batches(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """fair-esm's batches: see `padded_batches`."""
        return padded_batches(lengths, token_budget)

    def prepare(self, sequences: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """Tokens `[B, longest + 2]`, padded, and the residue counts."""
        return padded_tokens(self.model, sequences), [len(sequence) for sequence in sequences]

    @torch.no_grad()
    def launch(self, prepared: tuple[torch.Tensor, list[int]]) -> tuple[dict[str, Any], list[int], torch.Tensor]:
        """fair-esm's own results for the padded batch, on the device, the residue counts, and the tokens."""
        tokens, lengths = prepared
        with _autocast(self.device, self.precision):
            result = self.model(
                tokens.to(self.device),
                repr_layers=self.outputs.layers,
                need_head_weights=ATTENTION in self.outputs.include,
                return_contacts="contacts" in self.outputs.include,
            )
        return result, lengths, tokens

    @torch.no_grad()
    def fetch(self, launched: tuple[dict[str, Any], list[int], torch.Tensor]) -> dict[str, np.ndarray]:
        """Pools over residues only (neither cls nor eos) and copies to the host, in fp32."""
        result, lengths, tokens = launched
        arrays: dict[str, torch.Tensor] = {}
        for layer in self.outputs.layers:
            values = result["representations"][layer].float()
            residues = [values[i, 1 : length + 1] for i, length in enumerate(lengths)]
            if "mean" in self.outputs.include:
                arrays[Array("mean", layer).name] = torch.stack([rows.mean(0) for rows in residues])
            if "bos" in self.outputs.include:
                arrays[Array("bos", layer).name] = values[:, 0]
            if "max" in self.outputs.include:
                arrays[Array("max", layer).name] = torch.stack([rows.amax(0) for rows in residues])
            if "std" in self.outputs.include:
                arrays[Array("std", layer).name] = torch.stack([rows.std(0, correction=0) for rows in residues])
            if "per_residue" in self.outputs.include:
                rows = torch.cat(residues)
                arrays[Array("per_residue", layer).name] = rows.half() if self.outputs.per_residue == "fp16" else rows
            if layer and ATTENTION in self.outputs.include:
                maps = [result["attentions"][i, layer - 1, :, : n + 2, : n + 2] for i, n in enumerate(lengths)]
                arrays[Array(ATTENTION, layer).name] = torch.cat(
                    [each.float().permute(1, 2, 0).flatten(0, 1) for each in maps]
                )
        if "contacts" in self.outputs.include:
            arrays["contacts"] = torch.cat(
                [result["contacts"][i, :n, :n].float().flatten() for i, n in enumerate(lengths)]
            )
        if self.outputs.needs_logits:
            logits = [result["logits"][i, 1 : n + 1].float() for i, n in enumerate(lengths)]
            own = [
                -F.cross_entropy(rows, tokens[i, 1 : len(rows) + 1].to(rows.device), reduction="none")
                for i, rows in enumerate(logits)
            ]
            arrays["logits"] = torch.cat(logits)
            arrays[MASKED_LOGITS] = result["logits"][tokens == MASK].float()
            arrays["entropy"] = torch.distributions.Categorical(logits=arrays["logits"]).entropy()
            arrays[LOG_LIKELIHOOD] = torch.cat(own)
            arrays["pseudo_perplexity"] = torch.stack([(-values.mean()).exp() for values in own])
        return {name: arrays[name].cpu().numpy() for name in self.outputs.names()}

    def with_outputs(self, outputs: Outputs) -> ReferenceEngine:
        """The same module, computing something else."""
        return replace(self, outputs=outputs)

    @contextmanager
    def at_full_precision(self) -> Iterator[ReferenceEngine]:
        """The same module, whose weights are fp32, without autocast."""
        yield replace(self, precision="fp32")


_SMALL_BYTES = 200_000_000


def layer_bytes(dimensions: ModelDimensions) -> int:
    """Bytes of the weights of all layers in fp32."""
    return 4 * dimensions.layer_parameters * dimensions.layers


def fair_esm_module(dimensions: ModelDimensions) -> torch.nn.Module:
    """fair-esm's module of these dimensions, with its random start."""
    if dimensions.positions is None:
        return esm.ESM2(dimensions.layers, dimensions.hidden, dimensions.heads)
    arguments = Namespace(
        arch="roberta_large",
        layers=dimensions.layers,
        embed_dim=dimensions.hidden,
        ffn_embed_dim=dimensions.feed_forward,
        attention_heads=dimensions.heads,
        max_positions=dimensions.positions,
        emb_layer_norm_before=dimensions.family.norm_before,
        token_dropout=True,
    )
    model = esm.ProteinBertModel(arguments, esm.Alphabet.from_architecture("ESM-1b"))
    # As fair-esm's ESM2 has it.
    model.alphabet = esm.Alphabet.from_architecture("ESM-1b")
    return model


def load_fair_esm(
    checkpoint: str,
    device: torch.device,
    resident_bytes: int | None = None,
    module: Callable[[ModelDimensions], torch.nn.Module] = fair_esm_module,
) -> Any:
    """A module with the weights of a converted checkpoint, in fp32, on `device`, in evaluation mode.

    module: builds it; its parts are called as the checkpoint's tensors are. A head that the checkpoint does not hold is
    replaced with the identity: there are never made-up weights. Layers that take more than `resident_bytes` together in
    fp32 are each read when they compute and forgotten after it. Raises RuntimeError if the checkpoint lacks a tensor.
    """
    dimensions = read_checkpoint_info(checkpoint).dimensions
    # Built without memory, then given the checkpoint's tensors: fair-esm's random start would cost seconds. Of a small
    # model it takes less than the second in which torch imports what it needs for tensors without memory.
    with torch.device("cpu" if layer_bytes(dimensions) < _SMALL_BYTES else "meta"):
        model: Any = module(dimensions)
    file = safe_open(checkpoint, framework="pt")
    names = list(file.keys())

    def fill(module: torch.nn.Module, prefix: str, **tied: torch.Tensor) -> None:
        state = {n.removeprefix(prefix): file.get_tensor(n).to(device).float() for n in names if n.startswith(prefix)}
        module.load_state_dict({**state, **tied}, strict=True, assign=True)

    for part in ("embed_tokens", "embed_positions", "emb_layer_norm_before", "emb_layer_norm_after"):
        if isinstance(getattr(model, part, None), torch.nn.Module):
            fill(getattr(model, part), f"{part}.")
    if dimensions.has_lm_head:
        # The token embedding is stored once, where it is the decoder too.
        tied = {"weight": model.embed_tokens.weight} if dimensions.family.tied_head else {}
        fill(model.lm_head, "lm_head.", **tied)
    else:
        model.lm_head = torch.nn.Identity()
    if dimensions.has_contact_head:
        fill(model.contact_head, "contact_head.")
    else:
        model.contact_head = torch.nn.Identity()
    resident = resident_bytes is None or layer_bytes(dimensions) <= resident_bytes
    for number, layer in enumerate(model.layers):
        prefix = f"layers.{number}."
        if resident:
            fill(layer, prefix)
        else:
            layer.register_forward_pre_hook(lambda layer, _, prefix=prefix: fill(layer, prefix))
            layer.register_forward_hook(_forget)
    return model.eval()


def _forget(layer: torch.nn.Module, arguments: Any, output: Any) -> None:
    layer.to("meta")


def padded_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """fair-esm's batches: indices of sequences in order of length, padded tokens within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # In ascending order the newest sequence is the longest: it decides the padded size.
        if not batches or (lengths[index] + _SPECIAL_TOKENS) * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def padded_tokens(model: Any, sequences: Sequence[str]) -> torch.Tensor:
    """fair-esm's tokens of residue strings, `[B, longest + 2]`. Raises KeyError for a letter that it does not know."""
    texts = [("", sequence.replace(MASKED, "<mask>")) for sequence in sequences]
    _, _, tokens = model.alphabet.get_batch_converter()(texts)
    return tokens


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _keep_rotary_tables_in_fp32(rotary: RotaryEmbedding) -> None:
    compute_tables = rotary._update_cos_sin_tables

    def in_fp32(x: torch.Tensor, seq_dimension: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return compute_tables(x, seq_dimension)

    rotary._update_cos_sin_tables = in_fp32  # type: ignore[method-assign]
