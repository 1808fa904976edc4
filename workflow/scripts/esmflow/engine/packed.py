"""The packed engine: a model over packs, in the precision asked for, with copies and work on the device overlapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from esmflow.arrays import ATTENTION, LOG_LIKELIHOOD, MASKED_LOGITS, Array, Outputs
from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.checkpoint.models import ModelDimensions, check_heads
from esmflow.engine import eight_bit
from esmflow.engine.attention import AttentionWithMaps, Contacts, KeptMaps, rotate_of
from esmflow.engine.engine import resolve_precision
from esmflow.engine.memory import release_memory
from esmflow.engine.packing import Pack, fill_packs, full_size, pack_sequences
from esmflow.engine.transformer import Encoder, fastest_operations, logits, plain_operations
from esmflow.engine.weights import load_weights

_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TILE_ROWS = 128
"""Rows of one matrix product tile: a multiple of this many tokens for each multiprocessor leaves none idle."""
_TOKENS_WITH_MAPS = 2048
"""Of a pack whose attention maps are kept: with 256 residues in a sequence they are 42 MB in each layer of 20 heads."""
SHARE_OF_FREE_MEMORY = 0.6
"""Of a GPU's free memory, what `batch_tokens: auto` lets a pack take."""


@dataclass(frozen=True)
class Launched:
    """One pack's results on their way to the host. done: reached when they are there; None when they already are."""

    arrays: dict[str, torch.Tensor]
    done: torch.cuda.Event | None


@dataclass
class PackedEngine:
    """A model without padding. See `engine.Engine`, and `load`."""

    model: Encoder
    outputs: Outputs
    precision: str
    device: torch.device
    checkpoint: str | os.PathLike[str]

    def __post_init__(self) -> None:
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._quantum = quantum_of(self.device)
        self._rotate = rotate_of(read_checkpoint_info(self.checkpoint).dimensions.family)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        outputs: Outputs,
        precision: str = "auto",
        device: str = "cuda",
        *,
        fast_kernels: bool = True,
    ) -> PackedEngine:
        """Loads a converted checkpoint straight to `device`.

        precision: `auto` is bf16 on GPUs of compute capability 8.0 and above, fp32 elsewhere.
        fast_kernels: whether to use this project's own GPU kernels where they run.
        Raises ValueError when the checkpoint has no head for the contacts or logits that the outputs need, and
        CheckpointError when the file is not a whole converted checkpoint.
        """
        target = torch.device(device)
        resolved = resolve_precision(precision, target)
        # Beside products of 8 bits, the most exact 16 bits that the device is fast in.
        dtype = _DTYPE[resolved] if resolved != "int8" else eight_bit.beside(target)
        _sum_in_fp32()
        dimensions = read_checkpoint_info(checkpoint).dimensions
        check_heads(outputs.include, dimensions)
        read = partial(load_weights, checkpoint, dimensions, dtype, target)
        with ThreadPoolExecutor(1) as loader:
            # The file is read while the kernels are compiled.
            weights = loader.submit(read)
            if fast_kernels:
                operations = fastest_operations(target, dtype, dimensions)
            else:
                operations = plain_operations(target, dtype, dimensions.family)
            model = Encoder(weights.result(), operations, read)
        if resolved == "int8":
            model = eight_bit.rounded(model, dimensions.family)
        return cls(model, outputs, resolved, target, checkpoint)

    def default_token_budget(self) -> int:
        """Tokens for one pack that fit the device's free memory and fill it. See `auto_token_budget`."""
        dimensions = read_checkpoint_info(self.checkpoint).dimensions
        budget = auto_token_budget(dimensions, self.precision, str(self.device), len(self.outputs.layers))
        return min(budget, _TOKENS_WITH_MAPS) if ATTENTION in self.outputs.include else budget

    def batches(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """Groups sequences into packs of at most `token_budget` tokens, longest first. See `engine.Engine`."""
        return fill_packs(lengths, full_size(token_budget, self._quantum))

    def prepare(self, sequences: Sequence[str]) -> Pack:
        """Lays one batch of residue strings end to end, in page-locked memory when it goes to a GPU.

        Raises ValueError for a character outside the alphabet, and for more residues than there are positions for.
        """
        longest = self.model.longest
        if longest is not None and (most := max(map(len, sequences), default=0)) > longest:
            raise ValueError(f"{most} residues: this model has positions for {longest}")
        pack = pack_sequences(sequences, self._quantum)
        return pack.pinned() if self.device.type == "cuda" else pack

    @torch.inference_mode()
    def launch(self, prepared: Pack) -> Launched:
        """Queues the copy to the device, the forward pass and the copy back; on a GPU it returns at once.

        Raises torch.OutOfMemoryError when the pack does not fit.
        """
        return self._copy_to_host(self._compute(prepared.to(self.device)))

    def fetch(self, launched: Launched) -> dict[str, np.ndarray]:
        """Waits for one pack. See `engine.Engine`; `contacts` is every `[n, n]` map, flattened, end to end."""
        if launched.done is None:
            return {name: array.numpy() for name, array in launched.arrays.items()}
        launched.done.synchronize()
        # Copied out of page-locked memory, which is scarce and used again for the next packs.
        return {name: array.numpy().copy() for name, array in launched.arrays.items()}

    def with_outputs(self, outputs: Outputs) -> PackedEngine:
        """The same weights, computing something else."""
        return replace(self, outputs=outputs)

    @contextmanager
    def at_full_precision(self) -> Iterator[PackedEngine]:
        """The same checkpoint in fp32. Weights of 16 bits make room for it and are read again when next needed.

        A device need not hold both, and the token budget was fitted without the weights in fp32.
        """
        if self.precision == "fp32":
            yield self
            return
        self.model.unload()
        release_memory()
        exact = PackedEngine.load(self.checkpoint, self.outputs, "fp32", str(self.device))
        try:
            yield exact
        finally:
            exact.model.unload()
            release_memory()

    def _compute(self, pack: Pack) -> dict[str, torch.Tensor]:
        """Everything asked for, on the device."""
        weights, include = self.model.weights, self.outputs.include
        # What is asked for is there: `check_heads` has seen to it.
        head, regression = weights.lm_head, weights.regression
        contacts = Contacts(*regression) if regression and "contacts" in include else None
        last = len(weights.layers)
        layers = self.outputs.layers
        maps = KeptMaps(layers) if ATTENTION in include else None
        attend = self.model.operations.attend
        if readers := [each.read for each in (contacts, maps) if each]:
            attend = AttentionWithMaps(self._rotate, readers)
        computed = tuple(sorted({*layers, last})) if contacts or self.outputs.needs_logits else layers
        arrays: dict[str, torch.Tensor] = {}
        representation = torch.empty(0)
        for layer, representation in zip(computed, self.model.representations(pack, attend, computed), strict=True):
            if layer in layers:
                for array in self.outputs.of_layer(layer):
                    if maps and array.kind == ATTENTION:
                        arrays[array.name] = maps.of_layer(layer)
                    else:
                        arrays[array.name] = self._pool(array, representation, pack)
        if contacts is not None:
            arrays["contacts"] = contacts.contacts()
        if head and MASKED_LOGITS in include:
            arrays[MASKED_LOGITS] = logits(representation[pack.masks], head)
        elif head and self.outputs.needs_logits:
            arrays |= _made_of_logits(logits(representation[pack.residue_rows], head), pack)
        return {name: arrays[name] for name in self.outputs.names()}

    def _pool(self, array: Array, representation: torch.Tensor, pack: Pack) -> torch.Tensor:
        if array.kind == "bos":
            return representation[pack.runs[:-1:3]]
        if array.kind == "mean":
            return mean_over_residues(representation, pack)
        if array.kind == "max":
            return torch.segment_reduce(representation, "max", offsets=pack.runs, axis=0, unsafe=True)[1::3]
        if array.kind == "std":
            return _std_over_residues(representation, pack)
        rows = representation[pack.residue_rows]
        return rows.half() if self.outputs.per_residue == "fp16" else rows

    def _copy_to_host(self, arrays: dict[str, torch.Tensor]) -> Launched:
        if self._copies is None:
            return Launched(arrays, None)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            on_host = {}
            for name, array in arrays.items():
                on_host[name] = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
                on_host[name].copy_(array, non_blocking=True)
                # Its memory may be used again only after this copy.
                array.record_stream(self._copies)
            done = torch.cuda.Event()
            done.record()
        return Launched(on_host, done)


def _sum_in_fp32() -> None:
    """Keeps matrix products from adding up in 16 bits what they split over a GPU, as PyTorch lets them by default.

    It is products of few rows that are split: a sequence should not give less in a small pack than in a large one.
    `benchmarks/profile_engine.py --sums` measures what that costs.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def mean_over_residues(representation: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Mean of `[T, D]` over each sequence's residues, neither cls nor eos, accumulated in fp32: `[B, D]`."""
    sums = torch.segment_reduce(representation, "sum", offsets=pack.runs, axis=0, unsafe=True)[1::3]
    return sums / _residues(pack)[:, None]


def _std_over_residues(representation: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Of `[T, D]` the root of the mean squared distance of each sequence's residues from their mean: `[B, D]`."""
    rows, residues = representation[pack.residue_rows], _residues(pack)
    # In two passes: the difference of two mean squares would lose most digits where the mean is large.
    mean = mean_over_residues(representation, pack).repeat_interleave(residues, 0, output_size=len(rows))
    return torch.segment_reduce((rows - mean).square(), "mean", lengths=residues, axis=0, unsafe=True).sqrt()


def _made_of_logits(logits: torch.Tensor, pack: Pack) -> dict[str, torch.Tensor]:
    """All that `arrays.OF_HEAD` names and `LOG_LIKELIHOOD`, of the residues' logits `[R, 33]`; natural logarithms."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, pack.tokens[pack.residue_rows][:, None].long())[:, 0]
    mean = torch.segment_reduce(own, "mean", lengths=_residues(pack), axis=0, unsafe=True)
    return {
        "logits": logits,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        LOG_LIKELIHOOD: own,
        "pseudo_perplexity": (-mean).exp(),
    }


def _residues(pack: Pack) -> torch.Tensor:
    """Residues of each sequence, `[B]`."""
    return pack.runs[2::3] - pack.runs[1::3]


def quantum_of(device: torch.device) -> int:
    """The token count that gives each multiprocessor of the device whole rows of tiles; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return _TILE_ROWS * torch.cuda.get_device_properties(device).multi_processor_count


def auto_token_budget(dimensions: ModelDimensions, precision: str, device: str, layers: int = 1) -> int:
    """The token budget for `batch_tokens: auto`, from the device's free memory and the model's dimensions.

    Small models want large packs, since each kernel must outlast its launch; beyond some 33 thousand tokens large
    models gain nothing. layers: how many representations are asked for. Call it after the weights are loaded.
    """
    target = torch.device(device)
    quantum = quantum_of(target)
    if target.type != "cuda":
        return 4096
    free, _ = torch.cuda.mem_get_info(target)
    fits = int(SHARE_OF_FREE_MEMORY * free) // bytes_per_token(dimensions, precision, layers)
    return full_size(max(min(fits, wanted_tokens(dimensions, quantum)), 1024), quantum)


def bytes_per_token(dimensions: ModelDimensions, precision: str, layers: int = 1) -> int:
    """What one token of a pack takes on the device, with `layers` representations asked for."""
    bytes_per_value = 4 if precision == "fp32" else 2
    # The stream, its norm, q k v, attention's result and fc1's; then fp32 representations and what is made of them.
    values = 8 * dimensions.hidden + dimensions.activations
    return values * bytes_per_value + 12 * layers * dimensions.hidden + 4 * dimensions.heads


def wanted_tokens(dimensions: ModelDimensions, quantum: int) -> int:
    """Tokens of a pack beyond which a device of this `quantum` gains nothing, see `quantum_of`."""
    return quantum * max(2, min(16, 5120 // dimensions.hidden))
