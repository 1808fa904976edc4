"""ESM C once more, as plainly as PyTorch allows: padded, layer by layer, with nothing of the engine's.

The certificate of an ESM C run is computed with it. Its modules have the names of a converted checkpoint's tensors, and
it answers as fair-esm's modules do. From the description of transformers' `EsmcModel`, which tests hold it against.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import esm
import torch
import torch.nn.functional as F
from torch import nn

from esmflow.checkpoint.models import ModelDimensions


class _Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(torch.zeros(head_dim // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[B, H, T, hd]`."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * angles.sin()


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False)
        self.rot_emb = _Rotary(hidden // heads)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: `[B, T, D]`; padding: `[B, T]`, whether a token is none. Gives the result and the maps, `[B, H, T, T]`."""
        values = self.v_proj(x), self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        v, q, k = (value.unflatten(2, (self.heads, -1)).transpose(1, 2) for value in values)
        scores = self.rot_emb(q) @ self.rot_emb(k).transpose(2, 3) / math.sqrt(q.shape[-1])
        shares = scores.masked_fill(padding[:, None, None], -math.inf).softmax(dim=-1)
        return self.out_proj((shares @ v).transpose(1, 2).flatten(2)), shares


class _Layer(nn.Module):
    def __init__(self, dimensions: ModelDimensions) -> None:
        super().__init__()
        hidden, width = dimensions.hidden, dimensions.feed_forward
        self.self_attn = _Attention(hidden, dimensions.heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.gate, self.fc1 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.fc2 = nn.Linear(width, hidden, bias=False)
        self.divisor = math.sqrt(dimensions.layers / 36)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attended, maps = self.self_attn(self.self_attn_layer_norm(x), padding)
        x = x + attended / self.divisor
        normed = self.final_layer_norm(x)
        return x + self.fc2(F.silu(self.gate(normed)) * self.fc1(normed)) / self.divisor, maps


class _Head(nn.Module):
    def __init__(self, hidden: int, rows: int) -> None:
        super().__init__()
        self.dense, self.layer_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.weight, self.bias = nn.Parameter(torch.zeros(rows, hidden)), nn.Parameter(torch.zeros(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layer_norm(F.gelu(self.dense(x))), self.weight, self.bias)


class PlainEsmC(nn.Module):
    """ESM C with padding. `forward` and `alphabet` are as those of fair-esm's modules."""

    def __init__(self, dimensions: ModelDimensions) -> None:
        super().__init__()
        # The tokens of residues, cls, eos and padding are those of ESM-1b and ESM-2.
        self.alphabet = esm.Alphabet.from_architecture("ESM-1b")
        rows = dimensions.family.embedding_rows
        self.embed_tokens = nn.Embedding(rows, dimensions.hidden)
        self.layers = nn.ModuleList(_Layer(dimensions) for _ in range(dimensions.layers))
        self.emb_layer_norm_after = nn.LayerNorm(dimensions.hidden, bias=False)
        self.lm_head: nn.Module = _Head(dimensions.hidden, rows)
        self.contact_head: nn.Module = nn.Identity()

    def forward(
        self, tokens: torch.Tensor, repr_layers: Collection[int] = (), need_head_weights: bool = False
    ) -> dict[str, Any]:
        """tokens: `[B, T]`. Gives `logits` `[B, T, 33]`, and `representations` `[B, T, D]` by layer; `attentions`
        `[B, L, H, T, T]` if they are asked for."""
        padding = tokens == self.alphabet.padding_idx
        x, found, kept = self.embed_tokens(tokens), {}, []
        for number, layer in enumerate(self.layers):
            if number in repr_layers:
                found[number] = x
            x, maps = layer(x, padding)
            if need_head_weights:
                kept.append(maps)
        x = self.emb_layer_norm_after(x)
        if len(self.layers) in repr_layers:
            found[len(self.layers)] = x
        result: dict[str, Any] = {"logits": self.lm_head(x)[..., : len(self.alphabet)], "representations": found}
        return result | ({"attentions": torch.stack(kept, 1)} if need_head_weights else {})
