"""What the packed engine is measured beside: fair-esm under autocast, transformers with SDPA, one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import esm
import numpy as np
import torch
from synthetic import SIZES

from esmflow.checkpoint.families import ESMC
from esmflow.checkpoint.models import ModelDimensions
from esmflow.engine.fair_esm import load_fair_esm
from esmflow.engine.packing import pack_sequences


def synchronise(device: str) -> None:
    """Waits until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def residues_per_second(
    embed: Callable[[Sequence[str]], object], sequences: Sequence[str], device: str, warm_up: float = 0.05
) -> float:
    """Speed of `embed` over `sequences`, strings in and vectors on the host out.

    warm_up: the share of the sequences that goes through before the clock starts. Code with padded batches meets a new
    shape in every batch, and what a shape costs the first time is no part of its speed: give it 1.
    """
    embed(sequences[: max(1, int(len(sequences) * warm_up))])
    synchronise(device)
    start = time.perf_counter()
    embed(sequences)
    synchronise(device)
    return sum(map(len, sequences)) / (time.perf_counter() - start)


def fair_esm(
    checkpoint: Path, device: str, *, autocast: bool, tokens_per_batch: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """fair-esm's own batches and module, under bf16 autocast or in fp32, with its extract script's order of work."""
    model = load_fair_esm(str(checkpoint), torch.device(device))
    tokenise = model.alphabet.get_batch_converter()
    last = model.num_layers

    @torch.no_grad()
    def embed(sequences: Sequence[str]) -> np.ndarray:
        dataset = esm.FastaBatchedDataset([str(i) for i in range(len(sequences))], list(sequences))
        batches = dataset.get_batch_indices(tokens_per_batch, extra_toks_per_seq=1)
        means = np.empty((len(sequences), model.embed_dim), np.float32)
        for labels, strings, tokens in torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=tokenise):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                result = model(tokens.to(device), repr_layers=[last])
            # Both cross to the host whole and are pooled there, as in the extract script.
            result["logits"].cpu()
            representation = result["representations"][last].cpu()
            for row, (label, string) in enumerate(zip(labels, strings, strict=True)):
                means[int(label)] = representation[row, 1 : len(string) + 1].float().mean(0)
        return means

    return embed


def transformers_sdpa(size: str, device: str) -> Callable[[int], Callable[[Sequence[str]], np.ndarray]]:
    """transformers' own model with SDPA in bf16: by padded-token budget, a function that embeds length-sorted batches.

    Raises ImportError where transformers is not installed.
    """
    with torch.device(device):
        model = _of_transformers(SIZES[size]).to(torch.bfloat16).eval()
    assert model.config._attn_implementation == "sdpa"

    def with_budget(budget: int) -> Callable[[Sequence[str]], np.ndarray]:
        @torch.inference_mode()
        def embed(sequences: Sequence[str]) -> np.ndarray:
            means = []
            for batch in _padded_batches([len(s) for s in sequences], budget):
                tokens, mask, pooled = _padded([sequences[i] for i in batch], device)
                hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                means.append((hidden.float() * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True))
            return torch.cat(means).cpu().numpy()

        return embed

    return with_budget


def _of_transformers(dimensions: ModelDimensions) -> torch.nn.Module:
    import transformers

    if dimensions.family is ESMC:
        settings = transformers.EsmcConfig(
            hidden_size=dimensions.hidden,
            intermediate_size=dimensions.feed_forward,
            num_hidden_layers=dimensions.layers,
            num_attention_heads=dimensions.heads,
        )
        return transformers.EsmcModel(settings)
    settings = transformers.EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=dimensions.hidden,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        intermediate_size=4 * dimensions.hidden,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        attn_implementation="sdpa",
    )
    return transformers.EsmModel(settings, add_pooling_layer=False)


def _padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        # The first of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + 2) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(sequences: Sequence[str], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and residue mask, each `[B, longest + 2]`."""
    pack = pack_sequences(sequences)
    tokens = torch.ones(len(sequences), pack.longest, dtype=torch.long)
    inside = torch.arange(pack.longest) < torch.tensor(pack.lengths)[:, None]
    tokens[inside] = pack.tokens.long()
    residues = inside & (tokens != 0) & (tokens != 2)
    return tokens.to(device), inside.long().to(device), residues.float().to(device)


def fc1_flops_per_second(size: str, device: str, tokens: int, repetitions: int = 50) -> float:
    """Rate of fc1's matrix product alone, in bf16, at a pack's token count."""
    dimensions = SIZES[size]
    width, columns = dimensions.hidden, (2 if dimensions.family.gate else 1) * dimensions.feed_forward
    x = torch.randn(tokens, width, device=device).bfloat16()
    weight = torch.randn(columns, width, device=device).bfloat16() * width**-0.5
    for _ in range(10):
        x @ weight.t()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        x @ weight.t()
    synchronise(device)
    return repetitions * 2 * tokens * width * columns / (time.perf_counter() - start)
