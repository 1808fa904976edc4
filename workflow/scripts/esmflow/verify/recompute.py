"""Compute sequences again with fair-esm's own module in fp32, and hold stored embeddings against the result.

fair-esm tokenises and its module computes, filled by `engine.fair_esm`. ESM C, which it does not have, is computed by
`verify.esm_c`. The pooling is the certificate's own, written out here a second time, so that no engine's mistake is
repeated. Beside what is right it works out what well-known mistakes would give (the mean with eos in it, the layer next
door), so that a mistake too small for a threshold is still recognised: the stored vector is nearer to it than to what
is right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from esmflow.arrays import ATTENTION, Array, Outputs
from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.checkpoint.models import ModelDimensions
from esmflow.engine.fair_esm import fair_esm_module, layer_bytes, load_fair_esm, padded_batches, padded_tokens
from esmflow.engine.memory import release_memory, unless_out_of_memory
from esmflow.method import LongSequences
from esmflow.verify import CONTACT_MAP_BYTES, RESIDENT_BYTES, TOKENS_BY_LAYER
from esmflow.verify.esm_c import PlainEsmC

log = logging.getLogger(__name__)

# Of sequences of about one length, padded. On a CPU the tokens of long ones together cost more than batches save.
_BATCH_TOKENS = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Expected:
    """What one output of one sequence should be, and what it would be after each well-known mistake, by its name.

    Arrays are as segments hold them: pooled `[D]`, per residue `[n, D]`, logits `[n, 33]`, contacts `[n · n]`.
    negligible: a norm up to which there is nothing to compare.
    """

    right: np.ndarray
    mistakes: Mapping[str, np.ndarray]
    negligible: float = 0.0


class Recomputation:
    """fair-esm's module with a converted checkpoint's weights in fp32 on one device, or what stands in for it."""

    def __init__(self, checkpoint: str, device: str, resident_bytes: int = RESIDENT_BYTES) -> None:
        """Reads the weights: at once, or layer by layer as needed if they take more than `resident_bytes` in fp32."""
        self.device = torch.device(device)
        self.dimensions = read_checkpoint_info(checkpoint).dimensions
        # Never rounded to TF32, whatever the environment says.
        torch.set_float32_matmul_precision("highest")
        module = fair_esm_module if self.dimensions.family.in_fair_esm else PlainEsmC
        model = unless_out_of_memory(lambda: load_fair_esm(checkpoint, self.device, resident_bytes, module))
        if isinstance(model, str):
            release_memory()
            log.warning("no memory for the model's weights in fp32 (%s): they are read layer by layer", model)
            model = load_fair_esm(checkpoint, self.device, 0, module)
            resident_bytes = 0
        self.model = model
        by_layer = layer_bytes(self.dimensions) > resident_bytes
        self._batch_tokens = TOKENS_BY_LAYER if by_layer else _BATCH_TOKENS[self.device.type]

    def expect(
        self, sequences: Sequence[str], outputs: Outputs, long: LongSequences
    ) -> Iterator[tuple[int, dict[str, Expected] | None]]:
        """Computes sequences. Yields, in some order, the number of each and its arrays by name.

        A sequence that does not fit into memory, of the device or of the host, gives None; `contacts` are missing where
        their maps do not fit.
        """
        pieces = {
            number: [(start, sequence[start:end]) for start, end in long.pieces(len(sequence))]
            for number, sequence in enumerate(sequences)
        }
        whole = [number for number, cuts in pieces.items() if len(cuts) == 1]
        for batch in padded_batches([len(pieces[n][0][1]) for n in whole], self._batch_tokens):
            yield from self._expect_batch([(whole[i], pieces[whole[i]][0][1]) for i in batch], outputs)
        for number, cuts in pieces.items():
            if len(cuts) > 1:
                windows = unless_out_of_memory(partial(self._expect_windows, cuts, outputs))
                if isinstance(windows, str):
                    _leave_out(cuts[-1][1])
                    yield number, None
                else:
                    yield number, windows

    def _expect_batch(
        self, batch: list[tuple[int, str]], outputs: Outputs
    ) -> Iterator[tuple[int, dict[str, Expected] | None]]:
        found = unless_out_of_memory(partial(self._compute_batch, batch, outputs))
        if not isinstance(found, str):
            yield from found.items()
        elif len(batch) == 1:
            _leave_out(batch[0][1])
            yield batch[0][0], None
        else:
            release_memory()
            middle = len(batch) // 2
            yield from self._expect_batch(batch[:middle], outputs)
            yield from self._expect_batch(batch[middle:], outputs)

    def _compute_batch(self, batch: list[tuple[int, str]], outputs: Outputs) -> dict[int, dict[str, Expected]]:
        layers = _with_neighbours(outputs.layers, self.dimensions)
        result = self._run([residues for _, residues in batch], layers)
        found = {}
        for row, (number, residues) in enumerate(batch):
            size = len(residues) + 2
            tokens = {layer: result["representations"][layer][row, :size].cpu().numpy() for layer in layers}
            found[number] = _expected_by_layer(tokens, outputs)
            if outputs.needs_logits:
                logits = result["logits"][row, :size].cpu().numpy()
                found[number] |= _expected_of_logits(logits, self._own_tokens(residues), outputs)
            if ATTENTION in outputs.include and (maps := self._attentions(residues)) is not None:
                found[number] |= _expected_maps(maps, outputs)
            if "contacts" in outputs.include and (contacts := self._contacts(residues)) is not None:
                found[number]["contacts"] = Expected(contacts.ravel(), {})
        return found

    def _expect_windows(self, pieces: list[tuple[int, str]], outputs: Outputs) -> dict[str, Expected]:
        """A residue's vector is the mean over the windows that hold it; see `long_sequences: window`."""
        size = max(start + len(residues) for start, residues in pieces)
        sums = {layer: np.zeros((size, self.dimensions.hidden)) for layer in outputs.layers}
        begins = {layer: np.zeros(self.dimensions.hidden) for layer in outputs.layers}
        times = np.zeros((size, 1))
        scores = np.zeros((2, size))
        for start, residues in pieces:
            result = self._run([residues], outputs.layers)
            times[start : start + len(residues)] += 1
            if outputs.needs_logits:
                log_p = _log_probabilities(result["logits"][0, 1:-1].cpu().numpy())
                own = log_p[np.arange(len(residues)), self._own_tokens(residues)]
                scores[:, start : start + len(residues)] += _entropy(log_p), own
            for layer in outputs.layers:
                tokens = result["representations"][layer][0].cpu().numpy()
                sums[layer][start : start + len(residues)] += tokens[1:-1]
                begins[layer] += tokens[0] / len(pieces)
        expected = {}
        for layer in outputs.layers:
            by_residue = sums[layer] / times
            values = {kind: pool(by_residue) for kind, pool in _POOLS.items()}
            values |= {"bos": begins[layer], "per_residue": by_residue}
            for array in outputs.of_layer(layer):
                expected[array.name] = Expected(values[array.kind], {}, _negligible(array.kind, by_residue))
        entropy, own = scores / times[:, 0]
        of_model = {"entropy": entropy, "pseudo_perplexity": _perplexity(own)}
        asked = [kind for kind in of_model if kind in outputs.include]
        return expected | {kind: Expected(of_model[kind], {}, _negligible(kind, entropy)) for kind in asked}

    def _own_tokens(self, residues: str) -> np.ndarray:
        """The tokens of a sequence without cls and eos, `[n]`."""
        return padded_tokens(self.model, [residues])[0, 1:-1].numpy()

    @torch.no_grad()
    def _run(self, sequences: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
        """fair-esm's own results for a padded batch."""
        return self.model(padded_tokens(self.model, sequences).to(self.device), repr_layers=layers)

    def _contacts(self, residues: str) -> np.ndarray | None:
        return self._from_maps(residues, lambda tokens: self.model.predict_contacts(tokens)[0])

    def _attentions(self, residues: str) -> np.ndarray | None:
        """Of all layers and heads, `[L, H, n + 2, n + 2]`."""
        return self._from_maps(residues, lambda tokens: self.model(tokens, need_head_weights=True)["attentions"][0])

    @torch.no_grad()
    def _from_maps(self, residues: str, compute: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray | None:
        """What is made of all maps of one sequence; None where they do not fit."""
        maps = self.dimensions.layers * self.dimensions.heads
        if 4 * maps * (len(residues) + 2) ** 2 * 3 > CONTACT_MAP_BYTES:
            return None
        tokens = padded_tokens(self.model, [residues]).to(self.device)
        found = unless_out_of_memory(lambda: compute(tokens).cpu().numpy())
        if isinstance(found, str):
            release_memory()
            return None
        return found


def _leave_out(residues: str) -> None:
    release_memory()
    log.warning("%d residues alone do not fit into memory here: their sequence is not computed again", len(residues))


def _with_neighbours(layers: Sequence[int], dimensions: ModelDimensions) -> list[int]:
    near = {layer + step for layer in layers for step in (-1, 0, 1)}
    return sorted(layer for layer in near if 0 <= layer <= dimensions.layers)


def _expected_by_layer(tokens: Mapping[int, np.ndarray], outputs: Outputs) -> dict[str, Expected]:
    """tokens: by layer, the representations `[n + 2, D]` of cls, the residues and eos."""
    expected = {}
    for layer in outputs.layers:
        here = tokens[layer]
        beside = {f"layer {other}": tokens[other] for other in (layer - 1, layer + 1) if other in tokens}
        bos = {"eos": here[-1], **{f"cls of {name}": values[0] for name, values in beside.items()}}
        residues = {**_shifted(here), **{f"the residues of {name}": values[1:-1] for name, values in beside.items()}}
        kinds = {"bos": Expected(here[0], bos), "per_residue": Expected(here[1:-1], residues)}
        for kind, pool in _POOLS.items():
            mistakes = {
                f"the {kind} with eos in it": pool(here[1:]),
                f"the {kind} with cls in it": pool(here[:-1]),
                f"the {kind} with cls and eos in it": pool(here),
                **{f"the {kind} of {name}": pool(values[1:-1]) for name, values in beside.items()},
            }
            kinds[kind] = Expected(pool(here[1:-1]), mistakes, _negligible(kind, here[1:-1]))
        for array in outputs.of_layer(layer):
            if array.kind in kinds:
                expected[array.name] = kinds[array.kind]
    return expected


def _expected_maps(maps: np.ndarray, outputs: Outputs) -> dict[str, Expected]:
    """maps: `[L, H, n + 2, n + 2]`. A segment has a row of all heads for each pair of tokens."""

    def rows(of_layer: np.ndarray) -> np.ndarray:
        return of_layer.transpose(1, 2, 0).reshape(-1, len(of_layer))

    expected = {}
    for layer in filter(None, outputs.layers):
        here = maps[layer - 1]
        near = {other: maps[other - 1] for other in (layer - 1, layer + 1) if 0 < other <= len(maps)}
        mistakes = {f"the maps of layer {other}": rows(values) for other, values in near.items()}
        mistakes["the maps transposed"] = rows(here.transpose(0, 2, 1))
        expected[Array(ATTENTION, layer).name] = Expected(rows(here), mistakes)
    return expected


_POOLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda rows: rows.mean(axis=0, dtype=np.float64),
    "max": lambda rows: rows.max(axis=0),
    "std": lambda rows: rows.std(axis=0, dtype=np.float64),
}


def _negligible(kind: str, rows: np.ndarray) -> float:
    """A norm that is no more than rounding: of deviations where residues are alike, of entropies where all are sure.

    rows: those of the residues, vectors for `std` and entropies for `entropy`.
    """
    if kind == "std":
        return 1e-5 * float(np.linalg.norm(rows)) / len(rows) ** 0.5
    return 1e-3 * len(rows) ** 0.5 if kind == "entropy" else 0.0


def _expected_of_logits(logits: np.ndarray, own: np.ndarray, outputs: Outputs) -> dict[str, Expected]:
    """logits: `[n + 2, 33]` of cls, the residues and eos. own: the residues' tokens, `[n]`."""
    log_p = _log_probabilities(logits)

    def perplexity(rows: np.ndarray) -> np.ndarray:
        return _perplexity(rows[np.arange(len(own)), own])

    shifted = _shifted(log_p)
    entropy = {name: _entropy(rows) for name, rows in shifted.items()} | {
        "the entropy in bits": _entropy(log_p[1:-1]) / np.log(2)
    }
    kinds = {
        "logits": Expected(logits[1:-1], _shifted(logits)),
        "entropy": Expected(_entropy(log_p[1:-1]), entropy, _negligible("entropy", own)),
        "pseudo_perplexity": Expected(perplexity(log_p[1:-1]), {n: perplexity(rows) for n, rows in shifted.items()}),
    }
    return {kind: values for kind, values in kinds.items() if kind in outputs.include}


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _entropy(log_p: np.ndarray) -> np.ndarray:
    return -(np.exp(log_p) * log_p).sum(axis=-1)


def _perplexity(own: np.ndarray) -> np.ndarray:
    """Of the residues' own log-probabilities `[n]`; a number."""
    return np.asarray(np.exp(-own.mean()))


def _shifted(tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"residues shifted to the left": tokens[2:], "residues shifted to the right": tokens[:-2]}
